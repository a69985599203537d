"""What a part must be before it can be followed: its buffers and instructions name what exists."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from hetu.parallel.mask.segments import IntArray, QuerySpans
from hetu.parallel.plan.buffers import Buffer, shard
from hetu.parallel.plan.heads import HeadRange, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Runs, Send, Wait
from hetu.parallel.plan.parts import PipelinePlan, PlanData
from hetu.parallel.proof.contents import read_of_queries, results_of
from hetu.parallel.proof.fields import MOST
from hetu.parallel.proof.transfers import Tokens, instruction_name, refuse

BY_ROW = ("document", "position", "slot", "slot_row", "column")
"""What query spans say of every row."""


def check_heads(plan: PlanData) -> None:
    """That a row has heads, and query heads that share key heads evenly."""
    heads = plan.heads
    sizes = (heads.num_q, heads.num_kv, heads.head_dim, heads.itemsize)
    if min(sizes) < 1 or heads.columns < 0 or max(*sizes, heads.columns) > MOST or heads.num_q % heads.num_kv:
        refuse(f"rows have {heads}, expected sizes from 1 and as many query heads for each key head")


def check_part(plan: PlanData, r: int, part: PipelinePlan, tokens: Tokens) -> None:
    """That a part is of its pipeline, and that its instructions name what exists."""
    _check_buffers(plan, r, part)
    for item in part.instructions:
        if not isinstance(item, Wait):
            _Check(plan, part, item).instruction()
    attends = [item for item in part.instructions if isinstance(item, Attend)]
    if part.queries == 0:
        if not attends:
            refuse(f"pipeline {r} never attends, so its output is never written")
        _check_spans(_by_row(plan.layout.query_spans(r, plan.mask.joins), part.rows, r), part)
    elif attends:
        held = query_tokens(part, tokens)
        if len(held) != part.buffers[part.queries].rows:
            refuse(f"pipeline {r}: an attend names {len(held)} rows of buffer {part.queries}, that of its queries")
        row, zeros = np.arange(len(held)), np.zeros(len(held), np.int64)
        # Results by row have no other place than their row.
        _check_spans([tokens.document[held], tokens.position[held], zeros, row, zeros], part)


def check_rows(plan: PlanData, r: int, part: PipelinePlan) -> None:
    """That a pipeline holds no more rows than it may need."""
    tokens, rows = plan.layout.place(r)[0].tokens, [buffer.rows for buffer in part.buffers]
    held = sum(buffer.rows for buffer in part.buffers if buffer.holds_keys and buffer.heads.num_q)
    copies = [item for item in part.instructions if isinstance(item, Copy) and "k" in item.payload.values]
    if held > tokens + sum(item.runs.rows for item in copies):  # own rows that it copies it holds twice
        refuse(f"pipeline {r} holds {held} rows in buffers of {rows} rows; its group has {tokens}")
    landing = [buffer.rows for buffer in part.buffers if not buffer.holds_keys]
    # What lands is added to own rows, or to gradients of rows that the pipeline passed on.
    summed = [item.target for item in part.instructions if isinstance(item, Copy) and item.payload is Payload.KV_GRADS]
    most = max([part.rows, *(part.buffers[target].rows for target in summed)])
    if max(landing, default=0) > most:
        refuse(f"pipeline {r} has landing buffers of {landing} rows, but adds to {most} at most")


def query_tokens(part: PipelinePlan, tokens: Tokens) -> IntArray:
    """The token of each row of the queries' buffer: of the own shard, or what an attend to that buffer says."""
    if part.queries == 0:
        return tokens.shards[part.pipeline]
    for item in part.instructions:
        if isinstance(item, Attend) and item.buffer == part.queries:
            return tokens.of_sources(item)
    refuse(f"pipeline {part.pipeline} never attends to buffer {part.queries}, that of its queries")


# Buffers and spans


