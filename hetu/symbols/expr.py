"""The sympy side of symbols: the one place that makes sympy objects.

sympy's own floor, Mod, Max and Min are not used: they evaluate through assumptions and inequalities (Max of 32
symbols takes most of a second) and print to float divisions. The functions here do only what is cheap and exact.
Their canonical forms hold for all values within the leaves' ranges.

Leaves and functions carry their range and a divisor of all their values, so that these are found for any expression
from the nearest functions in it, not from the leaves up.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from functools import reduce
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import sympy
from sympy.printing.precedence import PRECEDENCE

from hetu.errors import HetuError, caller
from hetu.symbols.interval import ANY, Interval


class Leaf(sympy.Dummy):  # type: ignore[misc]  # sympy has no types
    """An unknown. Two leaves are different, whatever their names; each carries its range.

    Attributes:
        interval: The values that it may take.
        divisor: An int that divides them all.
        owner: The IntSymbol that it is the expression of.
    """

    interval: Interval
    divisor: int
    owner: Any

    def _sympystr(self, printer: Any) -> str:
        return str(self.name)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle(str(self.name))

    def __deepcopy__(self, memo: Any) -> Leaf:
        return self


def make_leaf(name: str, interval: Interval, multiple_of: int, owner: Any) -> Leaf:
    """A new unknown."""
    leaf = Leaf(name, integer=True)
    leaf.interval, leaf.divisor, leaf.owner = interval, multiple_of, owner
    return leaf


def make_int(value: int) -> Any:
    """A constant, of any size."""
    return sympy.Integer(value)


def add(*items: Any) -> Any:
    return sympy.Add(*items)


def multiply(*items: Any) -> Any:
    return sympy.Mul(*items)


def subtract(a: Any, b: Any) -> Any:
    if a.is_Add and b.is_Add:  # bounds of neighbours in a long sum: sympy would sort all that cancels
        return sympy.Add(*(sympy.Mul(make_int(number), item) for item, number in difference_terms(a, b)))
    return sympy.Add(a, sympy.Mul(sympy.S.NegativeOne, b))


def power(a: Any, exponent: Any) -> Any:
    if not exponent.is_Integer or exponent.p < 0:
        raise TypeError(f"{a} ** {exponent}: expected an exponent that is an int of at least 0")
    return sympy.Pow(a, exponent)


def difference_terms(a: Any, b: Any) -> list[tuple[Any, int]]:
    """The terms of ``a - b`` that don't cancel, each with its factor."""
    counts: dict[Any, int] = {}
    for sign, side in ((1, a), (-1, b)):
        for coefficient, item in terms(side):
            counts[item] = counts.get(item, 0) + sign * coefficient
    return [(item, number) for item, number in counts.items() if number]


class IntFunction(sympy.Expr):  # type: ignore[misc]
    """A function of ints with an int value, simplified when it is made and never after.

    There is one object per function and operands, and to sympy it has no parts. So what sympy does by recursion
    (comparing, hashing, sorting, expanding) ends at the nearest functions, however deep an expression is.

    Attributes:
        interval: The values that it may take.
        divisor: An int that divides them all.
    """

    is_integer = True
    is_commutative = True
    is_number = False  # all have a leaf in them
    is_Atom = True  # noqa: N815 - sympy's name
    is_Dummy = True  # noqa: N815 - sympy then sorts a multiple of it by its sort_key, and not by its text
    interval: Interval
    divisor: int
    _age: int

    @classmethod
    def _of(cls, *operands: Any) -> tuple[Any, bool]:
        """The object for some operands, and whether it is new: its range and divisor are then still to be set."""
        with _lock:
            found = _functions.get((cls, operands))
            if found is not None:
                return found, False
            made = sympy.Expr.__new__(cls, *operands)
            made._age = next(_ages)
            made._mhash = hash((cls.__name__, operands))
            return made, True

    @classmethod
    def _keep(cls, made: Any, interval: Interval, divisor: int) -> Any:
        """A new object with its range and divisor, for all who ask for the same operands from now on."""
        made.interval, made.divisor = interval, divisor
        with _lock:  # of two threads that made it the first has the word
            return _functions.setdefault((cls, made.args), made)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return int(self._mhash)

    def compare(self, other: Any) -> int:
        """Sympy's order within sums and products: of two functions the older one comes first."""
        if isinstance(other, IntFunction):
            return (self._age > other._age) - (self._age < other._age)
        return int(super().compare(other))

    def sort_key(self, order: Any = None) -> Any:
        """Sympy's order of anything."""
        return self.class_key(), (2, (self._age,)), sympy.S.One.sort_key(), sympy.S.One

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle(str(self))

    def __deepcopy__(self, memo: Any) -> IntFunction:
        return self

    def _sympystr(self, printer: Any) -> str:
        from hetu.symbols.text import text_of  # which knows these functions

        return text_of(self)


_functions: WeakValueDictionary[Any, Any] = WeakValueDictionary()
_ages = itertools.count()
_lock = threading.Lock()


