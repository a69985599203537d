"""What goes wrong on one rank is an error on all: within the timeout, naming ranks, and before anything is sent."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from support import faults
from support.faults import Change
from support.pool import Outcome, Pool, assert_lost, join
from support.same import assert_own

import hetu
from hetu.runtime.ranks.joining import NCCL_ENVIRONMENT, Others

World = Callable[..., Pool]
TIMEOUT = 5.0
SLACK = 3.0
"""Seconds that a process may have to wait for a core."""


def refused(world: World, change: Change, tokens: int) -> list[list[str]]:
    """The error of each of three ranks, if a run is refused for what the last one does; none of them begins it.

    Afterwards the same ranks run what they ran before, to the bit.
    """
    errors, begun = zip(*world(3).run(faults.watched, {2: change}, tokens), strict=True)
    assert not any(begun)
    (alone,) = world(1).run(faults.run)
    for rank, values in enumerate(world(3).run(faults.run)):
        assert_own(values, alone, rank, 3)
    return list(errors)


@pytest.mark.parametrize(
    ("change", "name", "sides"),
    [
        (faults.another_strategy, "the strategy", ["ranks 0, 1: 0", "rank 2: 1"]),
        (faults.a_strategy_to_be_chosen, "the strategy", ["ranks 0, 1: 0", "rank 2: 'auto'"]),
        (faults.other_lengths, "int_symbol_dict", ["ranks 0, 1: s = 12", "rank 2: s = 11"]),
        (faults.other_symbols_alone, "int_symbol_dict", ["ranks 0, 1: s = 12", "rank 2: s = 13"]),
        (faults.other_dtype, "the graph", ["ranks 0, 1: x: placeholder ", "rank 2: x: placeholder "]),
        (faults.other_fetches, "what is fetched", ["rank 2: 'parallel_attn_0.softmax_lse'"]),
        (faults.more_fetches, "what is fetched", ["ranks 0, 1: 'parallel_attn_0.output'"]),
        (faults.more_micro_batches, "the number of micro-batches", ["ranks 0, 1: 1", "rank 2: 2"]),
        (faults.another_seed, "the generator's state", ["ranks 0, 1: 'seed 0, ", "rank 2: 'seed 99, "]),
        (faults.another_backend, "the backend", ["ranks 0, 1: 'torch'", "rank 2: 'triton'"]),
        (faults.another_run_level, "run_level", ["ranks 0, 1: 'update'", "rank 2: 'grad'"]),
        (faults.plans_something_else, "the plans", ["ranks 0, 1: strategy 0, ", "rank 2: strategy 0, "]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_differs_is_shown_on_all_ranks(world: World, change: Change, name: str, sides: list[str]) -> None:
    # Plans of lengths seen before are not made again.
    tokens = 30 if change is faults.plans_something_else else 12
    for *kinds, text in refused(world, change, tokens):
        assert kinds[0] == "CommunicationError"
        assert f"{name} must be the same on all ranks, but the ranks differ in run " in text
        assert all(f"bound:  {side}" in text for side in sides), text
        assert "where:  faults.py:" in text and "return own(made.script.graph.run(" in text


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (faults.too_many_rows, "BindingError", "qkv has 4 rows on pipeline 2, but the strategy gives it 2 tokens"),
        (faults.no_rows, "BindingError", "qkv has 0 rows on pipeline 2, but the strategy gives it 2 tokens"),
        (faults.other_columns, "BindingError", "shape of x, dimension 1 is 23, expected 24"),
        (faults.other_documents, "BindingError", "cu_seqlens_q on pipeline 2 differs from cu_seqlens_q on pipeline 0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_shards_are_refused_alike_by_all(world: World, change: Change, kind: str, text: str) -> None:
    for *kinds, found in refused(world, change, 12):
        assert kinds[0] == kind and text in found
        assert "bound:  pipeline r is fed by rank r % 3" in found


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (faults.wrong_feed_dtype, "DTypeError", "x is float32, but a torch.float64 tensor was fed"),
        (faults.missing_feed, "BindingError", "placeholder cu is not fed"),
        (faults.no_feeds, "BindingError", "placeholder x is not fed"),
        (faults.no_placeholder, "BindingError", "it is no placeholder"),
        (faults.too_few_shards, "StrategyError", "x was fed 2 shards, but the strategy has 3 pipelines"),
        (faults.no_such_strategy, "StrategyError", "there is no strategy 7 in a graph of 2"),
        (faults.of_another_graph, "HetuError", "it is no tensor of this graph"),
        (faults.no_such_run_level, "HetuError", "there is no run_level 'often'"),
        (faults.raises_while_planning, "ValueError", "no plan today"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_one_rank_refuses_no_rank_begins(world: World, change: Change, kind: str, text: str) -> None:
    tokens = 31 if change is faults.raises_while_planning else 12
    *others, (*kinds, found) = refused(world, change, tokens)
    assert kinds[0] == kind and text in found
    for *kinds, theirs in others:
        assert kinds[0] == "CommunicationError"
        assert re.search(r"run \d+ was refused by rank 2, so nothing was computed", theirs)
        assert f"rank 2: {kind}: " in theirs and text in theirs


def test_a_demand_that_only_one_rank_adds_to_a_graph_that_ran_is_found(world: World) -> None:
    """It adds no node, and all ranks have agreed on the graph before."""
    for found in world(2).run(faults.adds_a_demand_after_a_run, 1):
        assert "the graph must be the same on all ranks, but the ranks differ in run " in found


# Ranks that are late, or gone


@pytest.fixture
def impatient() -> Iterator[Pool]:
    """Three ranks with a short timeout."""
    pool = Pool(3, timeout=TIMEOUT)
    yield pool
    pool.close()


def assert_stopped(pool: Pool, ranks: list[int]) -> None:
    """They live, and say of the next run that there can't be one."""
    assert all(outcome.is_value for outcome in pool.outcomes(faults.here, ranks))
    for outcome in pool.outcomes(faults.run, ranks, limit=TIMEOUT):
        assert_lost(outcome, "the ranks can't go on after an earlier failure: .*rank")


