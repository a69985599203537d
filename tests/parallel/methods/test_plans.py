"""Plans of random layouts by every method, against a simulation of their own that knows nothing of the verifier."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.layout_cases import DEFINITIONS, HEADS, MASKS, random_case, random_custom_layout
from support.plans import KV_METHODS
from support.same import assert_same

from hetu.errors import StrategyError
from hetu.parallel import METHODS, Hardware, Layout, Mask, Topology, build_pipeline_plan, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.plan.instructions import Attend, Receive, Send, Wait

Counts = list[np.ndarray]
"""For each pipeline how often each (row, token of its group) pair was computed."""


def simulate(plan: AttnPlan) -> tuple[Counts, list[set[tuple[int, int]]]]:
    """Follows a plan with (owner, row) in place of data.

    Returns:
        How often each pair was computed, and for each pipeline the foreign rows that it was sent.
    """
    layout, mail, arrived = plan.layout, {}, [set() for _ in plan.pipelines]
    sizes = [sum(g.rows) for g in layout.groups]
    counts = [np.zeros((layout.rows(r), sizes[layout.group_index(r)]), int) for r in range(layout.num_pipelines)]
    buffers = [
        [[(r, row) for row in range(p.rows)], *([None] * b.rows for b in p.buffers[1:])]
        for r, p in enumerate(plan.pipelines)
    ]
    left = [list(part.instructions) for part in plan.pipelines]
    receiving: dict[tuple[int, int], Receive] = {}
    while any(left):
        before = sum(map(len, left))
        for r, todo in enumerate(left):
            while todo:
                item = todo[0]
                if isinstance(item, Wait) and (r, item.transfer) in receiving:
                    if item.transfer not in mail:
                        break
                    to = receiving[r, item.transfer]
                    assert len(mail[item.transfer]) == to.rows
                    buffers[r][to.buffer][to.offset : to.offset + to.rows] = mail[item.transfer]
                    arrived[r].update(mail[item.transfer])
                elif isinstance(item, Send):
                    mail[item.transfer] = [buffers[r][item.buffer][row] for row in item.runs.indices()]
                elif isinstance(item, Receive):
                    receiving[r, item.transfer] = item
                elif isinstance(item, Attend):
                    attend(plan, r, item, buffers[r][item.buffer], counts[r])
                todo.pop(0)
        assert sum(map(len, left)) < before, "deadlock"
    return counts, arrived


def attend(plan: AttnPlan, r: int, item: Attend, buffer: list[tuple[int, int]], counts: np.ndarray) -> None:
    spans, table = plan.pipelines[r].spans, item.table
    columns = (table.query, table.k_start, table.k_len, table.diagonal, table.lower_over(spans))
    for query, k_start, k_len, diagonal, low in zip(*columns, strict=True):
        for i, j in itertools.product(range(spans.length[query]), range(k_len)):
            if i + low <= j <= i + diagonal:
                owner, row = buffer[k_start + j]
                counts[spans.start[query] + i, plan.layout.columns(owner)[row]] += 1


def allowed_pairs(layout: Layout, r: int, mask: Mask) -> np.ndarray:
    """What pipeline r's rows may see, straight from positions."""
    members = layout.groups[layout.group_index(r)].members
    tokens = np.concatenate([layout.columns(c) for c in members])
    documents = np.empty(len(tokens), int)
    positions = np.empty(len(tokens), int)
    documents[tokens] = np.concatenate([layout.documents(c) for c in members])
    positions[tokens] = np.concatenate([layout.positions(c) for c in members])
    same = layout.documents(r)[:, None] == documents
    return same & DEFINITIONS[mask](layout.positions(r)[:, None], positions)


def check(layout: Layout, method: str, mask: Mask) -> None:
    plan = build_plan(layout, method=method, mask=mask, heads=HEADS)
    plan.verify()
    counts, arrived = simulate(plan)
    needed = {r: set() for r in range(layout.num_pipelines)}
    for r, count in enumerate(counts):
        allowed = allowed_pairs(layout, r, mask)
        assert np.array_equal(count, allowed)
        assert plan.pairs(r) == allowed.sum()
        used = set(np.flatnonzero(allowed.any(0)).tolist())
        needed[r] = {
            (c, row)
            for c in layout.groups[layout.group_index(r)].members
            for row, token in enumerate(layout.columns(c).tolist())
            if c != r and token in used
        }
        assert needed[r] <= arrived[r]
        if method != "ring":
            assert arrived[r] == needed[r]
    for rows in arrived:  # a ring carries for others, but nothing that nobody uses
        assert rows <= set().union(*needed.values())
    for r in range(layout.num_pipelines):
        alone = build_pipeline_plan(layout, r, method=method, mask=mask, heads=HEADS)
        assert_same(alone, plan.pipelines[r])


