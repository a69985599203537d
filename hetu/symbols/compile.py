"""Expressions compiled to Python source on ints: exact for any size, and free of sympy when called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hetu.symbols.expr import FloorDiv, Leaf, Max, Min, Mod

if TYPE_CHECKING:
    from hetu.symbols.int_symbol import IntSymbol


def compile_exprs(exprs: Sequence[IntSymbol], leaves: Sequence[IntSymbol]) -> Callable[..., tuple[int, ...]]:
    """One function that evaluates many expressions.

    Args:
        exprs: What to evaluate; shared parts are computed once.
        leaves: Leaf symbols, in the order of the function's arguments; they cover those of ``exprs``.

    Returns:
        ``f(*values) -> tuple of ints``. Its text is ``f.source``.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> compile_exprs([s // 2, s - s // 2], [s])(2**60 + 1)
        (576460752303423488, 576460752303423489)
    """
    return compile_sympy([item.expr for item in exprs], [item.expr for item in leaves])


def compile_sympy(exprs: Sequence[Any], leaves: Sequence[Leaf]) -> Callable[..., tuple[int, ...]]:
    """:func:`compile_exprs` for sympy expressions."""
    writer = _Writer({leaf: f"v{i}" for i, leaf in enumerate(leaves)})
    results = [writer.name(expr) for expr in exprs]
    body = [f"    {line}" for line in writer.lines]
    head = f"def sizes({', '.join(writer.names[leaf] for leaf in leaves)}):"
    source = "\n".join([head, *body, f"    return ({''.join(item + ', ' for item in results)})"])
    scope: dict[str, Any] = {}
    exec(compile(source, "<hetu sizes>", "exec"), scope)  # our own text, made of names and ints only
    function: Callable[..., tuple[int, ...]] = scope["sizes"]
    function.source = source  # type: ignore[attr-defined]
    return function


class _Writer:
    """Writes a line for every part of an expression, each part once."""

    def __init__(self, names: dict[Any, str]) -> None:
        self.names, self.lines = dict(names), list[str]()

    def name(self, expr: Any) -> str:
        """The variable, or the number, that holds a part's value."""
        if expr.is_Integer:
            return f"({int(expr.p)})"
        if expr not in self.names:
            text = self._text(expr)
            self.names[expr] = f"t{len(self.lines)}"
            self.lines.append(f"{self.names[expr]} = {text}")
        return self.names[expr]

    def _text(self, expr: Any) -> str:
        if expr.is_Pow:
            return f"{self.name(expr.base)} ** {int(expr.exp)}"
        parts = [self.name(item) for item in expr.args]
        for kind, sign in ((FloorDiv, " // "), (Mod, " % ")):
            if isinstance(expr, kind):
                return sign.join(parts)
        if isinstance(expr, (Max, Min)):
            return f"{'max' if isinstance(expr, Max) else 'min'}({', '.join(parts)})"
        return (" + " if expr.is_Add else " * ").join(parts)
