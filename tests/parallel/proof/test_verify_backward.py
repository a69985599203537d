"""The verifier catches every kind of damage done to backward plans, and says which gradient it is about."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.layout_cases import HEADS
from support.plans import broadcast, find, refused, with_instructions

import hetu
from hetu.parallel import Layout, Mask, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.mask.mask import CAUSAL
from hetu.parallel.plan.buffers import shard
from hetu.parallel.plan.heads import Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Receive, Runs, Send, Wait


def good(method: str = "direct", count: int = 3, mask: Mask = CAUSAL) -> AttnPlan:
    cu = np.minimum([0, 5, 5, 17, 8 * count], 8 * count)
    layout = Layout.build([8] * count, [0] * count, split="sym", cu_seqlens=cu)
    plan = build_plan(layout, method=method, mask=mask, heads=HEADS).backward()
    plan.verify()
    return plan


def damaged(
    change: Callable[[list[Any], int], None], kind: type, r: int = 0, number: int = 0, **options: Any
) -> AttnPlan:
    """Changes what stands where the number-th instruction of a kind does, about gradients where it may be either."""
    plan = good(**options)
    instructions, at = find(plan, kind, r, number, grads=None if kind in (Attend, Accumulate) else True)
    change(instructions, at)
    return with_instructions(plan, r, instructions)


def drop(instructions: list[Any], at: int) -> None:
    del instructions[at]


def double(instructions: list[Any], at: int) -> None:
    instructions.insert(at, instructions[at])


def test_a_send_dropped_or_doubled() -> None:
    refused(damaged(drop, Send), "is received by pipeline", "but never sent")
    refused(damaged(double, Send), "is sent twice, by pipelines 0 and 0")


def test_a_receive_dropped_or_doubled() -> None:
    refused(damaged(drop, Receive), "is sent by pipeline", "but never received")
    refused(damaged(double, Receive), "is received twice, by pipelines 0 and 0")


def test_a_wait_dropped_or_doubled() -> None:
    def drop_the_wait(instructions: list[Any], at: int) -> None:
        assert isinstance(instructions.pop(at - 1), Wait)

    nothing = "pipeline 0: an accumulate adds row 0 of landing buffer 3: nothing that has landed"
    refused(damaged(drop_the_wait, Accumulate), nothing)
    refused(damaged(double, Wait), "pipeline 0 waits for transfer", "or twice")
    refused(damaged(drop, Wait), "of gradients to pipeline 2 is never waited for")


def test_an_accumulate_dropped_or_doubled() -> None:
    what = "the gradient of position 0 of document 2 of group 0 that pipeline 1 computes by attend 1"
    refused(damaged(drop, Accumulate), f"{what} is sent home, but never added to its owner's")
    refused(damaged(double, Accumulate), f"pipeline 0: an accumulate from landing buffer 3 adds a second time {what}")
    again = damaged(drop, Accumulate, method="all_gather", count=4, mask=Mask.full())
    refused(again, "pipeline 0: the gradient of", "is overwritten by transfer", "from pipeline 3 before it is used")


def test_a_transfer_dropped_with_both_its_ends() -> None:
    plan = good()
    sends, at = find(plan, Send, 1, grads=True)
    number, owner = sends[at].transfer, sends[at].peer
    for r in (1, owner):
        kept: list[Any] = []
        for item in plan.pipelines[r].instructions:
            if isinstance(item, Accumulate) and kept[-1:] == ["gone"]:
                kept.pop()
            elif getattr(item, "transfer", None) != number:
                kept.append(item)
            elif isinstance(item, Wait) and r == owner:
                kept.append("gone")
        plan = with_instructions(plan, r, kept)
    refused(plan, "the gradient of position", "that pipeline 1 computes by attend 1 is never sent home")


def test_a_transfer_to_another_peer() -> None:
    def misdirect(instructions: list[Any], at: int) -> None:
        instructions[at] = dataclasses.replace(instructions[at], peer=3 - instructions[at].peer)

    refused(damaged(misdirect, Send), "is sent by pipeline 0 to", "but received by pipeline")
    refused(damaged(misdirect, Receive), "but received by pipeline 0 from")


def test_a_transfer_of_another_kind() -> None:
    def change(instructions: list[Any], at: int) -> None:
        instructions[at] = dataclasses.replace(instructions[at], buffer=1, payload=Payload.KV)

    plan = damaged(change, Receive, mask=Mask.full())
    refused(plan, "sends gradients of heads 0 to 1, but keys and values of heads 0 to 1 are received")


def test_added_to_other_rows() -> None:
    def shift(instructions: list[Any], at: int) -> None:
        runs = instructions[at].runs
        instructions[at] = dataclasses.replace(instructions[at], runs=Runs(runs.start[::-1], runs.length[::-1]))

    plan = good()
    assert len(find(plan, Accumulate, 0)[0][find(plan, Accumulate, 0)[1]].runs.start) > 1
    refused(
        damaged(shift, Accumulate), "an accumulate from landing buffer 3 adds to own row", "that pipeline 1 computes"
    )


def test_added_from_another_landing_buffer() -> None:
    def swap(instructions: list[Any], at: int) -> None:
        instructions[at] = dataclasses.replace(instructions[at], buffer=7 - instructions[at].buffer)

    refused(damaged(swap, Accumulate), "pipeline 0: an accumulate")


def test_other_rows_sent_home() -> None:
    plan = good(mask=Mask.full())
    sends, at = find(plan, Send, 0, grads=True)
    runs = sends[at].runs
    assert runs.rows > 1
    one = Runs(np.full(runs.rows, runs.start[0]), np.ones(runs.rows, np.int64))
    sends[at] = dataclasses.replace(sends[at], runs=one)
    refused(with_instructions(plan, 0, sends), "pipeline 0: transfer", "sends a second time the gradient of position")


def test_rows_sent_home_that_nobody_used() -> None:
    """A ring carries rows for others; a member that doesn't use them computes no gradients of them."""
    plan = good("ring", count=4)
    for r, part in enumerate(plan.pipelines):
        for at, item in enumerate(part.instructions):
            if isinstance(item, Send) and item.grads:
                attend = next(x for x in reversed(part.instructions[:at]) if isinstance(x, Attend))
                unused = np.setdiff1d(np.arange(attend.rows), item.runs.indices())
                if len(unused):
                    rows = np.append(item.runs.indices()[1:], unused[0])
                    sends = list(part.instructions)
                    sends[at] = dataclasses.replace(item, runs=Runs(rows, np.ones_like(rows)))
                    refused(with_instructions(plan, r, sends), f"row {unused[0]} of buffer", "which no segment names")
                    return
    raise AssertionError("no such send")


