"""Which strategy a run follows where the user leaves it open, and why: by estimates, for the hardware that is set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from html import escape
from typing import Any, NamedTuple

from hetu.cache import LRU
from hetu.config import settings
from hetu.errors import StrategyError
from hetu.graph import Node
from hetu.ops.attention.layout_key import ParallelKey
from hetu.ops.attention.layout_op import strategy_of
from hetu.parallel import AttnPlan, Hardware, Strategy, build_plan
from hetu.parallel.choice.estimate import NOTHING, Estimate
from hetu.parallel.choice.price import Attention, Price, Pricer, layout_loads, pricer_of, strategy_loads
from hetu.parallel.choice.setting import Chosen
from hetu.parallel.topology import topology_of
from hetu.parallel.views.report import as_bytes, as_table, as_time
from hetu.planning.subgraph import Subgraph
from hetu.symbols import IntSymbol, as_symbol
from hetu.symbols.compile import compile_exprs

FORWARD, BACKWARD = "parallel_attn", "parallel_attn_grad"


@dataclass(frozen=True, slots=True)
class Choice:
    """What a strategy would cost, or why it can't be followed.

    Attributes:
        strategy: Its index.
        name: What it is called; its text if it has no name.
        reason: Why it can't be followed; None if it can.
        method: How tokens would move.
        estimate: How long its attentions would take, all forwards and backwards.
        peak_bytes: Most bytes that an attention's forward holds on a pipeline.
    """

    strategy: int
    name: str
    reason: str | None = None
    method: str = ""
    estimate: Estimate = NOTHING
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Explanation:
    """What each strategy of a graph would cost, and which one is taken. Printed, it is a table.

    Attributes:
        choices: One for each strategy, in their order.
        hardware: What it was estimated for.
        chosen: The index of the cheapest feasible one; None if there is none.
    """

    choices: tuple[Choice, ...]
    hardware: Hardware
    chosen: int | None

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("", "strategy", "method", "time", "computing", "sending", "held at most")]
        for choice in self.choices:
            mark, name = "*" if choice.strategy == self.chosen else "", f"{choice.strategy}: {choice.name}"
            if choice.reason is not None:
                lines.append((mark, name, f"can't run: {choice.reason}"))
                continue
            times = (choice.estimate.time, choice.estimate.compute, choice.estimate.transfer)
            lines.append((mark, name, choice.method, *map(as_time, times), as_bytes(choice.peak_bytes)))
        return "\n".join([f"estimated for {self.hardware.name or 'the given hardware'}", *as_table(lines, left=3)])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


class Counted(NamedTuple):
    """An attention of a graph, and how often it is computed.

    Attributes:
        node: One of the nodes.
        forwards: How many nodes attend so.
        backwards: How many nodes compute the gradients of such.
    """

    node: Node
    forwards: int
    backwards: int


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The loads of all strategies as one compiled function of symbols.

    Attributes:
        leaves: The symbols.
        function: Gives the lengths of all pipelines of all strategies, and the loads.
        attentions: What is computed, and how many forwards and backwards.
        loads: For each strategy and attention, by method, where the loads of groups are.
        lengths: For each strategy, where its lengths are.
        pricers: What prices the attentions on the hardware of a number; of the last one only.
    """

    leaves: tuple[IntSymbol, ...]
    function: Callable[..., tuple[int, ...]]
    attentions: list[tuple[Attention, int, int]]
    loads: list[list[dict[str, list[slice]]]]
    lengths: list[slice]
    pricers: dict[int, list[Pricer]] = field(default_factory=dict)

    def rank(self, values: Sequence[int], chosen: Chosen) -> Ranking:
        """The ranking for some values of the symbols."""
        pricers = self.pricers.get(chosen.number)
        if pricers is None:
            self.pricers.clear()
            pricers = [Pricer(attention, chosen.hardware, *counts) for attention, *counts in self.attentions]
            self.pricers[chosen.number] = pricers
        found, ranking, times = self.function(*values), Ranking(), list[tuple[float, int]]()
        memory = chosen.hardware.memory_bytes
        for strategy, (parts, lengths) in enumerate(zip(self.loads, self.lengths, strict=True)):
            fewest = min(found[lengths])
            if fewest < 0:
                ranking.reasons[strategy] = f"a pipeline would hold {fewest} tokens"
                continue
            time, need = 0.0, 0
            for pricer, own in zip(pricers, parts, strict=True):
                _, (seconds, _, _), peak = pricer.cheapest(
                    {method: [found[x] for x in of] for method, of in own.items()}
                )
                time += seconds
                if peak > need:
                    need = peak
            if need > memory:
                ranking.reasons[strategy] = _too_large(need, chosen.hardware)
            else:
                times.append((time, strategy))
        ranking.order = [strategy for _, strategy in sorted(times)]
        return ranking