def fail(pool: Pool, change: Change, rank: int = 1) -> list[Outcome]:
    """How a second run ends, in which a change takes place on one rank; all but that one have to come back in time."""
    pool.run(faults.run, tokens=48)
    return pool.outcomes(partial(faults.run, {rank: change}, tokens=48), limit=TIMEOUT + SLACK)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("change", [faults.dies, faults.sleeps, faults.is_interrupted], ids=lambda f: f.__name__)
def test_a_rank_that_does_not_come_to_a_run(impatient: Pool, change: Change, rank: int) -> None:
    outcomes = fail(impatient, change, rank)
    others = [0, 2] if rank == 1 else [1, 2]
    for other in others:
        how = "died" if change is faults.dies else f"did not come within {TIMEOUT:g} s"
        assert_lost(outcomes[other], f"^rank {rank} {how}; this rank was waiting for all ranks to come to run 2")
    assert_stopped(impatient, others)


SAYS = {
    "raises": "(?s)^rank 1 stopped; .*rank 1: ValueError: out of luck",
    "is interrupted": "(?s)^rank 1 stopped; .*rank 1: KeyboardInterrupt",
    "dies": "^rank 1 died; this rank was ",
    "sleeps": f"^rank 1 did not come within {TIMEOUT:g} s; this rank was ",
}


@pytest.mark.parametrize("end", ["send", "receive"])
@pytest.mark.parametrize("what", ["dies", "raises", "sleeps", "is interrupted"])
def test_a_rank_that_fails_before_it_sends_anything(impatient: Pool, what: str, end: str) -> None:
    """The others say whom they lost, or what that one says of itself."""
    outcomes = fail(impatient, faults.at_the_transfer(what, 1, end))
    for other in (0, 2):
        assert_lost(outcomes[other], SAYS[what])
    if what in ("raises", "is interrupted"):
        assert (raised := outcomes[1].raised) is not None
        if what == "raises":
            assert raised.kinds[0] == "HetuError" and "ValueError: out of luck" in raised.text
        else:
            assert raised.kinds[0] == "KeyboardInterrupt"
    assert_stopped(impatient, [0, 2])


@pytest.mark.parametrize("what", ["dies", "raises", "sleeps", "is interrupted"])
def test_a_rank_that_fails_after_it_sent(impatient: Pool, what: str) -> None:
    """Whoever got all that it needed has a result; the next run tells it."""
    outcomes = fail(impatient, faults.at_the_transfer(what, 1, "done"))
    done = [rank for rank in (0, 2) if outcomes[rank].is_value]
    for rank, outcome in zip(done, impatient.outcomes(faults.run, done, limit=TIMEOUT + SLACK), strict=True):
        outcomes[rank] = outcome
    for other in (0, 2):  # one that slept was ended before the next run
        assert_lost(outcomes[other], f"{SAYS[what]}|{SAYS['dies']}|can't go on after an earlier failure: rank 1 ")
    assert_stopped(impatient, [0, 2])


@pytest.mark.parametrize("what", ["dies", "raises"])
def test_nobody_waits_the_whole_timeout_for_a_rank_that_is_gone(what: str) -> None:
    with Pool(3, timeout=90.0) as pool:
        pool.run(faults.run, tokens=48)
        change = faults.at_the_transfer(what, 1, "send")
        outcomes = pool.outcomes(partial(faults.run, {1: change}, tokens=48), limit=45.0)
        for other in (0, 2):
            assert_lost(outcomes[other], SAYS[what])


