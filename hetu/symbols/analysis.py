"""What can be told of expressions without their leaves' values, beyond ranges: finer bounds, and linearity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import sympy

from hetu.symbols.expr import (
    Extremum,
    FloorDiv,
    Leaf,
    Max,
    Mod,
    add,
    divides_exactly,
    divisor_of,
    fold,
    interval_of,
    make_int,
    multiply,
    subtract,
    terms,
)
from hetu.symbols.interval import Interval

# Each step of a bound may start several others; so many of them lie one in the other. Enough for what lengths
# look like (floors of sums of floors), and "don't know" is a legal answer past it.
_STEPS = 3


def difference_bounds(a: Any, b: Any) -> Interval:
    """The values that ``a - b`` may take; finer than their ranges where parts of them cancel."""
    difference = expanded(subtract(a, b))
    if _never_zero(difference):
        low, high = interval_of(difference).lo, interval_of(difference).hi
        # Of a range that begins or ends at zero, the zero is cut off.
        return Interval(1 if low == 0 else low, -1 if high == 0 else high)
    negated = _least(expanded(multiply(make_int(-1), difference)), _STEPS)
    return Interval(_least(difference, _STEPS), None if negated is None else -negated)
