"""Backward plans of random strategies by every method: proven, counted, priced and printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layout_cases import DEFINITIONS, HEADS, MASKS, random_case, random_custom_layout, sparse_layout
from support.longer import LONGER
from support.plans import (
    KV_METHODS,
    attends,
    broadcast,
    find,
    foreign_buffers,
    holding_back,
    in_orders,
    landing_buffers,
    rows_aside,
    with_instructions,
)

import hetu
from hetu.parallel import METHODS, Hardware, Heads, Layout, Mask, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.plan.instructions import Accumulate, Attend, Receive, Send, Source, Wait

SEEDS = st.integers(0, 2**32 - 1)


def build(layout: Layout, method: str, mask: Mask) -> AttnPlan:
    if method == "broadcast":
        return broadcast(layout, mask)
    return build_plan(layout, method=method, mask=mask, heads=HEADS)


def foreign_rows(layout: Layout, r: int, mask: Mask) -> list[tuple[int, int]]:
    """(owner, row) of all foreign tokens that pipeline r's queries see, straight from positions."""
    rows = []
    group, _ = layout.place(r)
    for c in group.members:
        same = layout.documents(r)[:, None] == layout.documents(c)
        seen = same & DEFINITIONS[mask](layout.positions(r)[:, None], layout.positions(c))
        rows += [(c, row) for row in np.flatnonzero(seen.any(0)).tolist() if c != r]
    return rows


def check(layout: Layout, method: str, mask: Mask, held: bool) -> None:
    plan = build(layout, method, mask)
    plan.verify()
    with holding_back(held):
        backward = plan.backward().whole()
    backward.verify()
    received = [0] * layout.num_pipelines
    for r in range(layout.num_pipelines):
        # What is used is sent home and nothing else; keys and values travel as in the forward.
        foreign = foreign_rows(layout, r, mask)
        assert backward.grad_rows_sent(r) == len(foreign)
        assert (backward.rows_sent(r), backward.rows_received(r)) == (plan.rows_sent(r), plan.rows_received(r))
        assert backward.pairs(r) == plan.pairs(r)
        # The same objects: what is remembered of tables is kept.
        steps, same = attends(backward, r), attends(plan, r)
        if held and len(steps) > len(same):
            assert not steps.pop().buffer
            own = next(i for i, item in enumerate(same) if not item.buffer)
            assert not steps.pop(own).buffer
            same.pop(own)
        assert steps == same
        for owner, _ in foreign:
            received[owner] += 1
    assert received == [backward.grad_rows_received(r) for r in range(layout.num_pipelines)]


@pytest.mark.parametrize("method", [*KV_METHODS, "broadcast"])
@given(seed=SEEDS, mask=st.sampled_from(MASKS), held=st.booleans())
def test_random_layouts(method: str, seed: int, mask: Mask, held: bool) -> None:
    check(random_case(np.random.default_rng(seed), longest=9, most=7).layout(), method, mask, held)


@pytest.mark.parametrize("method", [*KV_METHODS, "broadcast"])
@given(seed=SEEDS, mask=st.sampled_from(MASKS), held=st.booleans())
def test_invented_layouts(method: str, seed: int, mask: Mask, held: bool) -> None:
    check(random_custom_layout(np.random.default_rng(seed), longest=10), method, mask, held)


@pytest.mark.parametrize("method", [*METHODS, "broadcast"])
@given(seed=SEEDS, mask=st.sampled_from(MASKS), held=st.booleans())
def test_sparse_documents(method: str, seed: int, mask: Mask, held: bool) -> None:
    """Who holds little of what travels is often at another hop than its neighbours, and waits while they compute."""
    plan = build(sparse_layout(np.random.default_rng(seed)), method, mask)
    with holding_back(held):
        proven(plan)


@settings(max_examples=100 * LONGER)
@given(
    seed=SEEDS, mask=st.sampled_from(MASKS), send_first=st.booleans(), num_buffers=st.integers(1, 3), held=st.booleans()
)
def test_members_that_attend_in_any_order(
    seed: int, mask: Mask, send_first: bool, num_buffers: int, held: bool
) -> None:
    rng = np.random.default_rng(seed)
    layout = random_case(rng, longest=5, most=7).layout()
    plan = in_orders(layout, mask, lambda _, count: rng.permutation(count).tolist(), send_first, num_buffers)
    if not error_of(plan.verify):  # half of such orders can be followed
        with holding_back(held):
            plan.backward().verify()


