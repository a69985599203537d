"""Own rows that a backward holds back until gradients travel: which, when, and that it costs nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.layout_cases import HEADS, MASKS, random_case, random_custom_layout
from support.plans import (
    KV_METHODS,
    attends,
    broadcast,
    holding_back,
    in_orders,
    landing_buffers,
    refused,
    rows_aside,
    with_instructions,
)

import hetu
from hetu.parallel import Hardware, Heads, Layout, Mask, QuerySpans, SegmentTable, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.methods import hold_back
from hetu.parallel.methods.hold_back import LEAST_SHARE, MIN_BYTES, MIN_FLOPS, MOST_SHARE, find_cut, split_keys
from hetu.parallel.plan.heads import Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Instruction, Receive, Send, Wait
from hetu.parallel.plan.own_gradients import OwnGradients

SEEDS = st.integers(0, 2**32 - 1)
LARGE = Heads(num_q=32, num_kv=8, head_dim=128, itemsize=2)


def backward(plan: AttnPlan, held: bool = True) -> AttnPlan:
    """The backward of a forward, made anew."""
    with holding_back(held):
        made = dataclasses.replace(plan, memo={}).backward().whole()
    made.verify()
    return made


def any_layout(seed: int, most: int = 5) -> Layout:
    rng = np.random.default_rng(seed)
    return random_custom_layout(rng, longest=12) if seed % 2 else random_case(rng, longest=9, most=most).layout()


def own_attends(plan: AttnPlan, r: int) -> list[int]:
    """Which instructions of a pipeline are attends to its own shard."""
    items = plan.pipelines[r].instructions
    return [n for n, item in enumerate(items) if isinstance(item, Attend) and item.buffer == 0]


def holding(plan: AttnPlan) -> list[int]:
    """Who holds back own rows."""
    return [r for r in range(len(plan.pipelines)) if len(own_attends(plan, r)) == 2]


# Splitting


def allowed(table: SegmentTable, spans: QuerySpans, rows: int) -> np.ndarray:
    """How often each query row sees each key."""
    seen = np.zeros((int(spans.length.sum()), rows), int)
    columns = (table.query, table.k_start, table.k_len, table.diagonal, table.lower_over(spans))
    for query, k_start, k_len, diagonal, lower in zip(*columns, strict=True):
        i, j = np.arange(spans.length[query])[:, None], np.arange(k_len)
        assert 0 < k_len <= spans.length[query] + diagonal and lower <= min(0, diagonal)  # the normal form
        seen[spans.start[query] + i, k_start + j] += (i + lower <= j) & (j <= i + diagonal)
    return seen


@given(seed=SEEDS, mask=st.sampled_from(MASKS), row=st.integers(0, 12))
def test_a_table_split_in_two(seed: int, mask: Mask, row: int) -> None:
    for part in build_plan(any_layout(seed), method="direct", mask=mask, heads=HEADS).pipelines:
        own = next(item for item in part.instructions if isinstance(item, Attend) and item.buffer == 0)
        first, last = split_keys(own.table, row)
        whole, *halves = (allowed(table, part.spans, part.rows) for table in (own.table, first, last))
        assert np.array_equal(np.concatenate([halves[0][:, :row], halves[1][:, row:]], 1), whole)
        assert not halves[0][:, row:].any() and not halves[1][:, :row].any()
        for table in (first, last):
            assert (np.diff(table.query) >= 0).all()
            assert table.pairs(part.spans) == allowed(table, part.spans, part.rows).sum()


@given(seed=SEEDS, mask=st.sampled_from(MASKS))
def test_the_share_that_is_held_back(seed: int, mask: Mask) -> None:
    plan = backward(build_plan(any_layout(seed), method="direct", mask=mask, heads=HEADS))
    for r in holding(plan):
        first, last = (plan.pipelines[r].instructions[n] for n in own_attends(plan, r))
        assert isinstance(first, Attend) and isinstance(last, Attend)
        pairs = [item.table.pairs(plan.pipelines[r].spans) for item in (first, last)]
        assert LEAST_SHARE <= pairs[1] / sum(pairs) <= MOST_SHARE


def cut(lens: Sequence[int], split: str, documents: Sequence[int] | None = None, may_share: bool = True) -> list:
    """Where the own shard of each pipeline is cut."""
    cu = None if documents is None else np.cumsum([0, *documents])
    plan = build_plan(Layout.build(list(lens), [0] * len(lens), split=split, cu_seqlens=cu), heads=HEADS)
    tables = [attends(plan, r)[0].table for r in range(len(lens))]
    return [find_cut(t, part.spans, part.rows, may_share) for t, part in zip(tables, plan.pipelines, strict=True)]


def test_where_it_is_cut() -> None:
    # A triangle: about half of the keys have a quarter of the pairs. A large one is cut into whole blocks.
    assert cut([100, 100], "normal") == [45, 45]
    assert cut([4096, 4096], "normal") == [1792, 1792]
    # The first piece of the document is not in what is held back of the first pipeline, which has the outer two; the
    # second has the inner two, which are one.
    assert cut([4096, 4096], "sym") == [2048, 1792]
    assert cut([16, 16], "sym", [12, 4, 16])[0] == 12
    # Between documents, if one of the places will do: 45, 55 and 36 pairs; not so 55 and 91, and 105 and 15.
    assert cut([27, 8], "normal", [9, 10, 8, 8]) == [19, 4]
    assert cut([18, 23], "normal", [18, 10, 13])[1] == 14
    assert cut([19, 8], "normal", [14, 5, 8])[0] == 8
    # Or not at all.
    assert cut([8, 8], "normal", [4, 12], may_share=False) == [4, None]


def test_fewest_queries_in_both_parts() -> None:
    """A place between two segments of one query span has the better share, one between two query spans is better."""
    length = np.array([10, 10, 9])
    spans = QuerySpans(np.append(0, length.cumsum()[:-1]), length, *[np.zeros(3, np.int64)] * 6)
    k_len = np.array([10, 5, 5, 5])
    table = SegmentTable(np.array([0, 1, 1, 2]), k_len.cumsum() - k_len, k_len, k_len - 1)
    assert table.segment_pairs(spans).tolist() == [100, 50, 50, 45]
    assert find_cut(table, spans, 25) == 20
    # If that has too small a share, there is no place where none is.
    fewer = dataclasses.replace(spans, length=np.array([10, 10, 4]))
    assert find_cut(table, fewer, 25) == 15 and find_cut(table, fewer, 25, may_share=False) is None


# When


def test_a_plan_of_two_ends_with_own_rows() -> None:
    """Everything that travels is posted before what is held back, and waited for and added after it."""
    for split in ("sym", "stripe", "balanced"):
        for method in KV_METHODS:
            layout = Layout.build([16, 16], [0, 0], split=split, cu_seqlens=[0, 30, 32])
            plan = backward(build_plan(layout, method=method, heads=HEADS))
            assert holding(plan) == [0, 1]
            for part in plan.pipelines:
                last = own_attends(plan, part.pipeline)[-1]
                posted = [n for n, item in enumerate(part.instructions) if isinstance(item, (Send, Receive))]
                added = [n for n, item in enumerate(part.instructions) if isinstance(item, (Attend, Accumulate))]
                assert max(posted) < last < added[-1] and added[-2] == last
                assert {item.payload for item in part.instructions if isinstance(item, Send)} == {
                    Payload.KV,
                    Payload.KV_GRADS,
                }


def test_who_only_sends_or_only_receives() -> None:
    """Under a causal mask the second half of a document sends home, and the first only receives."""
    plan = backward(build_plan(Layout.build([8, 8], [0, 0]), method="direct", heads=HEADS))
    assert holding(plan) == [1]  # the first has a single attend, whose queries' gradients would need float32
    layout = Layout.build([12, 8], [0, 0], cu_seqlens=[0, 4, 8, 20])
    plan = backward(build_plan(layout, method="direct", heads=HEADS))
    assert holding(plan) == [0, 1]
    first, second = plan.pipelines
    assert [type(item).__name__ for item in first.instructions] == [
        "Send", "Attend", "Wait", "Receive", "Attend", "Wait", "Accumulate",
    ]  # fmt: skip
    assert not first.runs_on and not second.sums_gradients


def test_what_is_held_back_waits_for_gradients_to_be_sent() -> None:
    """However late: the last pipeline attends to the second one's rows before it attends to the first one's."""
    pieces = np.array([[4, 4, 0], [0, 0, 4], [0, 4, 4]])
    layout = Layout.build([8, 4, 8], [0, 0, 0], cu_seqlens=[np.append(np.zeros((3, 1), int), pieces.cumsum(1), 1)])
    plan = backward(build_plan(layout, method="direct", heads=HEADS))
    assert holding(plan) == [0, 2]
    kinds = [type(item) for item in plan.pipelines[0].instructions if not isinstance(item, (Send, Wait))]
    assert kinds == [Attend, Receive, Attend, Accumulate]


def test_where_gradients_come_earlier_nobody_holds_back() -> None:
    for count in (3, 5):
        layout = Layout.build([8] * count, [0] * count)
        for method in ("ring", "direct", "all_gather"):  # of which none attends to far shards first
            assert holding(backward(build_plan(layout, method=method, mask=Mask.full(), heads=HEADS))) == []
            # Under a causal mask the last sends only, and to the one before it gradients return from only one.
            causal = backward(build_plan(layout, method=method, heads=HEADS))
            assert holding(causal) == [count - 2, count - 1]
        # The last's keys and values travel last, and all attend to them at the same time.
        assert holding(backward(broadcast(layout, mask=Mask.full()))) == [count - 1]
    alone = build_plan(Layout.build([8, 8], [0, 1]), heads=HEADS)
    assert holding(backward(alone)) == []


def test_groups_of_two_beside_a_larger_one() -> None:
    """What is held back comes in the round after a group's own returns, and doesn't wait for those of others."""
    layout = Layout.build([8] * 6, [0, 1, 1, 0, 1, 1], split="sym")
    for method in ("ring", "all_gather"):
        assert holding(backward(build_plan(layout, method=method, mask=Mask.full(), heads=HEADS))) == [0, 3]


def test_only_where_enough_travels() -> None:
    rows = int(MIN_BYTES / LARGE.grad_row_bytes)
    for more, expected in ((-1, []), (2, [1])):
        layout = Layout.build([rows + more, 20_000], [0, 0])
        assert holding(build_plan(layout, method="direct", heads=LARGE).backward()) == expected


def test_only_where_it_is_worth_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold_back, "MIN_BYTES", 0.0)
    rows = int((2 * MIN_FLOPS / (10 * 32 * 128)) ** 0.5)  # of a triangle with as many FLOPs
    for more, expected in ((-2, []), (2, [1])):
        layout = Layout.build([8, rows + more], [0, 0])
        assert holding(build_plan(layout, method="direct", heads=LARGE).backward()) == expected
    assert holding(build_plan(Layout.build([8, 8], [0, 0]), method="direct", heads=HEADS).backward()) == []


def test_own_rows_that_are_attended_to_otherwise_are_left_alone() -> None:
    """A plan whose pipelines attend to their own rows in two steps already, or not at all."""
    plan = build_plan(Layout.build([8, 8], [0, 0], split="sym"), method="direct", heads=HEADS)
    (at, *_), items = own_attends(plan, 0), list(plan.pipelines[0].instructions)
    own = items[at]
    assert isinstance(own, Attend)
    halves = [dataclasses.replace(own, table=table) for table in split_keys(own.table, 3)]
    made = backward(with_instructions(plan, 0, [*items[:at], *halves, *items[at + 1 :]]))
    assert [item for item in attends(made, 0) if not item.buffer] == halves and holding(made) == [0, 1]
    with holding_back(True):
        made = with_instructions(plan, 0, [*items[:at], *items[at + 1 :]]).backward().whole()
    assert own_attends(made, 0) == [] and holding(made) == [1]


def test_heads_hold_back_nothing() -> None:
    plan = build_plan(Layout.build([8, 8], [0, 0]), method="ulysses", heads=Heads(2, 2, 8, 4))
    assert backward(plan).hash() == backward(plan, held=False).hash()


# What stays as it is


@given(seed=SEEDS, mask=st.sampled_from(MASKS), method=st.sampled_from([*KV_METHODS, "broadcast", "any order"]))
def test_the_same_bytes_and_sums_and_little_more_memory(seed: int, mask: Mask, method: str) -> None:
    layout = any_layout(seed)
    rng = np.random.default_rng(seed)
    if method == "broadcast":
        forward = broadcast(layout, mask)
    elif method == "any order":
        forward = in_orders(layout, mask, lambda _, count: rng.permutation(count).tolist())
    else:
        forward = build_plan(layout, method=method, mask=mask, heads=HEADS)
    try:
        forward.verify()
    except hetu.PlanError:  # half of such orders can be followed
        assume(False)
    held, plain = backward(forward), backward(forward, held=False)
    for r, (mine, other) in enumerate(zip(held.pipelines, plain.pipelines, strict=True)):
        assert travels(mine.instructions) == travels(other.instructions)
        assert sums(mine.instructions) == sums(other.instructions)
        assert landing_buffers(mine) == landing_buffers(other)
        assert (mine.runs_on, mine.sums_gradients) == (other.runs_on, other.sums_gradients)
        # Less if gradients came before the own attend, which then was computed aside: now they are added after it.
        assert rows_aside(mine) <= rows_aside(other)
        # While what is held back is attended to, gradients land and are sent.
        travelling = sum(landing_buffers(mine)) + held.grad_rows_sent(r)
        assert held.peak_bytes(r) <= plain.peak_bytes(r) + travelling * HEADS.grad_row_bytes
        assert held.pairs(r) == plain.pairs(r)


def travels(instructions: Sequence[Instruction]) -> list[tuple[object, ...]]:
    """What is sent and received, in order."""
    found: list[tuple[object, ...]] = []
    for item in instructions:
        if isinstance(item, Send):
            found.append((item.transfer, item.peer, item.payload, item.buffer, *item.runs.indices().tolist()))
        elif isinstance(item, Receive):
            found.append((item.transfer, item.peer, item.payload, item.buffer, item.offset, item.rows))
    return found


def sums(instructions: Sequence[Instruction]) -> list[list[int]]:
    """What is added, in order: the transfer that brings it, and the rows."""
    last, found = -1, list[list[int]]()
    for item in instructions:
        if isinstance(item, Wait):
            last = item.transfer
        elif isinstance(item, Accumulate):
            found.append([last, *item.runs.indices().tolist()])
    return found


# What it is for


@pytest.mark.parametrize("documents", [None, [9000, 500, 4000, 8000, 11268]])
def test_gradients_travel_while_somebody_computes(documents: list[int] | None) -> None:
    """As the cost model has it, with the latency of NCCL: hidden is what was waited for at the end."""
    rows = 4096 if documents is None else sum(documents) // 2
    cu = None if documents is None else np.cumsum([0, *documents])
    forward = build_plan(Layout.build([rows, rows], [0, 0], split="sym", cu_seqlens=cu), method="direct", heads=LARGE)
    slow = dataclasses.replace(Hardware.h100(), latency=50e-6)
    held, plain = backward(forward), backward(forward, held=False)
    computing = [flops / slow.flops for flops in plain.cost(slow).flops]
    assert plain.cost(slow).time > max(computing) + slow.latency
    assert held.cost(slow).time < max(computing) + 1e-6


# Printing and proving


def test_printing() -> None:
    plan = backward(build_plan(Layout.build([4, 4], [0, 0]), method="direct", heads=HEADS))
    steps = [line for line in str(plan).splitlines() if "attend " in line]
    assert steps == [
        "  attend   buffer 0 (rows of 0): 1 segment, 10 pairs",
        "  attend   buffer 0, rows 0 to 2 (rows of 1): 1 segment, 7 pairs",
        "  attend   buffer 1 (rows of 0): 1 segment, 16 pairs",
        "  attend   buffer 0, rows 2 to 4 (rows of 1): 1 segment, 3 pairs",
    ]


def test_what_would_overwrite_own_gradients_is_refused() -> None:
    """If the backend were wrong about which gradients it may write in place."""
    plan = backward(build_plan(Layout.build([8, 8], [0, 0], split="sym"), method="direct", heads=HEADS))
    part = plan.pipelines[1]
    items, (at, held) = list(part.instructions), own_attends(plan, 1)
    first, last = items[at], items[held]

    def believed(instructions: list[Instruction], *aside: int, has_gaps: bool = False) -> AttnPlan:
        wrong = with_instructions(plan, 1, instructions)
        wrong.pipelines[1].memo["own_gradients"] = OwnGradients(frozenset(aside), frozenset([0] * has_gaps))
        return wrong

    believed(items).verify()
    twice = [*items[:held], first, *items[held + 1 :]]
    refused(believed(twice), "pipeline 1: attend 2 overwrites what there is of the gradient of own row 0")
    late = [*items[:held], *items[held + 1 :], last]
    refused(believed(late, held), "pipeline 1: an accumulate", "adds to the gradient of own row 4, to which nothing")
    refused(believed(late, has_gaps=True), "pipeline 1: attend 2 overwrites what there is of the gradient of own row 4")
    believed(late, len(late) - 1, has_gaps=True).verify()
    refused(believed(items, at), "pipeline 1: attend 0 adds to the gradient of own row 0, to which nothing")
    without = [item for item in items if item is not last and not isinstance(item, Accumulate)]
    refused(believed(without), "pipeline 1: the plan leaves the gradient of own row 4, to which nothing was written")
