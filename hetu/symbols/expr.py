"""The sympy side of symbols: the one place that makes sympy objects.

sympy's own floor, Mod, Max and Min are not used: they evaluate through assumptions and inequalities (Max of 32
symbols takes most of a second) and print to float divisions. The functions here do only what is cheap and exact.
Their canonical forms hold for all values within the leaves' ranges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeVar

import sympy
from sympy.printing.precedence import PRECEDENCE

from hetu.symbols.interval import ANY, Interval

_Value = TypeVar("_Value")


class Leaf(sympy.Dummy):
    """An unknown. Two leaves are different, whatever their names; each carries its range.

    Attributes:
        interval: The values that it may take.
        multiple_of: What they all are a multiple of.
        owner: The IntSymbol that it is the expression of.
    """

    interval: Interval
    multiple_of: int
    owner: Any

    def _sympystr(self, printer: Any) -> str:
        return str(self.name)


def make_leaf(name: str, interval: Interval, multiple_of: int, owner: Any) -> Leaf:
    """A new unknown."""
    leaf = Leaf(name, integer=True)
    leaf.interval, leaf.multiple_of, leaf.owner = interval, multiple_of, owner
    return leaf


def make_int(value: int) -> Any:
    """A constant, of any size."""
    return sympy.Integer(value)


def add(*items: Any) -> Any:
    return sympy.Add(*items)


def multiply(*items: Any) -> Any:
    return sympy.Mul(*items)


def subtract(a: Any, b: Any) -> Any:
    return sympy.Add(a, sympy.Mul(sympy.S.NegativeOne, b))


def text_of(expr: Any) -> str:
    """How an expression reads: as Python that would make it again."""
    return str(sympy.sstr(expr))


class IntFunction(sympy.Expr):
    """A function of ints with an int value, simplified when it is made and never after."""

    is_integer = True
    is_commutative = True


class FloorDiv(IntFunction):
    """Python's ``a // b``."""

    precedence = PRECEDENCE["Mul"]  # printed as 3*(s//2), which 3*s//2 is not

    def __new__(cls, a: Any, b: Any) -> Any:
        return _floor_by_int(a, int(b.p)) if b.is_Integer else sympy.Expr.__new__(cls, a, b)

    def _sympystr(self, printer: Any) -> str:
        return "//".join(_operand(printer, item) for item in self.args)