@pytest.mark.parametrize("method", KV_METHODS)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_random_layouts(method: str, mask: Mask) -> None:
    rng = np.random.default_rng(KV_METHODS.index(method))
    for _ in range(60):
        check(random_case(rng, longest=9, most=6).layout(), method, mask)


@pytest.mark.parametrize("method", KV_METHODS)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_invented_layouts(method: str, mask: Mask) -> None:
    rng = np.random.default_rng(7)
    for _ in range(40):
        check(random_custom_layout(rng, longest=10), method, mask)


def test_direct_moves_no_more_than_the_others() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        layout = random_case(rng).layout()
        moved = {
            name: sum(plan.rows_sent(r) for r in range(layout.num_pipelines))
            for name in KV_METHODS
            for plan in [build_plan(layout, method=name, heads=HEADS)]
        }
        assert moved["direct"] == moved["all_gather"] <= moved["ring"]


def test_cost_by_hand() -> None:
    layout = Layout.build([4, 4], [0, 0])
    plan = build_plan(layout, method="direct", heads=HEADS)
    # 10 pairs among the first four tokens; 4 * 4 + 10 for the last four. One transfer, of four rows.
    assert (plan.pairs(0), plan.pairs(1)) == (10, 26)
    row = 2 * HEADS.num_kv * HEADS.head_dim * HEADS.itemsize
    pair = 4 * HEADS.head_dim * HEADS.num_q
    cost = plan.cost(Hardware(flops=pair, link_bytes=row, latency=3.0, memory_bytes=1e9))
    assert cost.flops == (10 * pair, 26 * pair)
    assert cost.link_bytes == {(0, 1): 4 * row}
    # A second a pair and a row: pipeline 1 attends its own keys for 10 s, by when the transfer of 3 + 4 s is done.
    assert cost.finish == (10.0, 26.0) and cost.time == 26.0
    # Four rows of k and v and what is sent or received of them; q, out and lse; pipeline 1 needs a running output.
    query = 4 * (2 * HEADS.num_q * HEADS.head_dim * HEADS.itemsize + 4 * HEADS.num_q)
    running = 4 * 4 * HEADS.num_q * HEADS.head_dim
    assert cost.peak_bytes == (8 * row + query, 8 * row + query + running)
    slow = plan.cost(Hardware(flops=pair, link_bytes=row / 10, latency=3.0, memory_bytes=1))
    assert slow.finish == (43.0, 43.0 + 16.0) and not slow.fits


def test_hash_tells_plans_apart() -> None:
    plans = [
        build_plan(Layout.build(lens, [0, 0], split=split), method=method, mask=mask, heads=HEADS)
        for lens in ([4, 4], [3, 5])
        for split in ("normal", "sym")
        for method in METHODS
        for mask in MASKS
    ]
    assert len({plan.hash() for plan in plans}) == len(plans)
    again = build_plan(Layout.build([4, 4], [0, 0]), method="ring", mask=Mask.causal(), heads=HEADS)
    assert again.hash() == plans[0].hash()


def test_printing() -> None:
    plan = build_plan(Layout.build([4, 2], [0, 0], split="sym"), method="ring", heads=HEADS)
    text = str(plan)
    assert text.startswith(plan.summary())
    assert "pipeline 0: 2 query spans, buffers of 4, 2 rows" in text
    assert "  send     2 rows (1 run) of buffer 0 to 1\n" in text
    assert "  attend   buffer 1 (rows of 1): 1 segment, 4 pairs\n" in text


def test_a_topology_has_a_host_for_each_pipeline() -> None:
    layout = Layout.build([2, 2], [0, 0])
    with pytest.raises(StrategyError, match="hosts of 3 pipelines, but there are 2"):
        build_plan(layout, heads=HEADS, topology=Topology((0, 0, 1)))
    plans = [build_plan(layout, heads=HEADS, topology=topology) for topology in (None, Topology((0, 1)))]
    assert plans[0].hash() != plans[1].hash() and plans[0].digest() != plans[1].digest()
    assert Topology((4, 1, 4)).shares_host(0, 2) and not Topology((4, 1, 4)).shares_host(0, 1)