def _check_buffers(plan: PlanData, r: int, part: PipelinePlan) -> None:
    buffers = part.buffers
    if not plan.is_backward:
        for number, buffer in enumerate(buffers):
            if not set(buffer.values).isdisjoint(results_of(is_backward=True)):
                refuse(f"pipeline {r}: buffer {number} holds gradients, but the plan is no backward")
    own = shard(plan.layout.rows(r), plan.heads, plan.is_backward)
    if part.pipeline != r or not buffers or buffers[0] != own:
        says = _buffer_text(buffers[0]) if buffers else "no buffer"
        refuse(
            f"the part of pipeline {r} says it is of pipeline {part.pipeline} and its shard has {says}, but it has "
            f"{_buffer_text(own)}"
        )
    tokens = plan.layout.place(r)[0].tokens
    for number, buffer in enumerate(buffers):
        _check_range(buffer.heads, plan, f"pipeline {r}: buffer {number}")
        if not 0 <= buffer.rows <= tokens:
            refuse(f"pipeline {r} holds {buffer.rows} rows in buffer {number}; its group has {tokens}")
        if len(set(buffer.values)) < len(buffer.values):
            refuse(f"pipeline {r}: buffer {number} holds a value twice: {', '.join(buffer.values)}")
    if not 0 <= part.queries < len(buffers):
        refuse(f"pipeline {r} has no buffer {part.queries}, which is to hold its queries")
    needed = {*read_of_queries(plan.is_backward), *results_of(plan.is_backward)} - (
        set() if plan.heads.columns else {"p"}
    )
    if part.queries and not needed <= set(buffers[part.queries].values):
        lacks = ", ".join(sorted(needed - set(buffers[part.queries].values)))
        refuse(f"pipeline {r}: buffer {part.queries}, that of its queries, lacks {lacks}")


def _buffer_text(buffer: Buffer) -> str:
    return f"{buffer.rows} rows, {buffer.heads}, of {', '.join(buffer.values)}"


def _check_range(some: HeadRange, plan: PlanData, what: str) -> None:
    first, stop = some.first_q, some.first_q + some.num_q
    if not 0 <= first <= stop <= plan.heads.num_q or some != plan.heads.range(first, stop):
        refuse(f"{what}: {some} are none of {plan.heads.num_q} query heads with the key heads that these use")


def _check_spans(expected: list[IntArray], part: PipelinePlan) -> None:
    """That the query spans say of every row what they should, see ``BY_ROW``, however they are cut."""
    r = part.pipeline
    for name, mine, wanted in zip(BY_ROW, _by_row(part.spans, len(expected[0]), r), expected, strict=True):
        if not np.array_equal(mine, wanted):
            row = int((mine != wanted).argmax())
            refuse(f"pipeline {r}: {name} of query row {row} is {mine[row]}, but {wanted[row]} in the layout")


def _by_row(spans: QuerySpans, rows: int, r: int) -> list[IntArray]:
    ends = spans.length.cumsum()
    if (spans.length <= 0).any() or not np.array_equal(spans.start, ends - spans.length) or spans.length.sum() != rows:
        refuse(f"pipeline {r}: its query spans don't cover its {rows} rows one after the other")
    if (spans.step < 1).any():  # can't be seen by row where a span has one row, and the proof divides by it
        refuse(f"pipeline {r}: query span {int((spans.step < 1).argmax())} has a step below 1")
    i = np.arange(rows) - spans.start.repeat(spans.length)
    slopes: tuple[Any, ...] = (0, spans.step.repeat(spans.length), 0, 1, 0)
    return [getattr(spans, name).repeat(spans.length) + i * slope for name, slope in zip(BY_ROW, slopes, strict=True)]


# Instructions