def refuse_pickle(text: str) -> NoReturn:
    """Raises the error of a symbol that is to be pickled."""
    raise HetuError(
        f"the symbol {text} can't be pickled: in another process it would be another unknown",
        where=caller(),
        fix="pass ints, or make the symbols and the graph in each process",
    )


class FloorDiv(IntFunction):
    """Python's ``a // b``."""

    precedence = PRECEDENCE["Add"]  # sympy prints 3*(s//2) then, and not 3*s//2

    def __new__(cls, a: Any, b: Any) -> Any:
        return _floor_by_int(a, int(b.p)) if b.is_Integer else _floor_by_size(a, b, interval_of(b))


def floor_where_defined(a: Any, b: Any) -> Any:
    """``a // b``, simplified by what holds for all b but 0, for which there is no value: ``(a * b) // b`` is ``a``."""
    return FloorDiv(a, b) if b.is_Integer else _floor_by_size(a, b, None)


def _floor_by_size(a: Any, b: Any, divisor: Interval | None) -> Any:
    """``a // b`` for a symbolic b. Where that may be 0, nothing is cancelled: what is undefined stays so.

    Args:
        a: The dividend.
        b: The divisor.
        divisor: The range of b; None to leave 0 out of it.
    """
    if divisor is not None and 0 in divisor:
        return _new_floor(a, b)
    whole, rest = split_by_size(a, b)
    quotient = interval_of(rest) // (interval_of(b) if divisor is None else divisor)
    if quotient.lo is not None and quotient.lo == quotient.hi:
        return sympy.Add(whole, make_int(quotient.lo))
    return sympy.Add(whole, _new_floor(rest, b))


def split_by_size(a: Any, b: Any) -> tuple[Any, Any]:
    """``(whole, rest)`` with ``a == b * whole + rest``, for a symbolic b: terms that have b as a factor are whole."""
    at_once = _quotient(a, b)
    if at_once is not None:
        return at_once, make_int(0)
    whole, rest = list[Any](), list[Any]()
    for item in sympy.Add.make_args(a):
        factor = _quotient(item, b)
        (rest if factor is None else whole).append(item if factor is None else factor)
    left = sympy.Add(*rest)
    last = _quotient(left, b) if whole else None  # (s + 1)*t + s + 1 by s + 1
    return (sympy.Add(*whole), left) if last is None else (sympy.Add(*whole, last), make_int(0))


