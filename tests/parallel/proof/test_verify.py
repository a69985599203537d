"""The verifier passes good plans, and catches every kind of damage done to them, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from support.layout_cases import HEADS, MASKS
from support.plans import KV_METHODS, find, refused, with_instructions

import hetu
from hetu.parallel import SPLITS, Layout, Mask, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.mask.mask import CAUSAL
from hetu.parallel.mask.segments import SegmentTable
from hetu.parallel.plan.instructions import Attend, Receive, Runs, Send, Source, Wait


def good(method: str = "direct", split: str = "sym", count: int = 3, mask: Mask = CAUSAL) -> AttnPlan:
    cu = np.minimum([0, 5, 5, 17, 8 * count], 8 * count)
    layout = Layout.build([8] * count, [0] * count, split=split, cu_seqlens=cu)
    return build_plan(layout, method=method, mask=mask, heads=HEADS)


def test_good_plans_pass() -> None:
    for method in KV_METHODS:
        for split in SPLITS:
            for mask in MASKS:
                good(method, split, mask=mask).verify()


def damage_table(change: Callable[[dict[str, np.ndarray]], None], number: int, split: str = "sym") -> AttnPlan:
    """Changes the columns of the number-th table of pipeline 1."""
    plan = good(split=split)
    instructions, at = find(plan, Attend, 1, number)
    table = instructions[at].table
    columns = {name: getattr(table, name).copy() for name in ("query", "k_start", "k_len", "diagonal")}
    change(columns)
    instructions[at] = dataclasses.replace(instructions[at], table=SegmentTable(**columns))
    return with_instructions(plan, 1, instructions)


def each(columns: dict[str, np.ndarray], change: Callable[[np.ndarray], np.ndarray]) -> None:
    for name in columns:
        columns[name] = change(columns[name])


@pytest.mark.parametrize("number", [0, 1])
def test_a_row_dropped(number: int) -> None:
    refused(damage_table(lambda t: each(t, lambda c: c[1:]), number), "pipeline 1", "never", "expected once")


@pytest.mark.parametrize("number", [0, 1])
def test_a_row_doubled(number: int) -> None:
    refused(damage_table(lambda t: each(t, lambda c: np.insert(c, 0, c[0])), number), "pipeline 1", "attended 2 times")


@pytest.mark.parametrize("by", [1, -1])
def test_a_row_shifted(by: int) -> None:
    def shift(t: dict[str, np.ndarray]) -> None:
        t["k_start"][1] += by

    refused(damage_table(shift, 0), "pipeline 1")


@pytest.mark.parametrize("number", [0, 1])
def test_a_diagonal_too_wide(number: int) -> None:
    def widen(t: dict[str, np.ndarray]) -> None:
        row = int((t["diagonal"] < t["k_len"] - 1).argmax())
        assert t["diagonal"][row] < t["k_len"][row] - 1
        t["diagonal"][row] += 1

    refused(damage_table(widen, number, "stripe"), "pipeline 1", "though the mask hides the key")


def test_a_diagonal_too_narrow() -> None:
    def narrow(t: dict[str, np.ndarray]) -> None:
        row = int((t["diagonal"] >= t["k_len"] - 1).argmax())
        t["diagonal"][row] = t["k_len"][row] - 2

    refused(damage_table(narrow, 0), "pipeline 1")


def test_a_transfer_dropped() -> None:
    plan = good()
    sends, at = find(plan, Send, 0)
    number, target = sends[at].transfer, sends[at].peer
    without = [item for item in sends if getattr(item, "transfer", None) != number]
    refused(with_instructions(plan, 0, without), f"transfer {number} is received by pipeline {target}, but never sent")
    there = [item for item in plan.pipelines[target].instructions if getattr(item, "transfer", None) != number]
    refused(with_instructions(plan, target, there), f"transfer {number} is sent by pipeline 0, but never received")
    refused(with_instructions(with_instructions(plan, 0, without), target, there), f"pipeline {target}")


def test_a_transfer_redirected() -> None:
    plan = good()
    sends, at = find(plan, Send, 0)
    sends[at] = dataclasses.replace(sends[at], peer=3 - sends[at].peer)
    refused(
        with_instructions(plan, 0, sends), f"transfer {sends[at].transfer} is sent by pipeline 0 to {sends[at].peer}"
    )


def test_a_transfer_resized() -> None:
    plan = good()
    sends, at = find(plan, Send, 0)
    runs = sends[at].runs
    length = runs.length.copy()
    length[-1] -= 1
    kept = length > 0
    sends[at] = dataclasses.replace(sends[at], runs=Runs(runs.start[kept], length[kept]))
    refused(with_instructions(plan, 0, sends), f"transfer {sends[at].transfer}", "sends", "are received")


def test_other_rows_sent() -> None:
    plan = good(split="normal")
    sends, at = find(plan, Send, 0)
    rows = sends[at].runs.rows
    others = Runs(np.array([0]), np.array([rows]))
    assert not np.array_equal(others.indices(), sends[at].runs.indices())
    sends[at] = dataclasses.replace(sends[at], runs=others)
    refused(with_instructions(plan, 0, sends), "holds position", "but the plan says position")


def test_reordered_into_a_deadlock() -> None:
    plan = good("direct", mask=Mask.full())
    for r in range(3):  # everybody waits for what comes in before sending anything
        instructions = list(plan.pipelines[r].instructions)
        sends = [item for item in instructions if isinstance(item, Send)]
        numbers = {item.transfer for item in sends}
        rest = [item for item in instructions if item not in sends and getattr(item, "transfer", None) not in numbers]
        plan = with_instructions(plan, r, [*rest, *sends, *(Wait(number) for number in numbers)])
    refused(plan, "deadlock", "wait for each other")


def test_a_buffer_reused_while_it_is_sent() -> None:
    plan = good("ring", count=4, mask=Mask.full())
    instructions = list(plan.pipelines[0].instructions)
    sent = {item.transfer for item in instructions if isinstance(item, Send) and item.buffer > 0}
    early = next(i for i, item in enumerate(instructions) if isinstance(item, Wait) and item.transfer in sent)
    wait = instructions.pop(early)
    refused(with_instructions(plan, 0, [*instructions, wait]), "fills buffer", "is still being sent")


def test_attending_before_the_rows_have_landed() -> None:
    plan = good()
    instructions, at = find(plan, Attend, 1, 1)
    received = {item.transfer for item in instructions if isinstance(item, Receive)}
    wait = max(i for i in range(at) if isinstance(instructions[i], Wait) and instructions[i].transfer in received)
    instructions[wait], instructions[at] = instructions[at], instructions[wait]
    refused(with_instructions(plan, 1, instructions), "nothing that has landed")


def test_sources_that_lie() -> None:
    plan = good()
    instructions, at = find(plan, Attend, 1, 1)
    source = instructions[at].sources[0]
    lie = dataclasses.replace(source, owner=3 - source.owner - 1 if source.owner != 1 else 0)
    instructions[at] = dataclasses.replace(instructions[at], sources=(lie,))
    refused(with_instructions(plan, 1, instructions), "pipeline 1: attending to buffer 1", "but the plan says")


def test_a_transfer_never_waited_for() -> None:
    plan = good()
    instructions, at = find(plan, Wait, 0, -1)
    del instructions[at]
    refused(with_instructions(plan, 0, instructions), "is never waited for")


def test_a_pipeline_that_never_attends() -> None:
    plan = good(count=1)
    refused(with_instructions(plan, 0, []), "pipeline 0 never attends")


def test_rows_out_of_a_buffer() -> None:
    plan = good()
    instructions, at = find(plan, Receive, 1)
    instructions[at] = dataclasses.replace(instructions[at], offset=1)
    refused(with_instructions(plan, 1, instructions), "lands in rows 1 to")


def test_memory_bound() -> None:
    plan = good(mask=Mask.full())
    enough = max(plan.peak_bytes(r) for r in range(3))
    plan.verify(max_bytes=enough)
    with pytest.raises(hetu.PlanError, match="but may take"):
        plan.verify(max_bytes=enough - 1)


def test_a_buffer_larger_than_the_group() -> None:
    plan = good()
    own, *foreign = plan.pipelines[1].buffers
    buffers = (own, dataclasses.replace(foreign[0], rows=100), *foreign[1:])
    part = dataclasses.replace(plan.pipelines[1], buffers=buffers)
    damaged = dataclasses.replace(plan, pipelines=(plan.pipelines[0], part, plan.pipelines[2]))
    refused(damaged, "pipeline 1 holds", "its group has 24")


def test_a_step_below_one() -> None:
    plan = good()
    spans = dataclasses.replace(plan.pipelines[1].spans, step=plan.pipelines[1].spans.step * 0)
    part = dataclasses.replace(plan.pipelines[1], spans=spans)
    damaged = dataclasses.replace(plan, pipelines=(plan.pipelines[0], part, plan.pipelines[2]))
    refused(damaged, "pipeline 1: query span 0 has a step below 1")


def test_landing_in_the_own_shard() -> None:
    plan = good()
    instructions, at = find(plan, Receive, 1)
    instructions[at] = dataclasses.replace(instructions[at], buffer=0)
    refused(with_instructions(plan, 1, instructions), "lands in buffer 0, the pipeline's own shard")


def test_two_receives_into_the_same_rows() -> None:
    plan = good("all_gather", mask=Mask.full())
    instructions, at = find(plan, Receive, 1, 1)
    instructions[at] = dataclasses.replace(instructions[at], offset=0)
    refused(with_instructions(plan, 1, instructions), "is still landing")


def test_passing_on_what_has_not_landed() -> None:
    plan = good("ring", count=4, mask=Mask.full())
    instructions = list(plan.pipelines[1].instructions)
    at = next(i for i, item in enumerate(instructions) if isinstance(item, Send) and item.buffer > 0)
    wait = max(i for i in range(at) if isinstance(instructions[i], Wait))
    instructions.insert(wait, instructions.pop(at))
    refused(with_instructions(plan, 1, instructions), "sends row", "nothing that has landed")


def test_a_transfer_number_used_twice() -> None:
    plan = good()
    sends, at = find(plan, Send, 0)
    refused(with_instructions(plan, 0, [*sends, sends[at]]), f"transfer {sends[at].transfer} is sent twice")


def test_messages_in_another_order_at_the_other_end() -> None:
    plan = good("ring", count=3, mask=Mask.full())
    instructions = list(plan.pipelines[0].instructions)
    first, second = [i for i, item in enumerate(instructions) if isinstance(item, Receive)]
    a, b = instructions[first], instructions[second]
    instructions[first] = dataclasses.replace(b, buffer=a.buffer)
    instructions[second] = dataclasses.replace(a, buffer=b.buffer)
    refused(with_instructions(plan, 0, instructions), "which receives them in another order")


def test_config_verifies_every_new_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[AttnPlan] = []
    monkeypatch.setattr(AttnPlan, "verify", lambda plan: verified.append(plan))
    with hetu.graph("define_and_run") as g:
        qkv = hetu.placeholder(hetu.float32, [4, 24])
        hetu.parallel_attn(qkv, 8, 1, [[2, 2]], [[0, 0]])
    with hetu.config(verify_plans=True):
        plan = g.plan()
    assert verified == [plan]


def test_sources_out_of_a_shard() -> None:
    plan = good()
    instructions, at = find(plan, Attend, 1, 1)
    source = instructions[at].sources[0]
    for wrong, why in (
        (Source(7, source.runs), "there is no pipeline 7"),
        (Source(source.owner, Runs(source.runs.start + 8, source.runs.length)), "of the shard of pipeline"),
    ):
        instructions[at] = dataclasses.replace(instructions[at], sources=(wrong,))
        refused(with_instructions(plan, 1, instructions), "pipeline 1: attending to buffer 1", why)
