"""IntSymbol: an integer that is known only when the graph runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import cached_property
from numbers import Integral, Number
from typing import TYPE_CHECKING, Any, NoReturn

from hetu.arguments import MOST_OF_FLOATS, int_of, integer, number_of, refuse
from hetu.errors import DTypeError, HetuError, UnboundSymbolError, caller
from hetu.symbols.compile import compile_sympy
from hetu.symbols.expr import (
    FloorDiv,
    Mod,
    add,
    divisor_of,
    interval_of,
    leaves_of,
    make_int,
    make_leaf,
    multiply,
    power,
    refuse_pickle,
    subtract,
)
from hetu.symbols.interval import Interval, leaf_range
from hetu.symbols.text import names_of, placed, text_of

if TYPE_CHECKING:
    from hetu.symbols.constraint import Constraint

_unnamed = itertools.count()


class IntSymbol:
    """An int that is known only when the graph runs: a leaf, or an expression of leaves.

    Every call makes a new unknown, also where names are equal. Expressions are equal, and hash alike, when their
    canonical forms are. Ints of any size are exact; bools and floats are refused.

    Args:
        value: A leaf's name, or the default value of an unnamed leaf; None for an unnamed leaf without one.
        min: Least value of the leaf, None for no bound.
        max: Greatest value, None for no bound.
        multiple_of: What the value is a multiple of; the range is narrowed to its multiples.

    Attributes:
        expr: The sympy expression.

    Raises:
        BindingError: If the range is empty, or the default value lies outside of it.
        DTypeError: If an argument is no int; it is a TypeError too.

    Example:
        >>> s = IntSymbol("s", max=4096)
        >>> e = (s + 127) // 128 * 128
        >>> e.min, e.max, e.evaluate({s: 129})
        (0, 4096, 256)
    """

    __slots__ = ("__dict__", "_default", "_name", "expr")
    __array_ufunc__ = None  # numpy's ints and arrays leave arithmetic with a symbol to the symbol

    def __init__(
        self, value: str | int | None = None, *, min: int | None = 0, max: int | None = None, multiple_of: int = 1
    ) -> None:
        interval, multiple = leaf_range(min, max, multiple_of)
        if value is not None and not isinstance(value, str) and int_of(value) is None:
            wanted, fix = "a name or an int", 'write IntSymbol("seq_len"), or IntSymbol(4096) for a default value'
            refuse(value, "value", wanted, op="IntSymbol", error=DTypeError, fix=fix)
        self._name: str | None = str(value) if isinstance(value, str) else f"_{next(_unnamed)}"
        self._default: int | None = None
        self.expr: Any = make_leaf(str(self._name), interval, multiple, self)
        if value is not None and not isinstance(value, str):
            self._default = self._checked(value)

    @classmethod
    def from_expr(cls, expr: Any) -> IntSymbol:
        """The IntSymbol of a sympy expression over leaves."""
        if hasattr(expr, "owner"):
            owner: IntSymbol = expr.owner
            return owner
        symbol = object.__new__(cls)
        symbol._name = symbol._default = None
        symbol.expr = expr
        return symbol

    # What it is

    @property
    def is_leaf(self) -> bool:
        """Whether it is an unknown, not an expression or a constant."""
        return self._name is not None

    @property
    def name(self) -> str | None:
        """A leaf's name; None for an expression."""
        return self._name

    @cached_property
    def constant(self) -> int | None:
        """The value of a constant; None for all else."""
        return int(self.expr.p) if self.expr.is_Integer else None

    @cached_property
    def interval(self) -> Interval:
        """The values that it may take."""
        return interval_of(self.expr)

    @property
    def min(self) -> int | None:
        """Least possible value; None if there is no bound."""
        return self.interval.lo

    @property
    def max(self) -> int | None:
        """Greatest possible value; None if there is no bound."""
        return self.interval.hi

    @cached_property
    def multiple_of(self) -> int:
        """What the value is known to be a multiple of."""
        return divisor_of(self.expr) or 1  # everything divides the constant 0

    @cached_property
    def leaves(self) -> tuple[IntSymbol, ...]:
        """The leaves that it is made of, oldest first."""
        return tuple(leaf.owner for leaf in leaves_of(self.expr))

    # Values

    @property
    def default(self) -> int | None:
        """A leaf's default value; None if it has none."""
        return self._default

    @property
    def data(self) -> int:
        """The default value; of an expression, the value at its leaves' defaults.

        Raises:
            UnboundSymbolError: If a leaf has none.
        """
        if self.is_leaf:
            return self._default if self._default is not None else self.evaluate({})
        return self.evaluate({leaf: leaf._default for leaf in self.leaves if leaf._default is not None})

    def get_data(self) -> int:
        """The same as :attr:`data`."""
        return self.data

    def set_data(self, value: int) -> None:
        """Sets a leaf's default value.

        Raises:
            BindingError: If this is no leaf, or the value lies outside of its range.
            DTypeError: If the value is no int; it is a TypeError too.
        """
        self._default = self._checked(value)

    def _checked(self, value: Any) -> int:
        from hetu.symbols.binding import check_leaf

        return check_leaf(self, integer(value, "value", op="set_data", error=DTypeError), "set_data")

    def evaluate(self, values: Mapping[IntSymbol, int]) -> int:
        """The value for given values of the leaves, each within its range.

        Raises:
            BindingError: If a divisor is zero.
            UnboundSymbolError: If a leaf has no value; names all that have none.
        """
        missing = [leaf for leaf in self.leaves if leaf not in values]
        if missing:
            names = ", ".join(names_of(leaf.expr for leaf in missing).values())
            raise UnboundSymbolError(
                f"no value for {names}" + ("" if self.is_leaf else f" in {self}"),
                where=caller(),
                fix=f"give {names} in int_symbol_dict, or set_data(...) a default",
            )
        # numpy's ints would overflow
        return int(self._function(*(as_int(values[leaf]) for leaf in self.leaves))[0])

    @cached_property
    def _function(self) -> Any:
        return compile_sympy([self.expr], [leaf.expr for leaf in self.leaves])

    # Arithmetic

    def __add__(self, other: IntSymbol | int) -> IntSymbol:
        return _combine("+", add, self, other)

    def __radd__(self, other: int) -> IntSymbol:
        return _combine("+", add, other, self)

    def __sub__(self, other: IntSymbol | int) -> IntSymbol:
        return _combine("-", subtract, self, other)

    def __rsub__(self, other: int) -> IntSymbol:
        return _combine("-", subtract, other, self)

    def __mul__(self, other: IntSymbol | int) -> IntSymbol:
        return _combine("*", multiply, self, other)

    def __rmul__(self, other: int) -> IntSymbol:
        return _combine("*", multiply, other, self)

    def __floordiv__(self, other: IntSymbol | int) -> IntSymbol:
        return _combine("//", FloorDiv, self, other)

    def __rfloordiv__(self, other: int) -> IntSymbol:
        return _combine("//", FloorDiv, other, self)

    def __mod__(self, other: IntSymbol | int) -> IntSymbol:
        return _combine("%", Mod, self, other)

    def __rmod__(self, other: int) -> IntSymbol:
        return _combine("%", Mod, other, self)

    def __divmod__(self, other: IntSymbol | int) -> Any:
        quotient = self // other
        return NotImplemented if quotient is NotImplemented else (quotient, self % other)

    def __rdivmod__(self, other: int) -> Any:
        quotient = other // self
        return NotImplemented if quotient is NotImplemented else (quotient, other % self)

    def __pow__(self, exponent: int) -> Any:
        return _combine("**", power, self, exponent)

    def __neg__(self) -> IntSymbol:
        return -1 * self

    def __pos__(self) -> IntSymbol:
        return self

    def __truediv__(self, other: Any) -> Any:
        return _no_division(self, other, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _no_division(other, self, other)

    # Comparison

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, IntSymbol):
            return bool(self.expr == other.expr)
        if isinstance(other, (int, Integral)):
            return self.constant is not None and self.constant == int(other)
        return NotImplemented

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.expr)  # of a constant, its int's

    def __lt__(self, other: IntSymbol | int) -> Constraint:
        return _compare("<", self, other)

    def __le__(self, other: IntSymbol | int) -> Constraint:
        return _compare("<=", self, other)

    def __gt__(self, other: IntSymbol | int) -> Constraint:
        return _compare(">", self, other)

    def __ge__(self, other: IntSymbol | int) -> Constraint:
        return _compare(">=", self, other)

    def __bool__(self) -> bool:
        if self.constant is not None:
            return self.constant != 0
        if 0 not in self.interval:
            return True
        raise UnboundSymbolError(
            f"whether {self} is zero is known only when the graph runs",
            where=caller(),
            fix=f"demand it with hetu.require({self} > 0), or give {self} a range (min=1)",
        )

    def __index__(self) -> int:
        if self.constant is not None:
            return self.constant
        raise DTypeError(  # a TypeError, as of whatever is no int
            f"{self} is an int only when the graph runs, and Python needs one now",
            where=caller(),
            fix=f"give a plain int, or {self}.data if it has a default; ops of hetu take symbols",
        )

    # A copy would be another unknown of the same name, which nothing binds.

    def __copy__(self) -> IntSymbol:
        return self

    def __deepcopy__(self, memo: Any) -> IntSymbol:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle(str(self))

    def __str__(self) -> str:
        return self._text

    def __format__(self, spec: str) -> str:
        """A constant is written as its int is; of all else the text, to which a width and a place in it apply."""
        return format(self.constant, spec) if self.constant is not None else placed(str(self), spec)

    @cached_property
    def _text(self) -> str:
        return text_of(self.expr) if self._name is None else self._name

    def __repr__(self) -> str:
        return f"IntSymbol({self})"


