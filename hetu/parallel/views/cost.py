"""What a plan costs: FLOPs, bytes per link, memory, and the time that a simulation of its steps predicts.

There is one simulation, :func:`simulate`: :func:`predict` sums it up, and ``hetu/parallel/views/trace.py`` draws it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hetu.errors import PlanError
from hetu.parallel.mask.mask import CAUSAL, FULL, Mask
from hetu.parallel.plan.instructions import Attend, Receive, Send, Wait
from hetu.parallel.plan.memory import peak_bytes
from hetu.parallel.plan.parts import PipelinePlan, PlanData
from hetu.parallel.views.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Cost:
    """What a plan costs on some hardware.

    Source: FLOPs are counted as in Dao, "FlashAttention-2", 2023, section 4.1, on the pairs that the mask allows.

    Attributes:
        flops: Of each pipeline: ``4 * head_dim`` per pair and query head, for the scores and the weighted sum. In the
            backward ``10 * head_dim``, for the scores once more and four gradients; adding up and copying are not
            counted.
        link_bytes: Bytes from one pipeline to another, ``{(source, target): bytes}``.
        peak_bytes: Of each pipeline; see :meth:`AttnPlan.peak_bytes`.
        finish: Second at which each pipeline is done.
        fits: Whether every pipeline's memory is enough.
        host_bytes: Bytes that leave their host, of all pipelines together.

    Example:
        >>> import hetu
        >>> from hetu.parallel import Heads, Layout, build_plan
        >>> plan = build_plan(Layout.build([2, 2], [0, 0]), heads=Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2))
        >>> cost = plan.cost(hetu.Hardware.h100())
        >>> cost.flops, cost.link_bytes, cost.fits
        ((768, 1792), {(0, 1): 512}, True)
    """

    flops: tuple[int, ...]
    link_bytes: dict[tuple[int, int], int]
    peak_bytes: tuple[int, ...]
    finish: tuple[float, ...]
    fits: bool
    host_bytes: int = 0

    @property
    def time(self) -> float:
        """Seconds until the last pipeline is done."""
        return max(self.finish)


@dataclass(frozen=True, slots=True)
class Timeline:
    """When everything happens, in seconds from the plan's start.

    Attributes:
        ends: For each pipeline, when each of its instructions is done; each begins when the one before is done.
        transfers: When a transfer is on its way, ``{number: (start, end)}``.
        flops: FLOPs of each pipeline.
    """

    ends: tuple[list[float], ...]
    transfers: dict[int, tuple[float, float]]
    flops: tuple[int, ...]

    @property
    def finish(self) -> tuple[float, ...]:
        """Second at which each pipeline is done."""
        return tuple(ends[-1] if ends else 0.0 for ends in self.ends)


def attend_flops(plan: PlanData, part: PipelinePlan, item: Attend) -> int:
    """FLOPs of one step of a pipeline; see :attr:`Cost.flops`."""
    return (10 if plan.is_backward else 4) * plan.heads.head_dim * item.heads.num_q * item.table.pairs(part.spans)


def transfer_bytes(plan: PlanData, item: Send | Receive) -> int:
    """Bytes of the transfer that an instruction begins or ends."""
    return item.rows * plan.heads.row_bytes(item.payload, item.heads)


def mask_kind(mask: Mask) -> str:
    """What :class:`~hetu.parallel.views.hardware.Rate` calls the kind of a mask."""
    return "causal" if mask == CAUSAL else "full" if mask == FULL else "window"


def attend_time(plan: PlanData, part: PipelinePlan, item: Attend, hardware: Hardware) -> float:
    """Seconds of one step of a pipeline: how fast it is depends on the keys that those queries see that see any."""
    flops = attend_flops(plan, part, item)
    if not flops:
        return 0.0
    table = item.table
    queries = part.spans.length.take(np.unique(table.query)).sum()
    keys = table.pairs(part.spans) / max(int(queries), 1)
    return hardware.attend_time(flops, keys, plan.heads.head_dim, mask_kind(plan.mask), plan.is_backward)


def predict(plan: PlanData, hardware: Hardware, hosts: Sequence[int] | None = None) -> Cost:
    """See :meth:`hetu.parallel.attn_plan.AttnPlan.cost`.

    Raises:
        PlanError: If the plan deadlocks.
    """
    timeline = simulate(plan, hardware, hosts)
    links: dict[tuple[int, int], int] = {}
    for part in plan.pipelines:
        for item in part.instructions:
            if isinstance(item, Send):
                link = part.pipeline, item.peer
                links[link] = links.get(link, 0) + transfer_bytes(plan, item)
    peak = tuple(peak_bytes(plan, part) for part in plan.pipelines)
    leaving = [size for (a, b), size in links.items() if hosts is not None and hosts[a] != hosts[b]]
    fits = max(peak) <= hardware.memory_bytes
    return Cost(timeline.flops, links, peak, timeline.finish, fits=fits, host_bytes=sum(leaving))


def simulate(plan: PlanData, hardware: Hardware, hosts: Sequence[int] | None = None) -> Timeline:
    """Follows all pipelines in the order of their clocks.

    Computing and transfers overlap. A transfer starts when both its ends are posted and the sender's outgoing and the
    receiver's incoming link are free; links carry one transfer at a time. Of those that could start the one that was
    posted first does: a transfer that has to wait for the link at its other end keeps no other one from starting.

    Args:
        plan: The plan.
        hardware: What it runs on.
        hosts: The host of each pipeline; None if all share one.

    Raises:
        PlanError: If the plan deadlocks.
    """
    return _Simulation(plan, hardware, hosts).run()


class _Simulation:
    """The state of :func:`simulate`.

    Attributes:
        queue: What happens next, by time: links that are free again, as (time, 0, source, target), and pipelines that
            go on, as (time, 1, number, 0).
        waiting: For each source and each target the transfers that are posted and wait for a link, the first one first.
    """

    def __init__(self, plan: PlanData, hardware: Hardware, hosts: Sequence[int] | None) -> None:
        self.plan, self.hardware, self.hosts = plan, hardware, hosts
        count = len(plan.pipelines)
        self.ends: tuple[list[float], ...] = tuple([] for _ in range(count))
        self.flops = [0] * count
        self.sends, self.receives = [False] * count, [False] * count  # whether a link is in use
        self.posted: set[int] = set()
        self.transfers: dict[int, tuple[float, float]] = {}
        self.waiting: tuple[list[dict[int, _Transfer]], ...] = tuple([{} for _ in range(count)] for _ in range(2))
        self.blocked: dict[int, list[tuple[float, int, int, int]]] = {}
        self.queue = [(0.0, 1, r, 0) for r in range(count)]

    def run(self) -> Timeline:
        # Always what is earliest happens, so that transfers are posted in the order of time.
        while self.queue:
            now, is_pipeline, r, target = heapq.heappop(self.queue)
            if is_pipeline:
                self._go_on(now, r)
            else:
                self._free(now, r, target)
        if self.blocked:
            what = f"pipelines wait for ever for transfers {sorted(self.blocked)}"
            raise PlanError(what, op="plan", fix="see plan.verify()")
        return Timeline(self.ends, self.transfers, tuple(self.flops))

    def _go_on(self, now: float, r: int) -> None:
        """Follows a pipeline's next instruction."""
        part, ends = self.plan.pipelines[r], self.ends[r]
        if len(ends) == len(part.instructions):
            return
        item = part.instructions[len(ends)]
        if isinstance(item, Attend):
            self.flops[r] += attend_flops(self.plan, part, item)
            now += attend_time(self.plan, part, item, self.hardware)
        elif isinstance(item, Wait):
            if item.transfer not in self.transfers:
                self.blocked.setdefault(item.transfer, []).append((now, 1, r, 0))
                return
            now = max(now, self.transfers[item.transfer][1])
        elif isinstance(item, (Send, Receive)):
            self._post(now, r, item)
        ends.append(now)
        heapq.heappush(self.queue, (now, 1, r, 0))

    def _post(self, now: float, r: int, item: Send | Receive) -> None:
        """Notes an end of a transfer; if it is the second, the transfer starts or waits for its links."""
        if item.transfer not in self.posted:
            self.posted.add(item.transfer)
            return
        source, target = (r, item.peer) if isinstance(item, Send) else (item.peer, r)
        shares_host = self.hosts is None or self.hosts[source] == self.hosts[target]
        seconds = self.hardware.transfer_time(transfer_bytes(self.plan, item), shares_host)
        transfer = _Transfer(item.transfer, source, target, seconds)
        if self.sends[source] or self.receives[target]:
            for waiting, r in zip(self.waiting, (source, target), strict=True):
                waiting[r][item.transfer] = transfer
        else:
            self._start(now, transfer)

    def _start(self, now: float, transfer: _Transfer) -> None:
        """Starts a transfer, and lets those who wait for it look again."""
        number, source, target, seconds = transfer
        self.sends[source] = self.receives[target] = True
        self.transfers[number] = now, now + seconds
        heapq.heappush(self.queue, (now + seconds, 0, source, target))
        for blocked in self.blocked.pop(number, ()):
            heapq.heappush(self.queue, blocked)

    def _free(self, now: float, source: int, target: int) -> None:
        """Starts what waited for two links that are free again."""
        self.sends[source] = self.receives[target] = False
        for waiting, r in zip(self.waiting, (source, target), strict=True):
            for transfer in waiting[r].values():
                if not self.sends[transfer.source] and not self.receives[transfer.target]:
                    del self.waiting[0][transfer.source][transfer.number]
                    del self.waiting[1][transfer.target][transfer.number]
                    self._start(now, transfer)
                    break


class _Transfer(NamedTuple):
    """A transfer both of whose ends are posted."""

    number: int
    source: int
    target: int
    seconds: float
