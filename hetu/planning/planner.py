"""The stages before any number is computed: bind, select, plan. Integers only; knows nothing of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NoReturn

from numpy.typing import NDArray

from hetu.arguments import int_of, refuse, shown, text
from hetu.cache import LRU
from hetu.config import settings
from hetu.errors import BindingError, HetuError, StrategyError, caller
from hetu.graph import Graph, Node, Tensor
from hetu.ops.attention.layout_key import LayoutKey
from hetu.ops.attention.layout_op import LayoutOp, Value, strategy_of
from hetu.ops.attention.parallel_attn import ParallelAttn
from hetu.parallel import AttnPlan, Hardware, Layout
from hetu.parallel.choice.setting import chosen
from hetu.parallel.layout.printing import count
from hetu.planning import stages
from hetu.planning.arrays import host_array
from hetu.planning.binder import GIVEN, Binder, BoundPipeline, check_constraints
from hetu.planning.choosing import (
    BACKWARD,
    Choice,
    Chooser,
    Counted,
    Explanation,
    count_attentions,
    explain_strategy,
    strategy_name,
)
from hetu.planning.feeds import FeedReader, FeedSet, read_feeds, split_micro_batches, tensors_of
from hetu.planning.indices import check_indices
from hetu.planning.names import find_feeds, find_fetches
from hetu.planning.pipelines import Pipelines, placeholders_of_rows
from hetu.planning.subgraph import Subgraph
from hetu.symbols import Binding, IntSymbol, check_leaf

STRUCTURES, LENGTH_SETS = 64, 512
"""How many structures (sets of fetches and strategies) and how many sets of lengths are remembered."""


ComputeOnHost = Callable[[Subgraph, Mapping[Tensor, Any], BoundPipeline], Any]
"""Computes the one fetch of a subgraph on the CPU, from a pipeline's fed arrays and symbols; gives a torch tensor."""


@dataclass(slots=True, eq=False, weakref_slot=True)  # not frozen: each new set of lengths makes one
class Prepared:
    """A run that is bound, selected and planned, and not yet computed.

    Attributes:
        subgraph: What will be computed.
        strategy: Index of the strategy.
        bindings: Each pipeline's symbols, with where every value came from.
        plans: Each planned node's plan: one for all pipelines where the node spans them, else one per pipeline.
    """

    subgraph: Subgraph
    strategy: int
    bindings: tuple[Binding, ...]
    plans: dict[Node, tuple[Any, ...]]

    @property
    def num_pipelines(self) -> int:
        return len(self.bindings)

    def __repr__(self) -> str:
        planned = ", ".join(node.name for node in self.plans) or "nothing"
        return f"<strategy {self.strategy} on {self.num_pipelines} pipelines, planned: {planned}>"

    def __str__(self) -> str:
        """The strategy, every pipeline's symbols with where each value came from, and what each node's plan does."""
        named = self.subgraph.graph.strategies
        name = f" {named[self.strategy].name!r}" if named and named[self.strategy].name is not None else ""
        lines = [f"strategy {self.strategy}{name}: {count(self.num_pipelines, 'pipeline')}"]
        for r, binding in enumerate(self.bindings):
            lines += [f"pipeline {r}", *(f"  {line}" for line in binding.explain().splitlines())]
        for node, plans in self.plans.items():
            attention = [plan for plan in plans if isinstance(plan, AttnPlan)]
            lines.append(f"{node.name}: {attention[0].summary() if attention else count(len(plans), 'plan')}")
        return "\n".join(lines)

    def attention_plans(self) -> Iterator[AttnPlan]:
        """The plans that span all pipelines."""
        return (plan for plans in self.plans.values() for plan in plans if isinstance(plan, AttnPlan))

    def build_parts(self, pipelines: Sequence[int]) -> None:
        """Builds what some pipelines do in the attention plans, before anything is computed or sent."""
        for plan in self.attention_plans():
            plan.need(pipelines)


