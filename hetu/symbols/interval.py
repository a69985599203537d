"""Ranges of integers, and their arithmetic. Sound: the range of a result holds every value that it can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hetu.arguments import integer, shown
from hetu.errors import BindingError, DTypeError, caller

Bound = int | None


@dataclass(frozen=True, slots=True)
class Interval:
    """All ints from ``lo`` to ``hi``, both included; None is no bound.

    Example:
        >>> Interval(1, 4) * Interval(-2, None)
        Interval(lo=-8, hi=None)
    """

    lo: Bound
    hi: Bound

    @classmethod
    def point(cls, value: int) -> Interval:
        return cls(value, value)

    def __add__(self, other: Interval) -> Interval:
        return Interval(_add(self.lo, other.lo), _add(self.hi, other.hi))

    def __neg__(self) -> Interval:
        return Interval(None if self.hi is None else -self.hi, None if self.lo is None else -self.lo)

    def __sub__(self, other: Interval) -> Interval:
        return self + -other

    def __mul__(self, other: Interval) -> Interval:
        return _corners(self, other, _times)

    def __floordiv__(self, other: Interval) -> Interval:
        """The range of ``a // b`` for all b but 0, for which there is no value."""
        below, above = other.negative(), other.positive()
        if below and above:
            return (self // below).hull(self // above)
        if below:
            return -self // -below
        return _corners(self, above, _over) if above else ANY

    def __mod__(self, other: Interval) -> Interval:
        """The range of ``a % b`` for all b but 0, for which there is no value."""
        below, above = other.negative(), other.positive()
        if below and above:
            return (self % below).hull(self % above)
        if below:
            return -(-self % -below)
        if not above or above.lo is None:
            return ANY
        if self.lo is None or self.lo < 0:
            return Interval(0, None if above.hi is None else above.hi - 1)
        if self.hi is not None and self.hi < above.lo:
            return self
        tops = [top for top in (self.hi, None if above.hi is None else above.hi - 1) if top is not None]
        return Interval(0, min(tops, default=None))  # a % b is less than b, and at most a

    def positive(self) -> Interval | None:
        """The part of it above 0; None if there is none."""
        low = 1 if self.lo is None else max(self.lo, 1)
        return None if self.hi is not None and self.hi < low else Interval(low, self.hi)

    def negative(self) -> Interval | None:
        """The part of it below 0; None if there is none."""
        mirrored = (-self).positive()
        return None if mirrored is None else -mirrored

    def hull(self, other: Interval) -> Interval:
        """The least range that holds both."""
        return Interval(self.minimum(other).lo, self.maximum(other).hi)

    def power(self, exponent: int) -> Interval:
        """The range of ``x ** exponent`` for an exponent of at least 1."""
        if exponent == 1:
            return self
        least = None if self.lo is None else self.lo**exponent
        most = None if self.hi is None else self.hi**exponent
        if exponent % 2 or (self.lo is not None and self.lo >= 0):
            return Interval(least, most)
        if self.hi is not None and self.hi <= 0:
            return Interval(most, least)
        return Interval(0, None if least is None or most is None else max(least, most))

    def maximum(self, other: Interval) -> Interval:
        lows = [bound for bound in (self.lo, other.lo) if bound is not None]
        hi = None if self.hi is None or other.hi is None else max(self.hi, other.hi)
        return Interval(max(lows) if lows else None, hi)

    def minimum(self, other: Interval) -> Interval:
        return -(-self).maximum(-other)

    def __contains__(self, value: int) -> bool:
        return (self.lo is None or self.lo <= value) and (self.hi is None or value <= self.hi)

    def __str__(self) -> str:
        return f"{'-inf' if self.lo is None else self.lo}..{'inf' if self.hi is None else self.hi}"


ANY = Interval(None, None)


def leaf_range(low: int | None, high: int | None, multiple_of: int) -> tuple[Interval, int]:
    """A leaf's range, narrowed to multiples, and the multiple.

    Args:
        low: Least value; None for no bound.
        high: Greatest value; None for no bound.
        multiple_of: What the value is a multiple of.

    Raises:
        BindingError: If no value is left.
        DTypeError: If an argument is no int.
    """
    low, high = (
        None if bound is None else integer(bound, name, op="IntSymbol", error=DTypeError)
        for name, bound in (("min", low), ("max", high))
    )
    multiple = integer(multiple_of, "multiple_of", op="IntSymbol", error=DTypeError)
    if multiple < 1:
        raise BindingError(
            f"multiple_of is {shown(multiple)}, expected an int of at least 1",
            op="IntSymbol",
            where=caller(),
            fix="leave multiple_of out, or give what every value is a multiple of",
        )
    least = None if low is None else -(-low // multiple) * multiple
    most = None if high is None else high // multiple * multiple
    if least is not None and most is not None and least > most:
        what = "int" if multiple == 1 else f"multiple of {shown(multiple)}"
        raise BindingError(
            f"there is no {what} from min={shown(low)} to max={shown(high)}",
            op="IntSymbol",
            where=caller(),
            fix="give a range that holds a value",
        )
    return Interval(least, most), multiple


def _add(a: Bound, b: Bound) -> Bound:
    return None if a is None or b is None else a + b


Extended = tuple[int, int]
"""An int or an infinity that compares as it should: (0, value), (-1, 0) for -inf, (1, 0) for inf."""


def _corners(x: Interval, y: Interval, op: Callable[[Extended, Extended], Extended]) -> Interval:
    """The range of an operation that is monotone in each operand: from the least to the greatest corner."""
    corners = [op(a, b) for a in _ends(x) for b in _ends(y)]
    (low_rank, low), (high_rank, high) = min(corners), max(corners)
    return Interval(low if low_rank == 0 else None, high if high_rank == 0 else None)


def _ends(x: Interval) -> tuple[Extended, Extended]:
    return (-1, 0) if x.lo is None else (0, x.lo), (1, 0) if x.hi is None else (0, x.hi)


def _times(a: Extended, b: Extended) -> Extended:
    if a[0] == 0 and b[0] == 0:
        return 0, a[1] * b[1]
    return _sign(a) * _sign(b), 0  # (0, 0), the int 0, where one of them is 0


def _over(a: Extended, b: Extended) -> Extended:
    """Floor division by a positive divisor."""
    if a[0]:
        return a
    if b[0]:
        return 0, -1 if a[1] < 0 else 0
    return 0, a[1] // b[1]


def _sign(value: Extended) -> int:
    return value[0] or (value[1] > 0) - (value[1] < 0)