def as_int(value: Any, name: str = "a size") -> int:
    """An int, numpy's included, and no bool.

    Args:
        value: What came.
        name: What it is, for the error.

    Raises:
        DTypeError: For anything else; floats never enter.
    """
    number = value if type(value) is int else int_of(value)
    if number is None:
        refuse(value, name, "an int or an IntSymbol", error=DTypeError, fix=_INTS)
    return number


_INTS = "give an int or an IntSymbol; sizes are exact ints"


def as_size(value: Any, name: str, *, op: str | None = None, error: type[HetuError] = DTypeError) -> IntSymbol | int:
    """A size: an IntSymbol, or an int of any kind as Python's.

    Args:
        value: What came.
        name: The argument's name.
        op: Who asks, for the error.
        error: The class of the error.

    Example:
        >>> as_size(IntSymbol("s"), "seq_len"), as_size(5, "seq_len")
        (IntSymbol(s), 5)
    """
    number = value if isinstance(value, IntSymbol) else int_of(value)
    if number is None or (isinstance(number, int) and abs(number) > MOST_OF_FLOATS):
        refuse(value, name, "an int or an IntSymbol", op=op, error=error, fix=_INTS)
    return number


def as_symbol(value: IntSymbol | int, name: str = "a size") -> IntSymbol:
    """The symbol itself, or an int as a constant.

    Args:
        value: What came.
        name: What it is, for the error.

    Raises:
        DTypeError: If it is neither.

    Example:
        >>> as_symbol(5).constant
        5
    """
    return value if isinstance(value, IntSymbol) else IntSymbol.from_expr(make_int(as_int(value, name)))


