"""Owned placements: each element has one owner, in boxes that are contiguous, about as many on each rank."""

from __future__ import annotations

from math import prod
from unittest.mock import patch

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from hetu.parallel import placement
from hetu.parallel.placement import STAGES, Box, Placement, boxes_of_run, placed


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(1, 7), st.sampled_from([1, 3, 128]))
@example([], 3, 1)
@example([0, 3], 3, 1)
@example([4, 1, 300], 3, 128)
def test_each_element_has_one_owner(shape: list[int], ranks: int, unit: int) -> None:
    with patch.object(placement, "UNIT", unit):
        owned = Placement.owned(shape, ranks)
    numbers, outer = np.arange(prod(shape)).reshape(shape), Box.whole(shape)
    parts = [numbers[box.slices_in(outer)] for boxes in owned.boxes for box in boxes]
    assert [n for part in parts for n in part.reshape(-1)] == list(range(prod(shape)))
    assert all(part.flags.c_contiguous for part in parts)
    assert sum(len(boxes) for boxes in owned.boxes) >= 1, "what has no elements has an owner, too"


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=3), st.integers(1, 64))
def test_ranks_own_about_as_much(shape: list[int], ranks: int) -> None:
    owned = Placement.owned(shape, ranks)
    share = prod(shape) / ranks
    most = max(placement.UNIT, share * placement.LARGEST_UNIT)
    assert all(abs(owned.numel_of(rank) - share) <= most for rank in range(ranks))
    assert all(len(boxes) <= 2 * len(shape) - 1 for boxes in owned.boxes)


def test_rows_stay_whole_where_they_are_short() -> None:
    assert all(len(boxes) == 1 for boxes in Placement.owned([4096, 1024], 7).boxes)
    assert any(len(boxes) > 1 for boxes in Placement.owned([4, 1024], 3).boxes)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_a_run_is_its_boxes(shape: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    numbers = np.arange(prod(shape)).reshape(shape)
    boxes = boxes_of_run(shape, start, stop)
    assert [n for box in boxes for n in numbers[box.slices_in(Box.whole(shape))].reshape(-1)] == list(
        range(start, stop)
    )


@given(st.integers(1, 9), st.integers(1, 9))
def test_fewer_ranks_stand_in_for_the_others(ranks: int, fewer: int) -> None:
    owned = Placement.owned([997, 2], ranks)
    stand_ins = owned.over(min(fewer, ranks))
    assert sorted(box for boxes in stand_ins.boxes for box in boxes) == sorted(
        b for boxes in owned.boxes for b in boxes
    )
    assert all(
        stand_ins.held_by(rank)[: len(owned.held_by(rank))] == owned.held_by(rank) for rank in range(min(fewer, ranks))
    )


def test_stages_cut_one_thing_after_the_other() -> None:
    found = [placed([1024, 8], 4, stage) for stage, _ in enumerate(STAGES)]
    assert [[one.is_cut for one in stage] for stage in found] == [
        [False, False, False],
        [False, False, True],
        [False, True, True],
        [True, True, True],
    ]
    assert not any(one.is_cut for one in placed([1024, 8], 1, 3)), "one rank owns everything"
