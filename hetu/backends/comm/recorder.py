"""What really happens: a recorder of the interpreter's steps, and their names for torch's profiler."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.profiler import record_function

from hetu.arguments import path as as_path
from hetu.backends.comm.program import Program, Step
from hetu.backends.torch_private import is_profiling
from hetu.parallel.plan.instructions import Receive, Send, Wait
from hetu.parallel.plan.parts import PipelinePlan
from hetu.parallel.views.report import step_names
from hetu.parallel.views.trace import COMPUTE, Event, lane_events, link_lane, step_args, step_event

if TYPE_CHECKING:
    from hetu.backends.comm.interpreter import Communicator

PERIOD = 3 * 2_629_746 * 10**9
"""Times count from the last multiple of so many nanoseconds, a quarter of a year: as in the traces of torch's profiler.
So processes agree, and times stay small enough for floats."""

_current: ContextVar[Recorder | None] = ContextVar("recorder", default=None)

_names = lru_cache(maxsize=64)(step_names)  # the layers of a model follow one plan


class Recorder:
    """Records while it is entered; see :func:`hetu.trace`.

    Attributes:
        events: The events of a Chrome trace; there when the ``with`` block is left.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        now = time.time_ns()
        self._origin, self._base = now - time.perf_counter_ns(), now // PERIOD * PERIOD
        self._clocks: dict[torch.device, _Clock] = {}
        self._tapes: list[_Tape] = []
        self._token: Token[Recorder | None] | None = None

    def __enter__(self) -> Recorder:
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        _current.reset(self._token)
        self.events += _events(self._tapes, self._base)
        self._tapes.clear()

    def __repr__(self) -> str:
        return f"<hetu.trace of {len(self.events)} events>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file for https://ui.perfetto.dev or chrome://tracing."""
        trace = {"traceEvents": self.events, "displayTimeUnit": "ns", "baseTimeNanoseconds": self._base}
        with open(as_path(path, op="trace"), "w", encoding="utf-8") as file:
            json.dump(trace, file)

    def tape(self, plan: PipelinePlan, device: torch.device) -> _Tape:
        """Where to note the steps of one pipeline in one attention."""
        clock = self._clocks.get(device)
        if clock is None:
            clock = _StreamClock(self._origin, device) if device.type == "cuda" else _HostClock(self._origin)
            self._clocks[device] = clock
        self._tapes.append(_Tape(plan, clock))
        return self._tapes[-1]


# Clocks


class _Clock(Protocol):
    """Marks moments, and tells later when they were."""

    def mark(self) -> Any:
        """Now."""

    def read(self, mark: Any) -> int:
        """When a marked moment was, in nanoseconds since 1970."""


class _HostClock:
    """The host's time of day, but never set back: it goes on as the counter does."""

    def __init__(self, origin: int) -> None:
        self.origin = origin

    def mark(self) -> int:
        return self.origin + time.perf_counter_ns()

    def read(self, mark: int) -> int:
        return mark


class _StreamClock:
    """When the current stream of a GPU gets to a mark, in terms of the host's clock."""

    def __init__(self, origin: int, device: torch.device) -> None:
        self.device = device
        torch.cuda.synchronize(device)
        self.base = self.mark()
        self.base.synchronize()
        self.started = origin + time.perf_counter_ns()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def read(self, mark: torch.cuda.Event) -> int:
        mark.synchronize()
        return self.started + round(float(self.base.elapsed_time(mark)) * 1e6)


# What is noted


@dataclass(slots=True)
class _Span:
    """A step that began, and ended if ``end`` is not None; both are marks of a clock."""

    number: int
    lane: int
    start: Any
    end: Any = None
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Tape:
    """The spans of one pipeline in one attention, in the order in which they began."""

    plan: PipelinePlan
    clock: _Clock
    spans: list[_Span] = field(default_factory=list)

    def begin(self, number: int, lane: int, **args: Any) -> _Span:
        self.spans.append(_Span(number, lane, self.clock.mark(), args=args))
        return self.spans[-1]

    def end(self, span: _Span) -> None:
        span.end = self.clock.mark()


