"""How much memory a pipeline takes while it follows its part of a plan."""

from __future__ import annotations

from collections.abc import Hashable

from hetu.parallel.plan.heads import Heads, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Send, Wait
from hetu.parallel.plan.own_gradients import own_gradients
from hetu.parallel.plan.parts import PipelinePlan, PlanData


def peak_bytes(plan: PlanData, part: PipelinePlan) -> int:
    """See :meth:`hetu.parallel.attn_plan.AttnPlan.peak_bytes`."""
    return _peak_by_tokens(plan, part) if part.heads is None else _PeakByHeads(plan, part).walk()


# Keys and values travel


def _peak_by_tokens(plan: PlanData, part: PipelinePlan) -> int:
    heads = plan.heads
    width = heads.num_q * heads.head_dim
    moved = sum(part.buffers) * heads.kv_row_bytes + bytes_in_flight(part, heads)
    if not plan.is_backward:
        query_bytes = 2 * width * heads.itemsize + 4 * heads.num_q + 4 * width * part.runs_on
        return moved + part.rows * query_bytes
    # q, out, dout, dq; lse and delta; dk and dv. What comes in several parts is summed up in float32.
    row_bytes = 4 * width * heads.itemsize + 2 * 4 * heads.num_q + heads.kv_row_bytes
    if heads.itemsize < 4:
        row_bytes += 4 * width * part.runs_on + heads.grad_row_bytes * part.sums_gradients
    aside = (sum(part.landing) + scratch_rows(part)) * heads.grad_row_bytes
    return moved + aside + part.rows * row_bytes


def bytes_in_flight(part: PipelinePlan, heads: Heads) -> int:
    """Most bytes at a time that are packed and not yet known to be sent."""
    flying: dict[int, int] = {}
    most = 0
    for item in part.instructions:
        if isinstance(item, Send):
            flying[item.transfer] = item.rows * heads.row_bytes(item.payload, item.heads)
            most = max(most, sum(flying.values()))
        elif isinstance(item, Wait):
            flying.pop(item.transfer, None)
    return most


def scratch_rows(part: PipelinePlan) -> int:
    """Most rows at a time whose gradients are computed aside: to be sent home, or added to those of own rows."""
    last, held, most, aside = part.last_reads(), dict[int, int](), 0, own_gradients(part).aside
    for number, item in enumerate(part.instructions):
        if isinstance(item, Attend) and (item.buffer or number in aside):
            held[item.buffer] = item.rows if item.buffer else part.rows
            most = max(most, sum(held.values()))
        if number in last and isinstance(item, (Send, Attend)):
            held.pop(item.buffer, None)
    return most


# Heads are exchanged for tokens


class _PeakByHeads:
    """Walks the instructions, and adds up what is held after each: by transfer, by landing buffer, or by kind."""

    def __init__(self, plan: PlanData, part: PipelinePlan) -> None:
        self.heads, self.part, self.is_backward = plan.heads, part, plan.is_backward
        self.held: dict[Hashable, int] = {"shard": part.rows * self._shard_row()}
        self.most = sum(self.held.values())
        items = part.instructions
        self.computed = {item.payload for item in items if isinstance(item, (Send, Copy)) and item.buffer}

    def _shard_row(self) -> int:
        """Bytes of an own row that are there from the beginning."""
        row = self.heads.row_bytes
        if not self.is_backward:
            return row(Payload.QKV)
        return (
            row(Payload.QKV_DOUT) + row(Payload.OUT) + row(Payload.LSE_DELTA) + row(Payload.LSE)
        )  # lse as it came, and by rows

    def _result_row(self) -> int:
        """Bytes of an own row of results."""
        row = self.heads.row_bytes
        if not self.is_backward:
            return row(Payload.OUT) + 2 * row(Payload.LSE)  # by rows, and as it is returned
        sums = self.part.sums_gradients and self.heads.itemsize < 4
        return row(Payload.QKV_GRADS) + sums * row(Payload.KV_GRADS)

    def _gathered(self, kind: Payload) -> int:
        return self.part.buffers[1] * self.heads.row_bytes(kind, self.part.heads)

    def walk(self) -> int:
        """Most bytes at a time."""
        last = self.part.last_uses()
        for number, item in enumerate(self.part.instructions):
            match item:
                case Send():
                    self.held[item.transfer] = item.rows * self.heads.row_bytes(item.payload, item.heads)
                case Receive():
                    self._receive(item)
                case Copy():
                    self._fill(item.payload)
                case Attend():
                    self._attend(item)
                case Wait():
                    self.held.pop(item.transfer, None)
                case Accumulate():
                    self.held.pop(("landing", item.buffer), None)
            self.most = max(self.most, sum(self.held.values()))
            for kind in last.get(number, ()):
                self.held.pop(kind, None)
        return self.most

    def _receive(self, item: Receive) -> None:
        self._fill(item.payload)
        size = item.rows * self.heads.row_bytes(item.payload, item.heads)
        if item.grads:
            self.held["landing", item.buffer] = size
        elif item.runs is not None:
            self.held[item.transfer] = size

    def _fill(self, kind: Payload) -> None:
        """Where rows end up is made when the first ones come."""
        if kind.is_result:
            self.held["results"] = self.part.rows * self._result_row()
        else:
            self.held[kind] = self._gathered(kind)

    def _attend(self, item: Attend) -> None:
        self.held |= {kind: self._gathered(kind) for kind in self.computed}
        if self.is_backward:  # lse and delta of these heads, as kernels read them
            own = item.rows * self.heads.row_bytes(Payload.LSE_DELTA, item.heads)
            self.most = max(self.most, sum(self.held.values()) + own)