def _operand(value: Any, text: Callable[[], str]) -> IntSymbol | None:
    """One side of an operator as a symbol; None for a type that may know better what to do with symbols.

    Raises:
        TypeError: For bools and numbers that are no ints.
    """
    if isinstance(value, IntSymbol):
        return value
    number = int_of(value)
    if number is not None:
        return IntSymbol.from_expr(make_int(number))
    if isinstance(value, Number) or number_of(value) is not None:
        raise TypeError(f"{text()}: symbols are exact ints, got a {type(value).__name__}; write an int")
    return None


def _combine(sign: str, make: Callable[[Any, Any], Any], a: Any, b: Any) -> IntSymbol:
    left, right = (_operand(value, lambda: f"{a} {sign} {b}") for value in (a, b))
    return NotImplemented if left is None or right is None else IntSymbol.from_expr(make(left.expr, right.expr))


def _compare(op: str, a: IntSymbol, b: Any) -> Constraint:
    from hetu.symbols.constraint import Constraint

    right = _operand(b, lambda: f"{a} {op} {b}")
    return NotImplemented if right is None else Constraint(op, a, right)


def _no_division(a: Any, b: Any, other: Any) -> Any:
    if not isinstance(other, (IntSymbol, Number)):
        return NotImplemented  # a tensor knows how to be divided
    raise TypeError(f"{a} / {b} may be no int: use // for floor division, or hetu.ceil_div")
