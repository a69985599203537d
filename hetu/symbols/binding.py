"""Values of symbols, with where each came from; and the solver that finds them from equations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from hetu.arguments import shown
from hetu.errors import BindingError, Where, caller
from hetu.symbols.analysis import linear_in
from hetu.symbols.compile import compile_exprs, compile_sympy
from hetu.symbols.expr import leaves_of
from hetu.symbols.int_symbol import IntSymbol, as_int
from hetu.symbols.text import names_of

Values = MutableMapping[IntSymbol, int]
Sources = MutableMapping[IntSymbol, str]


class Source(str):
    """Where a value came from, in words, and the expression whose value was told there: the leaf was solved from it."""

    expr: IntSymbol

    @classmethod
    def of(cls, text: str, expr: IntSymbol) -> Source:
        made = cls(text)
        made.expr = expr
        return made

    def on(self, pipeline: int) -> Source:
        """The same, told by another pipeline."""
        return Source.of(f"{self} (pipeline {pipeline})", self.expr)


class Binding(Mapping[IntSymbol, int]):
    """Values of leaf symbols in one run. Immutable; binding never changes a symbol.

    Args:
        values: Leaves and their values.
        sources: For each leaf where its value came from: ``"int_symbol_dict"``, ``"shape of x, dimension 0"``.

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
        return expr.evaluate(self._values) if isinstance(expr, IntSymbol) else as_int(expr)

    def describe(self, *exprs: IntSymbol | int) -> list[str]:
        """A line for each bound leaf of some expressions: ``max_q = 512   from int_symbol_dict``."""
        leaves = dict.fromkeys(leaf for expr in exprs if isinstance(expr, IntSymbol) for leaf in expr.leaves)
        return _describe(tuple(leaves), self._values, self._sources)

    def explain(self, *leaves: IntSymbol) -> str:
        """A line for each of some symbols, or all: its value, where it came from, and what it was solved from.

        Example:
            >>> s = IntSymbol("s")
            >>> solved, sources = {}, {}
            >>> Solver([Equation(2 * s + 1, "shape of x, dimension 0")]).solve(solved, sources, [7])
            True
            >>> print(Binding(solved, sources).explain())
            s = 3, from shape of x, dimension 0: 2*s + 1 is 7
        """
        return "\n".join(map(self._explained, leaves or self)) or "(nothing bound)"

    def _explained(self, leaf: IntSymbol) -> str:
        source, value = self._sources[leaf], shown(self._values[leaf])
        told = source.expr if isinstance(source, Source) else leaf
        solved = "" if told == leaf else f": {told} is {shown(told.evaluate(self._values))}"
        return f"{leaf} = {value}, from {source}{solved}"

    def __repr__(self) -> str:
        return f"Binding({', '.join(f'{leaf}={value}' for leaf, value in self._values.items())})"

    def __str__(self) -> str:
        return "\n".join(self.describe(*self)) or "(nothing bound)"


def check_leaf(leaf: IntSymbol, value: Any, source: str, where: Where | None = None) -> int:
    """A value for a leaf as an int, checked against the leaf's range and multiple.

    Args:
        leaf: The leaf.
        value: What it is to be.
        source: Who says so, for the error.
        where: The user's line to name; the caller's if there is none.

    Raises:
        BindingError: If it is no leaf, the value is no int, or lies outside of the leaf's range.

    Example:
        >>> check_leaf(IntSymbol("s", max=8), 7, "int_symbol_dict")
        7
    """
    if not isinstance(leaf, IntSymbol):
        kind = type(leaf).__name__
        _refuse(f"{shown(leaf)} ({kind}) is no symbol, so {source} can't bind it", where, "use the IntSymbol itself")
    if not leaf.is_leaf:
        names = ", ".join(map(str, leaf.leaves))
        fix = f"bind {names} instead" if names else "leave it out"
        _refuse(f"{leaf} is no leaf symbol, so {source} can't bind it", where, fix)
    try:
        number = as_int(value)
    except TypeError:
        _refuse(
            f"{leaf} is {shown(value)} ({type(value).__name__}) from {source}, expected an int", where, "give an int"
        )
    if not _fits(leaf, number):
        _refuse(
            f"{leaf} is {shown(number)} from {source}, expected {_wanted(leaf)}", where, f"give {leaf} such a value"
        )
    return number


def _fits(leaf: IntSymbol, value: int) -> bool:
    return value in leaf.interval and value % leaf.multiple_of == 0


def _wanted(leaf: IntSymbol) -> str:
    """What a leaf may be, in words."""
    kind = "an int" if leaf.multiple_of == 1 else f"a multiple of {shown(leaf.multiple_of)}"
    least, most = shown(leaf.min), shown(leaf.max)
    if leaf.max is None:
        return kind if leaf.min is None else f"{kind}, at least {least}"
    return f"{kind}, at most {most}" if leaf.min is None else f"{kind} from {least} to {most}"