class Planner:
    """Binds and plans the runs of one graph, and remembers both by lengths.

    Args:
        graph: The graph.
        compute_on_host: What computes those values that planning reads and the graph makes (``cu_seqlens`` from
            lengths, say): the one thing that runs before planning, and that needs a backend.
    """

    def __init__(self, graph: Graph, compute_on_host: ComputeOnHost) -> None:
        self.graph = graph
        self._compute_on_host = compute_on_host
        self.subgraphs: LRU[Subgraph] = LRU(STRUCTURES)
        self.plans: LRU[Any] = LRU(LENGTH_SETS)
        self.prepared: LRU[Prepared] = LRU(LENGTH_SETS)
        self._own_rows: tuple[Any, frozenset[Tensor]] = (None, frozenset())
        self._chooser = Chooser(graph.num_strategy)

    def __repr__(self) -> str:
        return f"<Planner of {self.graph.name}>"

    def subgraph(self, fetches: Tensor | Sequence[Tensor]) -> Subgraph:
        """What the fetches need.

        Raises:
            HetuError: If something fetched is no tensor of the graph.
        """
        tensors = tensors_of(fetches)
        return self.subgraphs.get((tensors, self.graph.version), lambda: self._cut(tensors))

    def asked(self, fetches: Any) -> Subgraph:
        """What is needed for that which a user asks for: tensors or their names, a list or a dict of them."""
        return self.subgraph(find_fetches(self.graph, fetches)[0])

    def _cut(self, tensors: tuple[Any, ...]) -> Subgraph:
        for tensor in tensors:
            if tensor.graph is not self.graph:
                raise HetuError(
                    f"can't fetch {tensor!r} in fetches: it is no tensor of this graph",
                    op="run",
                    where=caller(),
                    fix="fetch tensors that were built in the graph that runs",
                )
        stages.keep(self.graph, "graph.txt", self.graph.__str__)
        return Subgraph.of(self.graph, tensors)

    def prepare(
        self,
        subgraph: Subgraph,
        feed_dict: Mapping[Any, Any] | None,
        symbols: Mapping[IntSymbol, Any] | None,
        strategy: int | str | None,
    ) -> tuple[Prepared, FeedSet]:
        """Selects, binds and plans a run that is fed in this process; see :meth:`prepare_read`."""
        ((feeds, given),) = split_micro_batches(find_feeds(self.graph, feed_dict), symbols, 1)
        return self.prepare_read(subgraph, partial(read_feeds, subgraph, feeds), given, strategy)

    def prepare_read(
        self,
        subgraph: Subgraph,
        read: FeedReader,
        symbols: Mapping[IntSymbol, int],
        strategy: int | str | None,
    ) -> tuple[Prepared, FeedSet]:
        """Selects the strategy: by index, or the cheapest of those that can run at all; binds and plans it.

        Args:
            subgraph: What will be computed.
            read: Gives the feeds.
            symbols: ``int_symbol_dict``.
            strategy: What the user asked for.

        Raises:
            StrategyError: If there is no such strategy, or none that can run (with each one's reason).
            HetuError: Whatever binding or planning refuses.
        """
        count = self.graph.num_strategy
        if strategy is None and count == 1:
            strategy = 0
        if strategy is not None and not (isinstance(strategy, str) and strategy == "auto"):
            return self._prepare(subgraph, read, symbols, self.index(strategy))
        return self._cheapest(subgraph, read, symbols)

    def _cheapest(
        self, subgraph: Subgraph, read: FeedReader, symbols: Mapping[IntSymbol, int]
    ) -> tuple[Prepared, FeedSet]:
        """The run under the cheapest strategy that can run at all.

        Where symbols alone tell what strategies cost, only that one is bound and planned; else all are. All ranks are
        told the same, and have the same hardware set, so they choose the same.
        """
        hardware, ready, reasons = chosen(), dict[int, tuple[Prepared, FeedSet]](), dict[int, str]()

        def prepare(index: int) -> bool:
            try:
                ready[index] = self._prepare(subgraph, read, symbols, index)
            except HetuError as error:
                reasons[index] = f"{type(error).__name__}: {error.what}"
            return index in ready

        ranking = self._chooser.by_symbols(subgraph, symbols, hardware)
        if ranking is None:
            feasible = [index for index in range(self.graph.num_strategy) if prepare(index)]
            plans = {index: ready[index][0].plans for index in feasible}
            ranking = self._chooser.by_plans(plans, hardware.hardware)
        reasons |= ranking.reasons
        for index in ranking.order:
            if index in ready or prepare(index):
                return ready[index]
        raise StrategyError(
            f"none of the {self.graph.num_strategy} strategies can run",
            op="run",
            where=caller(),
            bound=[f"strategy {index}: {reason}" for index, reason in sorted(reasons.items())],
            fix="see each reason",
        )

    def index(self, strategy: Any) -> int:
        """The index of a strategy that is given by index or by name, checked."""
        count = self.graph.num_strategy
        if isinstance(strategy, str):
            named = next((i for i, item in enumerate(self.graph.strategies) if item.name == strategy), None)
            if named is not None:
                return named
        index = strategy if type(strategy) is int else int_of(strategy)
        if index is None or not 0 <= index < count:
            names = [f", {item.name!r}" for item in self.graph.strategies if item.name is not None]
            raise StrategyError(
                f"there is no strategy {shown(strategy)} in a graph of {count}",
                op="run",
                where=caller(),
                fix=f'give an index from 0 to {count - 1}{"".join(names)}, or "auto"',
            )
        return index

    def pipelines(self, subgraph: Subgraph, strategy: int) -> Pipelines:
        """The pipelines of a strategy: the same ones whatever part of the graph is computed."""
        found = subgraph.pipelines.get(strategy)
        if found is None:
            version, own_rows = self._own_rows
            if version != self.graph.version:
                own_rows = placeholders_of_rows(self.graph)
                self._own_rows = self.graph.version, own_rows
            found = subgraph.pipelines[strategy] = Pipelines.of(self.graph, strategy, own_rows)
        return found

    def _prepare(
        self,
        subgraph: Subgraph,
        read: FeedReader,
        symbols: Mapping[IntSymbol, int],
        strategy: int,
    ) -> tuple[Prepared, FeedSet]:
        feeds = read(self.pipelines(subgraph, strategy), symbols)
        shape = strategy, feeds.num_pipelines, feeds.tensors
        binder = subgraph.binders.get(shape)
        if binder is None:
            binder = subgraph.binders[shape] = Binder(subgraph, *shape)
        given: tuple[Any, ...] = tuple(symbols.items())
        if given:  # 1, 1.0 and True are one key, and not one value
            given = given, tuple(map(type, symbols.values()))
        key = (binder, given, binder.defaults, feeds.shapes, feeds.host_bytes, chosen().number)
        prepared = self.prepared.get(key, lambda: self._bind_and_plan(subgraph, binder, symbols, feeds))
        if subgraph.index_checks:
            self.check_indices(prepared, feeds)
        return prepared, feeds

    def check_indices(self, prepared: Prepared, feeds: FeedSet, waits: bool = False) -> None:
        """Checks the indices among feeds and constants, and notes in the feeds which of them lie on a device.

        Args:
            prepared: The run.
            feeds: Its feeds.
            waits: Whether to wait for those that lie on a device.

        Raises:
            BindingError: If one is out of its range.
        """
        bindings = prepared.bindings
        feeds.unseen = check_indices(
            prepared.subgraph.index_checks,
            dict(enumerate(feeds.arrays)),
            lambda pipeline, size: bindings[pipeline].evaluate(size),
            lambda pipeline, size: bindings[pipeline].describe(size),
            waits,
        )

    def _bind_and_plan(
        self, subgraph: Subgraph, binder: Binder, symbols: Mapping[IntSymbol, int], feeds: FeedSet
    ) -> Prepared:
        def host_value(tensor: Tensor, pipeline: int, bound: BoundPipeline) -> NDArray[Any]:
            fed = feeds.arrays[pipeline].get(tensor)
            if fed is not None:
                return host_array(fed)
            return host_array(self._compute_on_host(self.subgraph(tensor), feeds.arrays[pipeline], bound))

        begin = perf_counter()
        run = binder.bind(symbols, feeds.shapes, host_value)
        bound = perf_counter()
        plans = {
            node: tuple([self.plan_for(node, key) for key in node.definition.plan_keys(node, run)])
            for node in subgraph.planned
        }
        prepared = Prepared(subgraph, binder.strategy, tuple([item.binding() for item in run.pipelines]), plans)
        if stages.are_told():
            stages.planned(prepared, bound - begin, perf_counter() - bound)
        return prepared

    def plan_for(self, node: Node, key: Any) -> Any:
        """The plan of a node for a key, or the one made for an equal key before."""
        op = node.definition
        try:
            plan = self.plans.get((op.plan_name or op.name, key), lambda: op.plan(key))
        except BindingError as error:  # of a mask that doesn't fit the documents, which knows no node
            name = op.plan_name or op.name
            raise BindingError(error.what, op=name, where=node.where, bound=error.bound, fix=error.fix) from error
        return _proven(op.derive(plan))

    def _counted(self, name: str | None) -> list[Counted]:
        """All attentions of the graph, as often as they are computed; or the one of a name, and its gradient."""
        named = self._attending(name)
        if name is None:
            return count_attentions(self.graph.nodes)
        own, *_ = count_attentions([*named, *(node for node in self.graph.nodes if node.definition.name == BACKWARD)])
        return [own._replace(backwards=min(own.backwards, 1))]

    def _attending(self, name: str | None) -> list[Node]:
        """The graph's ``parallel_attn`` nodes, or the one of a name; at least one."""
        own = [node for node in self.graph.nodes if node.original is None]
        nodes = [node for node in own if isinstance(node.definition, ParallelAttn)]
        wanted = None if name is None else text(name, "node", op="layout")
        nodes = [node for node in nodes if wanted in (None, node.name)]
        if not nodes:
            named = "" if wanted is None else f" that is the node {shown(wanted)}"
            _no_layout(f"the graph has no parallel_attn{named}", "name one that it has")
        return nodes

    def inspect(
        self,
        strategy: int | str,
        symbols: Mapping[IntSymbol, int] | None,
        cu_seqlens: Any,
        batch: Any,
        name: str | None,
    ) -> tuple[Node, LayoutKey, Value]:
        """A ``parallel_attn`` node, what its layout depends on, and what gives symbols' values.

        All of it from symbols alone; see :meth:`hetu.Graph.plan`.
        """
        nodes = self._attending(name)
        ((_, values),) = split_micro_batches(None, symbols, 1)
        values = {leaf: check_leaf(leaf, value, GIVEN) for leaf, value in values.items()}
        index, bound = self.index(strategy), BoundPipeline(0, dict(values), dict.fromkeys(values, GIVEN), _no_arrays)
        check_constraints([*self.graph.constraints, *(item for node in nodes for item in node.constraints)], bound)

        def value(expr: IntSymbol) -> int:
            defaults = {leaf: leaf.default for leaf in expr.leaves if leaf.default is not None}
            return expr.evaluate({**defaults, **values})

        keys = [_layout_op(node).inspect(node, index, value, cu_seqlens, batch) for node in nodes]
        if len(set(keys)) > 1:
            names = ", ".join(node.name for node in nodes)
            _no_layout(f"the graph's parallel_attn ops have different layouts: {names}", "say which: node=...")
        return nodes[0], keys[0], value

    def layout(
        self,
        strategy: int | str,
        symbols: Mapping[IntSymbol, int] | None,
        cu_seqlens: Any,
        batch: Any,
        name: str | None,
    ) -> Layout:
        """See :meth:`hetu.Graph.layout`."""
        return self.inspect(strategy, symbols, cu_seqlens, batch, name)[1].layout()

    def plan(
        self,
        strategy: int | str,
        symbols: Mapping[IntSymbol, int] | None,
        cu_seqlens: Any,
        batch: Any,
        name: str | None,
    ) -> AttnPlan:
        """See :meth:`hetu.Graph.plan`."""
        node, key, value = self.inspect(strategy, symbols, cu_seqlens, batch, name)
        plan: AttnPlan = self.plan_for(node, _layout_op(node).key(node, key, value))
        return plan

    def explain(
        self,
        symbols: Mapping[IntSymbol, int] | None,
        cu_seqlens: Any,
        batch: Any,
        name: str | None,
        hardware: Hardware | None,
    ) -> Explanation:
        """See :meth:`hetu.Graph.explain`."""
        if hardware is not None and not isinstance(hardware, Hardware):
            refuse(hardware, "hardware", "a hetu.Hardware or None", op="explain")
        on, choices, counted = hardware or chosen().hardware, list[Choice](), self._counted(name)
        for index in range(self.graph.num_strategy):
            strategy, keys = strategy_of(counted[0].node, index), list[Any]()
            try:
                for node, *times in counted:
                    packs = cu_seqlens if node.attrs["packing"] or len(counted) == 1 else None
                    _, key, value = self.inspect(index, symbols, packs, batch, node.name)
                    keys.append((_layout_op(node).key(node, key, value), *times))
                choices.append(explain_strategy(index, strategy, keys, on))
            except HetuError as error:
                choices.append(Choice(index, strategy_name(strategy), error.what))
        feasible = [choice for choice in choices if choice.reason is None]
        best = min(feasible, key=lambda choice: choice.estimate.time, default=None)
        return Explanation(tuple(choices), on, None if best is None else best.strategy)


def _no_arrays(tensor: Tensor, pipeline: int, bound: BoundPipeline) -> NoReturn:
    raise AssertionError(f"{tensor.name} is fed by runs only")


def _layout_op(node: Node) -> LayoutOp:
    assert isinstance(node.definition, LayoutOp)
    return node.definition


def _proven(plan: Any) -> Any:
    if isinstance(plan, AttnPlan) and settings().verify_plans and "proven" not in plan.memo:
        plan.verify()
        plan.memo["proven"] = True
    return plan


def _no_layout(what: str, fix: str) -> NoReturn:
    raise StrategyError(what, op="layout", where=caller(), fix=fix)