def test_gradients_sent_before_they_are_computed() -> None:
    def hurry(instructions: list[Any], at: int) -> None:
        attend = max(i for i in range(at) if isinstance(instructions[i], Attend))
        instructions.insert(attend, instructions.pop(at))

    refused(damaged(hurry, Send), "pipeline 0: transfer", "sends row", "of buffer 1 before any attend computed dk")
    refused(damaged(hurry, Send, method="ring", count=4, mask=Mask.full(), number=2), "pipeline 0: transfer")


def test_gradients_overwritten_before_they_are_sent() -> None:
    def delay(instructions: list[Any], at: int) -> None:
        item = instructions.pop(at)
        again = next(i for i in range(at, len(instructions)) if getattr(instructions[i], "buffer", None) == item.buffer
                     and isinstance(instructions[i], Attend))  # fmt: skip
        instructions.insert(again + 1, item)
        wait = next(i for i in range(at, again) if getattr(instructions[i], "transfer", None) == item.transfer)
        instructions.append(instructions.pop(wait))
        late.append(item)

    late: list[Send] = []
    plan = damaged(delay, Send, method="ring", count=4, mask=Mask.full())
    # The owner receives it late, too, so that nobody waits for it.
    items, owner = list(plan.pipelines[late[0].peer].instructions), late[0].peer
    receive = next(i for i, item in enumerate(items) if getattr(item, "transfer", None) == late[0].transfer)
    wait = next(i for i in range(receive + 1, len(items)) if getattr(items[i], "transfer", None) == late[0].transfer)
    own = [items[receive], items[wait], items[wait + 1]]
    plan = with_instructions(plan, owner, [*(item for item in items if item not in own), *own])
    refused(plan, "pipeline 0: the gradient of", "by attend 1 is never sent home")


def test_gradients_overwritten_while_they_are_sent() -> None:
    def keep(instructions: list[Any], at: int) -> None:
        number = instructions[at].transfer
        wait = next(i for i in range(at, len(instructions)) if instructions[i:] and type(instructions[i]) is Wait
                    and instructions[i].transfer == number)  # fmt: skip
        instructions.append(instructions.pop(wait))

    plan = damaged(keep, Send, method="ring", count=4, mask=Mask.full())
    refused(plan, "pipeline 0: attend 3 fills buffer 1 while transfer", "is still being sent")


def test_a_landing_buffer_filled_while_it_is_in_use() -> None:
    def hurry(instructions: list[Any], at: int) -> None:
        first = next(i for i, item in enumerate(instructions) if isinstance(item, Receive) and item.grads)
        instructions.insert(first + 1, instructions.pop(at))

    plan = damaged(hurry, Receive, number=2, method="all_gather", count=4, mask=Mask.full())
    refused(plan, "pipeline 0: transfer", "fills landing buffer 2 while transfer", "is still landing")