def test_a_rank_that_is_interrupted_while_it_plans() -> None:
    with Pool(3, timeout=90.0) as pool:
        outcomes = pool.outcomes(partial(faults.run, {1: faults.is_interrupted_while_planning}), limit=45.0)
        for other in (0, 2):
            assert_lost(outcomes[other], SAYS["is interrupted"])


def test_a_rank_that_does_something_else(impatient: Pool) -> None:
    for outcome in fail(impatient, faults.gathers_instead):
        assert_lost(outcome, r"(?s)at different places of the script.*rank 0: at run 2 .*rank 1: at gather_shards ")


@pytest.mark.parametrize("agent", [True, False], ids=["with torchrun's store", "with the store of rank 0"])
@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_never_starts(agent: bool, missing: int) -> None:
    ranks = [rank for rank in range(3) if rank != missing]
    with Pool(3, backend=None, agent=agent) as pool:
        for outcome in pool.outcomes(partial(join, "gloo", TIMEOUT), ranks, limit=TIMEOUT + SLACK):
            if missing or agent:
                assert_lost(outcome, rf"rank {missing} did not come to init_distributed within {TIMEOUT:g} s")
            else:
                assert_lost(outcome, f"can't be reached within {TIMEOUT:g} s(?s:.*)see that rank 0 has started")


def test_a_rank_that_dies_while_the_others_gather(impatient: Pool) -> None:
    impatient.run(faults.run)
    outcomes = impatient.outcomes(partial(faults.gather, {1: faults.dies}), limit=TIMEOUT + SLACK)
    for other in (0, 2):
        assert_lost(outcomes[other], "^rank 1 died; this rank was ")
    assert_stopped(impatient, [0, 2])


# Before there is a world


@pytest.mark.parametrize(
    ("environment", "options", "text"),
    [
        ({"RANK": "0"}, {}, "the environment has RANK, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({}, {"timeout": 0}, "expected timeout to be a number of seconds from 0.1 to 300,000,000, got 0 (int)"),
        ({}, {"timeout": -1.5}, "got -1.5 (float)"),
        ({}, {"timeout": float("nan")}, "got nan (float)"),
        ({}, {"timeout": float("inf")}, "got inf (float)"),
        ({}, {"timeout": 1e300}, "got 1e+300 (float)"),
        ({}, {"timeout": 10**400}, "expected timeout to be"),
        ({}, {"timeout": 1e-9}, "got 1e-09 (float)"),
        ({}, {"timeout": "5"}, "got '5' (str)"),
        ({}, {"timeout": None}, "got None"),
        ({}, {"timeout": True}, "got True (bool)"),
        ({}, {"timeout": [5]}, "got [5] (list)"),
        ({}, {"backend": "mpi"}, """expected backend to be "gloo" or "nccl", got 'mpi' (str)"""),
        ({}, {"backend": 5}, "got 5 (int)"),
    ],
)
def test_a_bad_start(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], options: dict[str, object], text: str
) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in (environment or whole).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(hetu.HetuError, match=re.escape(text)):
        hetu.init_distributed(**options)


def started_as(monkeypatch: pytest.MonkeyPatch, rank: int, gpus: int) -> None:
    """Makes this process one of ten on a host with so many GPUs, though there may be none."""
    environment = {"RANK": str(rank), "WORLD_SIZE": "10", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "NCCL_MULTI_RANK_GPU_ENABLE", *NCCL_ENVIRONMENT):
        monkeypatch.setenv(name, "")  # so that what is set here is gone afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.parametrize(("shared", "gpus"), [(None, 8), ("0", 8), ("1", 0)])
def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch, shared: str | None, gpus: int) -> None:
    started_as(monkeypatch, 9, gpus)
    if shared is not None:
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", shared)
    with pytest.raises(hetu.HetuError, match=rf"this is process 9 of its host, which has {gpus} GPUs"):
        hetu.init_distributed("nccl")


@pytest.mark.parametrize(("rank", "gpus", "index"), [(9, 8, 1), (7, 8, 7), (3, 2, 1), (9, 1, 0)])
def test_processes_that_share_gpus(monkeypatch: pytest.MonkeyPatch, rank: int, gpus: int, index: int) -> None:
    """NCCL 2.30 lets them, if it is asked to; each takes the GPU of its number, modulo the number of GPUs."""
    started_as(monkeypatch, rank, gpus)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert Others(rank, 10, False).device("nccl") == torch.device("cuda", index) and chosen == [index]
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32" and os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"  # the user's word stands


def test_one_queue_to_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    started_as(monkeypatch, 0, 8)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(hetu.HetuError, match="CUDA_DEVICE_MAX_CONNECTIONS is 1"):
        hetu.init_distributed("nccl")