def _floor_by_int(a: Any, b: int) -> Any:
    if b == 0:
        raise ZeroDivisionError(f"division by zero: ({text_of(a)}) // 0")
    whole, rest = split_multiples(a, b)
    common = math.gcd(b, *(coefficient for coefficient, _ in terms(rest)))
    rest, b = sympy.Add(*(make_int(coefficient // common) * item for coefficient, item in terms(rest))), b // common
    quotient = interval_of(rest) // Interval.point(b)
    if quotient.lo is not None and quotient.lo == quotient.hi:
        return sympy.Add(whole, make_int(quotient.lo))
    if isinstance(rest, FloorDiv) and b > 0 and rest.args[1].is_Integer and rest.args[1].p > 0:
        return sympy.Add(whole, FloorDiv(rest.args[0], rest.args[1] * make_int(b)))  # (x // m) // n = x // (m * n)
    return sympy.Add(whole, sympy.Expr.__new__(FloorDiv, rest, make_int(b)))


class Mod(IntFunction):
    """Python's ``a % b``."""

    precedence = PRECEDENCE["Mul"]

    def __new__(cls, a: Any, b: Any) -> Any:
        if not b.is_Integer:
            return sympy.Expr.__new__(cls, a, b)
        if b.p == 0:
            raise ZeroDivisionError(f"modulo by zero: ({text_of(a)}) % 0")
        _, rest = split_multiples(a, int(b.p))
        quotient = interval_of(rest) // Interval.point(int(b.p))
        return rest if quotient.lo == quotient.hi == 0 else sympy.Expr.__new__(cls, rest, b)

    def _sympystr(self, printer: Any) -> str:
        return "%".join(_operand(printer, item) for item in self.args)


class Extremum(IntFunction):
    """Max or Min of any number of operands: flat, without doubles, constants folded, in one order."""

    def __new__(cls, *operands: Any) -> Any:
        flat: dict[Any, None] = {}
        for item in operands:
            flat.update(dict.fromkeys(item.args if isinstance(item, cls) else (item,)))
        ints = [int(item.p) for item in flat if item.is_Integer]
        rest = [item for item in flat if not item.is_Integer]
        if ints:
            constant = max(ints) if cls is Max else min(ints)
            rest = [item for item in rest if not cls._beats(Interval.point(constant), interval_of(item))]
            if not any(cls._beats(interval_of(item), Interval.point(constant)) for item in rest):
                rest.append(make_int(constant))
        rest.sort(key=sympy.default_sort_key)
        return rest[0] if len(rest) == 1 else sympy.Expr.__new__(cls, *rest)

    @classmethod
    def _beats(cls, a: Interval, b: Interval) -> bool:
        """Whether any value of a makes one of b superfluous."""
        if cls is Min:
            a, b = -a, -b
        return a.lo is not None and b.hi is not None and a.lo >= b.hi

    def _sympystr(self, printer: Any) -> str:
        return f"{type(self).__name__.lower()}({', '.join(map(printer._print, self.args))})"


class Max(Extremum):
    """Python's ``max``."""


class Min(Extremum):
    """Python's ``min``."""


def _operand(printer: Any, item: Any) -> str:
    text = str(printer._print(item))
    return text if item.is_Symbol or (item.is_Integer and item.p >= 0) or isinstance(item, Extremum) else f"({text})"


def terms(expr: Any) -> list[tuple[int, Any]]:
    """A sum's terms as (int coefficient, rest); the rest of a constant is 1."""
    split = (item.as_coeff_Mul() for item in sympy.Add.make_args(expr))
    return [(int(number.p), rest) for number, rest in split]


def split_multiples(a: Any, b: int) -> tuple[Any, Any]:
    """``(whole, rest)`` with ``a == b * whole + rest`` and no term of ``rest`` known to be a multiple of b."""
    whole, rest = [], []
    for coefficient, item in terms(a):
        shared = math.gcd(coefficient, b)
        if item is sympy.S.One:  # the constant: keep its remainder, so that (s + 129) // 128 is (s + 1) // 128 + 1
            whole.append(make_int(coefficient // b))
            rest.append(make_int(coefficient % b))
        elif shared == abs(b):
            whole.append(make_int(coefficient // b) * item)
        elif divisor_of(item) % (b // shared) == 0:
            exact = sympy.Expr.__new__(FloorDiv, item, make_int(b // shared))
            whole.append(make_int(coefficient // shared) * exact)
        else:
            rest.append(make_int(coefficient) * item)
    return sympy.Add(*whole), sympy.Add(*rest)


def parts_of(expr: Any) -> list[Any]:
    """All parts of an expression, operands first, each once.

    A loop, because expressions that share parts have many more paths than parts, and may be deep.
    """
    done: dict[Any, None] = {}
    stack = [expr]
    while stack:
        waiting = [item for item in stack[-1].args if item not in done]
        if waiting:
            stack += waiting
        else:
            done[stack.pop()] = None
    return list(done)


def fold(expr: Any, rule: Callable[[Any, list[_Value]], _Value]) -> _Value:
    """A value for an expression from ``rule(part, values of its operands)``, computed once for each part."""
    known: dict[Any, _Value] = {}
    for item in parts_of(expr):
        known[item] = rule(item, [known[operand] for operand in item.args])
    return known[expr]


def leaves_of(expr: Any) -> tuple[Leaf, ...]:
    """The unknowns of an expression, oldest first."""
    found = [item for item in parts_of(expr) if isinstance(item, Leaf)]
    return tuple(sorted(found, key=lambda leaf: leaf.dummy_index))


def interval_of(expr: Any) -> Interval:
    """The values that an expression may take, from its leaves' ranges."""
    return fold(expr, _interval)


def _interval(item: Any, parts: Sequence[Interval]) -> Interval:
    if item.is_Integer:
        return Interval.point(int(item.p))
    if isinstance(item, Leaf):
        return item.interval
    if item.is_Pow:
        return parts[0].power(int(item.exp.p)) if item.exp.is_Integer and item.exp.p > 0 else ANY
    for kind, rule in _INTERVAL_RULES.items():
        if isinstance(item, kind):
            return reduce(rule, parts)
    return ANY


_INTERVAL_RULES: dict[Any, Callable[[Interval, Interval], Interval]] = {
    sympy.Add: Interval.__add__,
    sympy.Mul: Interval.__mul__,
    FloorDiv: Interval.__floordiv__,
    Mod: Interval.__mod__,
    Max: Interval.maximum,
    Min: Interval.minimum,
}


def divisor_of(expr: Any) -> int:
    """An int that divides every value of an expression, from its leaves' multiples; 0 for the constant 0."""
    return fold(expr, _divisor)


def _divisor(item: Any, parts: Sequence[int]) -> int:
    if item.is_Integer:
        return abs(int(item.p))
    if isinstance(item, Leaf):
        return item.multiple_of
    if item.is_Mul:
        return math.prod(parts)
    if item.is_Pow:
        return parts[0]
    if isinstance(item, FloorDiv):
        return parts[0] // parts[1] if divides_exactly(item, parts[0]) else 1
    return math.gcd(*parts)  # a sum, a remainder, the largest or the least


def divides_exactly(floor: FloorDiv, divisor: int | None = None) -> bool:
    """Whether ``a // b`` is known to leave no remainder; ``divisor`` is a's, if it is at hand."""
    a, b = floor.args
    return bool(b.is_Integer) and (divisor_of(a) if divisor is None else divisor) % int(b.p) == 0