def proven(plan: AttnPlan) -> AttnPlan:
    """Proves a plan and its backward; gives the latter."""
    plan.verify()
    backward = plan.backward().whole()
    backward.verify()
    return backward


def error_of(call: Callable[[], None]) -> str:
    try:
        call()
    except hetu.PlanError as error:
        return error.what
    return ""


def around(member: int, count: int) -> list[int]:
    """The own shard first, then the next one's, and so on."""
    return [(member + hop) % count for hop in range(count)]


def test_one_buffer_used_again_at_once() -> None:
    """Gradients have to leave before the next attend, and they go to a pipeline that is itself about to attend."""
    backward = in_orders(Layout.build([1] * 4, [0] * 4), Mask.causal(), around, num_buffers=1).backward()
    backward.verify()
    assert [foreign_buffers(part) for part in backward.pipelines] == [[], [1], [1], [1]]


def test_sends_that_are_received_too_late() -> None:
    """Everybody sends at once, attends to its own rows, and then receives: to attend may wait for what is sent."""
    plan = in_orders(Layout.build([2] * 3, [0] * 3), Mask.full(), around, num_buffers=1)
    with pytest.raises(hetu.PlanError, match="deadlock: these wait for each other: pipeline 0 for pipeline 1"):
        plan.verify()
    with pytest.raises(hetu.PlanError, match=r"pipelines \[0, 1, 2\] wait for each other for ever"):
        plan.backward()


def sparse_ring() -> AttnPlan:
    """Documents on pairs of pipelines, so that 4 and 1 attend to what comes at their fourth hop, and to nothing before.

    Would owners wait for gradients after so many attends of their own, then 0 would hold up the ring at its third hop
    for what 4 computes at its fourth, and 3 for what 1 does, each of which needs the other to pass on keys.
    """
    pairs = [(0, 5), (0, 4), (3, 2), (3, 1)]
    pieces = [[2 * (r in pair) for pair in pairs] for r in range(6)]
    cu = np.concatenate([np.zeros((6, 1), int), np.cumsum(pieces, axis=1)], axis=1)
    layout = Layout.build(np.sum(pieces, axis=1).tolist(), [0] * 6, cu_seqlens=[cu])
    return build_plan(layout, method="ring", mask=Mask.full(), heads=HEADS)


def test_a_ring_in_which_some_attend_late() -> None:
    backward = sparse_ring().backward()
    backward.verify()
    assert sum(backward.grad_rows_received(r) for r in range(6)) == 16


def test_gradients_that_come_before_an_owner_may_pack() -> None:
    """Pipeline 4 passes on what it can't pack yet, for 0 computes; 0 waits until 4 receives the gradients of that.

    The receive must not stand in the batch of what 4 passes on: what is sent together is packed before any of it is
    posted.
    """
    pieces = [[0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0], [1, 2, 1, 2, 0, 1]]
    cu = np.concatenate([np.zeros((5, 1), int), np.cumsum(pieces, axis=1)], axis=1)
    layout = Layout.build(np.sum(pieces, axis=1).tolist(), [0] * 5, split="balanced", cu_seqlens=[cu])
    backward = proven(build_plan(layout, method="ring", heads=HEADS))
    items, first = find(backward, Receive, 4, grads=True)
    assert isinstance(items[first - 1], Send) and isinstance(items[first + 2], Wait)


def test_made_once() -> None:
    plan = build_plan(Layout.build([4, 4], [0, 0]), heads=HEADS)
    assert plan.backward() is plan.backward()
    assert plan.backward().is_backward and not plan.is_backward
    with pytest.raises(hetu.PlanError, match="a backward already"):
        plan.backward().backward()


def test_hash() -> None:
    layouts = [Layout.build(lens, [0, 0, 0]) for lens in ([4, 4, 4], [3, 5, 4])]
    plans = [build_plan(layout, method=method, heads=HEADS) for layout in layouts for method in METHODS]
    hashes = {plan.hash() for plan in plans} | {plan.backward().hash() for plan in plans}
    assert len(hashes) == 2 * len(plans)
    alone = build_plan(Layout.build([4], [0]), heads=HEADS)  # both have one instruction, the same
    assert alone.hash() != alone.backward().hash()
    again = build_plan(layouts[0], method="ring", heads=HEADS)
    assert again.backward().hash() == plans[0].backward().hash()


