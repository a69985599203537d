"""The graph that ops are added to: the one whose ``with`` block was entered last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hetu.errors import HetuError, caller
from hetu.graph.graph import Graph, entered
from hetu.graph.tensor import Tensor
from hetu.symbols import Constraint


def current_graph(inputs: Iterable[Any] = (), op: str | None = None) -> Graph:
    """The graph that an op adds to: its tensors', else that of the innermost ``with``.

    Raises:
        HetuError: Outside of any graph.
    """
    for item in inputs:
        if isinstance(item, Tensor):
            return item.graph
    stack = entered.get()
    if not stack:
        raise HetuError(
            "called outside of a graph", op=op, where=caller(), fix='call it within "with hetu.graph(...) as g:"'
        )
    return stack[-1]


def _requirements() -> Sequence[Constraint]:
    """What the current graph demands of every run."""
    stack = entered.get()
    return stack[-1].constraints if stack else ()


Constraint.requirements = staticmethod(_requirements)


def require(constraint: Constraint) -> None:
    """Demands a relation between symbols in every run of the current graph.

    What is demanded decides comparisons of the same symbols in what is built after it.

    Args:
        constraint: A comparison such as ``s > 5`` or ``hetu.equal(a, b)``. Python's ``==`` and ``!=`` compare how
            symbols are made and give a bool, which demands nothing: bools are refused.

    Raises:
        ShapeError: At once if it can't hold for any value in the symbols' ranges.
        HetuError: Outside of a graph, or if it is no such comparison.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run") as g:
        ...     hetu.require(s <= 4096)
    """
    current_graph(op="require").require(constraint)
