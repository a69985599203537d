"""Differences between ranks and errors of some are told to all, with all sides."""

from __future__ import annotations

from typing import Any

import pytest

from hetu.backends.comm.compare import SHOWN, refuse_differences, refuse_errors
from hetu.errors import CommunicationError, ShapeError, in_words


def refused(said: list[dict[str, Any]], **options: Any) -> list[str]:
    """The lines of the error."""
    with pytest.raises(CommunicationError) as caught:
        refuse_differences(said, "run 3", "run", **options)
    return [line.strip() for line in str(caught.value).splitlines()]


def test_what_is_alike_passes() -> None:
    refuse_differences([{"a": [1, {"b": None}]}] * 3, "run 3", "run")
    refuse_differences([], "run 3", "run")
    refuse_errors([{"a": 1}, {}], "run 3", "run")


def test_ranks_that_say_the_same_are_one_side() -> None:
    first, _, *rest = refused([{"a": 0, "b": 1}, {"a": 0, "b": "1"}, {"a": 0, "b": 1}])
    assert first == "[run] b must be the same on all ranks, but the ranks differ in run 3"
    assert rest[:2] == ["bound:  ranks 0, 2: 1", "bound:  rank 1: '1'"]


def test_of_lists_only_what_differs_is_shown() -> None:
    lines = refused([{"a": ["x = 1", "y = 2"]}, {"a": ["x = 1", "y = 3"]}, {"a": ["x = 1"]}])
    assert lines[2:5] == ["bound:  rank 0: y = 2", "bound:  rank 1: y = 3", "bound:  rank 2: none of these"]
    many = [str(i) for i in range(SHOWN + 5)]
    assert refused([{"a": many}, {"a": []}])[2] == f"bound:  rank 0: {', '.join(many[:SHOWN])}, and 5 more"


def test_the_order_of_a_list_counts() -> None:
    assert refused([{"a": ["x", "y"]}, {"a": ["y", "x"]}])[2:4] == ["bound:  rank 0: x, y", "bound:  rank 1: y, x"]


def test_what_one_rank_does_not_say_differs() -> None:
    assert refused([{}, {"a": 1}])[2:4] == ["bound:  rank 0: None", "bound:  rank 1: 1"]


def test_what_to_do_is_said_by_name() -> None:
    assert refused([{"a": 1}, {"a": 2}], fixes={"a": "take 1"})[-1] == "fix:    take 1"
    assert "hetu.manual_seed(n)" in refused([{"a": 1}, {"a": 2}], fixes={"b": "take 1"})[-1]


def test_errors_of_other_ranks_are_told() -> None:
    error = ShapeError("rows don't fit", fix="count them")
    with pytest.raises(CommunicationError) as caught:
        refuse_errors([{}, {"error": in_words(error)}, {"error": in_words(KeyError(3))}], "run 3", "run")
    assert "run 3 was refused by ranks 1, 2, so nothing was computed" in str(caught.value)
    assert "bound:  rank 1: ShapeError: rows don't fit\n" in str(caught.value)
    assert "bound:  rank 2: KeyError: 3\n" in str(caught.value)
