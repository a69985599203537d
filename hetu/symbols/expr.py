"""The sympy side of symbols: the one place that makes sympy objects.

sympy's own floor, Mod, Max and Min are not used: they evaluate through assumptions and inequalities (Max of 32
symbols takes most of a second) and print to float divisions. The functions here do only what is cheap and exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy

from hetu.symbols.interval import ANY, Interval


class Leaf(sympy.Dummy):
    """An unknown. Two leaves are different, whatever their names; each carries its range.

    Attributes:
        interval: The values that it may take.
        owner: The IntSymbol that it is the expression of.
    """

    interval: Interval
    owner: Any

    def _sympystr(self, printer: Any) -> str:
        return str(self.name)


def make_leaf(name: str, interval: Interval, owner: Any) -> Leaf:
    """A new unknown."""
    leaf = Leaf(name, integer=True)
    leaf.interval, leaf.owner = interval, owner
    return leaf


def make_int(value: int) -> sympy.Integer:
    return sympy.Integer(value)


class IntFunction(sympy.Expr):
    """A function of ints with an int value, simplified when it is made and never after."""

    is_integer = True
    is_commutative = True


class FloorDiv(IntFunction):
    """Python's ``a // b``."""

    def __new__(cls, a: Any, b: Any) -> Any:
        a, b = sympy.sympify(a), sympy.sympify(b)
        if not b.is_Integer:
            return sympy.Expr.__new__(cls, a, b)
        if b.p == 0:
            raise ZeroDivisionError("division of a symbol by zero")
        if a.is_Integer:
            return sympy.Integer(a.p // b.p)
        if b.p == 1 or b.p == -1:
            return a * b
        whole, rest = split_multiples(a, b.p)
        common = math.gcd(b.p, *(coefficient for coefficient, _ in terms(rest))) if rest != 0 else abs(b.p)
        if common > 1:
            rest, b = divide_terms(rest, common), sympy.Integer(b.p // common)
        inner = _floor_of(rest, b)
        return whole + inner if whole != 0 else inner

    def _sympystr(self, printer: Any) -> str:
        return "//".join(_operand(printer, item) for item in self.args)


def _floor_of(a: Any, b: Any) -> Any:
    if a.is_Integer:
        return sympy.Integer(a.p // b.p)
    if b.p in (1, -1):
        return a * b
    if isinstance(a, FloorDiv) and b.p > 0 and a.args[1].is_Integer and a.args[1].p > 0:
        return FloorDiv(a.args[0], a.args[1] * b)  # (x // m) // n = x // (m * n)
    return sympy.Expr.__new__(FloorDiv, a, b)


class Mod(IntFunction):
    """Python's ``a % b``."""

    def __new__(cls, a: Any, b: Any) -> Any:
        a, b = sympy.sympify(a), sympy.sympify(b)
        if not b.is_Integer:
            return sympy.Expr.__new__(cls, a, b)
        if b.p == 0:
            raise ZeroDivisionError("modulo of a symbol by zero")
        _, rest = split_multiples(a, b.p)
        if rest.is_Integer:
            return sympy.Integer(rest.p % b.p)
        return sympy.Expr.__new__(cls, rest, b)

    def _sympystr(self, printer: Any) -> str:
        return "%".join(_operand(printer, item) for item in self.args)


class _Extremum(IntFunction):
    """Max or Min of any number of operands: flat, without doubles, constants folded, in one order."""

    pick: Callable[[Iterable[int]], int]

    def __new__(cls, *operands: Any) -> Any:
        flat: dict[Any, None] = {}
        for item in map(sympy.sympify, operands):
            flat.update(dict.fromkeys(item.args if isinstance(item, cls) else (item,)))
        ints = [item.p for item in flat if item.is_Integer]
        rest = sorted((item for item in flat if not item.is_Integer), key=sympy.default_sort_key)
        if ints:
            rest.append(sympy.Integer(cls.pick(ints)))
        return rest[0] if len(rest) == 1 else sympy.Expr.__new__(cls, *rest)

    def _sympystr(self, printer: Any) -> str:
        return f"{type(self).__name__.lower()}({', '.join(map(printer._print, self.args))})"


class Max(_Extremum):
    """Python's ``max``."""

    pick = staticmethod(max)


class Min(_Extremum):
    """Python's ``min``."""

    pick = staticmethod(min)


def _operand(printer: Any, item: Any) -> str:
    text = str(printer._print(item))
    return text if item.is_Symbol or (item.is_Integer and item.p >= 0) or isinstance(item, _Extremum) else f"({text})"


def terms(expr: Any) -> list[tuple[int, Any]]:
    """A sum's terms as (int coefficient, rest)."""
    return [_coefficient(item) for item in sympy.Add.make_args(expr)]


def _coefficient(term: Any) -> tuple[int, Any]:
    number, rest = term.as_coeff_Mul()
    return int(number.p), rest


def split_multiples(a: Any, b: int) -> tuple[Any, Any]:
    """``(whole, rest)`` with ``a == b * whole + rest`` and no term of ``rest`` a multiple of b."""
    whole, rest = [], []
    for coefficient, item in terms(a):
        if item == 1:  # the constant: keep its remainder, so that (s + 129) // 128 is (s + 1) // 128 + 1
            whole.append(sympy.Integer(coefficient // b))
            rest.append(sympy.Integer(coefficient % b))
        elif coefficient % b == 0:
            whole.append(sympy.Integer(coefficient // b) * item)
        else:
            rest.append(sympy.Integer(coefficient) * item)
    return sympy.Add(*whole), sympy.Add(*rest)


def divide_terms(a: Any, by: int) -> Any:
    """``a / by`` where every term's coefficient is a multiple of ``by``."""
    return sympy.Add(*(sympy.Integer(coefficient // by) * item for coefficient, item in terms(a)))


def interval_of(expr: Any) -> Interval:
    """The values that an expression may take, from its leaves' ranges."""
    if expr.is_Integer:
        return Interval.point(int(expr.p))
    if isinstance(expr, Leaf):
        return expr.interval
    parts = [interval_of(item) for item in expr.args]
    if expr.is_Add:
        return _fold(parts, Interval.__add__)
    if expr.is_Mul:
        return _fold(parts, Interval.__mul__)
    if isinstance(expr, FloorDiv):
        return parts[0] // parts[1]
    if isinstance(expr, Mod):
        return parts[0] % parts[1]
    if isinstance(expr, Max):
        return _fold(parts, Interval.maximum)
    if isinstance(expr, Min):
        return _fold(parts, Interval.minimum)
    return parts[0].power(int(expr.exp.p)) if expr.is_Pow and expr.exp.is_Integer and expr.exp.p > 0 else ANY


def _fold(parts: Sequence[Interval], op: Callable[[Interval, Interval], Interval]) -> Interval:
    total = parts[0]
    for part in parts[1:]:
        total = op(total, part)
    return total


def least(expr: Any) -> int | None:
    """A lower bound of an expression; finer than its interval where floors meet what they are floors of.

    With b > 0: ``a / b >= a // b >= (a - b + 1) / b``. Putting one of these for each floor in a sum, times b,
    gives a sum without floors that cancels: ``s - s // 2`` is at least ``(2 * s - s) / 2``.
    """
    low = interval_of(expr).lo
    if low is not None and low >= 0:
        return low
    for coefficient, item in terms(expr):
        if isinstance(item, FloorDiv) and item.args[1].is_Integer and item.args[1].p > 0:
            a, b = item.args
            bound = a if coefficient < 0 else a - b + 1
            finer = least(sympy.expand(b * (expr - coefficient * item) + coefficient * bound))
            if finer is not None:
                finer = -(-finer // int(b.p))
                return finer if low is None else max(low, finer)
    return low


def linear_in(expr: Any, leaf: Leaf) -> tuple[Any, Any] | None:
    """``(a, b)`` with ``expr == a * leaf + b``, neither of which holds the leaf; None if there are none."""
    slope, rest = [], []
    for term in sympy.Add.make_args(sympy.expand(expr)):
        if not term.has(leaf):
            rest.append(term)
            continue
        factors = list(sympy.Mul.make_args(term))
        if leaf not in factors:
            return None
        factors.remove(leaf)
        if any(item.has(leaf) for item in factors):
            return None
        slope.append(sympy.Mul(*factors))
    return sympy.Add(*slope), sympy.Add(*rest)


def leaves_of(expr: Any) -> tuple[Leaf, ...]:
    """The unknowns of an expression, oldest first."""
    return tuple(sorted(expr.atoms(Leaf), key=lambda leaf: leaf.dummy_index))
