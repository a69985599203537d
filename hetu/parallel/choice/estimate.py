"""How long attention takes under a strategy, from its counts alone: what strategies and methods are chosen by.

The virtual clock of :mod:`hetu.parallel.views.cost` follows a plan step by step, and needs one. An estimate takes the
busiest member's work and links as if each were busy without a pause: it is made in microseconds, and puts strategies
into the order that the clock puts them into in nine of ten pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import add
from typing import Any, NamedTuple

import numpy as np

from hetu.errors import StrategyError, caller
from hetu.parallel.choice.numbers import Numbers
from hetu.parallel.choice.work import WORK, GroupCounts, Work
from hetu.parallel.plan.heads import Heads, Payload
from hetu.parallel.views.hardware import Hardware
from hetu.symbols import IntSymbol, maximum

CANDIDATES = ("direct", "ulysses")
"""What ``method="auto"`` chooses among, the first of equal ones. Of the methods that move keys and values none moves
fewer bytes than ``direct``, and with these two a rank makes its part of a backward without those of all others."""


class Load(NamedTuple):
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


def load_of(method: str, group: GroupCounts, work: Work) -> Load:
    """The load of a group by a method, of which ``work`` is what the method makes of the group's counts."""
    come, gone = work.links.sum(0), work.links.sum(1)
    pairs = group.whole_pairs if method == "ulysses" else group.pairs.sum()
    moved, both, peers = _most(np.concatenate([come, gone])), _most(come + gone), group.members - 1
    return Load(_most(work.flops), pairs, group.rows.sum(), moved, both, _most(work.peak), peers)


def loads_of(groups: Iterable[GroupCounts], methods: Sequence[str]) -> dict[str, list[Load]]:
    """The load of each group, by each method.

    Raises:
        StrategyError: If a method has no closed form.
    """
    unknown = [method for method in methods if method not in WORK]
    if unknown:
        what = f"method {unknown[0]!r} has no closed form"
        raise StrategyError(what, op="cost", where=caller(), fix="count it from its plan: plan.cost(hardware)")
    found: dict[str, list[Load]] = {method: [] for method in methods}
    for group in groups:
        for method in methods:
            found[method].append(load_of(method, group, WORK[method](group)))
    return found


class Estimate(NamedTuple):
    """How long an attention takes, in seconds.

    Attributes:
        time: In all.
        compute: What the busiest pipeline computes.
        transfer: What the busiest link carries; most of it passes while pipelines compute.
    """

    time: float
    compute: float
    transfer: float

    def plus(self, other: Estimate) -> Estimate:
        """The time of both, one after the other."""
        return Estimate(*map(add, self, other))


NOTHING = Estimate(0.0, 0.0, 0.0)


class Estimator:
    """Estimates the times of one kind of attention.

    Args:
        heads: Widths of a token's row.
        kind: Of the mask, as :class:`~hetu.parallel.views.hardware.Rate` has it.
        hardware: What it runs on.
        is_backward: Whether it is the backward.
    """

    def __init__(self, heads: Heads, kind: str, hardware: Hardware, is_backward: bool = False) -> None:
        self.hardware, self.head_dim, self.kind, self.is_backward = hardware, heads.head_dim, kind, is_backward
        self.flops = 2.5 if is_backward else 1.0
        self.grads = heads.grad_row_bytes / heads.kv_row_bytes
        forward = (Payload.QKV, Payload.OUT, Payload.LSE)
        backward = (Payload.QKV_DOUT, Payload.LSE_DELTA, Payload.QKV_GRADS)
        grown = sum(map(heads.row_bytes, backward)) / sum(map(heads.row_bytes, forward))
        self.grown, self.payloads = (grown, 4) if is_backward else (1.0, 3)

    def of(self, method: str, loads: Sequence[Load]) -> Estimate:
        """The time of one attention, of which the loads are those of its context groups, as ints."""
        return max([self._of_group(method, *load) for load in loads])

    def _of_group(
        self, method: str, flops: int, pairs: int, rows: int, moved: int, both: int, peak: int, peers: int
    ) -> Estimate:
        if not flops:
            return NOTHING
        hardware, time = self.hardware, float(moved)
        steps = 1 if method == "ulysses" else 2 if method == "all_gather" else 1 + peers
        rate = (
            hardware.rate(pairs / rows, self.head_dim, self.kind, self.is_backward)
            if hardware.rates
            else hardware.flops
        )
        compute = self.flops * flops / rate + steps * hardware.launch
        if not moved:
            return Estimate(compute, compute, 0.0)
        transfers = peers
        if method == "ulysses":
            time, transfers = time * self.grown, peers * self.payloads  # one of each payload
        elif self.is_backward:  # gradients of what came go home while what is next comes
            time, transfers = max(time + self.grads * (both - moved), self.grads * time), 2 * peers
        transfer = time / hardware.link_bytes + transfers * hardware.latency
        if method != "ring":  # where members send as much as they get, links wait for each other
            transfer *= 1 + (1 - 1 / peers) * (both / moved - 1)
        if method == "ulysses":  # heads come, then it computes, then results go home
            return Estimate(compute + transfer, compute, transfer)
        last = compute / (2 if method == "all_gather" else steps)  # of what comes last
        return Estimate(max(compute, transfer + last), compute, transfer)


def _most(items: Numbers) -> Any:
    listed = items.tolist()
    return maximum(*listed) if IntSymbol in map(type, listed) else max(listed)