def _quotient(item: Any, b: Any) -> Any:
    """What times b is an expression, where that can be seen from its factors; None otherwise."""
    (own, factors), (number, wanted) = item.as_coeff_Mul(), b.as_coeff_Mul()
    if item.is_Integer or int(own.p) % int(number.p):
        return make_int(0) if item == 0 else None
    left = _without(sympy.Mul.make_args(factors), sympy.Mul.make_args(wanted))
    return None if left is None else sympy.Mul(make_int(int(own.p) // int(number.p)), *left)


def _without(factors: Sequence[Any], wanted: Sequence[Any]) -> list[Any] | None:
    """Some factors without some others; None if these are not among them."""
    powers = dict(factor.as_base_exp() for factor in factors)
    for factor in wanted:
        base, exponent = factor.as_base_exp()
        powers[base] = powers.get(base, sympy.S.Zero) - exponent
        if not powers[base].is_nonnegative:
            return None
    return [sympy.Pow(base, exponent) for base, exponent in powers.items()]


def _new_floor(a: Any, b: Any) -> Any:
    floor, is_new = FloorDiv._of(a, b)
    if not is_new:
        return floor
    return FloorDiv._keep(
        floor, interval_of(a) // interval_of(b), divisor_of(a) // abs(int(b.p)) if divides(b, a) else 1
    )


def _floor_by_int(a: Any, b: int) -> Any:
    if b == 0:
        raise ZeroDivisionError(f"division by zero: ({a})//0")
    whole, rest = split_multiples(a, b)
    common = math.gcd(b, *(coefficient for coefficient, _ in terms(rest)))
    if common > 1:
        rest = sympy.Add(*(make_int(coefficient // common) * item for coefficient, item in terms(rest)))
        b //= common
    quotient = interval_of(rest) // Interval.point(b)
    if quotient.lo is not None and quotient.lo == quotient.hi:
        return sympy.Add(whole, make_int(quotient.lo))
    if isinstance(rest, FloorDiv) and b > 0 and rest.args[1].is_Integer and rest.args[1].p > 0:
        return sympy.Add(whole, FloorDiv(rest.args[0], rest.args[1] * make_int(b)))  # (x // m) // n = x // (m * n)
    return sympy.Add(whole, _new_floor(rest, make_int(b)))


class Mod(IntFunction):
    """Python's ``a % b``."""

    precedence = PRECEDENCE["Add"]

    def __new__(cls, a: Any, b: Any) -> Any:
        if b.is_Integer:
            if b.p == 0:
                raise ZeroDivisionError(f"modulo by zero: ({a})%0")
            _, a = split_multiples(a, int(b.p))
            quotient = interval_of(a) // Interval.point(int(b.p))
            if quotient.lo == quotient.hi == 0:
                return a
        elif 0 not in interval_of(b):
            _, a = split_by_size(a, b)
            if a.is_Integer and a.p == 0:
                return a
        mod, is_new = cls._of(a, b)
        if not is_new:
            return mod
        return cls._keep(mod, interval_of(a) % interval_of(b), math.gcd(divisor_of(a), divisor_of(b)))


class Extremum(IntFunction):
    """Max or Min of any number of operands: flat, without doubles, constants folded, in one order."""

    def __new__(cls, *operands: Any) -> Any:
        flat: dict[Any, None] = {}
        for item in operands:
            cls._join(flat, item.args if isinstance(item, cls) else (item,))
        ints = [int(item.p) for item in flat if item.is_Integer]
        rest = [item for item in flat if not item.is_Integer]
        if ints:
            constant = max(ints) if cls is Max else min(ints)
            rest = [item for item in rest if not cls._beats(Interval.point(constant), interval_of(item))]
        rest.sort(key=sympy.default_sort_key)
        if ints and not any(cls._beats(interval_of(item), Interval.point(constant)) for item in rest):
            rest.append(make_int(constant))
        if len(rest) == 1:
            return rest[0]
        extremum, is_new = cls._of(*rest)
        if not is_new:
            return extremum
        interval = reduce(Interval.maximum if cls is Max else Interval.minimum, map(interval_of, rest))
        return cls._keep(extremum, interval, math.gcd(*map(divisor_of, rest)))

    @classmethod
    def _join(cls, kept: dict[Any, None], others: Sequence[Any]) -> None:
        """Adds operands that are none of each other's superfluous ones, and leaves out whoever another one beats.

        Args:
            kept: The operands so far, which is changed.
            others: Operands of one extremum, or a single one.
        """
        before, zero = list(kept), Interval.point(0)
        for item in others:
            if item in kept:
                continue
            is_needed = True
            for old in before:
                difference = interval_of_difference(item, old)
                is_beaten, beats = cls._beats(zero, difference), cls._beats(difference, zero)
                if is_beaten and beats:  # they are equal: one of them, whatever the order
                    beats = sympy.default_sort_key(item) < sympy.default_sort_key(old)
                    is_beaten = not beats
                if beats:
                    kept.pop(old, None)
                is_needed &= not is_beaten
            if is_needed:
                kept[item] = None

    @classmethod
    def _beats(cls, a: Interval, b: Interval) -> bool:
        """Whether any value of a makes one of b superfluous."""
        if cls is Min:
            a, b = -a, -b
        return a.lo is not None and b.hi is not None and a.lo >= b.hi


class Max(Extremum):
    """Python's ``max``."""


class Min(Extremum):
    """Python's ``min``."""


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
            whole.append(make_int(coefficient // shared) * _new_floor(item, make_int(b // shared)))
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


def leaves_of(expr: Any) -> tuple[Leaf, ...]:
    """The unknowns of an expression, oldest first."""
    found = [item for item in parts_of(expr) if isinstance(item, Leaf)]
    return tuple(sorted(found, key=lambda leaf: leaf.dummy_index))


def interval_of(expr: Any) -> Interval:
    """The values that an expression may take, from its leaves' ranges."""
    if expr.is_Integer:
        return Interval.point(int(expr.p))
    if isinstance(expr, (Leaf, IntFunction)):
        return expr.interval
    if expr.is_Add or expr.is_Mul:
        return reduce(Interval.__add__ if expr.is_Add else Interval.__mul__, map(interval_of, expr.args))
    return interval_of(expr.base).power(int(expr.exp.p)) if _is_power(expr) else ANY


def interval_of_difference(a: Any, b: Any) -> Interval:
    """The values that ``a - b`` may take, by what is left of their terms; it makes no expression."""
    bounds = [Interval.point(number) * interval_of(item) for item, number in difference_terms(a, b)]
    return reduce(Interval.__add__, bounds, Interval.point(0))


def divisor_of(expr: Any) -> int:
    """An int that divides every value of an expression, from its leaves' multiples; 0 for the constant 0."""
    if expr.is_Integer:
        return abs(int(expr.p))
    if isinstance(expr, (Leaf, IntFunction)):
        return expr.divisor
    if expr.is_Add:
        return math.gcd(*map(divisor_of, expr.args))
    if expr.is_Mul:
        return math.prod(map(divisor_of, expr.args))
    return divisor_of(expr.base) ** int(expr.exp.p) if _is_power(expr) else 1


def _is_power(expr: Any) -> bool:
    return bool(expr.is_Pow and expr.exp.is_Integer and expr.exp.p > 0)


def divides(b: Any, a: Any) -> bool:
    """Whether ``a // b`` is known to leave no remainder."""
    return bool(b.is_Integer) and divisor_of(a) % int(b.p) == 0