def test_a_plan_that_cannot_be_followed() -> None:
    plan = build_plan(Layout.build([4, 4], [0, 0]), method="ring", heads=HEADS)
    instructions, at = find(plan, Send, 0)
    del instructions[at]
    with pytest.raises(hetu.PlanError, match=r"pipelines \[0, 1\] wait"):
        with_instructions(plan, 0, instructions).backward()


def test_own_rows_in_a_foreign_buffer() -> None:
    plan = build_plan(Layout.build([4, 4], [0, 0]), method="ring", heads=HEADS)
    instructions, at = find(plan, Attend, 1, 1)
    sources = (Source(1, instructions[at].sources[0].runs),)
    instructions[at] = dataclasses.replace(instructions[at], sources=sources)
    with pytest.raises(hetu.PlanError, match="its own rows in buffer 1"):
        with_instructions(plan, 1, instructions).backward()


# Order


def test_two_landing_buffers_in_turn_and_time_to_travel() -> None:
    """Equal shards that all attend to: gradients of step i are added after the owner's step i + 1, nearest first."""
    for method in ("ring", "direct"):
        plan = build_plan(Layout.build([8] * 5, [0] * 5), method=method, mask=Mask.full(), heads=HEADS).backward()
        for r, part in enumerate(plan.pipelines):
            ends = {item.transfer: item for item in part.instructions if isinstance(item, Receive) and item.grads}
            steps, added, last = 0, [], None
            for item in part.instructions:
                steps += isinstance(item, Attend)
                if isinstance(item, Accumulate):
                    assert isinstance(last, Wait)
                    added.append((steps, ends[last.transfer].peer, item.buffer))
                last = item
            # The neighbour attends to this shard in its second step, and is waited for after the third here.
            first = len(part.buffers) - 2
            assert added == [(min(i + 2, 5), (r + i) % 5, first + (i - 1) % 2) for i in range(1, 5)]
            assert landing_buffers(part) == [8, 8]


def test_gathered_gradients_return_nearest_first() -> None:
    plan = build_plan(Layout.build([4] * 4, [0] * 4), method="all_gather", mask=Mask.full(), heads=HEADS).backward()
    for r, part in enumerate(plan.pipelines):
        home = [item for item in part.instructions if isinstance(item, Send) and item.grads]
        assert [item.peer for item in home] == [(r - hop) % 4 for hop in (1, 2, 3)]
        receives = [item for item in part.instructions if isinstance(item, Receive) and item.grads]
        assert [(item.peer, item.buffer) for item in receives] == [
            ((r + hop) % 4, 2 + (hop - 1) % 2) for hop in (1, 2, 3)
        ]


def test_messages_of_both_kinds_keep_one_order() -> None:
    """In a broadcast gradients go home before the sender's own keys and values leave, so they are received so too."""
    plan = broadcast(Layout.build([4] * 4, [0] * 4), mask=Mask.full()).backward()
    kinds = [item.grads for item in plan.pipelines[0].instructions if isinstance(item, Receive) and item.peer == 2]
    assert kinds == [True, False]
    plan.verify()


# Bytes, memory and cost by hand


