"""What a part that exchanges heads for tokens must be before it can be followed; see also verify_structure."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from hetu.parallel.plan.heads import HeadRange, Heads, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Runs, Send, Wait
from hetu.parallel.plan.parts import PipelinePlan, PlanData
from hetu.parallel.proof.structure import (
    Tokens,
    check_rows,
    check_runs,
    check_shard,
    check_spans,
    check_table,
    instruction_name,
    refuse,
)

FORWARD = (Payload.QKV, Payload.OUT, Payload.LSE, Payload.P)
BACKWARD = (Payload.QKV_DOUT, Payload.LSE_DELTA, Payload.Q_GRADS, Payload.KV_GRADS, Payload.QKV_GRADS)

GATHERED = 1
"""The buffer that has a row for each of the group's tokens; the others are the own shard, and landing buffers."""


def check_heads_part(plan: PlanData, r: int, part: PipelinePlan, heads: HeadRange, tokens: Tokens) -> None:
    """That a part is of its pipeline, and that its instructions name what exists."""
    check_shard(plan, r, part)
    group, _ = plan.layout.place(r)
    if any(plan.pipelines[other].heads is None for other in group.members):
        refuse(f"pipeline {r} attends for {heads}, but others of its group for all")
    _check_range(heads, plan.heads, f"pipeline {r}")
    attends = any(isinstance(item, Attend) for item in part.instructions)
    if part.buffers != ((part.rows, group.tokens) if attends else (part.rows,)):
        refuse(f"pipeline {r} has buffers {part.buffers}, but its group {group.tokens} tokens")
    if attends:
        own = np.flatnonzero(tokens.group == group.index)
        row, zeros = np.arange(len(own)), np.zeros(len(own), np.int64)
        check_spans((tokens.document[own], tokens.position[own], zeros, row, zeros), part, group.tokens)
    for item in part.instructions:
        if not isinstance(item, Wait):
            _Check(plan, part, item).instruction(item)


def _check_range(some: HeadRange, heads: Heads, what: str) -> None:
    first, stop = some.first_q, some.first_q + some.num_q
    if not 0 <= first <= stop <= heads.num_q or some != heads.range(first, stop):
        refuse(f"{what}: {some} are none of {heads.num_q} query heads with the key heads that these use")


class _Check:
    """Of one instruction."""

    def __init__(self, plan: PlanData, part: PipelinePlan, item: Send | Receive | Attend | Accumulate | Copy) -> None:
        self.plan, self.part = plan, part
        self.what = f"pipeline {part.pipeline}: {instruction_name(item)}"
        self.kinds = BACKWARD if plan.is_backward else FORWARD

    def instruction(self, item: Send | Receive | Attend | Accumulate | Copy) -> None:
        if item.heads is None:
            self.refuse("is about all heads, but the pipeline attends for some")
        _check_range(item.heads, self.plan.heads, self.what)
        if not isinstance(item, (Attend, Accumulate)) and item.payload not in self.kinds:
            self.refuse(
                f"is of {item.payload.label}, which {'a backward' if self.plan.is_backward else 'a forward'} lacks"
            )
        match item:
            case Send(buffer=buffer, payload=kind, runs=runs):
                self.buffer(buffer, kind, is_source=True)
                self.rows(runs, buffer, "sends")
            case Receive(buffer=buffer, payload=kind, runs=runs):
                self._receive(item)
            case Copy(payload=kind):
                self.buffer(item.buffer, kind, is_source=True)
                self.buffer(item.target, kind, is_source=False)
                self.rows(item.runs, item.buffer, "reads")
                self.rows(item.place, item.target, "fills")
                if item.runs.rows != item.place.rows:
                    self.refuse(f"reads {item.runs.rows} rows, but fills {item.place.rows}")
            case Accumulate():
                self._landing(item.buffer, item.offset, item.runs.rows)
                self.rows(item.runs, 0, "adds to")
            case Attend():
                self._attend(item)

    def _receive(self, item: Receive) -> None:
        if item.payload is Payload.KV_GRADS:
            self._landing(item.buffer, item.offset, item.rows)
            return
        self.buffer(item.buffer, item.payload, is_source=False)
        if item.runs is not None:
            self.rows(item.runs, item.buffer, "lands in")
            if item.runs.rows != item.rows:
                self.refuse(f"brings {item.rows} rows, but fills {item.runs.rows}")
        elif item.heads != self.part.heads or item.payload.is_result:
            self.refuse(f"lands in place, but brings {item.heads} to rows that have others too")
        else:
            check_rows(item.offset, item.rows, self.part.buffers[item.buffer], f"{self.what} lands in", "buffer 1")

    def _attend(self, item: Attend) -> None:
        some, own, group = item.heads, self.part.heads, self.plan.heads.num_q // self.plan.heads.num_kv
        assert some is not None and own is not None
        if item.buffer != GATHERED:
            self.refuse(f"sees buffer {item.buffer}, expected {GATHERED}")
        if some.num_q == 0 or some.first_q < own.first_q or some.first_q + some.num_q > own.first_q + own.num_q:
            self.refuse(f"is for {some}, but the pipeline has {own}")
        if some.num_kv > 1 and (some.first_q % group or some.num_q % group):
            self.refuse(f"is for {some}, of which not all key heads have as many")
        check_table(item, self.plan, self.part)
        places = [source.place for source in item.sources]
        if None in places or any(s.place is not None and s.place.rows != s.runs.rows for s in item.sources):
            self.refuse("has sources that don't say which rows they are")
        for place in places:
            assert place is not None
            self.rows(place, GATHERED, "has sources in")

    def buffer(self, buffer: int, kind: Payload, is_source: bool) -> None:
        """Results are computed in buffer 1 and go to buffer 0, all else the other way."""
        wanted = GATHERED if kind.is_result is is_source else 0
        if buffer != wanted:
            self.refuse(
                f"{'takes' if is_source else 'puts'} {kind.label} {'from' if is_source else 'to'} buffer {buffer}"
            )
        if buffer >= len(self.part.buffers):
            self.refuse(f"names buffer {buffer}, which the pipeline has not")

    def rows(self, runs: Runs, buffer: int, does: str) -> None:
        """Rows exist, and none is named twice."""
        size = self.part.buffers[buffer]
        step = np.ones_like(runs.start) if runs.step is None else runs.step
        if (step < 1).any():
            self.refuse(f"{does} rows with a step below 1")
        check_runs(Runs(runs.start, (runs.length - 1) * step + 1), size, f"{self.what} {does}", f"buffer {buffer}")
        row, times = np.unique(runs.indices(), return_counts=True)
        if (times > 1).any():
            self.refuse(f"{does} row {row[(times > 1).argmax()]} of buffer {buffer} twice")

    def _landing(self, buffer: int, offset: int, rows: int) -> None:
        if not 0 <= buffer < len(self.part.landing):
            self.refuse(f"names landing buffer {buffer}, which the pipeline has not")
        check_rows(offset, rows, self.part.landing[buffer], f"{self.what} is of", f"landing buffer {buffer}")

    def refuse(self, why: str) -> NoReturn:
        refuse(f"{self.what} {why}")
