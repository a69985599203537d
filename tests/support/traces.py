"""What every trace has to be, so that Perfetto shows all of it."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Send
from hetu.parallel.plan.parts import PipelinePlan
from hetu.parallel.views.report import step_names

Event = dict[str, Any]


def check_events(events: list[Event]) -> None:
    """Valid JSON; every process and lane has one name; steps of a lane follow each other; arrows have two ends."""
    assert json.loads(json.dumps(events)) == events
    assert {event["ph"] for event in events} <= {"M", "X", "s", "f"}
    assert all(isinstance(event["pid"], int) and isinstance(event["tid"], int) for event in events)
    named = Counter((event["pid"], event["tid"], event["name"]) for event in events if event["ph"] == "M")
    assert set(named.values()) <= {1}
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in steps(events):
        assert event["name"] and event["ts"] >= 0 and event["dur"] >= 0
        # Perfetto's own arithmetic: each of the two is multiplied as a float, and cut off.
        lanes.setdefault((event["pid"], event["tid"]), []).append((int(event["ts"] * 1000), int(event["dur"] * 1000)))
    for (pid, tid), spans in lanes.items():
        assert (pid, 0, "process_name") in named and (pid, tid, "thread_name") in named
        for (start, length), (following, _) in pairwise(sorted(spans)):
            assert start + length <= following
    arrows = {kind: {e["id"]: e for e in events if e["ph"] == kind} for kind in "sf"}
    assert arrows["s"].keys() == arrows["f"].keys()
    assert sum(map(len, arrows.values())) == sum(event["ph"] in "sf" for event in events)
    for number, begin in arrows["s"].items():
        end = arrows["f"][number]
        assert begin["ts"] <= end["ts"] and end["bp"] == "e"
        assert all(steps_at(events, arrow) for arrow in (begin, end))


def steps(events: list[Event]) -> list[Event]:
    return [event for event in events if event["ph"] == "X"]


def steps_at(events: list[Event], arrow: Event) -> list[Event]:
    """The steps in whose lane and time an end of an arrow is."""
    lane = [e for e in steps(events) if (e["pid"], e["tid"]) == (arrow["pid"], arrow["tid"])]
    return [e for e in lane if e["ts"] <= arrow["ts"] <= e["ts"] + e["dur"]]


def lane_names(events: list[Event]) -> dict[tuple[int, int], str]:
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}


def named_steps(events: list[Event]) -> Counter[tuple[int, str, str]]:
    """How often each (pipeline, lane, name) has a step."""
    lanes = lane_names(events)
    return Counter((e["pid"], lanes[e["pid"], e["tid"]], e["name"]) for e in steps(events))


def wanted_steps(plan: AttnPlan, *kinds: type) -> Counter[tuple[int, str, str]]:
    """The same of the instructions of some kinds: by default all but waits, one step each."""
    kinds = kinds or (Attend, Accumulate, Copy, Send, Receive)
    wanted: Counter[tuple[int, str, str]] = Counter()
    for part in plan.pipelines:
        for item, name in zip(part.instructions, step_names(part), strict=True):
            if isinstance(item, kinds):
                wanted[part.pipeline, lane_of(part, item), name] += 1
    return wanted


def lane_of(part: PipelinePlan, item: Any) -> str:
    match item:
        case Send():
            return f"to {item.peer}"
        case Receive():
            return f"from {item.peer}"
    return "compute"