def test_bytes_and_cost_by_hand() -> None:
    heads = Heads(num_q=2, num_kv=1, head_dim=8, itemsize=2)
    forward = build_plan(Layout.build([4, 4], [0, 0]), method="direct", heads=heads)
    plan = forward.backward()
    # Pipeline 0 sends the keys and values of four tokens, 16 numbers of 2 bytes each, and gets 16 of 4 bytes back.
    assert (plan.rows_sent(0), plan.grad_rows_sent(0), plan.bytes_sent(0)) == (4, 0, 4 * 32)
    assert (plan.rows_sent(1), plan.grad_rows_sent(1), plan.bytes_sent(1)) == (0, 4, 4 * 64)
    assert (plan.grad_rows_received(0), plan.grad_rows_received(1)) == (4, 0)
    assert (forward.bytes_sent(0), forward.bytes_sent(1), forward.grad_rows_sent(1)) == (4 * 32, 0, 0)
    # q, out, dout, dq in 2 bytes, lse and delta in 4, and dk and dv in 2 bytes.
    row = 4 * 16 * 2 + 2 * 2 * 4 + 32
    # Both sum up in 4 bytes: pipeline 0 dk and dv, which also come from the other, pipeline 1 dq, of two steps.
    # Pipeline 0 sends four rows, and when these are sent four gradients land. Pipeline 1 has a buffer of four rows,
    # computes their gradients aside, lets go of the buffer, and packs them.
    assert plan.peak_bytes(0) == 4 * 32 + 4 * 64 + 4 * (row + 64)
    assert plan.peak_bytes(1) == 4 * 32 + (4 + 4) * 64 + 4 * (row + 16 * 4)
    # float32 needs no second copy of what is summed up.
    single = build_plan(forward.layout, method="direct", heads=dataclasses.replace(heads, itemsize=4)).backward()
    assert single.peak_bytes(0) == 4 * 64 + 4 * 64 + 4 * (4 * 16 * 4 + 2 * 2 * 4 + 64)

    pair = 10 * 8 * 2
    cost = plan.cost(Hardware(flops=pair, link_bytes=32, latency=3.0, memory_bytes=1e9))
    assert cost.flops == (10 * pair, 26 * pair)
    assert cost.link_bytes == {(0, 1): 128, (1, 0): 256}
    # A second a pair: pipeline 1 is through after 26 s, and its gradients travel 3 + 8 s.
    assert cost.finish == (37.0, 37.0)


def test_one_step_is_written_as_it_is_returned() -> None:
    plan = build_plan(Layout.build([4], [0]), heads=Heads(num_q=2, num_kv=1, head_dim=8, itemsize=2)).backward()
    assert plan.peak_bytes(0) == 4 * 32 + 4 * (4 * 16 * 2 + 2 * 2 * 4 + 32)
    assert rows_aside(plan.pipelines[0]) == 0 and not landing_buffers(plan.pipelines[0])


def test_gradients_held_aside() -> None:
    """One foreign buffer's at a time, for they are packed at once; and those of a second step to the own shard."""
    plan = build_plan(Layout.build([4, 3, 2], [0] * 3), method="ring", mask=Mask.full(), heads=HEADS).backward()
    assert [rows_aside(part) for part in plan.pipelines] == [3, 4, 4]
    instructions, at = find(plan, Attend, 2)
    twice = with_instructions(plan, 2, [instructions[at], *instructions])
    assert rows_aside(twice.pipelines[2]) == 4
    once = with_instructions(plan, 2, [instructions[at], instructions[at]])
    assert rows_aside(once.pipelines[2]) == 2


# Printing


PRINTED = """\
direct backward, causal: 6 tokens of 1 document on 2 pipelines in 1 group; 21 pairs, largest share 1.05 of the mean; \
512 B sent

pipeline  group  tokens  pairs  steps  rows sent  rows received  gradients sent  gradients received   sent  held at most
       0      0       4     10      1          4              0               0                   4  256 B        1.9 kB
       1      0       2     11      2          0              4               4                   0  256 B        1.3 kB

pipeline 0: 1 query span, buffers of 4 rows, landing buffers of 4 rows
  send     4 rows (1 run) of buffer 0 to 1
  attend   buffer 0 (rows of 0): 1 segment, 10 pairs
  wait     to have sent to 1
  receive gradients of 4 rows from 1 into landing buffer 1
  wait     for gradients from 1
  add      4 rows (1 run) of landing buffer 1 to the own

pipeline 1: 1 query span, buffers of 2, 4 rows
  receive  4 rows from 0 into buffer 1
  attend   buffer 0 (rows of 1): 1 segment, 3 pairs
  wait     for what comes from 0
  attend   buffer 1 (rows of 0): 1 segment, 8 pairs
  send home gradients of 4 rows (1 run) of buffer 1 to 0
  wait     to have sent home gradients to 0"""


def test_printing() -> None:
    plan = build_plan(Layout.build([4, 2], [0, 0]), method="direct", heads=HEADS).backward()
    assert str(plan) == PRINTED
    assert plan.summary() in repr(plan)
