"""How a graph's symbols bind, without computing anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hetu.arguments import integers, mapping, refuse
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.graph import Graph, Tensor
from hetu.planning.planner import Prepared
from hetu.shards import Shards
from hetu.symbols import Binding, IntSymbol, as_size
from hetu.testing.graphs import given_graph


@dataclass(frozen=True)
class Bound:
    """A run that is bound, selected and planned, and not computed. ``print`` it to see every symbol's source.

    Attributes:
        prepared: What the run would be: its strategy, bindings and plans.
    """

    prepared: Prepared

    @property
    def strategy(self) -> int:
        """The index of the strategy that was taken."""
        return self.prepared.strategy

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """Every pipeline's symbols, each with where its value came from."""
        return self.prepared.bindings

    def values(self, expr: IntSymbol | int) -> tuple[int, ...]:
        """The value of a symbol or an expression on each pipeline."""
        size = as_size(expr, "expr", op="values")
        return tuple(binding.evaluate(size) for binding in self.bindings)

    def shapes(self, tensor: Tensor) -> tuple[tuple[int, ...], ...]:
        """The shape of a tensor on each pipeline."""
        if not isinstance(tensor, Tensor):
            refuse(tensor, "tensor", "a tensor of the graph", op="shapes")
        return tuple(zip(*map(self.values, tensor.symbolic_shape), strict=True)) or ((),) * len(self.bindings)

    def __str__(self) -> str:
        return str(self.prepared)


def bind(
    graph: Graph,
    fetches: Tensor | Sequence[Tensor],
    shapes: Mapping[Tensor, Any] | None = None,
    *,
    int_symbol_dict: Mapping[IntSymbol, int] | None = None,
    strategy: int | str | None = None,
) -> Bound:
    """Binds, selects and plans a run as ``graph.run`` would, from shapes alone. Nothing is computed.

    Args:
        graph: The graph.
        fetches: What the run would fetch.
        shapes: For each placeholder its shape, a tuple of ints; or a list of one shape per pipeline. Where planning
            reads the values (``cu_seqlens``, say), or indices are to be checked, give the array itself or
            ``hetu.Shards``.
        int_symbol_dict: As for ``run``.
        strategy: As for ``run``.

    Returns:
        The bound run.

    Raises:
        HetuError: Whatever the run would refuse before anything is computed.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2 * s + 1, 8], name="x")
        ...     y = hetu.relu(x)
        >>> bound = hetu.testing.bind(g, y, {x: (7, 8)})
        >>> bound.values(s), bound.shapes(y)
        ((3,), ((7, 8),))
        >>> print(bound)
        strategy 0: 1 pipeline
        pipeline 0
          s = 3, from shape of x, dimension 0: 2*s + 1 is 7
    """
    graph = given_graph(graph, "bind")
    given = mapping({} if shapes is None else shapes, "shapes", "a shape for each placeholder", op="bind")
    feeds = {tensor: _stand_in(tensor, value) for tensor, value in given.items()}
    planner = graph.planner
    prepared, _ = planner.prepare(planner.subgraph(fetches), feeds, int_symbol_dict, strategy)
    return Bound(prepared)


def _stand_in(tensor: Any, value: Any) -> Any:
    """What is fed for a shape: zeros that take no memory."""
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        return Shards([_stand_in(tensor, item) for item in value])
    if not isinstance(value, tuple) or not isinstance(tensor, Tensor):
        return value
    sizes = integers(value, "shapes", op="bind")
    return torch.zeros((), dtype=TORCH_DTYPES[tensor.dtype]).expand(*map(int, sizes))


def assert_bound(bound: Bound, expected: Mapping[IntSymbol, int | Sequence[int]]) -> None:
    """Compares what symbols and expressions were bound to.

    Args:
        bound: What :func:`bind` gave.
        expected: For each its value, or one per pipeline.

    Raises:
        AssertionError: Naming each that differs, with where its value came from.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [s], name="x")
        >>> hetu.testing.assert_bound(hetu.testing.bind(g, x, {x: (3,)}), {s: 4, 2 * s: 6})
        Traceback (most recent call last):
        AssertionError: s is 3, expected 4
          s = 3, from shape of x, dimension 0
    """
    wrong = []
    for expr, value in _expected(bound, expected, "a value for each symbol", IntSymbol, "assert_bound"):
        for r, (got, wanted) in enumerate(zip(bound.values(expr), _per_pipeline(value, bound), strict=True)):
            if got != wanted:
                leaves = [leaf for leaf in bound.bindings[r] if leaf in expr.leaves]
                sources = [f"\n  {line}" for line in bound.bindings[r].explain(*leaves).splitlines()]
                wrong.append(f"{expr}{_on(r, bound)} is {got}, expected {wanted}{''.join(sources)}")
    if wrong:
        raise AssertionError("\n".join(wrong))


def assert_shapes(bound: Bound, expected: Mapping[Tensor, Any]) -> None:
    """Compares tensors' shapes.

    Args:
        bound: What :func:`bind` gave.
        expected: For each tensor its shape, a tuple, or a list of one per pipeline.

    Raises:
        AssertionError: Naming each that differs, with its symbolic shape and the symbols' values.
    """
    wrong = []
    for tensor, shape in _expected(bound, expected, "a shape for each tensor", Tensor, "assert_shapes"):
        for r, (got, wanted) in enumerate(zip(bound.shapes(tensor), _per_pipeline(shape, bound), strict=True)):
            if got != integers(wanted, f"the shape of {tensor.name}", op="assert_shapes"):
                symbolic = ", ".join(map(str, tensor.symbolic_shape))
                leaves = dict.fromkeys(leaf for size in tensor.symbolic_shape for leaf in size.leaves)
                sources = [f"\n  {line}" for line in bound.bindings[r].explain(*leaves).splitlines() if leaves]
                wrong.append(
                    f"{tensor.name}{_on(r, bound)} is [{symbolic}] = {got}, expected {tuple(wanted)}{''.join(sources)}"
                )
    if wrong:
        raise AssertionError("\n".join(wrong))


def _expected(bound: Any, expected: Any, of: str, kind: type, op: str) -> Iterable[tuple[Any, Any]]:
    """What is expected, after a look at whether it can be compared."""
    if not isinstance(bound, Bound):
        refuse(bound, "bound", "what hetu.testing.bind gave", op=op)
    given = mapping(expected, "expected", of, op=op)
    for key in given:
        if not isinstance(key, kind):
            refuse(key, "a key of expected", f"a hetu.{kind.__name__}", op=op)
    return given.items()


def _per_pipeline(value: Any, bound: Bound) -> Sequence[Any]:
    """A value for each pipeline: a list is one per pipeline, anything else is the same for all."""
    count = len(bound.bindings)
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise AssertionError(f"{len(value)} values are expected, but there are {count} pipelines")
    return value


def _on(pipeline: int, bound: Bound) -> str:
    return f" on pipeline {pipeline}" if len(bound.bindings) > 1 else ""
