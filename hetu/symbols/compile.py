"""Expressions compiled to Python source on ints: exact for any size, and free of sympy when called."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from hetu.errors import BindingError, caller
from hetu.symbols.expr import FloorDiv, Leaf, Max, Min, Mod, interval_of, leaves_of, parts_of
from hetu.symbols.text import text_of

if TYPE_CHECKING:
    from hetu.symbols.int_symbol import IntSymbol

_OPERATORS = {"Add": " + ", "Mul": " * ", "Pow": " ** ", FloorDiv.__name__: " // ", Mod.__name__: " % "}
_FILENAME = os.path.join(os.path.dirname(__file__), "<sizes>")  # within the package, so never "the user's line"
_CALLS = {Max.__name__: "max", Min.__name__: "min"}


def compile_exprs(exprs: Sequence[IntSymbol], leaves: Sequence[IntSymbol]) -> Callable[..., tuple[int, ...]]:
    """One function that evaluates many expressions.

    Args:
        exprs: What to evaluate; shared parts are computed once, and have a line each.
        leaves: Leaf symbols, in the order of the function's arguments; they cover those of ``exprs``.

    Returns:
        ``f(*values) -> tuple of ints``, for values within the leaves' ranges. Its text is ``f.source``. It raises a
        BindingError where a divisor is zero.

    Raises:
        ValueError: If an expression has a leaf that is not in ``leaves``.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> halves = compile_exprs([s // 2, s - s // 2], [s])
        >>> halves(2**60 + 1)
        (576460752303423488, 576460752303423489)
        >>> print(halves.source)
        def sizes(v0):
            t0 = v0 // (2)
            t1 = ((-1) * t0) + v0
            return (t0, t1, )
    """
    return compile_sympy([item.expr for item in exprs], [item.expr for item in leaves])


def compile_sympy(exprs: Sequence[Any], leaves: Sequence[Leaf]) -> Callable[..., tuple[int, ...]]:
    """:func:`compile_exprs` for sympy expressions."""
    writer = _Writer(leaves, exprs)
    results = "".join(f"{writer.name(expr)}, " for expr in exprs)
    source = "\n".join([f"def sizes({writer.arguments}):", *writer.lines, f"    return ({results})"])
    scope: dict[str, Any] = {"refuse": _refuser(leaves, writer.divisors)}
    exec(compile(source, _FILENAME, "exec"), scope)  # our own text, made of our own names and ints only
    function: Callable[..., tuple[int, ...]] = scope["sizes"]
    function.source = source  # type: ignore[attr-defined]
    return function


_NESTED = 16
"""How many parentheses are nested at most; Python takes some hundred."""


class _Writer:
    """Writes a line for every part of the expressions that is used several times; others stand where they are used.

    Attributes:
        arguments: The leaves' names in the text, with commas.
        lines: The function's body.
        divisors: Those that may be zero; the text refuses a zero by their index.
    """

    def __init__(self, leaves: Sequence[Leaf], exprs: Sequence[Any]) -> None:
        self._names: dict[Any, str] = {leaf: f"v{i}" for i, leaf in enumerate(leaves)}
        parts = dict.fromkeys(part for expr in exprs for part in parts_of(expr))
        self._uses = Counter(operand for part in parts for operand in part.args * _times(part))
        self._uses.update([*exprs, *exprs])  # results have lines
        self._nested: dict[Any, int] = {}
        self.arguments = ", ".join(self._names.values())
        self.lines: list[str] = []
        self.divisors: list[Any] = []
        self._count = 0

    def name(self, expr: Any) -> str:
        """The variable, or the number, that holds an expression's value."""
        for item in parts_of(expr):
            if item in self._names:
                continue
            if isinstance(item, Leaf):
                raise ValueError(f"{item} is not among the leaves: {self.arguments or 'there are none'}")
            if item.is_Integer:
                self._names[item] = f"({int(item.p)})"
            else:
                self._write(item, [self._names[operand] for operand in item.args])
        return self._names[expr]

    def _write(self, item: Any, operands: list[str]) -> None:
        kind = type(item).__name__
        if isinstance(item, (FloorDiv, Mod)) and 0 in interval_of(item.args[1]):
            self.lines.append(f"    if {operands[1]} == 0: refuse({len(self.divisors)}, {self.arguments})")
            self.divisors.append(item.args[1])
        text = _extremum(_CALLS[kind], operands) if kind in _CALLS else _OPERATORS[kind].join(operands)
        nested = 1 + max(self._nested.get(operand, 0) for operand in item.args)
        if self._uses[item] == 1 and nested <= _NESTED:
            self._names[item], self._nested[item] = f"({text})", nested
            return
        self._names[item] = f"t{self._count}"
        self.lines.append(f"    t{self._count} = {text}")
        self._count += 1


def _times(item: Any) -> int:
    """How often the text of a part names its operands, at most."""
    is_compared = type(item).__name__ in _CALLS
    is_refused = isinstance(item, (FloorDiv, Mod)) and 0 in interval_of(item.args[1])
    return 2 if is_compared or is_refused else 1


def _extremum(call: str, operands: list[str]) -> str:
    """The largest or smallest operand: of two by a comparison, which takes a third of the time of a call."""
    if len(operands) != 2:
        return f"{call}({', '.join(operands)})"
    a, b = operands
    return f"{a} if {a} {'>' if call == 'max' else '<'} {b} else {b}"


def _refuser(leaves: Sequence[Leaf], divisors: Sequence[Any]) -> Callable[..., NoReturn]:
    """What compiled text calls where a divisor is zero. All that needs sympy is done here, not in the call."""
    told = [(text_of(item), leaves_of(item)) for item in divisors]

    def refuse(index: int, *values: int) -> NoReturn:
        text, of = told[index]
        bound = [f"{leaf.name} = {value}" for leaf, value in zip(leaves, values, strict=True) if leaf in of]
        raise BindingError(
            f"{text} is 0, and a size is divided by it",
            where=caller(),
            bound=bound,
            fix=f"bind {text} to another value",
        )

    return refuse
