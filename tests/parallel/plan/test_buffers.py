"""Buffers and the lifetimes of their memory: by hand, and for plans that no method builds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layout_cases import HEADS, MASKS, random_case
from support.plans import KV_METHODS, attends, broadcast, by_halves, find, refused, with_instructions

from hetu.parallel import METHODS, Heads, Layout, Mask, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.mask.segments import SegmentTable
from hetu.parallel.plan.buffers import batches, lifetimes
from hetu.parallel.plan.heads import HeadRange, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Runs, Send, Wait
from hetu.parallel.plan.parts import PipelinePlan

SEEDS = st.integers(0, 2**32 - 1)
TWO = Heads(num_q=4, num_kv=2, head_dim=2, itemsize=4)


def lives(part: PipelinePlan) -> list[tuple[int, Payload, int, int, int]]:
    """Buffer, payload, rows, before which instruction it is made and after which let go of; behind all if never."""
    found = lifetimes(part)
    ends = {id(life): number for number, some in found.freed.items() for life in some}
    return [
        (life.buffer, life.payload, life.rows, number, ends.get(id(life), len(part.instructions)))
        for number, some in found.made.items()
        for life in some
    ]


def test_lifetimes_by_hand() -> None:
    plan = build_plan(Layout.build([4, 2], [0, 0]), method="direct", heads=HEADS).backward()
    owner, other = plan.pipelines
    # send, attend, wait, receive gradients, wait, add
    assert lives(owner) == [(1, Payload.KV_GRADS, 4, 3, 6)] and lifetimes(owner).results == 1
    # receive, attend, wait, attend, send gradients, wait: these are packed and let go of at once.
    assert lives(other) == [(1, Payload.KV, 4, 0, 3), (1, Payload.KV_GRADS, 4, 3, 4)] and lifetimes(other).results == 1


def test_what_each_attend_computes_of_foreign_rows_has_a_life_of_its_own() -> None:
    plan = build_plan(Layout.build([4] * 4, [0] * 4), method="ring", mask=Mask.full(), heads=HEADS)
    part = plan.backward().pipelines[0]
    attends = [number for number, item in enumerate(part.instructions) if isinstance(item, Attend) and item.buffer]
    made = [(first, last) for _, payload, _, first, last in lives(part) if payload is Payload.KV_GRADS]
    mine = [(first, last) for first, last in made if first in attends]
    assert [first for first, _ in mine] == attends
    starts = batches(part)
    for _, last in mine:
        assert any(send.grads for send in starts[last].sends)


@pytest.mark.parametrize("method", ["broadcast", *METHODS])
@given(seed=SEEDS, mask=st.sampled_from(MASKS), is_backward=st.booleans())
def test_memory_is_made_where_the_pipeline_may_wait(method: str, seed: int, mask: Mask, is_backward: bool) -> None:
    """Where it computes or packs, which is proven as if it waited, or where no transfer is under way."""
    layout = random_case(np.random.default_rng(seed), longest=7, most=6).layout()
    own = broadcast(layout, mask) if method == "broadcast" else None
    plan = own or build_plan(layout, method=method, mask=mask, heads=HEADS)
    for part in (plan.backward() if is_backward else plan).pipelines:
        under_way: set[int] = set()
        written, starts = lifetimes(part).written, batches(part)
        for number, item in enumerate(part.instructions):
            packs = number in starts and starts[number].sends
            if number in written:
                assert packs or not under_way or isinstance(item, (Attend, Copy, Accumulate))
            if isinstance(item, (Send, Receive)):
                under_way.add(item.transfer)
            elif isinstance(item, Wait):
                under_way.discard(item.transfer)


def test_peak_by_hand_where_results_travel() -> None:
    heads = Heads(num_q=2, num_kv=2, head_dim=8, itemsize=2, columns=100)
    plan = build_plan(Layout.build([2, 2], [0, 0]), method="ulysses", heads=heads)
    # One head each, of four tokens. When the results of the other's two rows are packed there are: q, k and v of two
    # rows; out, lse and p of four rows, for one head; out and lse of two rows, the latter also by row.
    own, computed, results = 2 * 3 * 2 * 16, 4 * (16 + 4 + 200), 2 * 2 * (16 + 2 * 4)
    packed = 2 * (16 + 4 + 200)
    assert plan.peak_bytes(0) == plan.peak_bytes(1) == own + computed + results + packed
    # What is computed is let go of then, before there has to be room for what comes from the other.
    assert packed < computed


def test_ranges_of_heads() -> None:
    whole, first, last, none = TWO.all, TWO.range(0, 2), TWO.range(2, 4), TWO.range(4, 4)
    assert whole.contains(first) and whole.contains(last) and not first.contains(whole) and not first.contains(last)
    assert first.overlaps(whole) and not first.overlaps(last) and not none.overlaps(whole)
    assert TWO.range(0, 1).overlaps(TWO.range(1, 2)), "they have a key head in common"
    assert TWO.all is Heads(4, 2, 8, 2).all


@pytest.mark.parametrize("method", KV_METHODS)
@given(seed=SEEDS, mask=st.sampled_from(MASKS))
def test_several_receives_fill_columns_of_one_buffer(method: str, seed: int, mask: Mask) -> None:
    layout = random_case(np.random.default_rng(seed), longest=7, most=6).layout()
    plan = by_halves(build_plan(layout, method=method, mask=mask, heads=TWO))
    plan.verify()
    plan.backward().verify()


def test_columns_that_nobody_filled() -> None:
    plan = by_halves(build_plan(Layout.build([4, 4], [0, 0]), method="direct", heads=TWO))
    plan.verify()
    number = next(item.transfer for item in plan.pipelines[1].instructions if isinstance(item, Receive))
    for r in range(2):
        kept = [item for item in plan.pipelines[r].instructions if getattr(item, "transfer", None) != number]
        plan = with_instructions(plan, r, kept)
    refused(plan, "pipeline 1: attending to buffer 1: row 0 holds nothing that was ever received", "k of head 0 of")


def test_columns_that_are_filled_twice() -> None:
    plan = by_halves(build_plan(Layout.build([4, 4], [0, 0]), method="direct", heads=TWO))
    for r, kind in ((0, Send), (1, Receive)):
        instructions, at = find(plan, kind, r, 1)
        instructions[at] = dataclasses.replace(instructions[at], heads=HeadRange(0, 2, 0, 1))
        plan = with_instructions(plan, r, instructions)
    refused(plan, "pipeline 1: transfer", "fills buffer 1 while transfer", "is still landing")


def test_a_head_that_two_pipelines_attend_for() -> None:
    """A plan of two in which the second one also attends for the first one's head, and tells nobody."""
    plan = build_plan(Layout.build([3, 3], [0, 0]), method="ulysses", heads=TWO)
    first, second = plan.pipelines
    some, rows = first.heads, Runs(np.array([0]), np.array([3]))
    items = list(second.instructions)
    received = next(i for i, item in enumerate(items) if isinstance(item, Receive))
    place = Runs(np.array([items[received].offset]), rows.length)
    items[received] = dataclasses.replace(items[received], offset=0, runs=place)
    copied, attended = (next(i for i, item in enumerate(items) if isinstance(item, kind)) for kind in (Copy, Attend))
    items.insert(attended, dataclasses.replace(items[attended], heads=some))
    items[attended:attended] = [dataclasses.replace(items[copied], heads=some), Wait(99)]
    items.insert(received + 1, dataclasses.replace(items[received], transfer=99, heads=some))
    both = dataclasses.replace(second.buffers[1], heads=TWO.all)
    second = dataclasses.replace(second, buffers=(second.buffers[0], both), instructions=tuple(items))

    items = list(first.instructions)
    sent = next(i for i, item in enumerate(items) if isinstance(item, Send))
    items.insert(sent + 1, dataclasses.replace(items[sent], transfer=99, heads=some))
    first = dataclasses.replace(first, instructions=(*items, Wait(99)))
    twice = dataclasses.replace(plan, pipelines=(first, second))
    refused(twice, "q of heads 0 to 1 of position 0", "is attended for by 2 pipelines, expected one")


