"""Timelines as Chrome traces: what a plan is predicted to do, and the events that recorded ones are made of too.

A pipeline is a process of the trace. Its lanes are threads: one for what it computes, and for each other pipeline that
it exchanges rows with one for what goes there and one for what comes from there. The format is the "Trace Event Format"
of Chrome (https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU), which Perfetto reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Instruction, Receive, Send, Wait
from hetu.parallel.plan.parts import PipelinePlan, PlanData
from hetu.parallel.views.cost import Timeline, attend_flops, simulate, transfer_bytes
from hetu.parallel.views.hardware import Hardware
from hetu.parallel.views.report import step_names, summary

Event = dict[str, Any]

COMPUTE = 0
"""The lane of what a pipeline computes."""


def link_lane(kind: type[Send | Receive], peer: int) -> int:
    """The lane of what is sent to another pipeline, or received from it."""
    return 1 + 2 * peer + (kind is Receive)


def lane_events(part: PipelinePlan, process: str) -> list[Event]:
    """What names a pipeline's process and its lanes, and puts them in order."""
    lanes = {COMPUTE: "compute"}
    for item in part.instructions:
        if isinstance(item, (Send, Receive)):
            lanes[link_lane(type(item), item.peer)] = (
                f"to {item.peer}" if isinstance(item, Send) else f"from {item.peer}"
            )

    def told(what: str, tid: int, **args: str | int) -> Event:
        return {"name": what, "ph": "M", "pid": part.pipeline, "tid": tid, "args": args}

    events = [
        told("process_name", COMPUTE, name=process),
        told("process_sort_index", COMPUTE, sort_index=part.pipeline),
    ]
    for tid, name in sorted(lanes.items()):
        events += [told("thread_name", tid, name=name), told("thread_sort_index", tid, sort_index=tid)]
    return events


def microseconds(nanoseconds: int) -> float:
    """A time of a trace, down to 1/8 µs.

    Readers multiply microseconds by 1000 as floats and cut off the rest. A neighbour that ends where another begins may
    then end a nanosecond after that, and Perfetto drops what overlaps. Eighths are exact in every one of these steps.
    """
    return nanoseconds // 125 / 8


def step_event(pipeline: int, lane: int, name: str, start: int, end: int, args: dict[str, Any]) -> Event:
    """A step on a lane, from nanosecond ``start`` to ``end``."""
    ts = microseconds(start)
    dur = microseconds(end) - ts
    return {"name": name, "ph": "X", "pid": pipeline, "tid": lane, "ts": ts, "dur": dur, "cat": "plan", "args": args}


def step_args(item: Instruction, part: PipelinePlan) -> dict[str, Any]:
    """What a step's event says besides its name."""
    match item:
        case Send() | Receive():
            return {"rows": item.rows, "transfer": item.transfer}
        case Attend():
            return {"rows": item.rows, "segments": len(item.table), "pairs": item.table.pairs(part.spans)}
        case Accumulate() | Copy():
            return {"rows": item.runs.rows}
        case Wait():
            return {"transfer": item.transfer}


def predicted_trace(plan: PlanData, hardware: Hardware | None = None) -> dict[str, Any]:
    """See :meth:`hetu.parallel.attn_plan.AttnPlan.trace`."""
    timeline = simulate(plan, hardware or Hardware.h100())
    events: list[Event] = []
    for part in plan.pipelines:
        group, _ = plan.layout.place(part.pipeline)
        events += lane_events(part, f"pipeline {part.pipeline} (group {group.value})")
        events += _steps(plan, part, timeline)
    for part in plan.pipelines:
        events += _arrows(part, timeline)
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"plan": summary(plan)}}


def _steps(plan: PlanData, part: PipelinePlan, timeline: Timeline) -> Iterator[Event]:
    """An event for each of a pipeline's instructions; for a wait only if it takes time."""
    times = pairwise([0.0, *timeline.ends[part.pipeline]])
    for item, name, (start, end) in zip(part.instructions, step_names(part), times, strict=True):
        args, lane = step_args(item, part), COMPUTE
        if isinstance(item, Attend):
            args["flops"] = attend_flops(plan, part, item)
        elif isinstance(item, (Send, Receive)):
            if item.transfer not in timeline.transfers:  # the other end is missing, and nobody waits for it
                continue
            args["bytes"], lane = transfer_bytes(plan, item), link_lane(type(item), item.peer)
            start, end = timeline.transfers[item.transfer]
        event = step_event(part.pipeline, lane, name, _nanoseconds(start), _nanoseconds(end), args)
        if event["dur"] or not isinstance(item, Wait):
            yield event


def _arrows(part: PipelinePlan, timeline: Timeline) -> Iterator[Event]:
    """An arrow from each transfer to a pipeline to the step there that is the first to read what it brought."""
    starts = [0.0, *timeline.ends[part.pipeline]]
    for receive, reader in _first_readers(part):
        sent = microseconds(_nanoseconds(timeline.transfers[receive.transfer][0]))
        read = microseconds(_nanoseconds(starts[reader]))
        arrow: Event = {"name": "rows", "cat": "plan", "id": receive.transfer}
        yield {**arrow, "ph": "s", "pid": receive.peer, "tid": link_lane(Send, part.pipeline), "ts": sent}
        yield {**arrow, "ph": "f", "pid": part.pipeline, "tid": COMPUTE, "ts": read, "bp": "e"}


def _first_readers(part: PipelinePlan) -> Iterator[tuple[Receive, int]]:
    """What each transfer brings, and which instruction, by number, is the first to compute with it, if any does."""
    unread: list[Receive] = []
    for number, item in enumerate(part.instructions):
        if isinstance(item, Receive):
            # What others were only passed on is overwritten unread.
            unread = [old for old in unread if not _overwrites(item, old)]
            if item.grads or not item.payload.is_result:  # nobody reads finished results
                unread.append(item)
        elif isinstance(item, (Attend, Accumulate)):
            offset, rows = (item.offset, item.runs.rows) if isinstance(item, Accumulate) else (0, item.rows)
            read = [old for old in unread if old.buffer == item.buffer and _overlap(old, offset, rows)]
            unread = [old for old in unread if old not in read]
            yield from ((receive, number) for receive in read)


def _overwrites(later: Receive, earlier: Receive) -> bool:
    """Whether a transfer lands where an earlier one landed."""
    if (later.buffer, later.payload, later.heads) != (earlier.buffer, earlier.payload, earlier.heads):
        return False
    if later.runs is None and earlier.runs is None:
        return _overlap(earlier, later.offset, later.rows)
    return bool(np.isin(later.indices(), earlier.indices()).any())


def _overlap(receive: Receive, offset: int, rows: int) -> bool:
    """Whether a transfer lands in some neighbouring rows of its buffer."""
    landed = receive.indices()
    return bool(((landed >= offset) & (landed < offset + rows)).any())


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
