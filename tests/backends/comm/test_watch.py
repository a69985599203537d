"""The watch over messages that come after a run has returned, with a device whose streams the tests move."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from hetu.backends.comm import watch
from hetu.backends.comm.watch import Awaited, Watch

SOON = 10.0
"""Seconds within which something has to happen; mostly it takes a hundredth."""


@dataclass
class Mark:
    """A place in a stream."""

    is_reached: bool = False
    asked: int = 0

    def query(self) -> bool:
        self.asked += 1
        return self.is_reached


class Host:
    """The CPU as a device of several streams."""

    def __init__(self) -> None:
        self.stream = 0
        self.marks: list[Mark] = []

    def enter(self) -> None:
        pass

    def queue(self) -> int:
        return self.stream

    def mark(self) -> Mark:
        self.marks.append(Mark())
        return self.marks[-1]

    def reached(self, mark: Mark) -> None:
        pass

    def fill(self, places: Sequence[tuple[int, int]]) -> None:
        for address, size in places:
            ctypes.memset(address, 255, size)


class Watched:
    """A watch, and what it found lost."""

    def __init__(self, patience: float) -> None:
        self.host, self.is_stopped, self.lost = Host(), False, list[Awaited]()
        self.found = threading.Event()
        self.watch = Watch(self.host, patience, lambda: self.is_stopped, self._lose)

    def _lose(self, item: Awaited) -> None:
        self.watch.fill()
        self.lost.append(item)
        self.found.set()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], Watched]]:
    monkeypatch.setattr(watch, "PERIOD", 0.001)
    monkeypatch.setattr(watch, "SLOW", 0.01)
    made = []

    def make(patience: float) -> Watched:
        made.append(Watched(patience))
        return made[-1]

    yield make
    for one in made:
        one.watch.end()


def test_what_came_is_left_alone_and_what_is_late_is_nan(watched: Callable[[float], Watched]) -> None:
    one = watched(0.2)
    places = [torch.ones(5, dtype=t) for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    came, empty = torch.ones(5), torch.ones(0)
    one.watch.expect([came, empty], "receiving rows from", [0])
    one.watch.expect(places[:3], "receiving rows from", [1])
    one.host.stream = 1
    one.watch.expect(places[3:], "adding up gradients")
    one.host.marks[0].is_reached = True
    assert one.found.wait(SOON)
    assert [(x.doing, x.peers) for x in one.lost] == [("receiving rows from", (1,))]
    assert all(x.isnan().all() for x in places) and came.eq(1).all()


def test_nothing_is_lost_as_long_as_streams_go_on(watched: Callable[[float], Watched]) -> None:
    """Also of messages that are noted while the thread looks, or sleeps."""
    one = watched(60.0)
    places = torch.ones(200, 3)
    for i, place in enumerate(places):
        one.watch.expect([place], "receiving rows from", [0])
        one.host.marks[max(i - 3, 0)].is_reached = True
        time.sleep(0.0005 * (i % 4))
    for mark in one.host.marks:
        mark.is_reached = True
    one.is_stopped = True
    time.sleep(0.05)
    one.watch.fill()
    assert not one.lost and places.eq(1).all()


@pytest.mark.parametrize("reached", [0, 1, 57, 199, 200])
def test_few_marks_are_asked(reached: int) -> None:
    """Each question takes time from whoever computes; a stream comes to its marks in order."""
    host, place = Host(), torch.ones(3)
    watch = Watch(host, 60.0, lambda: False, lambda item: None)
    watch._thread = threading.current_thread()  # no other looks
    for number in range(200):
        watch.expect([place], "receiving rows from", [number])
    for mark in host.marks[:reached]:
        mark.is_reached = True
    oldest = watch._oldest()
    assert (None if oldest is None else oldest.peers) == (None if reached == 200 else (reached,))
    assert sum(mark.asked for mark in host.marks) <= 9


def test_a_rank_that_says_that_it_stopped_is_heard_at_once(watched: Callable[[float], Watched]) -> None:
    one, place = watched(60.0), torch.ones(3)
    one.watch.expect([torch.ones(1)], "receiving rows from", [0])
    one.host.marks[0].is_reached = True
    time.sleep(0.02)  # nothing is awaited; the thread sleeps
    one.watch.expect([place], "receiving rows from", [1])
    one.is_stopped = True
    assert one.found.wait(SOON)
    assert one.lost[0].peers == (1,) and place.isnan().all()


def test_a_host_that_does_not_come_to_wait(watched: Callable[[float], Watched]) -> None:
    """It may hang on its way there, in CUDA, behind the very message."""
    one, came, place = watched(0.2), torch.ones(2), torch.ones(3)
    first = one.watch.started([came], "receiving rows from", (0,))
    one.watch.started([place], "receiving rows from", (1,))
    one.watch.waited(first)
    one.host.marks[0].is_reached = True
    assert one.found.wait(SOON)
    assert one.lost[0].peers == (1,) and place.eq(1).all() and came.eq(1).all()


def test_after_its_end_nothing_is_looked_at(watched: Callable[[float], Watched]) -> None:
    one, place = watched(0.0), torch.ones(3)
    one.watch.end()
    one.watch.expect([place], "receiving rows from", [1])
    assert not one.found.wait(0.05) and place.eq(1).all()
