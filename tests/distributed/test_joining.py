"""Joining the other processes, however they were started, and leaving them with what is theirs."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support import faults, joining
from support.pool import Pool
from support.same import assert_own

import hetu

World = Callable[..., Pool]


def address(folder: Path, kind: str) -> str:
    """A place where the processes of torch's world may meet."""
    if kind == "file":
        return f"file://{folder / 'store'}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("how", "place", "backend"),
    [
        ("environment", "tcp", "gloo"),
        ("no environment", "tcp", "gloo"),
        ("no environment", "file", "cpu:gloo"),
        ("another", "tcp", "cpu:gloo"),
    ],
)
def test_a_world_of_torch_is_joined(world: World, tmp_path: Path, how: str, place: str, backend: str) -> None:
    """Whatever the environment says; it stays when hetu leaves."""
    (alone,) = world(1).run(faults.run)
    with Pool(3, backend=None) as pool:
        found = pool.run(joining.joined, how, address(tmp_path, place), backend)
    for number, (rank, size, values, is_whole) in enumerate(found):
        assert (rank, size, is_whole) == (number, 3, True)
        assert_own(values, alone, number, 3)


def test_a_rank_of_a_world_of_torch_that_does_not_come_is_named(tmp_path: Path) -> None:
    with Pool(3, backend=None) as pool:
        pool.run(joining.start_torch, "no environment", address(tmp_path, "tcp"))
        outcomes = pool.outcomes(
            partial(joining.refused, partial(hetu.init_distributed, timeout=2.0)), [0, 2], limit=15.0
        )
        for outcome in outcomes:
            text, took = outcome.value
            assert "rank 1 did not come to init_distributed within 2 s" in text and took < 8


def test_a_world_of_torch_of_one_process() -> None:
    with Pool(1, backend=None) as pool:
        assert pool.run(joining.torchs_alone) == [(1, True)]


@pytest.mark.parametrize("breaks", [False, True])
def test_process_groups_of_the_user_outlive_hetu(breaks: bool) -> None:
    """Also in a world that hetu made, and after a failure."""
    with Pool(3, backend=None) as pool:
        assert pool.run(joining.groups_outlive, breaks) == [[True, True, True]] * 3


@pytest.mark.parametrize("agent", [True, False])
def test_joining_again(agent: bool) -> None:
    """Nothing that was left in the store the first time is taken for the second."""
    with Pool(3, backend=None, agent=agent) as pool:
        assert pool.run(joining.in_and_out, 3) == [[False] * 3] * 3


@pytest.mark.parametrize("who", [0, 1])
def test_joining_again_alone(who: int) -> None:
    with Pool(3, timeout=30.0) as pool:
        text, took = pool.run(joining.again, 2.0, who)[who]
    others = ", ".join(str(rank) for rank in range(3) if rank != who)
    assert f"ranks {others} did not come to init_distributed within 2 s" in text and took < 8


def test_backends_that_differ() -> None:
    with Pool(2, backend=None) as pool:
        for text, took in pool.run(joining.with_backends, ["gloo", "nccl"]):
            assert "the backend must be the same on all ranks, but the ranks differ" in text and took < 8
            assert "bound:  rank 0: gloo" in text and "bound:  rank 1: nccl" in text


def test_two_processes_of_one_number() -> None:
    with Pool(2, backend=None) as pool:
        texts = [text for text, _ in pool.run(joining.as_rank, 1)]
    assert any("rank 1 came twice" in text for text in texts)
    assert all(re.search(r"rank 1 came twice|rank 0 did not come", text) for text in texts)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", "abc", "a number from 0 to 1"),
        ("RANK", "2", "a number from 0 to 1"),
        ("RANK", "-1", "a number from 0 to 1"),
        ("RANK", "", "a number from 0 to 1"),
        ("WORLD_SIZE", "0", "a number from 1 to 1000000"),
        ("WORLD_SIZE", "2.0", "a number from 1 to 1000000"),
        ("WORLD_SIZE", "9" * 5000, "a number from 1 to 1000000"),
        ("WORLD_SIZE", "9" * 9, "a number from 1 to 1000000"),
        ("MASTER_PORT", "http", "a number from 0 to 65535"),
        ("MASTER_PORT", "65536", "a number from 0 to 65535"),
    ],
)
def test_an_environment_that_makes_no_sense(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for key, text in (whole | {name: value}).items():
        monkeypatch.setenv(key, text)
    with pytest.raises(hetu.HetuError, match=re.escape(f"the environment's {name} is '{value[:20]}")) as caught:
        hetu.init_distributed("gloo", timeout=1)
    assert f"expected {expected}" in str(caught.value) and len(str(caught.value)) < 1000
