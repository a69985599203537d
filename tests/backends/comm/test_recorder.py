"""What really happens, recorded: the steps that the plan says, on the lanes and at the times that they had."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.devices import ON_CUDA
from support.held import holding_zeros
from support.layout_cases import HEADS, MASKS, random_case, random_custom_layout
from support.traces import check_events, lane_names, named_steps, steps, wanted_steps

import hetu
from hetu.backends.comm import LocalComm, follow, recorder, run_lock_step
from hetu.backends.comm.program import Program
from hetu.backends.comm.recorder import PERIOD, _in_turn, watched
from hetu.parallel import METHODS, Layout, Mask, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Send, Wait
from hetu.parallel.views.cost import transfer_bytes
from hetu.parallel.views.trace import link_lane

SEEDS = st.integers(0, 2**32 - 1)
CPU = torch.device("cpu")


def run(plan: AttnPlan, attend: Any = lambda *_: None, comm: Any = None) -> None:
    """Follows a plan of float32 on zeros."""
    comm, coroutines = comm or LocalComm(), []
    for part in plan.pipelines:
        coroutines.append(follow(part, holding_zeros(part, HEADS), comm, attend))
    run_lock_step(coroutines)


def plan_of(lens: list[int], method: str = "direct", is_backward: bool = False) -> AttnPlan:
    plan = build_plan(Layout.build(lens, [0] * len(lens)), method=method, mask=Mask.full(), heads=HEADS)
    return plan.backward() if is_backward else plan


@pytest.mark.parametrize("method", METHODS)
@given(seed=SEEDS, mask=st.sampled_from(MASKS), is_backward=st.booleans(), custom=st.booleans())
def test_the_steps_of_the_plan(method: str, seed: int, mask: Mask, is_backward: bool, custom: bool) -> None:
    rng = np.random.default_rng(seed)
    layout = random_custom_layout(rng, longest=9) if custom else random_case(rng, longest=7, most=6).layout()
    plan = build_plan(layout, method=method, mask=mask, heads=HEADS)
    plan = plan.backward() if is_backward else plan
    with hetu.trace() as t:
        run(plan)
    check_events(t.events)
    assert named_steps(t.events) == wanted_steps(plan, Attend, Accumulate, Copy, Send, Receive, Wait)
    predicted = plan.trace()["traceEvents"]
    assert lane_names(t.events) == lane_names(predicted)
    assert not named_steps(predicted) - named_steps(t.events)  # only of waits does it predict fewer
    sizes = {
        (part.pipeline, link_lane(type(item), item.peer), item.transfer): transfer_bytes(plan, item)
        for part in plan.pipelines
        for item in part.instructions
        if isinstance(item, (Send, Receive))
    }
    told = {(e["pid"], e["tid"], e["args"]["transfer"]): e["args"]["bytes"] for e in steps(t.events) if e["tid"]}
    assert told == sizes


def test_nothing_is_in_between_when_nobody_looks() -> None:
    part, comm = plan_of([2, 2]).pipelines[0], LocalComm()
    steps, same = watched(part, comm, CPU)
    assert steps is Program.of(part).steps and same is comm
    with hetu.trace():
        others, other = watched(part, comm, CPU)
        assert others is not steps and other is not comm
    assert watched(part, comm, CPU)[1] is comm


# Times


class Ticking:
    """A clock that goes on by what a step says it took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        clock = SimpleNamespace(time_ns=lambda: PERIOD, perf_counter_ns=lambda: self.now)
        monkeypatch.setattr(recorder, "time", clock)

    def __call__(self, microseconds: int) -> None:
        self.now += 1000 * microseconds


class Slow(LocalComm):
    """A message is there 20 µs after it was sent; to look whether it is takes 5 µs."""

    def __init__(self, tick: Ticking) -> None:
        super().__init__()
        self.tick, self.arrival = tick, dict[int, int]()

    def send(self, pipeline: int, instruction: Send, rows: torch.Tensor) -> None:
        super().send(pipeline, instruction, rows)
        self.arrival[instruction.transfer] = self.tick.now + 20_000

    def done(self, pipeline: int, transfer: int) -> bool:
        self.tick(5)
        return self.tick.now >= self.arrival[transfer] and super().done(pipeline, transfer)


