"""Random runs, right and broken: only hetu's errors come out, failed runs leave no trace, and right ones stay right."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from support.longer import LONGER
from support.random_runs import Program, Request, requests
from support.states import is_same

import hetu
from hetu import rng

PROGRAMS, REQUESTS = 10, 12


def run(program: Program, request: Request) -> Any:
    with ExitStack() as stack:
        request.patches(stack)
        return program.graph.run(**request.arguments)


def as_values(given: Any) -> Any:
    """What a run or a state gave, nested as it was, with a number in place of NaN, which equals nothing."""
    if isinstance(given, dict):
        return {key: as_values(item) for key, item in given.items()}
    if isinstance(given, (list, tuple, hetu.Shards)):
        return [as_values(item) for item in given]
    return torch.nan_to_num(given, nan=0.125) if isinstance(given, torch.Tensor) else given


class Walk:
    """Runs one program, and its twin for right requests only.

    Attributes:
        wrong: What is wrong, a line each.
        counts: How many runs there were, were refused, and escaped, by the type of the error.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.wrong = seed, list[str]()
        self.counts: Counter[str] = Counter()
        hetu.manual_seed(seed)
        self.program, self.twin = Program(seed), Program(seed)

    def go(self, count: int) -> None:
        for seed, breaks in requests(self.seed, count):
            self.step(seed, breaks)

    def step(self, seed: int, breaks: bool) -> None:
        self.counts["runs"] += 1
        request = Request(self.program, seed, breaks)
        start = rng.get_state()
        try:
            given = run(self.program, request)
        except hetu.HetuError as error:
            self.counts["refused"] += 1
            self.refused(request, error, start)
            return
        except Exception as error:
            self.counts["escaped"] += 1
            self.counts[f"escaped: {type(error).__name__}"] += 1
            self.note(request, f"{type(error).__name__}: {error}")
            self.refused(request, None, start)
            return
        end = rng.get_state()
        rng.set_state(*start)
        try:
            wanted = run(self.twin, Request(self.twin, seed, breaks))
        except Exception as error:
            self.note(request, f"the twin fails: {type(error).__name__}: {error}")
            return
        if rng.get_state() != end:
            self.note(request, "the twin draws other numbers")
        if not is_same(as_values(given), as_values(wanted)):
            self.counts["other values"] += 1
            self.note(request, "gives something else than the twin")
        self.compare(request)

    def refused(self, request: Request, error: hetu.HetuError | None, start: tuple[int, int]) -> None:
        if error is not None and request.kind == "right":
            self.note(request, f"a right run is refused: {error}")
        if rng.get_state() != start:
            self.counts["traces"] += 1
            self.note(request, f"the generator is at {rng.get_state()}, not {start}")
            rng.set_state(*start)
        self.compare(request)

    def compare(self, request: Request) -> None:
        """Both programs have one state; where they don't, the twin takes it over."""
        state = rng.get_state()
        mine, wanted = as_values(self.program.state()), as_values(self.twin.state())
        rng.set_state(*state)
        if not is_same(mine, wanted):
            self.counts["traces"] += 1
            parts = [part for part in wanted if not is_same(mine.get(part), wanted[part])]
            self.note(request, f"leaves a trace in {parts}")
            self.program.graph.load_state_dict(self.twin.state())
            rng.set_state(*state)

    def note(self, request: Request, what: str) -> None:
        self.wrong.append(f"{self.seed}, {request.kind}: {' '.join(what.split())[:300]}")


@pytest.mark.parametrize("part", range(8 * LONGER))
def test_random_runs(part: int) -> None:
    counts, wrong = Counter[str](), list[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's and torch's, of what the values are
        for number in range(PROGRAMS):
            walk = Walk(1000 * part + number)
            walk.go(REQUESTS)
            counts += walk.counts
            wrong += walk.wrong
    print(dict(counts))
    assert counts["runs"] == PROGRAMS * REQUESTS and counts["refused"] > counts["runs"] // 4
    assert not wrong, "\n".join([str(dict(counts)), *wrong])
