"""What a plan costs: FLOPs, bytes a link, memory, and the time that a simulation of its steps predicts."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from hetu.errors import PlanError
from hetu.parallel.plan import Accumulate, Attend, AttnPlan, Receive, Send, Wait


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a device can do.

    Attributes:
        flops: Floating point operations a second that attention reaches.
        link_bytes: Bytes a second that a device can send, and as many that it can receive at the same time.
        latency: Seconds from the start of a transfer to its first byte.
        memory_bytes: Bytes that an attention may take.
    """

    flops: float
    link_bytes: float
    latency: float
    memory_bytes: float

    @classmethod
    def h100(cls) -> Hardware:
        """An H100 SXM in a node: NVLink 4 at 450 GB/s each way, 80 GB.

        500 TFLOP/s is about half of the peak of dense bfloat16 (989 TFLOP/s), as attention forward reaches.
        """
        return cls(flops=500e12, link_bytes=450e9, latency=10e-6, memory_bytes=80e9)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a plan costs on some hardware.

    Attributes:
        flops: Of each pipeline: ``4 * head_dim * num_q`` a pair, for the scores and the weighted sum. In the backward
            ``10 * head_dim * num_q``, for the scores once more and four gradients; adding up is not counted.
        link_bytes: Bytes from one pipeline to another, ``{(source, target): bytes}``.
        peak_bytes: Of each pipeline; see :meth:`AttnPlan.peak_bytes`.
        finish: Second at which each pipeline is done.
        fits: Whether every pipeline's memory is enough.
    """

    flops: tuple[int, ...]
    link_bytes: dict[tuple[int, int], int]
    peak_bytes: tuple[int, ...]
    finish: tuple[float, ...]
    fits: bool

    @property
    def time(self) -> float:
        """Seconds until the last pipeline is done."""
        return max(self.finish)


def predict(plan: AttnPlan, hardware: Hardware) -> Cost:
    """See :meth:`hetu.parallel.plan.AttnPlan.cost`.

    Raises:
        PlanError: If the plan deadlocks.
    """
    pipelines = range(len(plan.pipelines))
    links: dict[tuple[int, int], int] = {}
    for r in pipelines:
        for item in plan.pipelines[r].instructions:
            if isinstance(item, Send):
                sent = item.rows * plan.heads.row_bytes(item.grads)
                links[r, item.peer] = links.get((r, item.peer), 0) + sent
    peak = tuple(plan.peak_bytes(r) for r in pipelines)
    pair_flops = (10 if plan.is_backward else 4) * plan.heads.head_dim * plan.heads.num_q
    return Cost(
        flops=tuple(pair_flops * plan.pairs(r) for r in pipelines),
        link_bytes=links,
        peak_bytes=peak,
        finish=_Clock(plan, hardware, pair_flops).run(),
        fits=max(peak) <= hardware.memory_bytes,
    )


class _Clock:
    """Follows all pipelines in the order of their clocks.

    Computing and transfers overlap. A transfer starts when both its ends are posted and the sender's outgoing and the
    receiver's incoming link are free; links carry one transfer at a time.
    """

    def __init__(self, plan: AttnPlan, hardware: Hardware, pair_flops: int) -> None:
        self.plan, self.hardware, self.pair_flops = plan, hardware, pair_flops
        count = len(plan.pipelines)
        self.next, self.finish = [0] * count, [0.0] * count
        self.out_free, self.in_free = [0.0] * count, [0.0] * count
        self.posted: set[int] = set()
        self.landed: dict[int, float] = {}
        self.blocked: dict[int, list[tuple[float, int]]] = {}
        self.ready = [(0.0, r) for r in range(count)]

    def run(self) -> tuple[float, ...]:
        """Second at which each pipeline is done."""
        # Always the earliest pipeline goes on, so that transfers are posted in the order of time.
        while self.ready:
            now, r = heapq.heappop(self.ready)
            part = self.plan.pipelines[r]
            if self.next[r] == len(part.instructions):
                self.finish[r] = now
                continue
            item = part.instructions[self.next[r]]
            self.next[r] += 1
            if isinstance(item, Attend):
                now += self.pair_flops * item.table.pairs(part.spans) / self.hardware.flops
            elif isinstance(item, Wait):
                if item.transfer not in self.landed:
                    self.blocked.setdefault(item.transfer, []).append((now, r))
                    continue
                now = max(now, self.landed[item.transfer])
            elif not isinstance(item, Accumulate):
                self._post(now, r, item)
            heapq.heappush(self.ready, (now, r))
        if self.blocked:
            what = f"pipelines wait for ever for transfers {sorted(self.blocked)}"
            raise PlanError(what, op="plan", fix="see plan.verify()")
        return tuple(self.finish)

    def _post(self, now: float, r: int, item: Send | Receive) -> None:
        """Starts a transfer if this is its second end, and wakes who waits for it."""
        if item.transfer not in self.posted:
            self.posted.add(item.transfer)
            return
        source, target = (r, item.peer) if isinstance(item, Send) else (item.peer, r)
        start = max(now, self.out_free[source], self.in_free[target])
        end = (
            start + self.hardware.latency + item.rows * self.plan.heads.row_bytes(item.grads) / self.hardware.link_bytes
        )
        self.out_free[source] = self.in_free[target] = self.landed[item.transfer] = end
        for since, waiting in self.blocked.pop(item.transfer, ()):
            heapq.heappush(self.ready, (max(since, end), waiting))
