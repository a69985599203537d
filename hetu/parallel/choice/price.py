"""What an attention costs on a layout by each method that may be taken, and which of them is the cheapest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from hetu.errors import StrategyError
from hetu.parallel.choice.cost import constant_groups
from hetu.parallel.choice.counts import counts_of
from hetu.parallel.choice.estimate import CANDIDATES, NOTHING, Estimate, Estimator, Load, Times, loads_of, plus
from hetu.parallel.choice.numbers import Numbers, numbers
from hetu.parallel.choice.work import GroupCounts
from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.layout.layout import Layout
from hetu.parallel.layout.splits import SPLITS
from hetu.parallel.layout.strategy import Strategy, groups_of
from hetu.parallel.mask.mask import Mask
from hetu.parallel.methods import AUTO, METHODS
from hetu.parallel.methods.hosts import Hosts
from hetu.parallel.plan.heads import Heads
from hetu.parallel.topology import Topology, topology_of
from hetu.parallel.views.cost import mask_kind
from hetu.parallel.views.hardware import Hardware

_PEAK = Load._fields.index("peak")


@dataclass(frozen=True, slots=True)
class Attention:
    """What a cost depends on, apart from the layout and the hardware.

    Attributes:
        mask: Which keys a query sees.
        heads: Widths of a token's row.
        method: How tokens move, or ``"auto"``.
        hosts: The host of each rank, see :func:`~hetu.parallel.topology.topology_of`; None if all share one.
    """

    mask: Mask
    heads: Heads
    method: str
    hosts: tuple[int, ...] | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that may be taken."""
        if self.method != "auto":
            return (self.method,)
        has_several = len(set(self.hosts or ())) > 1
        return tuple(method for method in CANDIDATES if has_several or not METHODS[method].joins_hosts)


class Pricer:
    """Finds the cheapest method of one attention on some hardware.

    Args:
        attention: What it is.
        hardware: What it runs on.
        forwards: How many forwards are computed.
        backwards: How many backwards.
    """

    def __init__(self, attention: Attention, hardware: Hardware, forwards: int = 1, backwards: int = 0) -> None:
        kind = mask_kind(attention.mask)
        each = [Estimator(attention.heads, kind, hardware, is_backward) for is_backward in (False, True)]
        self.forward, self.backward = each
        self.forwards, self.backwards = forwards, backwards

    def price(self, loads: Mapping[str, Sequence[Sequence[int]]]) -> Price:
        """The price by the method whose forward takes least time; of equal ones what is sent is less, or the first.

        Args:
            loads: By method those of all groups, ints in the order of :class:`Load`.
        """
        method, times, peak = self.cheapest(loads)
        return Price(method, Estimate._make(times), peak)

    def cheapest(self, loads: Mapping[str, Sequence[Sequence[int]]]) -> tuple[str, Times, int]:
        """The fields of :meth:`price`, for the many of which nobody sees more."""
        found = [(self.forward.of(method, of_groups), method) for method, of_groups in loads.items()]
        forward, method = found[0] if len(found) == 1 else min(found, key=_time)
        own, total = loads[method], forward if self.forwards else NOTHING
        peak = own[0][_PEAK] if len(own) == 1 else max([load[_PEAK] for load in own])
        if self.forwards <= 1 and not self.backwards:
            return method, total, peak
        for _ in range(self.forwards - 1):
            total = plus(total, forward)
        if self.backwards:
            backward = self.backward.of(method, own)
            for _ in range(self.backwards):
                total = plus(total, backward)
        return method, total, peak


@lru_cache(64)
def pricer_of(attention: Attention, hardware: Hardware, forwards: int = 1, backwards: int = 0) -> Pricer:
    """A pricer, made once for equal arguments."""
    return Pricer(attention, hardware, forwards, backwards)


class Price(NamedTuple):
    """What attention costs by the cheapest method that may be taken.

    Attributes:
        method: The method.
        estimate: The time of all forwards and backwards.
        peak_bytes: Most bytes that a pipeline holds at a time in a forward.
    """

    method: str
    estimate: Estimate
    peak_bytes: int


def _time(found: tuple[Times, str]) -> tuple[float, float]:
    """What decides: the time, then what has to be hidden, for an estimate takes it to be hidden wholly if it can be."""
    time, _, transfer = found[0]
    return time, transfer


def layout_loads(layout: Layout, attention: Attention) -> dict[str, list[Load]]:
    """The loads of all groups of a layout, by each method that may be taken.

    Raises:
        StrategyError: If the layout is a custom one, or the mask has no closed form on it.
    """
    topology = topology_of(attention.hosts, layout.num_pipelines)
    groups = [
        _counted(group.pieces, split_of(group), attention, Hosts.of(group.members, topology)) for group in layout.groups
    ]
    return loads_of(groups, attention.methods)


def strategy_loads(strategy: Strategy, split: str, attention: Attention) -> dict[str, list[Load]]:
    """The loads of a strategy's groups in its symbols, by each method that may be taken; those that differ.

    Raises:
        StrategyError: If a group is a symbol, or the mask has no closed form.
    """
    topology = topology_of(attention.hosts, strategy.num_pipelines)
    groups = [
        _counted(numbers([[strategy.lengths[r]] for r in members]), split, attention, Hosts.of(members, topology))
        for members in groups_of(constant_groups(strategy)).values()
    ]
    return {method: list(dict.fromkeys(loads)) for method, loads in loads_of(groups, attention.methods).items()}


def _counted(pieces: Numbers, split: str, attention: Attention, hosts: Hosts) -> GroupCounts:
    return GroupCounts(counts_of(pieces, split, attention.mask), attention.heads, hosts=hosts)


_LIES_AS = {
    split: next(name for name in ("normal", "sym", "stripe") if SPLITS[name].parts == lies_as.parts)
    for split, lies_as in SPLITS.items()
}


def split_of(group: GroupLayout) -> str:
    """A split that lays a group's pieces as they lie.

    Raises:
        StrategyError: If none does.
    """
    if group.split is None:
        raise StrategyError("a custom layout has no closed form", op="cost", fix="count it from its plan")
    return _LIES_AS[group.split]


def cheapest_method(
    layout: Layout, mask: Mask, heads: Heads, hardware: Hardware, topology: Topology | None = None
) -> str:
    """What ``"auto"`` is on a layout; where nothing can be counted, as without hardware, :data:`AUTO`."""
    attention = Attention(mask, heads, "auto", None if topology is None else topology.hosts)
    try:
        return pricer_of(attention, hardware).price(layout_loads(layout, attention)).method
    except StrategyError:
        return AUTO