def test_times_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both send two rows, attend to their own for 5 µs, wait for the other's, attend to it, and wait to have sent."""
    tick, plan = Ticking(monkeypatch), plan_of([2, 2])
    with hetu.trace() as t:
        run(plan, lambda *_: tick(5), Slow(tick))
    lanes, timed = lane_names(t.events), dict[str, list[tuple[str, float, float]]]()
    for e in steps(t.events):
        span = e["name"].split(":")[0], e["ts"], e["ts"] + e["dur"]
        timed.setdefault(f"{e['pid']} {lanes[e['pid'], e['tid']]}", []).append(span)
    # They take turns. 0 sends at 0 and 1 at 5. At 15 0 looks in vain, at 20 1 finds what was sent to it and attends,
    # at 30 0 does so, at 40 1 knows that its message has left, and at 45 0.
    assert timed == {
        "0 compute": [
            ("attend buffer 0 (rows of 0)", 0.0, 5.0),
            ("wait for what comes from 1", 5.0, 30.0),
            ("attend buffer 1 (rows of 1)", 30.0, 35.0),
            ("wait to have sent to 1", 35.0, 45.0),
        ],
        "0 to 1": [("send 2 rows (1 run) of buffer 0 to 1", 0.0, 45.0)],
        "0 from 1": [("receive 2 rows from 1 into buffer 1", 0.0, 30.0)],
        "1 compute": [
            ("attend buffer 0 (rows of 1)", 5.0, 10.0),
            ("wait for what comes from 0", 10.0, 20.0),
            ("attend buffer 1 (rows of 0)", 20.0, 25.0),
            ("wait to have sent to 0", 25.0, 40.0),
        ],
        "1 to 0": [("send 2 rows (1 run) of buffer 0 to 0", 5.0, 40.0)],
        "1 from 0": [("receive 2 rows from 0 into buffer 1", 5.0, 20.0)],
    }


def test_processes_of_a_host_agree() -> None:
    with hetu.trace() as first:
        run(plan_of([2, 2]))
    before = time.time_ns()
    with hetu.trace() as second:
        run(plan_of([2, 2]))
    after = time.time_ns()
    base = before // PERIOD * PERIOD
    assert all(before - base - 1e6 <= 1000 * e["ts"] <= after - base + 1e6 for e in steps(second.events))
    assert max(e["ts"] for e in steps(first.events)) <= min(e["ts"] for e in steps(second.events))


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1))
def test_messages_of_a_link_in_turn(given: list[tuple[int, int]]) -> None:
    posted = sorted(start for start, _ in given)
    seen = [start + length for start, (_, length) in zip(posted, given, strict=True)]
    starts, ends = _in_turn(posted, seen)
    for i in range(len(given)):
        assert posted[i] <= starts[i] <= ends[i] <= seen[i]
        assert ends[i] == min(seen[i:]) and starts[i] == max(posted[i], *ends[:i], 0)


# Who records what


def test_what_lies_outside_is_not_recorded() -> None:
    plan = plan_of([2, 2])
    run(plan)
    with hetu.trace() as outer:
        with hetu.trace() as inner:
            run(plan)
        thread = threading.Thread(target=run, args=(plan,))
        thread.start()
        thread.join()
        run(plan_of([3]))
    run(plan)
    assert named_steps(inner.events) == wanted_steps(plan, Attend, Send, Receive, Wait)
    assert named_steps(outer.events) == wanted_steps(plan_of([3]))


def test_several_runs_and_names_told_once() -> None:
    plans = [plan_of([2, 3, 2], "ring"), plan_of([2, 3, 2], "direct", is_backward=True), plan_of([2, 3])]
    with hetu.trace() as t:
        for plan in plans:
            run(plan)
    check_events(t.events)
    everything = [wanted_steps(plan, Attend, Accumulate, Copy, Send, Receive, Wait) for plan in plans]
    assert named_steps(t.events) == sum(everything, Counter())


