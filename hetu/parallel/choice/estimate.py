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
from hetu.parallel.choice.numbers import Numbers, add_up
from hetu.parallel.choice.work import WORK, GroupCounts, Work
from hetu.parallel.plan.heads import Heads, Payload
from hetu.parallel.views.hardware import Hardware, curve_of
from hetu.symbols import IntSymbol, maximum

CANDIDATES = ("direct", "ulysses", "hierarchical")
"""What ``method="auto"`` chooses among, the first of equal ones. Of the methods that move keys and values none moves
fewer bytes than ``direct``, or fewer between hosts than ``hierarchical``, and with these a rank makes its part of a
backward without those of all others."""


_WAITS = 0.2
"""How much longer transfers take because links wait for each other, where members send as much as they get and have
many peers: what the virtual clock shows of random cases (``benchmarks/choice_order.py``)."""


class Load(NamedTuple):
    """What decides how long a context group takes, as ints or symbols.

    Attributes:
        flops: FLOPs of the member that has most.
        pairs: Pairs of all members, of one head.
        rows: Tokens of all members.
        moved: Bytes inside hosts, in the busier direction of the member that moves most.
        both: Bytes inside hosts, in both directions of the member that moves most so.
        far_moved: As ``moved``, between hosts.
        far_both: As ``both``, between hosts.
        peak: Bytes that the member holds that holds most.
        peers: Transfers of a member in one direction, at most.
        far_peers: Those of them that leave its host, at most.
        steps: Attends of a member, at most.
    """

    flops: Any
    pairs: Any
    rows: Any
    moved: Any
    both: Any
    far_moved: Any
    far_both: Any
    peak: Any
    peers: Any
    far_peers: Any
    steps: Any


def load_of(method: str, group: GroupCounts, work: Work) -> Load:
    """The load of a group by a method, of which ``work`` is what the method makes of the group's counts."""
    pairs = group.whole_pairs if method == "ulysses" else add_up(group.pairs)
    near, far = work.links, (0, 0)
    if len(group.hosts.members) > 1:
        of_member = np.array(group.hosts.of_member)
        is_far = np.not_equal.outer(of_member, of_member).astype(int)
        near, far = work.links * (1 - is_far), _busiest(work.links * is_far)
    peers = group.members - 1
    return Load(
        _most(work.flops),
        pairs,
        add_up(group.rows),
        *_busiest(near),
        *far,
        _most(work.peak),
        peers,
        work.between_hosts,
        work.steps,
    )


def _busiest(links: Numbers) -> tuple[Any, Any]:
    """Bytes in the busier direction of the member that moves most, and in both of the one that moves most so."""
    if len(links) == 1:
        return 0, 0
    come, gone = add_up(links, 0), add_up(links, 1)
    return _most(np.concatenate([come, gone])), _most(come + gone)


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
        return Estimate._make(plus(self, other))


NOTHING = Estimate(0.0, 0.0, 0.0)

Times = tuple[float, float, float]
"""The fields of an estimate: to make a tuple of a class takes as long as an estimate does."""


def plus(one: Times, other: Times) -> Times:
    """The time of both, one after the other."""
    time, compute, transfer = map(add, one, other)
    return time, compute, transfer


class Estimator:
    """Estimates the times of one kind of attention.

    Args:
        heads: Widths of a token's row.
        kind: Of the mask, as :class:`~hetu.parallel.views.hardware.Rate` has it.
        hardware: What it runs on.
        is_backward: Whether it is the backward.
    """

    def __init__(self, heads: Heads, kind: str, hardware: Hardware, is_backward: bool = False) -> None:
        self.rate = curve_of(hardware, heads.head_dim, kind, is_backward)
        self.launch, self.is_backward = hardware.launch, is_backward
        self.near, self.far = hardware.link_bytes, hardware.host_link_bytes or hardware.link_bytes
        self.latency, self.far_latency = hardware.transfer_time(0), hardware.transfer_time(0, False)
        self.flops = 2.5 if is_backward else 1.0
        self.grads = heads.grad_row_bytes / heads.kv_row_bytes
        forward = (Payload.QKV, Payload.OUT, Payload.LSE)
        backward = (Payload.QKV_DOUT, Payload.LSE_DELTA, Payload.QKV_GRADS)
        grown = sum(map(heads.row_bytes, backward)) / sum(map(heads.row_bytes, forward))
        self.grown, self.payloads = (grown, 4) if is_backward else (1.0, 3)

    def of(self, method: str, loads: Sequence[Sequence[int]]) -> Times:
        """The time of one attention, of which the loads are those of its context groups, as ints in Load's order."""
        if len(loads) == 1:
            return self._of_group(method, loads[0])
        return max([self._of_group(method, load) for load in loads])

    def _of_group(self, method: str, load: Sequence[int]) -> Times:
        flops, pairs, rows, moved, both, far_moved, far_both, _, peers, far, steps = load
        if not flops:
            return NOTHING
        compute = self.flops * flops / self.rate(pairs / rows) + steps * self.launch
        time = moved / self.near + far_moved / self.far
        if not time:
            return compute, compute, 0.0
        busy, rounds = both / self.near + far_both / self.far, 1
        more = busy / time
        if method == "ulysses":
            time, rounds = time * self.grown, self.payloads  # one of each payload
        elif self.is_backward:  # gradients of what came go home while what is next comes
            time, rounds = max(time + self.grads * (busy - time), self.grads * time), 2
        transfer = time + rounds * (self.latency * (peers - far) + far * self.far_latency)
        if method != "ring":  # where members send as much as they get, links wait for each other
            transfer *= 1 + _WAITS * (1 - 1 / peers) * (more - 1)
        if method == "ulysses":  # heads come, then it computes, then results go home
            return compute + transfer, compute, transfer
        last = compute / steps  # of what comes last
        return max(compute, transfer + last), compute, transfer


def _most(items: Numbers) -> Any:
    listed = items.tolist()
    return maximum(*listed) if IntSymbol in map(type, listed) else max(listed)
