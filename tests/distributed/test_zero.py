"""Sharded state over several ranks: the bits of one process at stage 0, in less memory, done whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support import mishaps, zero
from support.longer import grid
from support.pool import Pool, assert_lost
from support.same import assert_same
from support.states import is_same
from support.unseen import check_unseen_ids
from support.zero import STEPS, Case, Step

World = Callable[..., Pool]

CASES = {
    "AdamW": Case(),
    "SGD, more pipelines than ranks, small buckets": Case(
        shapes=((7, 3), (2, 3), (1, 3), (4, 3)),
        pipelines=(5, 1, 2),
        kind="SGD",
        options={"momentum": 0.9},
        unit=2,
        bucket_bytes=40,
    ),
    "Adam in float64, larger units": Case(kind="Adam", options={"amsgrad": True}, dtype="float64", unit=8),
}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses_and_state_are_those_of_one_process_at_stage_0(world: World, case: Case, stage: int) -> None:
    """Also on ranks without a pipeline, which own their part all the same."""
    (alone,) = world(1).run(zero.train, case, 0)
    for size in (2, 3):
        for rank in world(size).run(zero.train, case, stage):
            assert_same([loss for loss, _ in rank.numbers], [loss for loss, _ in alone.numbers])
            norms = [[norm for _, norm in one.numbers] for one in (rank, alone)]
            torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
            assert_same(rank.state, alone.state)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipping_is_that_of_one_process_up_to_rounding(world: World, stage: int) -> None:
    case = Case(dtype="float64", options={"max_grad_norm": 0.1})
    (alone,) = world(1).run(zero.train, case, 0)
    ranks = world(3).run(zero.train, case, stage)
    for rank in ranks:
        torch.testing.assert_close([x for x, _ in rank.numbers], [x for x, _ in alone.numbers], rtol=1e-12, atol=0)
        torch.testing.assert_close(rank.state["parameters"], alone.state["parameters"], rtol=1e-12, atol=1e-14)
        assert_same(rank.state, (alone if stage == 1 else ranks[0]).state)  # at stage 1 each has the whole norm


def test_a_state_goes_on_over_other_ranks_at_another_stage(world: World, tmp_path: Path) -> None:
    case, path, again = Case(), tmp_path / "state.safetensors", tmp_path / "again.safetensors"
    (alone,) = world(1).run(zero.train, case, 0)
    world(3).run(zero.train, case, 3, STEPS[:4], end=path)  # with gradients that wait
    world(2).run(zero.train, case, 1, STEPS[4:5], first=4, begin=path, end=again)
    for size, stage in ((1, 0), (3, 2), (2, 3)):
        for rank in world(size).run(zero.train, case, stage, STEPS[5:], first=5, begin=again):
            assert_same([loss for loss, _ in rank.numbers], [loss for loss, _ in alone.numbers[5:]])
            assert_same(rank.state, alone.state)


@pytest.mark.parametrize("size", [2, 4])
def test_what_a_rank_holds_is_what_the_formula_says(world: World, size: int) -> None:
    """See the table in docs/training.md, of which this is the row of each stage."""
    bucket = 4096
    case = Case(shapes=((16, 16),) * 16, pipelines=(size, 1), unit=16, bucket_bytes=bucket)
    frozen = 4 * 16 * 16
    trained = 15 * frozen + 4  # the scale is one element
    for stage in (0, 1, 2, 3):
        values = (trained + frozen) / (size if stage == 3 else 1)
        states = 2 * trained / (size if stage >= 1 else 1)
        grads = trained / (size if stage >= 2 else 1)
        copied = 3 * trained / (size if stage >= 1 else 1)
        gathered = (0, bucket, bucket, 3 * bucket)[stage] + (bucket / size if stage >= 1 else 0)
        for rank in world(size).run(zero.train, case, stage, [Step(0), Step(1), Step(0, 1, "grad")]):
            found = [*(rank.bytes[part] for part in ("values", "state", "gradients")), rank.copied, rank.gathered]
            for held, wanted in zip(found, [values, states, grads, copied, gathered], strict=True):
                assert held == pytest.approx(wanted, rel=0.1, abs=64), (stage, found)


@pytest.mark.parametrize("stage", [1, 3])
def test_five_ranks(world: World, stage: int) -> None:
    """With products in bfloat16 that are computed again, and strategies of fewer and of more pipelines than ranks."""
    case = Case(shapes=((5, 4), (1, 4), (3, 4), (8, 4)), pipelines=(5, 2, 7, 1), bucket_bytes=60, is_mixed=True)
    steps = [Step(0), Step(1, 2), Step(2), Step(3, 1, "grad"), Step(1, 1, "compute_only"), Step(3)]
    (alone,) = world(1).run(zero.train, case, 0, steps)
    for rank in world(5).run(zero.train, case, stage, steps):
        assert_same([loss for loss, _ in rank.numbers], [loss for loss, _ in alone.numbers])
        assert_same(rank.state, alone.state)


@pytest.mark.parametrize(
    ("stage", "mishap", "who"),
    grid([1, 2, 3], ["the first step, half done", "the norm", "clipping", "the schedule"], [{1}, {0, 2}]),
)
def test_an_update_is_made_on_all_ranks_or_on_none(world: World, stage: int, mishap: str, who: set[int]) -> None:
    (_, wanted), *_ = world(3).run(mishaps.train, "AdamW", stage=stage)
    for rank, (told, state) in enumerate(world(3).run(mishaps.train, "AdamW", mishap, who, stage=stage)):
        assert not told.has_changed and is_same(state, wanted)
        names = f"rank{'s' * (len(who) > 1)} {', '.join(map(str, sorted(who)))}"
        said = "the run failed, and changed nothing" if rank in who else f"failed on {names}, so no rank has changed"
        assert said in told.text


@pytest.mark.parametrize(("stage", "is_done"), [(1, False), (2, True), (3, True)])
def test_values_that_are_lost_on_the_way_change_nothing(stage: int, is_done: bool) -> None:
    with Pool(3) as pool:
        for rank, outcome in enumerate(
            pool.outcomes(partial(zero.fails_while_gathering, stage, [1], is_done), limit=30.0)
        ):
            if rank == 1:
                assert outcome.raised is not None and "lost on the way" in outcome.raised.text
            else:
                assert_lost(outcome, "^rank 1 stopped")
        assert all(outcome.value for outcome in pool.outcomes(zero.is_as_before))


@pytest.mark.parametrize(
    ("stage", "part", "told"),
    [
        (2, "gradients", "loaded/train/gradients/w0"),
        (2, "state", "loaded/train/state/w0"),
        (3, "parameters", "parameters/w0"),
    ],
)
def test_ranks_that_load_different_parts_are_refused(
    world: World, tmp_path: Path, stage: int, part: str, told: str
) -> None:
    """What they keep of it differs in any case, so they compare what it was cut from."""
    path = tmp_path / "state.safetensors"
    world(1).run(zero.train, Case(), 0, STEPS[:3], end=path)
    assert world(2).run(zero.loads, stage, path, [], part) == ["", ""]
    for text in world(2).run(zero.loads, stage, path, [1], part):
        assert "what the graph keeps from run to run must be the same on all ranks" in text
        assert f"rank 1: {told}" in text


def test_a_rank_that_goes_back_alone_is_refused(world: World) -> None:
    for text in world(2).run(zero.goes_back_alone, 3):
        assert "what the graph keeps from run to run must be the same on all ranks" in text


def test_a_state_that_only_one_rank_asks_for() -> None:
    with Pool(2, timeout=3.0) as pool:
        assert_lost(pool.outcomes(partial(zero.asks_alone, 1))[0], "state_dict")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_graph_that_trained_alone_goes_on_with_others_from_its_state(stage: int) -> None:
    with Pool(2, backend=None) as pool:
        for first, second, third in pool.run(zero.joins_late, stage):
            assert "what this graph trains is cut over one process, but now this is rank" in first
            assert "load_state_dict" in first and second == ""
            assert re.search("is cut over rank . of 2, but now this is one process", third)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ids_that_only_a_device_knows(world: World, stage: int) -> None:
    """What the owner's device takes back is what the others get."""
    for wrong in (0, 1, 2):
        check_unseen_ids(world, wrong, 2, stage=stage)


def test_small_parameters_have_one_owner_each(world: World) -> None:
    """Without cutting finely, a model this small lies on the last rank alone, and the others serve it all the same."""
    case = replace(Case(), unit=128)
    (alone,) = world(1).run(zero.train, case, 0)
    ranks = world(2).run(zero.train, case, 2)
    assert_same([rank.state for rank in ranks], [alone.state] * 2)
    assert ranks[0].bytes["state"] == 0