def test_a_run_that_fails() -> None:
    def attend(item: Attend, *_: Any) -> None:
        if item.buffer:
            raise RuntimeError("out of something")

    plan = plan_of([2, 2])
    with pytest.raises(RuntimeError, match="out of something"), hetu.trace() as t:
        run(plan, attend)
    assert watched(plan.pipelines[0], LocalComm(), CPU)[0] is Program.of(plan.pipelines[0]).steps
    check_events(t.events)
    found = named_steps(t.events)
    assert found[0, "compute", "attend buffer 0 (rows of 0): 1 segment, 4 pairs"] == 1
    assert found[0, "from 1", "receive 2 rows from 1 into buffer 1"] == 1
    assert not any("attend buffer 1" in name for _, _, name in found)
    assert not any(lane == "from 0" for _, lane, _ in found)  # pipeline 1 was not yet told that it had come


def test_saved(tmp_path: Path) -> None:
    with hetu.trace() as t:
        run(plan_of([2, 2]))
    t.save(tmp_path / "trace.json")
    saved = json.loads((tmp_path / "trace.json").read_text())
    assert saved["traceEvents"] == t.events and steps(t.events)
    assert saved["displayTimeUnit"] == "ns" and saved["baseTimeNanoseconds"] % PERIOD == 0


# Runs of a graph


class Training:
    """A graph with two strategies, and its gradient."""

    def __init__(self, device: str = "cpu") -> None:
        self.s, rows = hetu.IntSymbol("s"), hetu.IntSymbol("rows")
        with hetu.graph("define_and_run", num_strategy=2, device=device) as self.graph:
            self.qkv = hetu.placeholder(hetu.float32, [rows, 3 * 16], name="qkv")
            lens = [[self.s], [self.s // 3, self.s - self.s // 3]]
            self.out, *_ = hetu.parallel_attn(self.qkv, 16, 1, lens, [[0], [0, 0]])
            (self.grad,) = hetu.gradients([hetu.sum(self.out * self.out)], [self.qkv])

    def run(self, strategy: int, tokens: int = 12) -> AttnPlan:
        data = np.random.default_rng(0).standard_normal((tokens, 48)).astype(np.float32)
        symbols = {self.s: tokens}
        shards = hetu.Shards(self.graph.layout(strategy, int_symbol_dict=symbols).scatter(data))
        fed = {self.qkv: shards if strategy else data}
        self.graph.run(self.grad, fed, int_symbol_dict=symbols, strategy=strategy)
        return self.graph.plan(strategy, int_symbol_dict=symbols)


@pytest.mark.parametrize("strategy", [0, 1])
def test_a_training_run(strategy: int) -> None:
    training = Training()
    with hetu.trace() as t:
        plan = training.run(strategy)
    check_events(t.events)
    kinds = Attend, Accumulate, Send, Receive, Wait
    assert named_steps(t.events) == wanted_steps(plan, *kinds) + wanted_steps(plan.backward(), *kinds)


def test_names_in_torchs_profiler() -> None:
    training = Training()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        plan = training.run(1)
    found = Counter(event.name for event in profile.events())
    wanted: Counter[str] = Counter()
    for (_, _, name), count in (wanted_steps(plan) + wanted_steps(plan.backward())).items():
        wanted[name] += count
    assert {name: found[name] for name in wanted} == wanted
    for _, _, name in wanted_steps(plan, Wait) + wanted_steps(plan.backward(), Wait):
        assert found[name] >= 1  # as often as it was looked


def test_spans_in_torchs_profiler_hold_what_a_step_computes() -> None:
    training = Training()
    training.run(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        training.run(1)
    spans = [event for event in profile.events() if event.name.startswith(("attend", "send"))]
    assert spans and all(event.cpu_children for event in spans)


@pytest.mark.parametrize("strategy", [pytest.param(1, marks=ON_CUDA)])
def test_times_of_a_gpu(strategy: int) -> None:
    training = Training("cuda")
    training.run(strategy, 4096)
    before = time.time_ns()
    with hetu.trace() as t:
        plan = training.run(strategy, 4096)
    after = time.time_ns()
    check_events(t.events)
    kinds = Attend, Accumulate, Send, Receive, Wait
    assert named_steps(t.events) == wanted_steps(plan, *kinds) + wanted_steps(plan.backward(), *kinds)
    base = before // PERIOD * PERIOD
    for e in steps(t.events):
        assert before - base - 1e6 <= 1000 * e["ts"] <= 1000 * (e["ts"] + e["dur"]) <= after - base + 1e6
        assert e["dur"] > 1 or not e["name"].startswith("attend")
