"""Heads exchanged for tokens: who has which heads, what is sent, and damage that the verifier has to find."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layout_cases import MASKS, random_case, random_custom_layout
from support.longer import LONGER
from support.plans import refused, with_instructions
from support.same import assert_same

import hetu
from hetu.parallel import Heads, Layout, Mask, build_pipeline_plan, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.mask.mask import CAUSAL
from hetu.parallel.mask.segments import SegmentTable
from hetu.parallel.methods.ulysses import alike, deal, sequence_rows
from hetu.parallel.plan.heads import HeadRange, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Runs, Send, Wait

SEEDS = st.integers(0, 2**32 - 1)
RATIOS = st.sampled_from([(1, 1), (2, 1), (4, 2), (5, 5), (6, 2), (7, 7), (12, 3)])


def plan_of(
    lens: list[int],
    heads: tuple[int, int] = (4, 2),
    *,
    is_backward: bool = False,
    split: str = "sym",
    mask: Mask = CAUSAL,
    columns: int = 0,
) -> AttnPlan:
    layout = Layout.build(lens, [0] * len(lens), split=split, cu_seqlens=[0, sum(lens) // 3, sum(lens)])
    widths = Heads(*heads, head_dim=8, itemsize=2, columns=columns)
    plan = build_plan(layout, method="ulysses", mask=mask, heads=widths)
    return plan.backward() if is_backward else plan


@given(heads=RATIOS, members=st.integers(1, 9))
def test_heads_are_dealt_evenly_and_in_order(heads: tuple[int, int], members: int) -> None:
    widths = Heads(*heads, head_dim=8, itemsize=2)
    ranges = deal(widths, members)
    assert [q for own in ranges for q in range(own.first_q, own.first_q + own.num_q)] == list(range(widths.num_q))
    counts = [own.num_q for own in ranges]
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)
    group = widths.num_q // widths.num_kv
    for own in ranges:
        used = {q // group for q in range(own.first_q, own.first_q + own.num_q)}
        assert set(range(own.first_kv, own.first_kv + own.num_kv)) == used
        parts = alike(widths, own)
        assert sum(part.num_q for part in parts) == own.num_q and sum(part.num_kv for part in parts) == own.num_kv
        for part in parts:  # as kernels find a query head's key head
            ratio = part.num_q // part.num_kv
            assert part.num_q % part.num_kv == 0
            assert all((part.first_q + i) // group == part.first_kv + i // ratio for i in range(part.num_q))


@given(seed=SEEDS, custom=st.booleans())
def test_rows_in_sequence_order(seed: int, custom: bool) -> None:
    rng = np.random.default_rng(seed)
    layout = random_custom_layout(rng, longest=9) if custom else random_case(rng, longest=9, most=6).layout()
    for group in layout.groups:
        places = [sequence_rows(group, member).indices() for member in range(len(group.members))]
        assert sorted(np.concatenate(places).tolist()) == list(range(group.tokens))
        for r, place in zip(group.members, places, strict=True):
            assert np.array_equal(place, layout.columns(r))


@settings(max_examples=150 * LONGER)
@given(seed=SEEDS, heads=RATIOS, mask=st.sampled_from(MASKS), custom=st.booleans(), columns=st.sampled_from([0, 9]))
def test_plans_are_proven(seed: int, heads: tuple[int, int], mask: Mask, custom: bool, columns: int) -> None:
    rng = np.random.default_rng(seed)
    layout = random_custom_layout(rng, longest=9) if custom else random_case(rng, longest=7, most=6).layout()
    widths = Heads(*heads, head_dim=8, itemsize=2, columns=columns)
    plan = build_plan(layout, method="ulysses", mask=mask, heads=widths)
    plan.verify()
    plan.backward().verify()
    other = build_plan(layout, method="direct", mask=mask, heads=widths)
    work = sum(plan.head_pairs(r) for r in range(layout.num_pipelines))
    assert work == sum(other.head_pairs(r) for r in range(layout.num_pipelines))
    for r in range(layout.num_pipelines):
        alone = build_pipeline_plan(layout, r, method="ulysses", mask=mask, heads=widths)
        assert_same(alone, plan.pipelines[r])


def test_what_is_sent_by_hand() -> None:
    """Six query heads of two key heads on three pipelines: two each, the middle one needs both key heads."""
    plan, row = plan_of([4, 2, 3], (6, 2)), 8 * 2
    # Each sends its rows to both others: two query heads, one or two key heads and as many value heads; and sends home
    # an output row and an lse of two heads for each row of the others.
    qkv = {0: 2 + 2, 1: 2 + 4, 2: 2 + 2}
    for r, own in enumerate([4, 2, 3]):
        there = sum(own * qkv[other] * row for other in qkv if other != r)
        home = (9 - own) * (2 * row + 2 * 4)
        assert plan.bytes_sent(r) == there + home
    # Two of the three attend for half of a key head: its gradients travel in float32.
    sent = {item.payload for part in plan.backward().pipelines for item in part.instructions if isinstance(item, Send)}
    assert sent == {Payload.QKV_DOUT, Payload.LSE_DELTA, Payload.Q_GRADS, Payload.KV_GRADS}
    whole = plan_of([4, 2], (4, 2)).backward()
    sent = {item.payload for part in whole.pipelines for item in part.instructions if isinstance(item, Send)}
    assert sent == {Payload.QKV_DOUT, Payload.LSE_DELTA, Payload.QKV_GRADS}


def test_more_members_than_heads() -> None:
    plan = plan_of([3, 4, 2, 5], (2, 1))
    plan.verify()
    assert [part.attends for part in plan.pipelines] == [1, 1, 0, 0]
    assert [plan.head_pairs(r) > 0 for r in range(4)] == [True, True, False, False]
    assert "0" in str(plan).splitlines()[4].split()


def test_printing() -> None:
    text = str(plan_of([4, 2], (4, 2), mask=Mask.full()))
    for piece in ("ulysses, full: 6 tokens", "heads", "q, k, v of heads 2 to 3", "copy     4 rows", "wait     for out"):
        assert piece in text


# Damage


def damaged(change: Any, kind: type, number: int = 0, pipeline: int = 1, **options: Any) -> AttnPlan:
    """A plan whose number-th instruction of a kind is changed, or replaced by several, on one pipeline."""
    plan = plan_of([5, 4, 6], (6, 2), **options)
    instructions = list(plan.pipelines[pipeline].instructions)
    at = [i for i, item in enumerate(instructions) if isinstance(item, kind)][number]
    made = change(instructions[at])
    instructions[at : at + 1] = made if isinstance(made, list) else [made]
    return with_instructions(plan, pipeline, instructions)


def other_rows(runs: Runs) -> Runs:
    return Runs(runs.start[::-1], runs.length[::-1], None if runs.step is None else runs.step[::-1])


def narrower(heads: HeadRange) -> HeadRange:
    return dataclasses.replace(heads, num_q=heads.num_q - 1)


BOTH = pytest.mark.parametrize("is_backward", [False, True])


@BOTH
@pytest.mark.parametrize("kind", [Send, Receive])
def test_a_transfer_of_other_heads(kind: type, is_backward: bool) -> None:
    change = lambda item: dataclasses.replace(item, heads=narrower(item.heads))  # noqa: E731
    with pytest.raises(hetu.PlanError, match=r"are none of 6 query heads|are received|lands in place"):
        damaged(change, kind, is_backward=is_backward).verify()


@BOTH
def test_a_transfer_of_another_kind(is_backward: bool) -> None:
    other = Payload.LSE_DELTA if is_backward else Payload.OUT
    plan = damaged(lambda item: dataclasses.replace(item, payload=other), Receive, 0, is_backward=is_backward)
    with pytest.raises(hetu.PlanError, match=r"(out|lse, delta) of .* are received"):
        plan.verify()
    refused(damaged(lambda item: dataclasses.replace(item, payload=Payload.KV), Send, 0), "but q, k, v of heads")


@BOTH
def test_a_copy_left_out(is_backward: bool) -> None:
    refused(
        damaged(lambda item: [], Copy, 0, is_backward=is_backward), "attending to", "nothing that was ever received"
    )
    home = "is never sent home" if is_backward else "never comes home"
    refused(damaged(lambda item: [], Copy, -1, is_backward=is_backward), home)


@BOTH
def test_a_copy_made_twice(is_backward: bool) -> None:
    refused(damaged(lambda item: [item, item], Copy, 0, is_backward=is_backward), "is overwritten by a copy")
    twice = "sends a second time" if is_backward else "is overwritten by a copy"
    refused(damaged(lambda item: [item, item], Copy, -1, is_backward=is_backward), twice)


def test_rows_put_elsewhere() -> None:
    def change(item: Any) -> Any:
        return dataclasses.replace(item, runs=other_rows(item.runs))

    plan = plan_of([5, 4, 6], (6, 2))
    at = [i for i, item in enumerate(plan.pipelines[1].instructions) if isinstance(item, Receive) and item.runs]
    instructions = list(plan.pipelines[1].instructions)
    scattered = next(i for i in at if len(instructions[i].runs.start) > 1)
    instructions[scattered] = change(instructions[scattered])
    refused(
        with_instructions(plan, 1, instructions), "attending to buffer 1 for head 2", "holds k of head 0 of position"
    )


def test_an_attend_left_out_or_done_twice() -> None:
    refused(damaged(lambda item: [], Attend), "pipeline 1")
    refused(damaged(lambda item: [item, item], Attend), "are attended 2 times, expected once")


def test_an_attend_for_heads_of_others() -> None:
    def change(item: Attend) -> Attend:
        return dataclasses.replace(item, heads=HeadRange(0, 1, 0, 1))

    refused(damaged(change, Attend), "is for head 0, but the pipeline has heads 2 to 3")


def test_an_attend_for_unlike_heads() -> None:
    def change(item: Attend) -> list[Attend]:
        return [dataclasses.replace(item, heads=HeadRange(2, 2, 0, 2))]

    refused(damaged(change, Attend), "is for heads 2 to 3, of which not all key heads have as many")


def test_a_pair_left_out() -> None:
    def change(item: Attend) -> Attend:
        table = item.table
        columns = (column[1:] for column in (table.query, table.k_start, table.k_len, table.diagonal))
        return dataclasses.replace(item, table=SegmentTable(*columns))

    refused(damaged(change, Attend), "pipeline 1, document 0", "are attended never, expected once")


def test_other_sources() -> None:
    def change(item: Attend) -> Attend:
        first, *rest = item.sources
        swapped = dataclasses.replace(first, place=Runs(np.arange(first.runs.rows), np.ones(first.runs.rows, int)))
        return dataclasses.replace(item, sources=(swapped, *rest))

    refused(damaged(change, Attend, pipeline=2), "its sources don't name every row once")


def test_gradients_left_out_or_added_twice() -> None:
    options = {"is_backward": True, "pipeline": 0}
    refused(damaged(lambda item: [], Accumulate, **options), "is sent home, but never added to its owner's")
    refused(damaged(lambda item: [item, item], Accumulate, **options), "adds a second time the gradient of")


def test_gradients_added_to_other_heads() -> None:
    def change(item: Accumulate) -> Accumulate:
        return dataclasses.replace(item, heads=HeadRange(0, item.heads.num_q, 0, item.heads.num_kv))

    refused(damaged(change, Accumulate, is_backward=True, pipeline=0), "pipeline 0")


def test_waits_in_an_order_that_nobody_can_follow() -> None:
    plan = plan_of([5, 4, 6], (6, 2))
    for r in range(3):
        items = plan.pipelines[r].instructions
        sends = [item for item in items if isinstance(item, Send) and item.payload is Payload.QKV]
        rest = [item for item in items if item not in sends]
        first = next(i for i, item in enumerate(rest) if isinstance(item, Attend))
        plan = with_instructions(plan, r, [*rest[:first], *sends, *rest[first:]])
    refused(plan, "deadlock", "wait for each other")


@settings(max_examples=300 * LONGER)
@given(seed=SEEDS, is_backward=st.booleans())
def test_nothing_can_be_left_out_or_moved(seed: int, is_backward: bool) -> None:
    """Without any one of its instructions, or with two of them swapped, a plan is refused, or as good as before."""
    rng = np.random.default_rng(seed)
    plan = plan_of(rng.integers(0, 6, 3).tolist(), [(4, 2), (6, 2), (2, 1)][seed % 3], is_backward=is_backward)
    r = int(rng.integers(3))
    items = list(plan.pipelines[r].instructions)
    if not items:
        return
    at = int(rng.integers(len(items)))
    with pytest.raises(hetu.PlanError):
        with_instructions(plan, r, items[:at] + items[at + 1 :]).verify()


def test_every_wait_is_needed() -> None:
    for is_backward, r in itertools.product([False, True], range(3)):
        plan = plan_of([5, 4, 6], (6, 2), is_backward=is_backward)
        items = list(plan.pipelines[r].instructions)
        for at in [i for i, item in enumerate(items) if isinstance(item, Wait)]:
            with pytest.raises(hetu.PlanError):
                with_instructions(plan, r, items[:at] + items[at + 1 :]).verify()
