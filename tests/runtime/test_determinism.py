"""hetu.config(deterministic=True): torch's switch is the process's, and is left as it was found."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import hetu
from hetu.runtime.determinism import WORKSPACE, deterministic


@pytest.fixture(autouse=True)
def switch() -> Iterator[None]:
    """Whatever a test does, the next one finds the switch off."""
    yield
    torch.use_deterministic_algorithms(False)


def run(within: Callable[[], None], deterministic: bool = True) -> None:
    """A run that calls a function in its middle: where a parameter's first value is made."""

    def init(x: torch.Tensor) -> None:
        within()

    with hetu.config(deterministic=deterministic), hetu.graph("define_and_run", device="cpu") as g:
        w = hetu.parameter(init, [2])
        g.run(w + 1.0)


def test_the_switch_is_on_while_a_run_lasts() -> None:
    seen: list[bool] = []
    run(lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    run(lambda: seen.append(torch.are_deterministic_algorithms_enabled()), deterministic=False)
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_switch_that_the_user_set_is_left_alone() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    seen: list[bool] = []
    run(lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert seen == [True]
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_an_error_turns_it_off_too() -> None:
    def fail() -> None:
        raise ValueError("no weights today")

    with pytest.raises(hetu.HetuError, match="no weights today"):
        run(fail)
    assert not torch.are_deterministic_algorithms_enabled()


def test_of_two_threads_the_last_one_turns_it_off() -> None:
    """The first run ends while the second one computes."""
    both_compute, first_is_over = threading.Barrier(2, timeout=30), threading.Event()
    seen: list[bool] = []

    def first() -> None:
        both_compute.wait()

    def last() -> None:
        both_compute.wait()
        assert first_is_over.wait(30)
        seen.append(torch.are_deterministic_algorithms_enabled())

    with ThreadPoolExecutor(2) as threads:
        runs = threads.submit(run, first), threads.submit(run, last)
        runs[0].result()
        first_is_over.set()
        runs[1].result()
    assert seen == [True], "the second run went on without deterministic kernels"
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_workspace_is_named_while_runs_on_a_gpu_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    with deterministic(torch.device("cpu")):
        assert WORKSPACE not in os.environ
        with deterministic(torch.device("cuda")), deterministic(torch.device("cuda")):
            assert os.environ[WORKSPACE] == ":4096:8"
        assert WORKSPACE not in os.environ
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_workspace_that_the_user_named_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic(torch.device("cuda")):
        assert os.environ[WORKSPACE] == ":16:8"
    assert os.environ[WORKSPACE] == ":16:8"
