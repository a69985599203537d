"""What an attention costs on a layout by each method that may be taken, and which of them is the cheapest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

from hetu.errors import StrategyError
from hetu.parallel.choice.counts import counts_of
from hetu.parallel.choice.estimate import CANDIDATES, NOTHING, Estimate, Load, estimate, loads_of
from hetu.parallel.choice.numbers import numbers
from hetu.parallel.choice.work import GroupCounts
from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.layout.layout import Layout
from hetu.parallel.layout.strategy import Strategy, groups_of
from hetu.parallel.mask.mask import Mask
from hetu.parallel.methods import AUTO
from hetu.parallel.plan.heads import Heads
from hetu.parallel.views.cost import mask_kind
from hetu.parallel.views.hardware import Hardware

LOAD_SIZES = len(fields(Load))


@dataclass(frozen=True, slots=True)
class Attention:
    """What a cost depends on, apart from the layout and the hardware.

    Attributes:
        mask: Which keys a query sees.
        heads: Widths of a token's row.
        method: How tokens move, or ``"auto"``.
    """

    mask: Mask
    heads: Heads
    method: str

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that may be taken."""
        return CANDIDATES if self.method == "auto" else (self.method,)


@dataclass(frozen=True, slots=True)
class Price:
    """What an attention costs by the cheapest method that may be taken.

    Attributes:
        method: The method.
        forward: Its time.
        backward: That of the gradients.
        peak_bytes: Most bytes that a pipeline holds at a time in the forward.
    """

    method: str
    forward: Estimate
    backward: Estimate
    peak_bytes: int

    def total(self, forwards: int, backwards: int) -> Estimate:
        """The time of so many attentions."""
        return self.forward.times(forwards) + self.backward.times(backwards)


def price_of(attention: Attention, loads: Mapping[str, Sequence[Load]], hardware: Hardware) -> Price:
    """The price by the method whose forward takes least time; of equal ones the first."""
    kind, best = mask_kind(attention.mask), None
    for method, of_groups in loads.items():
        forward = estimate(method, of_groups, attention.heads, kind, hardware)
        if best is None or forward.time < best[1].time:
            best = method, forward, of_groups
    if best is None:
        return Price(AUTO, NOTHING, NOTHING, 0)
    method, forward, of_groups = best
    backward = estimate(method, of_groups, attention.heads, kind, hardware, is_backward=True)
    return Price(method, forward, backward, int(max(load.peak for load in of_groups)))


def layout_loads(layout: Layout, attention: Attention) -> dict[str, list[Load]]:
    """The loads of all groups of a layout, by each method that may be taken.

    Raises:
        StrategyError: If the layout is a custom one, or the mask has no closed form on it.
    """
    groups = [
        GroupCounts(counts_of(group.pieces, split_of(group), attention.mask), attention.heads)
        for group in layout.groups
    ]
    return loads_of(groups, attention.methods)


def strategy_sizes(strategy: Strategy, split: str, attention: Attention) -> list[Any]:
    """The loads of a strategy's groups in its symbols, in one list; :func:`read_loads` reads its values."""
    lengths = [[[strategy.lengths[r]] for r in members] for members in groups_of(strategy.groups).values()]  # type: ignore[arg-type]
    groups = [GroupCounts(counts_of(numbers(own), split, attention.mask), attention.heads) for own in lengths]
    return [size for loads in loads_of(groups, attention.methods).values() for load in loads for size in load.sizes]


def read_loads(values: Sequence[int], methods: Sequence[str]) -> dict[str, list[Load]]:
    """The loads of which :func:`strategy_sizes` gave the sizes."""
    each, items = len(values) // len(methods), iter(values)
    return {method: [Load(*islice(items, LOAD_SIZES)) for _ in range(each // LOAD_SIZES)] for method in methods}


def split_of(group: GroupLayout) -> str:
    """A split that lays a group's pieces as they lie.

    Raises:
        StrategyError: If none does.
    """
    parts = group.parts
    if parts is None:
        raise StrategyError("a custom layout has no closed form", op="cost", fix="count it from its plan")
    if parts.is_dealt:
        return "stripe"
    return "normal" if len(parts.document) == len(group.lengths) else "sym"


def cheapest_method(layout: Layout, mask: Mask, heads: Heads, hardware: Hardware) -> str:
    """What ``"auto"`` is on a layout; where nothing can be counted, as without hardware, :data:`AUTO`."""
    attention = Attention(mask, heads, "auto")
    try:
        return price_of(attention, layout_loads(layout, attention), hardware).method
    except StrategyError:
        return AUTO
