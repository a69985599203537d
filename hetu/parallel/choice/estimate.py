"""How long attention takes under a strategy, from its counts alone: what strategies and methods are chosen by.

The virtual clock of :mod:`hetu.parallel.views.cost` follows a plan step by step, and needs one. An estimate takes the
busiest member's work and links as if each were busy without a pause: it is made in microseconds, and puts strategies
into the order that the clock puts them into in nine of ten pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

from hetu.parallel.choice.numbers import larger
from hetu.parallel.choice.work import WORK, GroupCounts, Work
from hetu.parallel.plan.heads import Heads, Payload
from hetu.parallel.views.hardware import Hardware

CANDIDATES = ("direct", "ulysses")
"""What ``method="auto"`` chooses among, the first of equal ones. Of the methods that move keys and values none moves
fewer bytes than ``direct``, and with these two a rank makes its part of a backward without those of all others."""


@dataclass(frozen=True, slots=True)
class Load:
    """What decides how long a context group takes, as ints or symbols.

    Attributes:
        flops: FLOPs of the member that has most.
        pairs: Pairs of all members, of one head.
        rows: Tokens of all members.
        moved: Bytes in the busier direction of the member that moves most.
        both: Bytes in both directions of the member that moves most so.
        peak: Bytes that the member holds that holds most.
        peers: Transfers of a member in one direction, at most.
    """

    flops: Any
    pairs: Any
    rows: Any
    moved: Any
    both: Any
    peak: Any
    peers: Any

    @property
    def sizes(self) -> list[Any]:
        return [getattr(self, item.name) for item in fields(self)]


def load_of(method: str, group: GroupCounts, work: Work) -> Load:
    """The load of a group by a method, of which ``work`` is what the method makes of the group's counts."""
    R = group.members
    come, gone = [0] * R, [0] * R
    for (source, target), count in work.links.items():
        come[target] = come[target] + count
        gone[source] = gone[source] + count
    both = [a + b for a, b in zip(come, gone, strict=True)]
    pairs = group.whole_pairs if method == "ulysses" else sum(group.pairs)
    return Load(_most(work.flops), pairs, sum(group.rows), _most([*come, *gone]), _most(both), _most(work.peak), R - 1)


def loads_of(groups: Iterable[GroupCounts], methods: Sequence[str]) -> dict[str, list[Load]]:
    """The load of each group, by each method."""
    found: dict[str, list[Load]] = {method: [] for method in methods}
    for group in groups:
        for method in methods:
            found[method].append(load_of(method, group, WORK[method](group)))
    return found


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long an attention takes, in seconds.

    Attributes:
        time: In all.
        compute: What the busiest pipeline computes.
        transfer: What the busiest link carries; most of it passes while pipelines compute.
    """

    time: float
    compute: float
    transfer: float

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.time + other.time, self.compute + other.compute, self.transfer + other.transfer)

    def times(self, count: int) -> Estimate:
        return Estimate(self.time * count, self.compute * count, self.transfer * count)


NOTHING = Estimate(0.0, 0.0, 0.0)


def estimate(
    method: str, loads: Sequence[Load], heads: Heads, kind: str, hardware: Hardware, is_backward: bool = False
) -> Estimate:
    """The time of one attention.

    Args:
        method: How tokens move.
        loads: Of each context group, as ints.
        heads: Widths of a token's row.
        kind: Of the mask, as :class:`~hetu.parallel.views.hardware.Rate` has it.
        hardware: What it runs on.
        is_backward: Whether it is the backward.
    """
    found = [_of_group(method, load, heads, kind, hardware, is_backward) for load in loads]
    return max(found, key=lambda item: item.time)


def _of_group(method: str, load: Load, heads: Heads, kind: str, hardware: Hardware, is_backward: bool) -> Estimate:
    flops = load.flops * 5 // 2 if is_backward else load.flops
    rate = hardware.rate(load.pairs / max(load.rows, 1), heads.head_dim, kind, is_backward)
    steps = 1 if method == "ulysses" else 2 if method == "all_gather" else 1 + load.peers
    compute = flops / rate + steps * hardware.launch if flops else 0.0
    if not load.moved:
        return Estimate(compute, compute, 0.0)
    transfers, moved = load.peers, float(load.moved)
    if method == "ulysses":
        transfers = (4 if is_backward else 3) * load.peers  # one of each payload
        moved *= _ulysses_growth(heads) if is_backward else 1.0
    elif is_backward:  # gradients of what came go home while what is next comes
        grads = heads.grad_row_bytes / heads.kv_row_bytes
        moved, transfers = moved + grads * (load.both - load.moved), 2 * load.peers
        if load.both < 2 * load.moved:
            moved = max(moved, grads * load.moved)
    transfer = moved / hardware.link_bytes + transfers * hardware.latency
    if method != "ring":  # where members send as much as they get, links wait for each other: one transfer at a time
        transfer *= 1 + (1 - 1 / load.peers) * min(load.both / load.moved - 1, 1.0)
    if method == "ulysses":  # heads come, then it computes, then results go home
        return Estimate(compute + transfer, compute, transfer)
    last = compute / 2 if method == "all_gather" else compute / steps  # what came last is attended to after it came
    return Estimate(max(compute, transfer + last), compute, transfer)


def _ulysses_growth(heads: Heads) -> float:
    """How many times as many bytes a backward moves as a forward."""
    forward = (Payload.QKV, Payload.OUT, Payload.LSE)
    backward = (Payload.QKV_DOUT, Payload.LSE_DELTA, Payload.QKV_GRADS)
    return sum(map(heads.row_bytes, backward)) / sum(map(heads.row_bytes, forward))


def _most(items: Sequence[Any]) -> Any:
    return reduce(larger, items)