@dataclass(slots=True, eq=False)
class Ranking:
    """Strategies in the order of their estimated times, and why others are out.

    Attributes:
        order: Indices, the cheapest first.
        reasons: Of those that are out, by index.
    """

    order: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)


class Chooser:
    """Ranks the strategies of one graph; remembers by values of symbols.

    Args:
        strategies: How many there are.
    """

    def __init__(self, strategies: int) -> None:
        self.count = strategies
        self._sizes: LRU[_Sizes | None] = LRU(64)
        self._rankings: LRU[Ranking] = LRU(512)

    def by_symbols(self, subgraph: Subgraph, symbols: Mapping[IntSymbol, int], chosen: Chosen) -> Ranking | None:
        """The ranking that given symbols alone tell; None if they don't.

        With packing it depends on documents, other masks than windows have no closed form, and of a symbol that is not
        given feeds may tell another value than its default.
        """
        hosts = settings().hosts
        sizes = self._sizes.get((subgraph, hosts), lambda: _sizes_of(subgraph, self.count, hosts))
        if sizes is None:
            return None
        found = [symbols.get(leaf) for leaf in sizes.leaves]
        values = [value for value in found if type(value) is int]
        if len(values) < len(found):
            return None
        key = subgraph, hosts, chosen.number, tuple(values)
        return self._rankings.get(key, lambda: sizes.rank(values, chosen))

    def by_plans(self, plans: Mapping[int, Mapping[Node, Sequence[Any]]], hardware: Hardware) -> Ranking:
        """The ranking of strategies that are planned, though no part is built yet.

        Args:
            plans: For each strategy the plans of its nodes.
            hardware: What they are to run on.
        """
        ranking, times = Ranking(), dict[int, float]()
        for strategy, of_nodes in plans.items():
            times[strategy], need = 0.0, 0
            for plan in (plan for of_node in of_nodes.values() for plan in of_node if isinstance(plan, AttnPlan)):
                time, peak = plan_price(plan, hardware)
                times[strategy] += time
                need = max(need, 0 if plan.is_backward else peak)
            if need > hardware.memory_bytes:
                ranking.reasons[strategy] = _too_large(need, hardware)
        ranking.order = sorted(times.keys() - ranking.reasons.keys(), key=lambda strategy: (times[strategy], strategy))
        return ranking


def plan_price(plan: AttnPlan, hardware: Hardware) -> tuple[float, int]:
    """Seconds that a plan takes, and most bytes that a pipeline holds; made once for each hardware.

    By an estimate, or, where the mask has no closed form, by the virtual clock, which builds all parts.
    """
    key = "price", hardware
    found: tuple[float, int] | None = plan.memo.get(key)
    if found is None:
        counts = (0, 1) if plan.is_backward else (1, 0)
        hosts = None if plan.topology is None else plan.topology.hosts
        attention = Attention(plan.mask, plan.heads, plan.method, hosts)
        try:
            price = pricer_of(attention, hardware, *counts).price(layout_loads(plan.layout, attention))
        except StrategyError:
            price = _by_clock(plan, hardware)
        plan.memo[key] = found = price.estimate.time, price.peak_bytes
    return found


def explain_strategy(
    index: int, strategy: Strategy, keys: Sequence[tuple[ParallelKey, int, int]], hardware: Hardware
) -> Choice:
    """What attentions cost under a strategy, one after the other; each comes with how many forwards and backwards."""
    prices = [_price(key, forwards, backwards, hardware) for key, forwards, backwards in keys]
    peak = max(price.peak_bytes for price in prices)
    return Choice(
        index,
        strategy_name(strategy),
        _too_large(peak, hardware) if peak > hardware.memory_bytes else None,
        ", ".join(dict.fromkeys(price.method for price in prices)),
        reduce(Estimate.plus, (price.estimate for price in prices)),
        peak,
    )


