"""Sums over pipelines, choosing, gathering and planning in several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.jobs import (
    REDUCED,
    by_strategy,
    calibrated,
    chosen,
    gathered,
    hardware_of_ranks,
    reduced,
    shared_by_pipelines,
    whole_rows,
)
from support.longer import grid
from support.pool import Pool
from support.same import assert_own, assert_same
from support.unseen import check_unseen_ids

import hetu

World = Callable[..., Pool]


@pytest.mark.parametrize(("size", "reduction", "part"), grid([2, 3, 4], REDUCED, range(4)))
def test_sums_over_pipelines(world: World, size: int, reduction: tuple[str, str], part: int) -> None:
    """Added in the order of the pipelines, whichever processes they run in; in one bucket or many."""
    count, bucket = [(1, 1), (size - 1, 100), (size, 10**6), (2 * size + 1, 100)][part]
    (alone,) = world(1).run(reduced, *reduction, count)
    for rank, values in enumerate(world(size).run(reduced, *reduction, count, bucket)):
        for mine, whole in zip(values, alone, strict=True):
            assert_own(mine, whole, rank, size)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("lens", [[5], [3, 0, 4], [1, 2, 3, 0, 5]])
def test_gathered_shards_are_those_of_one_process_on_every_rank(world: World, size: int, lens: list[int]) -> None:
    (alone,) = world(1).run(gathered, lens)
    for rank in world(size).run(gathered, lens):
        assert_same(rank, alone)


@pytest.mark.parametrize("size", [2, 3])
def test_the_strategy_says_how_many_pipelines_run(world: World, size: int) -> None:
    """Not the number of ranks, and not what is fetched; documents are fed by the groups' values."""
    for parts in (2, size, size + 1):
        (alone,) = world(1).run(by_strategy, False, parts)
        assert [len(values) for values in alone] == [parts] * 3
        for own_shard in (False, True)[: 1 + (parts <= size)]:
            for rank, values in enumerate(world(size).run(by_strategy, own_shard, parts)):
                for mine, whole in zip(values, alone, strict=True):
                    assert_own(mine, whole, rank, size)


def test_a_rank_of_several_pipelines_is_fed_shards(world: World) -> None:
    for text in world(2).run(shared_by_pipelines, 3):
        assert "for the 2 pipelines that run here" in text


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_the_same_rows_on_each_rank_are_not_taken_for_a_batch(world: World, kind: str, batch: int, size: int) -> None:
    """They are as many as those of a shard of a larger batch."""
    (alone,) = world(1).run(whole_rows, "shards", size, batch)
    for rank, (first, second, right) in enumerate(world(size).run(whole_rows, kind, size, batch)):
        names = ", ".join(map(str, range(size)))
        assert first == second and f"x was fed the same rows on ranks {names}, but each pipeline needs" in first
        assert "layout.scatter(x)[rank]" in first and "hetu.Shards" in first and "where:  jobs.py:" in first
        assert_own(right, alone[2], rank, size)


@pytest.mark.parametrize("kind", ["equal rows", "shards", "own rows"])
def test_batches_of_shards_are_taken(world: World, kind: str) -> None:
    for values in world(2).run(whole_rows, kind, 2):
        assert [len(value[0]) for value in values] == [6, 6, 3]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_an_id_that_one_ranks_device_knows_is_refused_on_all(world: World, wrong: int) -> None:
    check_unseen_ids(world, wrong, 2)


def test_ranks_measure_together(world: World, tmp_path: Path) -> None:
    for rank, (said, found, is_taken) in enumerate(world(2).run(calibrated, tmp_path)):
        assert ("expected path to be a path" if rank else "rank 1") in said
        measured = hetu.Hardware.from_json(found)
        assert is_taken and measured.host_latency is None and 0 < measured.latency < 1 < measured.link_bytes


def test_hardware_is_that_of_rank_0(world: World) -> None:
    for rank, (link_bytes, said, is_kept) in enumerate(world(2).run(hardware_of_ranks)):
        assert link_bytes == 1e3 and is_kept
        assert ("expected hardware to be a hetu.Hardware" if rank else "rank 1") in said


@pytest.mark.parametrize("strategy", ["auto", None, 1])
def test_all_ranks_choose_alike(world: World, strategy: str | int | None) -> None:
    for count in [1, 2, 3] if strategy != 1 else [2]:
        (alone,) = world(1).run(chosen, strategy, count)
        for rank, (index, plan, values) in enumerate(world(2).run(chosen, strategy, count)):
            assert (index, plan) == alone[:2] and index == count - 1
            assert_own(values, alone[2], rank, 2)
