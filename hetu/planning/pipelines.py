"""The pipelines of a strategy as feeds see them: how many, in which groups, and what each must be given for itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hetu.graph import Graph, Node, Role, Tensor
from hetu.ops.attention.layout_op import LayoutOp, strategy_of
from hetu.ops.choice import Where
from hetu.ops.common.elementwise import Elementwise
from hetu.ops.joining import Concat
from hetu.symbols import IntSymbol


@dataclass(frozen=True, slots=True)
class Pipelines:
    """The pipelines of one strategy.

    Attributes:
        strategy: The strategy's index; None where it is not chosen yet.
        count: How many there are. None if neither the graph nor an op of it says: then the shards that are fed do.
        groups: Each pipeline's context group. None if nothing says, or ops say different things.
        own_rows: The placeholders of which every pipeline needs rows of its own.
    """

    strategy: int | None
    count: int | None
    groups: tuple[IntSymbol | int, ...] | None
    own_rows: frozenset[Tensor]

    @classmethod
    def of(cls, graph: Graph, strategy: int, own_rows: frozenset[Tensor]) -> Pipelines:
        """The pipelines of a graph's strategy, whatever is fetched."""
        said = {strategy_of(node, strategy).groups for node in graph.nodes if isinstance(node.definition, LayoutOp)}
        if graph.strategies:
            said = {graph.strategies[strategy].groups}
        groups = next(iter(said)) if len(said) == 1 else None
        return cls(strategy, graph.num_pipelines(strategy), groups, own_rows)


UNKNOWN = Pipelines(None, None, None, frozenset())
"""The pipelines of a strategy that is not chosen yet."""


def placeholders_of_rows(graph: Graph) -> frozenset[Tensor]:
    """The placeholders that have a row for each token of a pipeline, so that no two pipelines can share an array.

    These are what the rows of ops over layouts are made of, and all others whose shapes have the same number of rows.
    """
    nodes = [node for node in graph.nodes if isinstance(node.definition, LayoutOp)]
    found = {source for node in nodes for source in _sources_of_rows(node.tensors[0])}
    rows = {node.tensors[0].symbolic_shape[0] for node in nodes}
    same = _equal_sizes(graph, {size for size in rows if size.constant is None})
    for node in graph.nodes:
        if node.role is Role.PLACEHOLDER and not same.isdisjoint(node.outputs[0].symbolic_shape):
            found.add(node.outputs[0])
    return frozenset(found)


def _sources_of_rows(x: Tensor) -> Iterator[Tensor]:
    """The placeholders that a tensor's rows come from: what an op computes row by row from is its first operand."""
    stack, seen = [x], set[Tensor]()
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        if item.op.role is Role.PLACEHOLDER:
            yield item
        stack += _row_operands(item.op, item)


def _row_operands(node: Node, out: Tensor) -> Sequence[Tensor]:
    if isinstance(node.definition, (Elementwise, Where)):  # a bias has fewer dimensions, or one row
        return [x for x in node.tensors if x.ndim == out.ndim and x.symbolic_shape[:1] == out.symbolic_shape[:1]]
    return node.tensors if isinstance(node.definition, Concat) else node.tensors[:1]


def _equal_sizes(graph: Graph, sizes: set[IntSymbol]) -> set[IntSymbol]:
    """Sizes, and all others that a run demands to be equal to one of them."""
    demands = (*graph.constraints, *(item for node in graph.nodes for item in node.constraints))
    pairs = [(item.lhs, item.rhs) for item in demands if item.op == "=="]
    found, grew = set(sizes), True
    while grew:
        count = len(found)
        for pair in pairs:
            if not found.isdisjoint(pair):
                found.update(side for side in pair if side.constant is None)
        grew = len(found) > count
    return found