def test_rows_out_of_a_landing_buffer() -> None:
    def shift(instructions: list[Any], at: int) -> None:
        instructions[at] = dataclasses.replace(instructions[at], offset=1)

    def rename(instructions: list[Any], at: int) -> None:
        instructions[at] = dataclasses.replace(instructions[at], buffer=9)

    refused(damaged(shift, Receive, mask=Mask.full()), "lands in rows 1 to", "of landing buffer 3, which has")
    refused(damaged(shift, Accumulate, mask=Mask.full()), "adds rows 1 to", "of landing buffer 3, which has")
    refused(damaged(rename, Accumulate), "pipeline 0 has no buffer 9, which an accumulate names")
    refused(damaged(rename, Receive), "pipeline 0 has no buffer 9, which transfer")


def test_a_landing_buffer_larger_than_the_shard() -> None:
    plan = good()
    *others, last = plan.pipelines[0].buffers
    assert not last.holds_keys
    part = dataclasses.replace(plan.pipelines[0], buffers=(*others, dataclasses.replace(last, rows=9)))
    refused(dataclasses.replace(plan, pipelines=(part, *plan.pipelines[1:])), "landing buffers of [3, 9] rows")


def test_one_row_added_to_twice_at_once() -> None:
    def repeat(instructions: list[Any], at: int) -> None:
        rows = instructions[at].runs.indices()
        rows[1] = rows[0]
        instructions[at] = dataclasses.replace(instructions[at], runs=Runs(rows, np.ones_like(rows)))

    refused(damaged(repeat, Accumulate), "pipeline 0: an accumulate adds to row", "of the shard twice")


def test_gradients_of_the_own_shard_sent() -> None:
    def own(instructions: list[Any], at: int) -> None:
        runs = Runs(np.array([0]), np.array([instructions[at].runs.rows]))
        instructions[at] = dataclasses.replace(instructions[at], buffer=0, runs=runs)

    refused(damaged(own, Send), "sends gradients of buffer 0, the pipeline's own shard")


def test_gradients_in_a_forward() -> None:
    plan = good()
    refused(dataclasses.replace(plan, is_backward=False), "holds gradients, but the plan is no backward")


def test_a_forward_called_a_backward() -> None:
    plan = build_plan(Layout.build([4, 4], [0, 0]), method="direct", heads=HEADS)
    refused(dataclasses.replace(plan, is_backward=True), "its shard has 4 rows, heads 0 to 1, of q, k, v, out, lse")
    parts = []
    for part in plan.pipelines:
        own, *foreign = part.buffers
        held = [dataclasses.replace(buffer, payloads=(Payload.KV, Payload.KV_GRADS)) for buffer in foreign]
        parts.append(dataclasses.replace(part, buffers=(shard(own.rows, HEADS, is_backward=True), *held)))
    lie = dataclasses.replace(plan, pipelines=tuple(parts), is_backward=True)
    refused(
        lie, "the gradient of position 0 of document 0 of group 0 that pipeline 1 computes by attend 1 is never sent"
    )


def test_messages_in_another_order_at_the_other_end() -> None:
    plan = broadcast(Layout.build([4] * 4, [0] * 4), mask=Mask.full()).backward()
    instructions = list(plan.pipelines[0].instructions)
    first, second = (i for i, item in enumerate(instructions) if isinstance(item, Receive) and item.peer == 2)
    instructions[first], instructions[second] = instructions[second], instructions[first]
    refused(with_instructions(plan, 0, instructions), "which receives them in another order")


def test_waiting_in_a_circle() -> None:
    """Everybody waits for gradients of its rows before it sends any home."""
    plan = good("all_gather", mask=Mask.full())
    for r in range(3):
        instructions, first = find(plan, Send, r, grads=True)
        at = next(i for i in range(len(instructions)) if isinstance(instructions[i], Accumulate))
        wait = instructions.pop(at - 1)
        place = next(i for i, item in enumerate(instructions) if getattr(item, "transfer", None) == wait.transfer)
        instructions[first:first] = [instructions.pop(place), wait]
        plan = with_instructions(plan, r, instructions)
    refused(plan, "deadlock", "wait for each other")


def test_landing_buffers_count_as_memory() -> None:
    plan = good(mask=Mask.full())
    enough = max(plan.peak_bytes(r) for r in range(3))
    plan.verify(max_bytes=enough)
    with pytest.raises(hetu.PlanError, match="but may take"):
        plan.verify(max_bytes=enough - 1)


def test_pairs_are_proven_too() -> None:
    def hide(instructions: list[Any], at: int) -> None:
        table = instructions[at].table
        columns = {name: getattr(table, name)[1:] for name in ("query", "k_start", "k_len", "diagonal")}
        instructions[at] = dataclasses.replace(instructions[at], table=dataclasses.replace(table, **columns))

    refused(damaged(hide, Attend, r=1), "pipeline 1", "attended never, expected once")
