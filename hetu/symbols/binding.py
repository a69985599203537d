"""Values of symbols, with where each came from; and the solver that finds them from equations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from hetu.errors import BindingError, Where, caller
from hetu.symbols.compile import compile_sympy
from hetu.symbols.expr import leaves_of, linear_in
from hetu.symbols.int_symbol import IntSymbol, as_int, as_symbol

Values = MutableMapping[IntSymbol, int]
Sources = MutableMapping[IntSymbol, str]


class Binding(Mapping[IntSymbol, int]):
    """Values of leaf symbols in one run. Immutable; binding never changes a symbol.

    Args:
        values: Leaves and their values.
        sources: For each leaf where its value came from.

    Example:
        >>> s = IntSymbol("s")
        >>> b = Binding({s: 7}, {s: "int_symbol_dict"})
        >>> b[s], b.evaluate(2 * s + 1), b.describe(s)
        (7, 15, ['s = 7   from int_symbol_dict'])
    """

    __slots__ = ("_sources", "_values")

    def __init__(self, values: Mapping[IntSymbol, int], sources: Mapping[IntSymbol, str]) -> None:
        self._values, self._sources = dict(values), dict(sources)

    def __getitem__(self, leaf: IntSymbol) -> int:
        return self._values[leaf]

    def __iter__(self) -> Iterator[IntSymbol]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def source(self, leaf: IntSymbol) -> str:
        """Where the leaf's value came from."""
        return self._sources[leaf]

    def evaluate(self, expr: IntSymbol | int) -> int:
        """The value of an expression.

        Raises:
            UnboundSymbolError: If a leaf of it is not bound.
        """
        return as_symbol(expr).evaluate(self._values)

    def describe(self, expr: IntSymbol | int) -> list[str]:
        """A line for each bound leaf of an expression: ``max_q = 512   from int_symbol_dict``."""
        leaves = as_symbol(expr).leaves
        return [f"{leaf} = {self[leaf]}   from {self.source(leaf)}" for leaf in leaves if leaf in self]

    def __repr__(self) -> str:
        return f"Binding({', '.join(f'{leaf}={value}' for leaf, value in self._values.items())})"

    def __str__(self) -> str:
        return "\n".join(line for leaf in self for line in self.describe(leaf)) or "(nothing bound)"


def check_leaf(leaf: IntSymbol, value: Any, source: str, where: Where | None = None) -> int:
    """A value for a leaf as an int, checked against the leaf's range and multiple.

    Raises:
        BindingError: If it is no leaf, the value is no int, or lies outside of the leaf's range.
    """
    if not isinstance(leaf, IntSymbol) or not leaf.is_leaf:
        _refuse(leaf, f"{leaf!s} is no leaf symbol, so it takes no value from {source}", where, "bind its leaves instead")
    try:
        number = as_int(value)
    except TypeError:
        _refuse(leaf, f"{leaf} was given {value!r} by {source}, expected an int", where, "give an int")
    if number not in leaf.interval or number % leaf.multiple_of:
        wanted = f"an int in {leaf.interval}" + (f", a multiple of {leaf.multiple_of}" if leaf.multiple_of > 1 else "")
        _refuse(leaf, f"{leaf} is {number} from {source}, expected {wanted}", where, f"bind {leaf} to a value in its range")
    return number


def _refuse(leaf: Any, what: str, where: Where | None, fix: str) -> NoReturn:
    raise BindingError(what, where=where or caller(), fix=fix)


