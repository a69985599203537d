"""The part of a graph that a list of fetches needs: it is found once and used by every later stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hetu.graph import Graph, Node, Role, Tensor
from hetu.graph.passes import live_nodes, merge_duplicates, nodes_of
from hetu.planning.indices import IndexCheck, computes_indices, index_checks
from hetu.symbols import Constraint, IntSymbol

if TYPE_CHECKING:
    from hetu.planning.binder import Binder
    from hetu.planning.pipelines import Pipelines

BinderKey = tuple[int, int, tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Subgraph:
    """The live part of a graph.

    Attributes:
        graph: The graph that it is a part of.
        fetches: The tensors that are asked for.
        nodes: Live nodes without duplicates, in computing order.
        replaced: For each tensor of a merged duplicate the tensor to read instead.
        feeds: Placeholders that must be fed.
        witnesses: Placeholders that need not be fed. If they are, their shapes tell symbols that no other shape tells:
            the gradient of a sum depends on the length of what is summed, and on nothing else of it.
        host_feeds: Placeholders whose values planning reads, directly or through nodes computed on the host.
        planned: Nodes with a plan.
        random: Random nodes, each with its place among all random nodes of the graph, so that a node
            draws the same numbers whatever else is fetched. What is computed again has its original's place.
        index_checks: What is known of the values of feeds and constants by which ops look something up.
        computes_indices: True if an op looks something up by what the graph computes.
        step_wide: Nodes whose value is made of the whole step before the rest is computed.
        draws: How many random nodes the whole graph has, clones aside: a run advances the generator by so much.
        constraints: Relations that must hold in every run.
        binders: The binders of its runs, by strategy, number of pipelines and fed placeholders. The planner makes them.
        fed: For the placeholders that a user feeds, in the user's order, those of them that a run reads.
        pipelines: What feeds know of each strategy's pipelines. The planner makes them.
    """

    graph: Graph
    fetches: tuple[Tensor, ...]
    nodes: tuple[Node, ...]
    replaced: dict[Tensor, Tensor]
    feeds: tuple[Tensor, ...]
    witnesses: tuple[Tensor, ...]
    host_feeds: tuple[Tensor, ...]
    planned: tuple[Node, ...]
    random: dict[Node, int]
    step_wide: tuple[Node, ...]
    draws: int
    constraints: tuple[Constraint, ...]
    index_checks: tuple[IndexCheck, ...]
    computes_indices: bool
    binders: dict[BinderKey, Binder] = field(default_factory=dict, init=False, repr=False)
    fed: dict[tuple[Tensor, ...], tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False)
    pipelines: dict[int, Pipelines] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, graph: Graph, fetches: Sequence[Tensor]) -> Subgraph:
        """Removes dead nodes and merges common subexpressions."""
        live = live_nodes(fetches)
        replaced = merge_duplicates(live)
        kept = [node for node in live if node.outputs[0] not in replaced]
        planned = [node for node in kept if node.definition.has_plan]
        hosts = [
            tensor
            for node in planned
            for name in node.definition.host_inputs
            if isinstance(tensor := node.input(name), Tensor)
        ]
        places = [node for node in graph.nodes if node.definition.is_random and node.original is None]
        place = {node: i for i, node in enumerate(places)}
        return cls(
            graph=graph,
            fetches=tuple(fetches),
            nodes=tuple(kept),
            replaced=replaced,
            feeds=_placeholders(kept),
            witnesses=_witnesses(graph, kept),
            host_feeds=_placeholders(live_nodes(hosts)),
            planned=tuple(planned),
            random={node: place[node.original or node] for node in kept if node.definition.is_random},
            step_wide=tuple(node for node in kept if node.definition.is_step_wide),
            draws=len(places),
            index_checks=index_checks(kept),
            computes_indices=computes_indices(kept),
            constraints=(*graph.constraints, *(item for node in live for item in node.constraints)),
        )

    def leaves(self, strategy: int) -> tuple[IntSymbol, ...]:
        """Symbols that must have a value: those of all live shapes and of the strategy's own lists."""
        shapes = (dim for node in self.nodes for tensor in node.outputs for dim in tensor.symbolic_shape)
        operands = (item for node in self.nodes for item in node.inputs if isinstance(item, IntSymbol))
        lists = (s for node in self.nodes for s in node.definition.shared_symbols(node, strategy))
        return tuple(dict.fromkeys(leaf for expr in (*shapes, *operands, *lists) for leaf in expr.leaves))


def _witnesses(graph: Graph, nodes: Sequence[Node]) -> tuple[Tensor, ...]:
    told = {leaf for tensor in _placeholders(nodes) for dim in tensor.symbolic_shape for leaf in dim.leaves}
    needed = {leaf for node in nodes for item in node.outputs for dim in item.symbolic_shape for leaf in dim.leaves}
    missing = needed - told
    if not missing:
        return ()
    return tuple(
        tensor
        for tensor in _placeholders(graph.nodes)
        if any(leaf in missing for dim in tensor.symbolic_shape for leaf in dim.leaves)
    )


def _placeholders(nodes: Sequence[Node]) -> tuple[Tensor, ...]:
    return tuple(node.outputs[0] for node in nodes_of(nodes, Role.PLACEHOLDER))