def test_own_rows_attend_for_all_heads() -> None:
    plan = build_plan(Layout.build([4], [0]), method="direct", heads=TWO)
    instructions, at = find(plan, Attend, 0)
    instructions[at] = dataclasses.replace(instructions[at], heads=TWO.range(0, 2))
    refused(with_instructions(plan, 0, instructions), "is for heads 0 to 1, but own rows attend for all heads at once")


# What a plan may not say, since nobody could do it


def changed(plan: AttnPlan, r: int, kind: type, number: int = 0, **values: Any) -> AttnPlan:
    """A plan in which an instruction of one pipeline says something else."""
    instructions, at = find(plan, kind, r, number)
    instructions[at] = dataclasses.replace(instructions[at], **values)
    return with_instructions(plan, r, instructions)


def with_buffer(plan: AttnPlan, r: int, number: int, **values: Any) -> AttnPlan:
    """A plan in which a buffer of one pipeline is declared in another way."""
    part = plan.pipelines[r]
    buffers = list(part.buffers)
    buffers[number] = dataclasses.replace(buffers[number], **values)
    part = dataclasses.replace(part, buffers=tuple(buffers))
    return dataclasses.replace(plan, pipelines=(*plan.pipelines[:r], part, *plan.pipelines[r + 1 :]))