@dataclass(frozen=True, slots=True)
class Equation:
    """An expression whose value will be told.

    Attributes:
        expr: The expression.
        source: Who tells it, for messages: ``"shape of x, dimension 0"``.
        where: The user's line that it stands on.
    """

    expr: IntSymbol
    source: str
    where: Where | None = None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An equation with everything computed that needs sympy.

    ``slopes[leaf]`` gives (a, b) of ``a * leaf + b`` from the values of ``others[leaf]``.
    """

    equation: Equation
    leaves: tuple[IntSymbol, ...]
    others: dict[IntSymbol, tuple[IntSymbol, ...]]
    slopes: dict[IntSymbol, Callable[..., tuple[int, ...]]]


class Solver:
    """Finds leaf symbols from equations ``expr == value``, again and again for new values.

    All sympy work is done here, none by :meth:`solve`.

    Args:
        equations: What will be told.

    Example:
        >>> s = IntSymbol("s")
        >>> known, sources = {}, {}
        >>> Solver([Equation(2 * s + 1, "shape of x, dimension 0")]).solve(known, sources, [15])
        >>> known[s], sources[s]
        (7, 'shape of x, dimension 0')
    """

    def __init__(self, equations: Sequence[Equation]) -> None:
        self._equations = [_prepare(equation) for equation in equations]

    def solve(self, known: Values, sources: Sources, values: Sequence[int | None]) -> bool:
        """Adds to ``known`` and ``sources`` what the equations tell; what they leave open stays out.

        Args:
            known: Values of leaves.
            sources: Where each came from.
            values: For each equation its value, None if it is not told.

        Returns:
            Whether every equation that was told is used up, so that asking again would tell nothing more.

        Raises:
            BindingError: If an equation contradicts what is known, has no int solution, or one out of range.
        """
        open_ = [(one, value) for one, value in zip(self._equations, values, strict=True) if value is not None]
        while open_:
            left = [item for item in open_ if not self._use(*item, known, sources)]
            if len(left) == len(open_):
                return False
            open_ = left
        return True

    def _use(self, one: _Prepared, value: int, known: Values, sources: Sources) -> bool:
        """Checks or solves one equation; False if it is not ripe."""
        unknown = [leaf for leaf in one.leaves if leaf not in known]
        if not unknown:
            got = one.equation.expr.evaluate(known)
            if got != value:
                _conflict(one.equation, value, got, known, sources)
            return True
        if len(unknown) > 1 or unknown[0] not in one.slopes:
            return False
        leaf = unknown[0]
        slope, rest = one.slopes[leaf](*(known[other] for other in one.others[leaf]))
        if slope == 0:
            return False
        solution, remainder = divmod(value - rest, slope)
        source, where = one.equation.source, one.equation.where
        if remainder:
            _refuse(
                leaf,
                f"{source} is {value}, which is {one.equation.expr} for no int {leaf}",
                where,
                f"feed an array whose size is {one.equation.expr}",
            )
        known[leaf], sources[leaf] = check_leaf(leaf, solution, source, where), source
        return True


def _prepare(equation: Equation) -> _Prepared:
    expr, leaves = equation.expr.expr, equation.expr.leaves
    others, slopes = {}, {}
    for leaf in leaves:
        linear = linear_in(expr, leaf.expr)
        if linear is not None:
            needed = tuple(dict.fromkeys(item.owner for part in linear for item in leaves_of(part)))
            others[leaf] = needed
            slopes[leaf] = compile_sympy(linear, [item.expr for item in needed])
    return _Prepared(equation, leaves, others, slopes)


def _conflict(equation: Equation, value: int, got: int, known: Values, sources: Sources) -> NoReturn:
    expr = equation.expr
    if expr.constant is not None:
        what = f"{equation.source} is {value}, expected {expr}"
    elif expr.is_leaf:
        what = f"{expr} is {got} from {sources[expr]}, but {value} from {equation.source}"
    else:
        what = f"{expr} is {got}, but {equation.source} is {value}"
    bound = [f"{leaf} = {known[leaf]}   from {sources[leaf]}" for leaf in expr.leaves]
    fix = "make the two agree, or leave one of them out" if expr.leaves else "feed an array of the placeholder's shape"
    raise BindingError(what, where=equation.where or caller(), bound=bound, fix=fix)
