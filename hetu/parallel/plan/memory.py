"""How much memory a pipeline takes while it follows its part of a plan."""

from __future__ import annotations

from hetu.parallel.plan.buffers import Lifetime, batches, lifetimes
from hetu.parallel.plan.heads import Heads, Payload
from hetu.parallel.plan.instructions import Attend, Wait
from hetu.parallel.plan.own_gradients import own_gradients
from hetu.parallel.plan.parts import PipelinePlan, PlanData


def peak_bytes(plan: PlanData, part: PipelinePlan) -> int:
    """See :meth:`hetu.parallel.attn_plan.AttnPlan.peak_bytes`."""
    heads, lives, starts = plan.heads, lifetimes(part), batches(part)
    aside = own_gradients(part).aside if plan.is_backward else ()
    packed: dict[int, int] = {}
    held = most = part.rows * _given_row(plan, part)

    def size(life: Lifetime) -> int:
        return life.rows * heads.row_bytes(life.payload, life.heads)

    for number, item in enumerate(part.instructions):
        batch = starts.get(number)
        if batch is not None:
            for send in batch.sends:
                packed[send.transfer] = send.rows * heads.row_bytes(send.payload, send.heads)
                held += packed[send.transfer]
            most = max(most, held)
            held -= sum(map(size, lives.freed.get(number, ())))
        held += sum(map(size, lives.made.get(number, ())))
        if number == lives.results:
            held += _results(plan, part)
        most = max(most, held)
        if isinstance(item, Attend) and plan.is_backward:
            most = max(most, held + _for_an_attend(part, item, heads, is_aside=number in aside))
        elif isinstance(item, Wait):
            held -= packed.pop(item.transfer, 0)
        if batch is None:
            held -= sum(map(size, lives.freed.get(number, ())))
    return most


def _given_row(plan: PlanData, part: PipelinePlan) -> int:
    """Bytes of an own row that are there from the beginning."""
    row = plan.heads.row_bytes
    if not plan.is_backward:
        return row(Payload.QKV)
    # If lse travels it is there twice: as the forward gave it, and row by row.
    return row(Payload.QKV_DOUT) + row(Payload.OUT) + row(Payload.LSE_DELTA) + bool(part.queries) * row(Payload.LSE)


def _results(plan: PlanData, part: PipelinePlan) -> int:
    """Bytes of the results of own rows, and of what runs on between steps in float32."""
    row, wide = plan.heads.row_bytes, max(plan.heads.itemsize, 4)
    running = part.buffers[part.queries].rows * part.heads.num_q * plan.heads.head_dim * wide * part.runs_on
    if not plan.is_backward:
        return part.rows * (row(Payload.OUT) + row(Payload.LSE) + bool(part.queries) * row(Payload.LSE)) + running
    if plan.heads.itemsize == wide:
        return part.rows * row(Payload.QKV_GRADS)
    return part.rows * (row(Payload.QKV_GRADS) + part.sums_gradients * row(Payload.KV_GRADS)) + running


def _for_an_attend(part: PipelinePlan, item: Attend, heads: Heads, is_aside: bool) -> int:
    """Bytes that only an attend of a backward needs."""
    rows = part.buffers[part.queries].rows
    by_head = rows * heads.row_bytes(Payload.LSE_DELTA, item.heads) if part.queries else 0  # as kernels read them
    return by_head + is_aside * rows * heads.row_bytes(Payload.KV_GRADS, item.heads)