class _Check:
    """Checks one instruction."""

    def __init__(self, plan: PlanData, part: PipelinePlan, item: Send | Receive | Attend | Accumulate | Copy) -> None:
        self.plan, self.part, self.item = plan, part, item
        self.results = results_of(plan.is_backward)

    def instruction(self) -> None:
        _check_range(self.item.heads, self.plan, f"pipeline {self.part.pipeline}: {instruction_name(self.item)}")
        if isinstance(self.item, (Send, Receive)):
            self._peer(self.item.peer)
        match self.item:
            case Send() as item:
                self._takes(item.buffer, item.payload, item.runs, "sends")
            case Receive() as item:
                self._receive(item)
            case Copy() as item:
                self._takes(item.buffer, item.payload, item.runs, "reads")
                self._puts(item.target, item.payload)
                self._written(item.place, item.target, "fills")
                if item.runs.rows != item.place.rows:
                    self._refuse(f"reads {item.runs.rows} rows, but fills {item.place.rows}")
            case Accumulate() as item:
                self._takes(item.buffer, Payload.KV_GRADS, None, "adds")
                self._is_whole(item.buffer, Payload.KV_GRADS, "adds")
                self._neighbours(item.offset, item.runs.rows, item.buffer, "adds")
                self._written(item.runs, 0, "adds to")
            case Attend() as item:
                self._attend(item)

    def _peer(self, peer: int) -> None:
        if not 0 <= peer < len(self.plan.pipelines) or peer == self.part.pipeline:
            self._refuse(f"has no other end: there is no other pipeline {peer}")

    def _receive(self, item: Receive) -> None:
        self._puts(item.buffer, item.payload)
        if item.runs is None:
            self._is_whole(item.buffer, item.payload, "lands in place, but brings")
            self._neighbours(item.offset, item.rows, item.buffer, "lands in")
            return
        self._written(item.runs, item.buffer, "lands in")
        if item.runs.rows != item.rows:
            self._refuse(f"brings {item.rows} rows, but fills {item.runs.rows}")

    def _attend(self, item: Attend) -> None:
        heads, own, group = item.heads, self.part.heads, self.plan.heads.num_q // self.plan.heads.num_kv
        if heads.num_q == 0 or not own.contains(heads):
            self._refuse(f"is for {heads}, but the pipeline has {own}")
        if self.part.queries == 0 and heads != own:  # their results have a place for all heads only
            self._refuse(f"is for {heads}, but own rows attend for all heads at once")
        if heads.num_kv > 1 and (heads.first_q % group or heads.num_q % group):
            self._refuse(f"is for {heads}, of which not all key heads have as many")
        self._holds(item.buffer, Payload.KV)
        if self.plan.is_backward and item.buffer:
            self._holds(item.buffer, Payload.KV_GRADS)
        self._table(item)

    def _table(self, item: Attend) -> None:
        table, part, rows = item.table, self.part, self.part.buffers[item.buffer].rows
        what = f"pipeline {part.pipeline}: attending to buffer {item.buffer}"
        if item.rows > rows:
            refuse(f"{what}: its sources have {item.rows} rows, but the buffer only {rows}")
        self._sources(item, what)
        if len(table) == 0:
            return
        query = table.query
        if (query[1:] < query[:-1]).any() or query.item(0) < 0 or query.item(-1) >= len(part.spans):
            refuse(f"{what}: its segments are not ordered by query span, or name one that does not exist")
        keys, each = Runs(table.k_start, table.k_len), len(part.spans)
        check_runs(keys, item.rows, f"{what}: a segment sees", f"buffer {item.buffer}", times=each)
        unseen = table.k_len > part.spans.length[table.query] + table.diagonal
        if table.lower is not None:
            unseen |= (table.lower > 0) | (table.lower > table.diagonal)
        if unseen.any():
            refuse(f"{what}: segment {int(unseen.argmax())} has keys that no row of its query span sees")

    def _sources(self, item: Attend, what: str) -> None:
        """They say of every row, once, which token it is: kernels are told the keys' positions by them."""
        named: list[IntArray] = []
        for source in item.sources:
            if not 0 <= source.owner < len(self.plan.pipelines):
                refuse(f"{what}: there is no pipeline {source.owner}, of which a source is")
            shard_name = f"the shard of pipeline {source.owner}"
            check_runs(source.runs, self.plan.layout.rows(source.owner), f"{what}: a source is", shard_name)
            if source.place is not None:
                check_runs(source.place, item.rows, f"{what}: a source lies in", f"buffer {item.buffer}")
                if source.place.rows != source.runs.rows:
                    refuse(f"{what}: a source of {source.runs.rows} rows lies in {source.place.rows}")
                named.append(source.place.indices())
        if named and not np.array_equal(np.sort(np.concatenate(named)), np.arange(item.rows)):
            refuse(f"{what}: its sources don't name every row once")

    # What buffers hold

    def _holds(self, number: int, payload: Payload) -> None:
        if not 0 <= number < len(self.part.buffers):
            what = f"pipeline {self.part.pipeline} has no buffer {number}"
            refuse(f"{what}, which {instruction_name(self.item)} names")
        buffer = self.part.buffers[number]
        if payload not in buffer.payloads and not set(payload.values) <= set(buffer.values):
            self._refuse(f"is of {payload.label}, which buffer {number} lacks")
        if buffer.heads != self.item.heads and not buffer.heads.contains(self.item.heads):
            self._refuse(f"is of {self.item.heads}, but buffer {number} has {buffer.heads}")

    def _takes(self, number: int, payload: Payload, runs: Runs | None, does: str) -> None:
        self._holds(number, payload)
        if number == 0 and not self.results.isdisjoint(payload.values):
            self._refuse(f"{does} {payload.label} of buffer 0, the pipeline's own shard")
        if runs is not None:
            check_runs(runs, self.part.buffers[number].rows, f"{self._what()} {does}", self._place(number))

    def _is_whole(self, number: int, payload: Payload, does: str) -> None:
        """What lands in place, or is added as it lies, is all that rows have of a payload."""
        buffer = self.part.buffers[number]
        if self.item.heads != buffer.heads:
            self._refuse(f"{does} {self.item.heads} of rows that have {buffer.heads}")
        if payload not in buffer.payloads:
            self._refuse(f"{does} {payload.label}, which lie apart in buffer {number}")

    def _puts(self, number: int, payload: Payload) -> None:
        """What is given to the shard is there from the beginning, and parts of gradients are added to what is."""
        self._holds(number, payload)
        is_part = payload is Payload.KV_GRADS and isinstance(self.item, Receive)
        if number == 0 and (is_part or not self.results.issuperset(payload.values)):
            self._refuse("lands in buffer 0, the pipeline's own shard")
        if number == self.part.queries == 0 and payload is not Payload.KV_GRADS:
            self._refuse("brings results of own rows, which are computed where they belong")

    def _written(self, runs: Runs, number: int, does: str) -> None:
        """Rows exist, and none is named twice: what were written or added there would depend on an order."""
        place = self._place(number)
        check_runs(runs, self.part.buffers[number].rows, f"{self._what()} {does}", place)
        row, times = np.unique(runs.indices(), return_counts=True)
        if (times > 1).any():
            self._refuse(f"{does} row {row[(times > 1).argmax()]} of {place} twice")

    def _neighbours(self, offset: int, rows: int, number: int, does: str) -> None:
        size = self.part.buffers[number].rows
        if rows <= 0 or offset < 0 or offset + rows > size:
            self._refuse(f"{does} rows {offset} to {offset + rows} of {self._place(number)}, which has {size}")

    def _place(self, number: int) -> str:
        return buffer_name(self.part, number) if number else "the shard"

    def _what(self) -> str:
        return f"pipeline {self.part.pipeline}: {instruction_name(self.item)}"

    def _refuse(self, why: str) -> NoReturn:
        refuse(f"{self._what()} {why}")


def buffer_name(part: PipelinePlan, number: int) -> str:
    """A buffer, as messages call it."""
    return f"{'landing ' * (not part.buffers[number].holds_keys)}buffer {number}"


def check_runs(runs: Runs, size: int, what: str, place: str, times: int = 1) -> None:
    """That rows exist, and that there are no more runs than rows, each of which may be named so many times."""
    if len(runs.start) > size * times:
        refuse(f"{what} {len(runs.start)} runs of rows of {place}, which has {size}")
    stop = runs.start + runs.length
    if runs.step is None and (len(stop) == 0 or (runs.start.min() >= 0 < runs.length.min() and stop.max() <= size)):
        return
    bad = (runs.start < 0) | (runs.length <= 0)
    if runs.step is not None:
        bad |= runs.step < 1
        stop = runs.start + (runs.length - 1) * runs.step + 1
    bad |= stop > size
    if bad.any():
        refuse(f"{what} rows {runs.start[bad][0]} to {stop[bad][0]} of {place}, which has {size}")