def _events(tapes: Iterable[_Tape], base: int) -> list[Event]:
    """The names of pipelines and of their lanes, each once, and then all steps that were done, lane by lane."""
    names: dict[Any, Event] = {}
    lanes: dict[tuple[int, int], list[tuple[_Tape, _Span]]] = {}
    for tape in tapes:
        r = tape.plan.pipeline
        names |= {(r, event["tid"], event["name"]): event for event in lane_events(tape.plan, f"pipeline {r}")}
        for span in tape.spans:
            if span.end is not None:  # else it was under way when the run failed
                lanes.setdefault((r, span.lane), []).append((tape, span))
    events = list(names.values())
    for (r, lane), noted in lanes.items():
        starts = [tape.clock.read(span.start) - base for tape, span in noted]
        ends = [tape.clock.read(span.end) - base for tape, span in noted]
        for (tape, span), start, end in zip(noted, *_in_turn(starts, ends), strict=True):
            args = step_args(tape.plan.instructions[span.number], tape.plan) | span.args
            events.append(step_event(r, lane, _names(tape.plan)[span.number], start, end, args))
    return events


def _in_turn(starts: list[int], ends: list[int]) -> tuple[list[int], list[int]]:
    """Spans of one lane, in the order of their starts, made to follow each other: what overlaps can't be drawn.

    Messages of one link come one after the other. So each had come when a later one was seen to have come, and was
    not on its way yet when the one before came. What is computed follows each other anyway.

    Example:
        >>> _in_turn([0, 1, 2], [8, 5, 9])
        ([0, 5, 5], [5, 5, 9])
    """
    ends = list(accumulate(reversed(ends), min))[::-1]
    return [max(start, before) for start, before in zip(starts, [starts[0], *ends], strict=False)], ends


# What the interpreter sees


def watched(plan: PipelinePlan, comm: Communicator, device: torch.device) -> tuple[Iterable[Step], Communicator]:
    """A pipeline's steps and its communicator, as the interpreter is to use them.

    They are what was given unless a recorder or torch's profiler looks on. This is asked once an attention, so that a
    step costs nothing then.
    """
    recorder, steps = _current.get(), Program.of(plan).steps
    if recorder is None and not is_profiling():
        return steps, comm
    watch = _Watch(plan, comm, recorder.tape(plan, device) if recorder else _Tape(plan, _HostClock(0)))
    return watch.timed(steps), watch


class _Watch:
    """Steps that are timed from when the interpreter takes one until it takes the next; and a communicator.

    Of a wait only ``done`` has a span in torch's profiler: other pipelines of this process have their turn meanwhile.
    """

    def __init__(self, plan: PipelinePlan, comm: Communicator, tape: _Tape) -> None:
        self.plan, self.comm, self.tape = plan, comm, tape
        self.number, self.name, self.told = 0, "", f"pipeline {plan.pipeline}"
        self.transfers: dict[int, _Span] = {}

    def timed(self, steps: Sequence[Step]) -> Iterator[Step]:
        """Those of the plan."""
        names = _names(self.plan)
        for step in steps:
            self.number, self.name = step.number, names[step.number]
            if isinstance(step.item, (Send, Receive)):
                with record_function(self.name, self.told):
                    yield step
                continue
            span = self.tape.begin(step.number, COMPUTE)
            if isinstance(step.item, Wait):
                yield step
            else:
                with record_function(self.name, self.told):
                    yield step
            self.tape.end(span)

    def send(self, pipeline: int, instruction: Send, rows: torch.Tensor) -> None:
        """Sends."""
        self._begin(instruction, rows)
        self.comm.send(pipeline, instruction, rows)

    def receive(self, pipeline: int, instruction: Receive, place: torch.Tensor) -> None:
        """Receives."""
        self._begin(instruction, place)
        self.comm.receive(pipeline, instruction, place)

    def done(self, pipeline: int, transfer: int) -> bool:
        """Whether it is done, and if it is, then it just ended as far as anybody here knows."""
        with record_function(self.name, self.told):
            is_done = self.comm.done(pipeline, transfer)
        if is_done and transfer in self.transfers:
            self.tape.end(self.transfers.pop(transfer))
        return is_done

    def stuck(self, pipelines: Sequence[int]) -> None:
        """Waits."""
        self.comm.stuck(pipelines)

    def _begin(self, item: Send | Receive, rows: torch.Tensor) -> None:
        lane = link_lane(type(item), item.peer)
        self.transfers[item.transfer] = self.tape.begin(self.number, lane, bytes=rows.nbytes)
