"""What can be told of expressions without their leaves' values, beyond ranges: finer bounds, and linearity."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import sympy

from hetu.symbols.expr import (
    Extremum,
    FloorDiv,
    IntFunction,
    Leaf,
    Max,
    Mod,
    add,
    divides,
    divisor_of,
    floor_where_defined,
    interval_of,
    make_int,
    multiply,
    parts_of,
    subtract,
    terms,
)
from hetu.symbols.interval import Interval

# How often a bound may be derived from another one. Enough for what lengths look like (floors of sums of floors);
# each derivation has a few alternatives, so that more would cost more than "don't know" does.
_STEPS = 3

_FEW = 8
"""How many operands of extrema are tried one by one, and looked into."""


def difference_of(a: Any, b: Any) -> Any:
    """``a - b`` multiplied out, with remainders as what they are of floors, so that whatever can cancel does."""
    plain: dict[Any, Any] = {}
    for item in parts_of(subtract(a, b)):
        parts = [plain[part] for part in item.args]
        if isinstance(item, IntFunction):  # sympy's expand doesn't look into it
            parts = [sympy.expand(part) for part in parts]
        if isinstance(item, (Mod, FloorDiv)) and parts[1] == 0:  # it has no value, which is for runs to say
            plain[item] = item
        elif isinstance(item, Mod):
            plain[item] = subtract(parts[0], multiply(parts[1], floor_where_defined(*parts)))
        elif isinstance(item, FloorDiv):
            plain[item] = floor_where_defined(*parts)
        else:
            plain[item] = item.func(*parts) if parts else item
    return _expanded(plain[item])  # the whole comes last


def bounds_of(expr: Any) -> Interval:
    """The values that an expression may take; finer than :func:`interval_of` where floors meet what they are of."""
    negated = _least(_expanded(multiply(make_int(-1), expr)), _STEPS)
    return Interval(_least(expr, _STEPS), None if negated is None else -negated)


def _expanded(expr: Any) -> Any:
    """An expression multiplied out; sympy looks for long at sums in which there is nothing to multiply."""
    is_plain = all(not item.is_Mul and not item.is_Pow and not item.is_Add for _, item in terms(expr))
    return expr if is_plain else sympy.expand(expr)


def never_zero(expr: Any) -> bool:
    """Whether it is known that no values make a sum zero, as in ``2*s - 2*t + 1``."""
    constant = sum(coefficient for coefficient, item in terms(expr) if item is sympy.S.One)
    divisor = divisor_of(subtract(expr, make_int(constant)))
    return divisor != 0 and constant % divisor != 0


def _least(expr: Any, steps: int) -> int | None:
    """A lower bound of an expression, None if none is known."""
    bounds = [interval_of(expr).lo]
    if steps and (bounds[0] is None or bounds[0] <= 0):
        for times, smaller in _smaller(expr):
            low = _least(smaller, steps - 1)
            bounds.append(None if low is None else -(-low // times))
        for choices in _choices(expr):
            rest = steps - 1 if len(choices) <= _FEW else 0
            lows = [_least(choice, rest) for choice in choices]
            bounds.append(None if None in lows else min(low for low in lows if low is not None))
    return max((bound for bound in bounds if bound is not None), default=None)


def _smaller(expr: Any) -> Iterator[tuple[int, Any]]:
    """Pairs ``(times, smaller)`` with ``times * expr >= smaller`` that may cancel better.

    With b > 0: ``a / b >= a // b >= (a - b + 1) / b``. Putting one of these for the floors in a sum, times all b,
    gives a sum without them: ``s - s // 2`` is at least ``(2 * s - s) / 2``.
    """
    pairs = terms(expr)
    floors = [pair for pair in pairs if _is_floor(pair[1])]
    subtracted = [pair for pair in floors if pair[0] < 0]
    for chosen in [subtracted, floors] if 0 < len(subtracted) < len(floors) else [floors] if floors else []:
        times = math.lcm(*(int(item.args[1].p) for _, item in chosen))
        kept = [multiply(make_int(times * n), item) for n, item in pairs if (n, item) not in chosen]
        yield times, sympy.expand(add(*kept, *(_floor_bound(n * times, item) for n, item in chosen)))
    low = [(n, item) for n, item in pairs if isinstance(item, Extremum) and (n > 0) == isinstance(item, Max)]
    counts = Counter(operand for _, item in low for operand in item.args)
    tried = list(counts)
    if len(counts) > _FEW and len(low) > 1:  # of many only those that cancel something
        tried = [operand for operand, count in counts.most_common(_FEW) if count > 1]
    for operand in tried:  # max(a, b) is at least a, and at least b
        exchanged = expr
        for n, item in low:
            if operand in item.args:
                exchanged = _exchange(exchanged, n, item, operand)
        yield 1, exchanged


def _choices(expr: Any) -> Iterator[list[Any]]:
    """Lists of expressions of which one has the value of ``expr``: with an operand in the place of a min(...)."""
    for n, item in terms(expr):
        if isinstance(item, Extremum) and (n > 0) != isinstance(item, Max):
            yield [_exchange(expr, n, item, operand) for operand in item.args]
            return


def _is_floor(item: Any) -> bool:
    return isinstance(item, FloorDiv) and bool(item.args[1].is_Integer) and item.args[1].p > 0


def _floor_bound(coefficient: int, floor: FloorDiv) -> Any:
    """What ``coefficient * (a // b)`` is at least, for a coefficient that is a multiple of b."""
    a, b = floor.args
    least = a if coefficient < 0 or divides(b, a) else add(a, make_int(1 - int(b.p)))
    return multiply(make_int(coefficient // int(b.p)), least)


def _exchange(expr: Any, coefficient: int, item: Any, operand: Any) -> Any:
    return sympy.expand(add(expr, multiply(make_int(-coefficient), item), multiply(make_int(coefficient), operand)))


def magnitude_of(expr: Any, most: int) -> int:
    """What the absolute value of an expression can't exceed where none of its leaves' absolute values exceeds ``most``.

    Example:
        >>> import hetu
        >>> s, t = hetu.IntSymbol("s"), hetu.IntSymbol("t")
        >>> magnitude_of((s * t - s // 2).expr, 10)
        111
    """
    found: dict[Any, int] = {}
    for item in parts_of(expr):
        parts = [found[part] for part in item.args]
        if item.is_Integer:
            found[item] = abs(int(item.p))
        elif isinstance(item, Leaf):
            found[item] = most
        elif isinstance(item, FloorDiv):
            found[item] = parts[0] + 1  # a divisor is 1 at least, and a floor is below
        elif isinstance(item, Mod):
            found[item] = parts[1]
        elif isinstance(item, Extremum):
            found[item] = max(parts)
        elif item.is_Pow:
            found[item] = parts[0] ** int(item.exp.p)
        else:
            found[item] = sum(parts) if item.is_Add else math.prod(parts)
    return found[expr]


def linear_in(expr: Any, leaf: Leaf) -> tuple[Any, Any] | None:
    """``(a, b)`` with ``expr == a * leaf + b``, neither of which holds the leaf; None if there are none."""
    slope, rest = [], []
    for term in sympy.Add.make_args(sympy.expand(expr)):
        factors = list(sympy.Mul.make_args(term))
        if leaf in factors:
            factors.remove(leaf)
            slope.append(multiply(*factors))
        else:
            rest.append(term)
    return None if any(leaf in parts_of(item) for item in (*slope, *rest)) else (add(*slope), add(*rest))