def _price(key: ParallelKey, forwards: int, backwards: int, hardware: Hardware) -> Price:
    attention, layout = Attention(key.mask, key.heads, key.method, key.hosts), key.layout.layout()
    try:
        return pricer_of(attention, hardware, forwards, backwards).price(layout_loads(layout, attention))
    except StrategyError:
        topology = topology_of(key.hosts, layout.num_pipelines)
        plan = build_plan(layout, method=key.method, mask=key.mask, heads=key.heads, topology=topology)
        price = _by_clock(plan, hardware)
        again = [_by_clock(plan.backward(), hardware).estimate] * backwards if backwards else []
        return price._replace(estimate=reduce(Estimate.plus, [price.estimate] * forwards + again))


def _by_clock(plan: AttnPlan, hardware: Hardware) -> Price:
    """The price of a plan whose mask has no closed form: all its parts are built and followed."""
    cost = plan.cost(hardware)
    sent = [sum(size for link, size in cost.link_bytes.items() if link[0] == r) for r in range(len(cost.flops))]
    estimate = Estimate(cost.time, max(cost.flops) / hardware.flops, max(sent) / hardware.link_bytes)
    return Price(plan.method, estimate, max(cost.peak_bytes))


def strategy_name(strategy: Strategy) -> str:
    """What a table calls a strategy."""
    return strategy.name or str(strategy)


def _too_large(need: int, hardware: Hardware) -> str:
    over = as_bytes(need - hardware.memory_bytes)
    return f"it holds {as_bytes(need)} on a pipeline, {over} more than the {as_bytes(hardware.memory_bytes)} of memory"


def count_attentions(nodes: Iterable[Node]) -> list[Counted]:
    """The attentions among some nodes that cost different things."""
    counts: dict[Any, list[Any]] = {}
    for node in nodes:
        if node.definition.name in (FORWARD, BACKWARD):
            attrs, qkv = node.attrs, node.tensors[0]
            same = (attrs["strategies"], attrs["split"], attrs["method"], attrs["mask"], attrs["packing"])
            key = (*same, attrs["head_dim"], attrs["group_query_ratio"], qkv.symbolic_shape[1], qkv.dtype)
            found = counts.setdefault(key, [node, 0, 0])
            found[2 if node.definition.name == BACKWARD else 1] += 1
    return [Counted(*found) for found in counts.values()]


def _sizes_of(subgraph: Subgraph, count: int, hosts: tuple[int, ...] | None) -> _Sizes | None:
    counted = count_attentions(subgraph.planned)
    if not counted or any(item.node.attrs["packing"] for item in counted):
        return None
    attentions = [
        (Attention(node.attrs["mask"], ParallelKey.heads_of(node), node.attrs["method"], hosts), forwards, backwards)
        for node, forwards, backwards in counted
    ]
    sizes, loads, lengths = list[Any](), list[list[dict[str, list[slice]]]](), list[slice]()
    try:
        for index in range(count):
            strategies = [strategy_of(node, index) for node, *_ in counted]
            lengths.append(_extend(sizes, [length for strategy in strategies for length in strategy.lengths]))
            loads.append([])
            for strategy, (node, *_), (attention, *_) in zip(strategies, counted, attentions, strict=True):
                found = strategy_loads(strategy, node.attrs["split"], attention)
                loads[-1].append({method: [_extend(sizes, load) for load in of] for method, of in found.items()})
    except StrategyError:  # it has no closed form
        return None
    symbols = [as_symbol(size if isinstance(size, IntSymbol) else int(size)) for size in sizes]
    leaves = tuple(dict.fromkeys(leaf for symbol in symbols for leaf in symbol.leaves))
    return _Sizes(leaves, compile_exprs(symbols, leaves), attentions, loads, lengths)


def _extend(sizes: list[Any], more: Sequence[Any]) -> slice:
    """Where more sizes are, which are added."""
    sizes += more
    return slice(len(sizes) - len(more), len(sizes))