def test_buffers_that_are_not_what_instructions_need() -> None:
    heads = build_plan(Layout.build([3, 3], [0, 0]), method="ulysses", heads=TWO)
    keys = build_plan(Layout.build([3, 3], [0, 0]), method="direct", heads=TWO)
    refused(with_buffer(heads, 1, 1, rows=7), "pipeline 1 holds 7 rows in buffer 1; its group has 6")
    (attend,) = attends(heads, 1)
    some = {"sources": attend.sources[:1], "table": SegmentTable(*[np.empty(0, np.int64)] * 4)}
    names = "pipeline 1: an attend names 3 rows of buffer 1, that of its queries"
    refused(changed(heads, 1, Attend, **some), names)
    refused(with_buffer(heads, 1, 1, payloads=(Payload.QKV, Payload.OUT)), "that of its queries, lacks lse")
    refused(with_buffer(heads, 1, 1, heads=HeadRange(2, 2, 0, 1)), "are none of 4 query heads")
    apart = (Payload.QKV, Payload.OUT, Payload.LSE)
    refused(with_buffer(keys, 1, 1, payloads=apart), "brings keys and values, which lie apart in buffer 1")
    refused(with_buffer(keys, 1, 1, heads=TWO.range(0, 2)), "heads 0 to 3, but buffer 1 has heads 0 to 1")
    lost = dataclasses.replace(heads.pipelines[0], queries=2)
    refused(dataclasses.replace(heads, pipelines=(lost, heads.pipelines[1])), "pipeline 0 has no buffer 2")


def test_results_of_own_rows_that_come_from_elsewhere() -> None:
    """The pipeline computes them itself, into the place where they would land."""
    plan = build_plan(Layout.build([3, 3], [0, 0]), method="direct", heads=TWO)
    rows = Runs(np.array([0]), np.array([3]))
    refused(changed(plan, 1, Receive, buffer=0, payload=Payload.OUT, runs=rows), "brings results of own rows")


def test_gradients_that_are_added_in_part() -> None:
    plan = build_plan(Layout.build([3, 3], [0, 0]), method="direct", mask=Mask.full(), heads=TWO).backward()
    refused(changed(plan, 0, Accumulate, heads=TWO.range(0, 2)), "adds heads 0 to 1 of rows that have heads 0 to 3")


def test_gathered_rows_that_are_attended_to_twice_in_a_backward() -> None:
    """The second attend adds to what the first one computed, which nobody could tell apart on its way home."""
    plan = build_plan(Layout.build([3, 3], [0, 0]), method="ulysses", heads=TWO).backward()
    instructions, at = find(plan, Attend, 1)
    instructions.insert(at, instructions[at])
    refused(with_instructions(plan, 1, instructions), "attend 1 adds to gradients of buffer 1 that an earlier one")