def _refuse(what: str, where: Where | None, fix: str, bound: Sequence[str] = ()) -> NoReturn:
    raise BindingError(what, where=where or caller(), bound=bound, fix=fix)


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

    ``value`` gives the expression's value from those of ``leaves``, and ``slopes[leaf]`` gives (a, b) of
    ``a * leaf + b`` from those of ``others[leaf]``.

    Most sizes are a constant or ``slope * only + rest`` of a single leaf with a slope that is not zero: then that is
    kept, with what the leaf may be, and no function needs to be called.
    """

    equation: Equation
    source: Source
    text: str
    leaves: tuple[IntSymbol, ...]
    value: Callable[..., tuple[int, ...]]
    others: dict[IntSymbol, tuple[IntSymbol, ...]]
    slopes: dict[IntSymbol, Callable[..., tuple[int, ...]]]
    constant: int | None
    only: IntSymbol | None
    slope: int
    rest: int
    low: float
    high: float
    multiple: int


class Solver:
    """Finds leaf symbols from equations ``expr == value``, again and again for new values.

    All sympy work is done here, none by :meth:`solve`.

    Args:
        equations: What will be told.

    Example:
        >>> s = IntSymbol("s")
        >>> known, sources = {}, {}
        >>> Solver([Equation(2 * s + 1, "shape of x, dimension 0")]).solve(known, sources, [15])
        True
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
        open_ = []
        for one, value in zip(self._equations, values, strict=True):
            if value is None or value == one.constant:
                continue
            leaf = one.only
            if leaf is not None:  # nearly always all goes well: what doesn't is told apart below
                got = known.get(leaf)
                if got is None:
                    solution, remainder = divmod(value - one.rest, one.slope)
                    if not remainder and one.low <= solution <= one.high and solution % one.multiple == 0:
                        known[leaf], sources[leaf] = solution, one.source
                        continue
                elif one.slope * got + one.rest == value:
                    continue
            if not self._use(one, value, known, sources):
                open_.append((one, value))
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
            (got,) = one.value(*[known[leaf] for leaf in one.leaves])
            if got != value:
                _conflict(one, value, got, known, sources)
            return True
        if len(unknown) > 1 or unknown[0] not in one.slopes:
            return False
        leaf = unknown[0]
        slope, rest = one.slopes[leaf](*[known[other] for other in one.others[leaf]])
        if slope == 0:
            return False
        solution, remainder = divmod(value - rest, slope)
        if remainder or not _fits(leaf, solution):
            _no_solution(one, leaf, value, None if remainder else solution, known, sources)
        known[leaf], sources[leaf] = solution, one.source
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
    value = compile_exprs([equation.expr], leaves)
    only, slope, rest, low, high, multiple = None, 0, 0, -math.inf, math.inf, 1
    if len(leaves) == 1 and leaves[0] in slopes and not others[leaves[0]]:
        slope, rest = slopes[leaves[0]]()
        only = leaves[0] if slope else None
        low = low if leaves[0].min is None else leaves[0].min
        high = high if leaves[0].max is None else leaves[0].max
        multiple = leaves[0].multiple_of
    constant, text = equation.expr.constant, str(equation.expr)
    source = Source.of(equation.source, equation.expr)
    return _Prepared(
        equation, source, text, leaves, value, others, slopes, constant, only, slope, rest, low, high, multiple
    )


def _no_solution(
    one: _Prepared, leaf: IntSymbol, value: int, solution: int | None, known: Values, sources: Sources
) -> NoReturn:
    source, others = one.equation.source, [other for other in one.leaves if other != leaf]
    if solution is None:
        what = f"{source} is {value}, but {one.text} is that for no int {leaf}"
    elif one.equation.expr.is_leaf:
        what = f"{source} is {value}, expected {leaf}, {_wanted(leaf)}"
    else:
        what = f"{source} is {value}, so that {one.text} makes {leaf} {solution}, expected {_wanted(leaf)}"
    _refuse(what, one.equation.where, f"feed a size that {one.text} can have", _describe(others, known, sources))


def _describe(
    leaves: Sequence[IntSymbol], known: Mapping[IntSymbol, int], sources: Mapping[IntSymbol, str]
) -> list[str]:
    names = names_of(leaf.expr for leaf in leaves)
    return [f"{names[leaf.expr]} = {shown(known[leaf])}   from {sources[leaf]}" for leaf in leaves if leaf in known]


def _conflict(one: _Prepared, value: int, got: int, known: Values, sources: Sources) -> NoReturn:
    expr, source = one.equation.expr, one.equation.source
    fix = "make the two agree, or leave one of them out"
    if expr.constant is not None:
        what, fix = f"{source} is {value}, expected {one.text}", f"feed a size of {one.text}"
    elif expr.is_leaf:
        what = f"{one.text} is {shown(got)} from {sources[expr]}, but {value} from {source}"
    else:
        what = f"{one.text} is {got}, but {source} is {value}"
    _refuse(what, one.equation.where, fix, _describe(one.leaves, known, sources))
