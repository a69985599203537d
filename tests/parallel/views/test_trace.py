"""Predicted timelines: valid traces with one event a step, at the times that the cost says."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layout_cases import HEADS, MASKS, random_case, random_custom_layout
from support.plans import broadcast, find, with_instructions
from support.traces import check_events, lane_names, named_steps, steps, steps_at, wanted_steps

import hetu
from hetu.parallel import METHODS, Hardware, Heads, Layout, Mask, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.plan.instructions import Accumulate, Attend, Receive, Send, Wait
from hetu.parallel.views.trace import microseconds

SEEDS = st.integers(0, 2**32 - 1)
PAIR = 4 * HEADS.head_dim * HEADS.num_q
HARDWARE = [
    Hardware.h100(),
    Hardware(flops=PAIR * 3e5, link_bytes=7e6, latency=1e-5, memory_bytes=1e9),
    Hardware(flops=PAIR * 1e7, link_bytes=3e4, latency=0.0, memory_bytes=1e9),
]


def build(layout: Layout, method: str, mask: Mask, is_backward: bool) -> AttnPlan:
    if method == "broadcast":
        plan = broadcast(layout, mask)
    else:
        plan = build_plan(layout, method=method, mask=mask, heads=HEADS)
    return plan.backward() if is_backward else plan


def check(plan: AttnPlan, hardware: Hardware) -> None:
    trace, cost = plan.trace(hardware), plan.cost(hardware)
    events = trace["traceEvents"]
    check_events(events)
    found, wanted = named_steps(events), wanted_steps(plan)
    waits = wanted_steps(plan, Wait)
    assert {key: n for key, n in found.items() if "wait " not in key[2]} == wanted
    assert all(n <= waits[key] for key, n in found.items() if "wait " in key[2])
    count = sum(len(part.instructions) for part in plan.pipelines)
    for r, (flops, finish) in enumerate(zip(cost.flops, cost.finish, strict=True)):
        own = [e for e in steps(events) if e["pid"] == r and e["tid"] == 0]
        attending = [e for e in own if e["name"].startswith("attend")]
        assert sum(e["args"]["flops"] for e in attending) == flops
        # Times are told to an eighth of a microsecond.
        seconds = flops / hardware.flops
        assert math.isclose(sum(e["dur"] for e in attending), 1e6 * seconds, rel_tol=1e-9, abs_tol=count / 8)
        assert math.isclose(
            max((e["ts"] + e["dur"] for e in own), default=0), 1e6 * finish, rel_tol=1e-9, abs_tol=1 / 8
        )
        # Computing, adding up and waiting is all that a pipeline does: its lane has no gaps.
        assert math.isclose(sum(e["dur"] for e in own), 1e6 * finish, rel_tol=1e-9, abs_tol=1 / 8)
        assert all(e["dur"] > 0 or not e["name"].startswith("wait") for e in own)
    sent: Counter[tuple[int, int]] = Counter()
    for e in steps(events):
        lane = lane_names(events)[e["pid"], e["tid"]]
        if lane.startswith("to "):
            sent[e["pid"], int(lane[3:])] += e["args"]["bytes"]
    assert sent == cost.link_bytes


@pytest.mark.parametrize("method", [*METHODS, "broadcast"])
@given(seed=SEEDS, mask=st.sampled_from(MASKS), is_backward=st.booleans(), hardware=st.sampled_from(HARDWARE))
def test_random_layouts(method: str, seed: int, mask: Mask, is_backward: bool, hardware: Hardware) -> None:
    layout = random_case(np.random.default_rng(seed), longest=9, most=6).layout()
    check(build(layout, method, mask, is_backward), hardware)


@pytest.mark.parametrize("method", [*METHODS, "broadcast"])
@given(seed=SEEDS, mask=st.sampled_from(MASKS), is_backward=st.booleans(), hardware=st.sampled_from(HARDWARE))
def test_invented_layouts(method: str, seed: int, mask: Mask, is_backward: bool, hardware: Hardware) -> None:
    layout = random_custom_layout(np.random.default_rng(seed), longest=10)
    check(build(layout, method, mask, is_backward), hardware)


def test_both_ends_of_a_transfer_take_the_same_time() -> None:
    plan = build(Layout.build([5, 9, 4], [0] * 3), "ring", mask=Mask.full(), is_backward=True)
    ends: dict[int, set[tuple[float, float]]] = {}
    for e in steps(plan.trace(HARDWARE[1])["traceEvents"]):
        if e["tid"]:
            ends.setdefault(e["args"]["transfer"], set()).add((e["ts"], e["dur"]))
    assert len(ends) == 12 and all(len(times) == 1 for times in ends.values())


# By hand


def test_a_timeline_by_hand() -> None:
    """A pair takes 1 µs, a row 2 µs and a message 3 µs more. Pipeline 1 waits for four rows, from 3 to 11 µs."""
    heads = Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2)
    plan = build_plan(Layout.build([4, 2], [0, 0]), method="direct", heads=heads)
    hardware = Hardware(flops=4 * 64e6, link_bytes=256e6 / 2, latency=3e-6, memory_bytes=1e9)
    trace = plan.trace(hardware)
    assert trace["displayTimeUnit"] == "ns" and trace["otherData"] == {"plan": plan.summary()}
    events = trace["traceEvents"]
    names = {(e["pid"], e["name"]): e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {(0, "process_name"): "pipeline 0 (group 0)", (1, "process_name"): "pipeline 1 (group 0)"}
    assert lane_names(events) == {(0, 0): "compute", (0, 3): "to 1", (1, 0): "compute", (1, 2): "from 0"}
    timed = [(e["pid"], e["tid"], e["ts"], e["dur"], e["name"]) for e in steps(events)]
    assert timed == [
        (0, 3, 0.0, 11.0, "send 4 rows (1 run) of buffer 0 to 1"),
        (0, 0, 0.0, 10.0, "attend buffer 0 (rows of 0): 1 segment, 10 pairs"),
        (0, 0, 10.0, 1.0, "wait to have sent to 1"),
        (1, 2, 0.0, 11.0, "receive 4 rows from 0 into buffer 1"),
        (1, 0, 0.0, 3.0, "attend buffer 0 (rows of 1): 1 segment, 3 pairs"),
        (1, 0, 3.0, 8.0, "wait for what comes from 0"),
        (1, 0, 11.0, 8.0, "attend buffer 1 (rows of 0): 1 segment, 8 pairs"),
    ]
    transfer = plan.pipelines[0].instructions[0].transfer
    assert steps(events)[0]["args"] == {"rows": 4, "transfer": transfer, "bytes": 4 * 256}
    assert steps(events)[6]["args"] == {"rows": 4, "segments": 1, "pairs": 8, "flops": 8 * 256}
    arrow = {"name": "rows", "cat": "plan", "id": transfer}
    assert [e for e in events if e["ph"] in "sf"] == [
        {**arrow, "ph": "s", "pid": 0, "tid": 3, "ts": 0.0},
        {**arrow, "ph": "f", "pid": 1, "tid": 0, "ts": 11.0, "bp": "e"},
    ]


def test_an_h100_unless_told_otherwise() -> None:
    plan = build_plan(Layout.build([40, 20], [0, 0]), heads=HEADS)
    assert plan.trace() == plan.trace(Hardware.h100()) != plan.trace(HARDWARE[1])


# Arrows


def arrows(plan: AttnPlan) -> list[tuple[int, str, str]]:
    """For each arrow who sent, on which lane, and the name of the step that it leads to."""
    events = plan.trace(HARDWARE[1])["traceEvents"]
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    found = []
    for e in events:
        if e["ph"] == "s":
            (reader,) = [x for x in steps_at(events, ends[e["id"]]) if x["ts"] == ends[e["id"]]["ts"]]
            found.append((e["pid"], lane_names(events)[e["pid"], e["tid"]], reader["name"]))
    return found


@pytest.mark.parametrize("method", ["direct", "broadcast"])
def test_an_arrow_leads_to_the_attend_of_what_was_sent(method: str) -> None:
    plan = build(Layout.build([8] * 5, [0] * 5), method, mask=Mask.full(), is_backward=False)
    found = arrows(plan)
    assert len(found) == 20
    assert all(f"(rows of {owner})" in reader for owner, _, reader in found)
    assert Counter(lane for _, lane, _ in found) == {f"to {r}": 4 for r in range(5)}


def test_what_is_gathered_is_attended_to_at_once() -> None:
    plan = build(Layout.build([8] * 4, [0] * 4), "all_gather", mask=Mask.full(), is_backward=False)
    assert len(arrows(plan)) == 12
    assert all("attend buffer 1" in reader for _, _, reader in arrows(plan))


def test_gradients_lead_to_where_they_are_added() -> None:
    plan = build(Layout.build([8, 7, 5], [0] * 3), "direct", mask=Mask.full(), is_backward=True)
    events = plan.trace(HARDWARE[1])["traceEvents"]
    home = {i.transfer for part in plan.pipelines for i in part.instructions if isinstance(i, Send) and i.grads}
    for e in events:
        if e["ph"] == "f":
            (reader,) = [x for x in steps_at(events, e) if x["ts"] == e["ts"] and "wait" not in x["name"]][:1]
            assert reader["name"].startswith("add" if e["id"] in home else "attend")
    assert len(home) == 6 and sum(e["ph"] == "f" for e in events) == 12


def test_what_a_ring_only_passes_on_has_no_arrow() -> None:
    """Documents of 0 and 2, and of 3 and 1. What 1 passes on to 2 lay where later is what 1 itself attends to."""
    pieces = [[4, 0], [0, 4], [4, 0], [0, 4], [0, 0]]
    cu = [np.cumsum([[0, *row] for row in pieces], axis=1)]
    layout = Layout.build(np.sum(pieces, axis=1).tolist(), [0] * 5, cu_seqlens=cu)
    plan = build_plan(layout, method="ring", mask=Mask.full(), heads=HEADS)
    landed = [i.buffer for i in plan.pipelines[1].instructions if isinstance(i, Receive)]
    assert len(landed) > len(set(landed))
    owners = sorted(reader[reader.index("(") : reader.index(":")] for _, _, reader in arrows(plan))
    assert owners == ["(rows of 0)", "(rows of 1)", "(rows of 2)", "(rows of 3)"]


def test_an_arrow_leads_to_the_first_that_reads() -> None:
    plan = build_plan(Layout.build([4, 4], [0, 0]), method="direct", heads=HEADS)
    instructions, at = find(plan, Attend, 1, 1)
    twice = with_instructions(plan, 1, [*instructions, instructions[at]])
    check_events(twice.trace()["traceEvents"])
    assert len(arrows(twice)) == 1


# Damaged plans


def test_a_plan_that_cannot_be_followed() -> None:
    plan = build_plan(Layout.build([4, 4], [0, 0]), method="direct", heads=HEADS)
    instructions, at = find(plan, Send, 0)
    del instructions[at]
    with pytest.raises(hetu.PlanError, match="wait for ever"):
        with_instructions(plan, 0, instructions).trace()


def test_a_transfer_that_never_starts_has_no_event() -> None:
    plan = build_plan(Layout.build([4, 4], [0, 0]), method="direct", heads=HEADS)
    alone = with_instructions(plan, 1, [i for i in plan.pipelines[1].instructions if isinstance(i, Attend)])
    alone = with_instructions(alone, 0, [i for i in alone.pipelines[0].instructions if not isinstance(i, Wait)])
    events = alone.trace()["traceEvents"]
    check_events(events)
    assert named_steps(events) == wanted_steps(alone, Attend, Accumulate)


# Times


@given(st.lists(st.integers(0, 92 * 86_400 * 10**9), min_size=2, max_size=9))
def test_times_survive_readers(moments: list[int]) -> None:
    """A quarter of a year: what ends where another begins does so after any reader's rounding."""
    told = [microseconds(moment) for moment in sorted(moments)]
    assert all(abs(1000 * t - moment) < 125 for t, moment in zip(told, sorted(moments), strict=True))
    for start, end in pairwise(told):
        assert int(1000 * start) + int(1000 * (end - start)) == int(1000 * end)
        assert start + (end - start) == end
