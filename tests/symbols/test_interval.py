"""Ranges: whatever values the operands take, the result's range holds the result, and mostly nothing more."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetu.symbols import Interval

BOUNDS = [None, *range(-3, 4)]
INTERVALS = [Interval(lo, hi) for lo in BOUNDS for hi in BOUNDS if lo is None or hi is None or lo <= hi]
OPERATIONS: dict[str, tuple[Callable[[int, int], int], Callable[[Interval, Interval], Interval]]] = {
    "+": (operator.add, operator.add),
    "-": (operator.sub, operator.sub),
    "*": (operator.mul, operator.mul),
    "//": (operator.floordiv, operator.floordiv),
    "%": (operator.mod, operator.mod),
    "max": (max, Interval.maximum),
    "min": (min, Interval.minimum),
}


def members(interval: Interval, reach: int = 8) -> range:
    """The values of an interval, so many past the small bounds where there is no bound."""
    return range(-reach if interval.lo is None else interval.lo, (reach if interval.hi is None else interval.hi) + 1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_pair_of_small_ranges_is_sound(name: str) -> None:
    on_ints, on_ranges = OPERATIONS[name]
    for x, y in itertools.product(INTERVALS, INTERVALS):
        result = on_ranges(x, y)
        for a, b in itertools.product(members(x), members(y)):
            if b or name not in ("//", "%"):
                assert on_ints(a, b) in result, (x, y, a, b, result)


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - {"%"}))
def test_ranges_with_bounds_are_exact(name: str) -> None:
    on_ints, on_ranges = OPERATIONS[name]
    bounded = [one for one in INTERVALS if one.lo is not None and one.hi is not None]
    for x, y in itertools.product(bounded, bounded):
        if name == "//" and 0 in y:
            continue
        values = [on_ints(a, b) for a in members(x) for b in members(y)]
        assert on_ranges(x, y) == Interval(min(values), max(values)), (x, y)


@given(st.sampled_from(INTERVALS), st.integers(1, 5))
def test_powers_are_sound(x: Interval, exponent: int) -> None:
    assert all(a**exponent in x.power(exponent) for a in members(x))


def test_what_remainders_are() -> None:
    assert Interval(0, 5) % Interval(8, 9) == Interval(0, 5)  # smaller than the divisor: itself
    assert Interval(0, 5) % Interval(2, None) == Interval(0, 5)  # never more than it was
    assert Interval(-1, 5) % Interval(4, 4) == Interval(0, 3)
    assert Interval(0, None) % Interval(-4, -4) == Interval(-3, 0)
    assert Interval(0, None) % Interval(0, None) == Interval(0, None)  # a divisor is not 0


def test_a_divisor_that_may_be_zero_is_taken_as_not_zero() -> None:
    assert Interval(0, 10) // Interval(0, None) == Interval(0, 10)
    assert Interval(0, 10) // Interval(-2, 2) == Interval(-10, 10)
    assert Interval(0, 10) // Interval(0, 0) == Interval(None, None)


def test_a_divisor_without_a_bound() -> None:
    assert Interval(-3, -1) // Interval(1, None) == Interval(-3, -1)  # never reaches 0
    assert Interval(1, 3) // Interval(1, None) == Interval(0, 3)
    assert Interval(1, 3) // Interval(None, -1) == Interval(-3, -1)


def test_how_a_range_reads() -> None:
    assert str(Interval(None, 5)) == "-inf..5"
    assert str(Interval(0, None)) == "0..inf"
