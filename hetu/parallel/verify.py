"""Proves a plan without running it: follows every instruction with token numbers in place of keys and values.

The proof is exact and takes time and memory in proportion to the keys that the segments name, not to the pairs:

1. Every instruction refers to rows, spans and buffers that exist, and every transfer has two ends that agree.
2. The instructions are followed. Sends and receives are posted, and a wait blocks until the other end of the transfer
   is posted, so a plan that passes can't deadlock however little a network buffers. What lands in a buffer is known by
   token, a read of what has not landed is refused, and so is a receive into rows that are still being sent.
3. Row i of a query span sees a segment's key j from ``i = max(0, j - diagonal)`` on. The mask lets position ``p + i *
   step`` see key position k from ``i = max(0, ceil((k - p) / step))`` on. Where the two are equal for every key of
   every segment, and every key that the span's last row may see is named exactly once, every allowed pair is computed
   exactly once and no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from hetu.errors import PlanError
from hetu.parallel.plan import Attend, AttnPlan, PipelinePlan, Receive, Runs, Send, Wait
from hetu.parallel.segments import IntArray, QuerySpans

_BY_ROW = ("document", "position", "slot", "slot_row", "column")
"""What query spans say of every row."""

UNWRITTEN, LANDING = -1, -2
"""Rows of a buffer that hold no token: nothing was received there yet, or what is has not landed."""


def verify(plan: AttnPlan, max_bytes: int | None = None) -> None:
    """See :meth:`hetu.parallel.plan.AttnPlan.verify`."""
    tokens = _Tokens.of(plan)
    if len(plan.pipelines) != plan.layout.num_pipelines:
        _refuse(f"{len(plan.pipelines)} parts for {plan.layout.num_pipelines} pipelines")
    for r, part in enumerate(plan.pipelines):
        _check_part(plan, r, part)
    transfers = _pair_transfers(plan)
    runs = [_Run(r, part, tokens, transfers) for r, part in enumerate(plan.pipelines)]
    _follow(runs, transfers)
    for run in runs:
        run.check_end()
        _prove_pairs(plan, run)
    _check_memory(plan, max_bytes)


def _refuse(what: str) -> NoReturn:
    raise PlanError(what, op="plan", fix="build plans by hetu.parallel.build_plan; if this one was, please report it")


# Tokens


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """All tokens of all groups, numbered group after group in the order of documents and positions."""

    group: IntArray
    document: IntArray
    position: IntArray
    shards: list[IntArray]

    @classmethod
    def of(cls, plan: AttnPlan) -> _Tokens:
        groups = plan.layout.groups
        sizes = [group.tokens for group in groups]
        base = np.cumsum([0, *sizes])
        document = [np.arange(len(group.lengths)).repeat(group.lengths) for group in groups]
        position = [
            np.arange(size) - group.offsets[owner] for size, group, owner in zip(sizes, groups, document, strict=True)
        ]
        shards = [base[plan.layout.group_index(r)] + plan.layout.columns(r) for r in range(plan.layout.num_pipelines)]
        everyone = np.arange(len(groups)).repeat(sizes)
        return cls(everyone, np.concatenate(document), np.concatenate(position), shards)

    def name(self, token: int) -> str:
        if token < 0:
            return "nothing that has landed" if token == LANDING else "nothing that was ever received"
        return f"position {self.position[token]} of document {self.document[token]} of group {self.group[token]}"


# Parts and transfers


def _check_part(plan: AttnPlan, r: int, part: PipelinePlan) -> None:
    """That a part is of its pipeline, and that its instructions name what exists."""
    if part.pipeline != r or part.rows != plan.layout.rows(r) or not part.buffers or part.buffers[0] != part.rows:
        _refuse(
            f"the part of pipeline {r} says it is of pipeline {part.pipeline} with {part.rows} rows and buffers "
            f"{part.buffers}, but its shard has {plan.layout.rows(r)} rows"
        )
    _check_spans(plan.layout.query_spans(r), part, r)
    if not any(isinstance(item, Attend) for item in part.instructions):
        _refuse(f"pipeline {r} never attends, so its output is never written")
    for item in part.instructions:
        if isinstance(item, Wait):
            continue
        if not 0 <= item.buffer < len(part.buffers):
            _refuse(f"pipeline {r} has no buffer {item.buffer}, which {_name(item)} names")
        size = part.buffers[item.buffer]
        if isinstance(item, Send):
            _check_runs(item.runs, size, f"pipeline {r}: {_name(item)} sends", item.buffer)
        elif isinstance(item, Receive):
            if item.buffer == 0:
                _refuse(f"pipeline {r}: {_name(item)} lands in buffer 0, the pipeline's own shard")
            if item.rows <= 0 or item.offset < 0 or item.offset + item.rows > size:
                rows = f"rows {item.offset} to {item.offset + item.rows}"
                _refuse(f"pipeline {r}: {_name(item)} lands in {rows} of buffer {item.buffer}, which has {size}")
        else:
            _check_table(item, part, r)


def _check_spans(expected: QuerySpans, part: PipelinePlan, r: int) -> None:
    """That the query spans are the rows of the layout, however they are cut."""
    given, wanted = _by_row(part.spans, part.rows, r), _by_row(expected, part.rows, r)
    for name, mine, layouts in zip(_BY_ROW, given, wanted, strict=True):
        if not np.array_equal(mine, layouts):
            row = int((mine != layouts).argmax())
            _refuse(f"pipeline {r}: {name} of query row {row} is {mine[row]}, but {layouts[row]} in the layout")


def _by_row(spans: QuerySpans, rows: int, r: int) -> list[IntArray]:
    ends = spans.length.cumsum()
    if (spans.length <= 0).any() or not np.array_equal(spans.start, ends - spans.length) or spans.length.sum() != rows:
        _refuse(f"pipeline {r}: its query spans don't cover its {rows} rows one after the other")
    if (spans.step < 1).any():  # can't be seen by row where a span has one row, and the proof divides by it
        _refuse(f"pipeline {r}: query span {int((spans.step < 1).argmax())} has a step below 1")
    i = np.arange(rows) - spans.start.repeat(spans.length)
    slopes: tuple[Any, ...] = (0, spans.step.repeat(spans.length), 0, 1, 0)
    return [getattr(spans, name).repeat(spans.length) + i * slope for name, slope in zip(_BY_ROW, slopes, strict=True)]


def _check_runs(runs: Runs, size: int, what: str, buffer: int) -> None:
    bad = (runs.start < 0) | (runs.length <= 0) | (runs.start + runs.length > size)
    if bad.any():
        start, length = runs.start[bad][0], runs.length[bad][0]
        _refuse(f"{what} rows {start} to {start + length} of buffer {buffer}, which has {size}")


def _check_table(item: Attend, part: PipelinePlan, r: int) -> None:
    table, what = item.table, f"pipeline {r}: attending to buffer {item.buffer}"
    if not len(table.query) == len(table.k_start) == len(table.k_len) == len(table.diagonal):
        _refuse(f"{what}: the columns of the segment table differ in length")
    held = sum(source.runs.rows for source in item.sources)
    if held > part.buffers[item.buffer]:
        _refuse(f"{what}: its sources have {held} rows, but the buffer only {part.buffers[item.buffer]}")
    if len(table) == 0:
        return
    if table.query.min() < 0 or table.query.max() >= len(part.spans) or (np.diff(table.query) < 0).any():
        _refuse(f"{what}: its segments are not ordered by query span, or name one that does not exist")
    _check_runs(Runs(table.k_start, table.k_len), held, f"{what}: a segment sees", item.buffer)
    unseen = table.k_len > part.spans.length[table.query] + table.diagonal
    if unseen.any():
        _refuse(f"{what}: segment {int(unseen.argmax())} has keys that no row of its query span sees")


def _name(item: Send | Receive | Attend) -> str:
    if isinstance(item, Attend):
        return "an attend"
    return f"transfer {item.transfer} {'to' if isinstance(item, Send) else 'from'} pipeline {item.peer}"


@dataclass(slots=True, eq=False)
class _Transfer:
    """Both ends of a transfer, and what it carries once it is sent."""

    source: int
    send: Send
    target: int
    receive: Receive
    payload: IntArray | None = None
    is_expected: bool = False


def _pair_transfers(plan: AttnPlan) -> dict[int, _Transfer]:
    """Finds both ends of every transfer, and that they agree."""
    sends: dict[int, tuple[int, Send]] = {}
    receives: dict[int, tuple[int, Receive]] = {}
    for r, part in enumerate(plan.pipelines):
        for item in part.instructions:
            if isinstance(item, Send):
                if item.transfer in sends:
                    _refuse(f"transfer {item.transfer} is sent twice, by pipelines {sends[item.transfer][0]} and {r}")
                sends[item.transfer] = r, item
            elif isinstance(item, Receive):
                if item.transfer in receives:
                    first = receives[item.transfer][0]
                    _refuse(f"transfer {item.transfer} is received twice, by pipelines {first} and {r}")
                receives[item.transfer] = r, item
    for number in sends.keys() ^ receives.keys():
        done, missing = ("sent by", "received") if number in sends else ("received by", "sent")
        r = (sends if number in sends else receives)[number][0]
        _refuse(f"transfer {number} is {done} pipeline {r}, but never {missing}")
    transfers = {}
    for number, (source, send) in sends.items():
        target, receive = receives[number]
        if (send.peer, receive.peer) != (target, source):
            _refuse(
                f"transfer {number} is sent by pipeline {source} to {send.peer}, "
                f"but received by pipeline {target} from {receive.peer}"
            )
        if send.runs.rows != receive.rows:
            _refuse(
                f"transfer {number} from pipeline {source} to {target} sends {send.runs.rows} rows, "
                f"but {receive.rows} are received"
            )
        transfers[number] = _Transfer(source, send, target, receive)
    _check_order(plan)
    return transfers


def _check_order(plan: AttnPlan) -> None:
    """Process groups match the messages of two ranks by their order, so it must be the same at both ends."""
    orders: dict[tuple[int, int, type], list[int]] = {}
    for r, part in enumerate(plan.pipelines):
        for item in part.instructions:
            if isinstance(item, (Send, Receive)):
                ends = (r, item.peer) if isinstance(item, Send) else (item.peer, r)
                orders.setdefault((*ends, type(item)), []).append(item.transfer)
    for (source, target, kind), numbers in orders.items():
        if kind is Send and numbers != orders[source, target, Receive]:
            _refuse(
                f"pipeline {source} sends transfers {numbers} to pipeline {target}, which receives them in another "
                f"order: {orders[source, target, Receive]}"
            )


# Following the instructions


class _Run:
    """One pipeline that follows its instructions, with token numbers for keys and values."""

    def __init__(self, r: int, part: PipelinePlan, tokens: _Tokens, transfers: dict[int, _Transfer]) -> None:
        self.r, self.part, self.tokens, self.transfers = r, part, tokens, transfers
        self.buffers = [tokens.shards[r], *(np.full(size, UNWRITTEN) for size in part.buffers[1:])]
        self.next = 0
        self.pending: dict[int, Send | Receive] = {}
        self.seen: list[tuple[IntArray, IntArray, IntArray]] = []

    @property
    def is_done(self) -> bool:
        return self.next == len(self.part.instructions)

    def advance(self) -> bool:
        """Follows instructions until one has to wait; says whether any was followed."""
        begin = self.next
        while not self.is_done and self._step():
            self.next += 1
        return self.next > begin

    def _step(self) -> bool:
        item = self.part.instructions[self.next]
        if isinstance(item, Wait):
            return self._wait(item)
        if isinstance(item, Send):
            self._send(item)
        elif isinstance(item, Receive):
            self._receive(item)
        else:
            self._attend(item)
        return True

    def _wait(self, item: Wait) -> bool:
        own = self.pending.get(item.transfer)
        if own is None:
            _refuse(f"pipeline {self.r} waits for transfer {item.transfer}, which it has not started, or twice")
        transfer = self.transfers[item.transfer]
        if isinstance(own, Send):
            if not transfer.is_expected:
                return False
        else:
            if transfer.payload is None:
                return False
            self.buffers[own.buffer][own.offset : own.offset + own.rows] = transfer.payload
        del self.pending[item.transfer]
        return True

    def _send(self, item: Send) -> None:
        rows = item.runs.indices()
        payload = self.buffers[item.buffer][rows]
        if (payload < 0).any():
            row = int((payload < 0).argmax())
            self._refuse(
                f"{_name(item)} sends row {rows[row]} of buffer {item.buffer}: {self.tokens.name(payload[row])}"
            )
        self.transfers[item.transfer].payload = payload
        self.pending[item.transfer] = item

    def _receive(self, item: Receive) -> None:
        rows = slice(item.offset, item.offset + item.rows)
        for other in self.pending.values():
            if other.buffer != item.buffer:
                continue
            if isinstance(other, Send):
                runs = other.runs
                is_busy = bool(((runs.start < rows.stop) & (runs.start + runs.length > rows.start)).any())
                why = "is still being sent"
            else:
                is_busy, why = other.offset < rows.stop and other.offset + other.rows > rows.start, "is still landing"
            if is_busy:
                self._refuse(f"{_name(item)} fills buffer {item.buffer} while {_name(other)} {why}")
        self.buffers[item.buffer][rows] = LANDING
        self.transfers[item.transfer].is_expected = True
        self.pending[item.transfer] = item

    def _attend(self, item: Attend) -> None:
        """Notes for every key of every segment: the query span, the key's token, the first row that sees it."""
        buffer, what = self.buffers[item.buffer], f"attending to buffer {item.buffer}"
        said = [self.tokens.shards[source.owner][source.runs.indices()] for source in item.sources]
        held = np.concatenate(said) if said else np.empty(0, np.int64)
        wrong = buffer[: len(held)] != held
        if wrong.any():
            row = int(wrong.argmax())
            there, wanted = self.tokens.name(int(buffer[row])), self.tokens.name(int(held[row]))
            self._refuse(f"{what}: row {row} holds {there}, but the plan says {wanted}")
        table = item.table
        span = table.query.repeat(table.k_len)
        number = np.arange(len(span)) - (table.k_len.cumsum() - table.k_len).repeat(table.k_len)
        keys = buffer[table.k_start.repeat(table.k_len) + number]
        self.seen.append((span, keys, np.maximum(number - table.diagonal.repeat(table.k_len), 0)))

    def _refuse(self, what: str) -> NoReturn:
        _refuse(f"pipeline {self.r}: {what}")

    def check_end(self) -> None:
        """Every end of every transfer was waited for: else its rows never land, or its buffer dies too early."""
        for item in self.pending.values():
            self._refuse(f"{_name(item)} is never waited for")


def _follow(runs: list[_Run], transfers: dict[int, _Transfer]) -> None:
    """Follows all pipelines until they are done, or none can go on."""
    while not all(run.is_done for run in runs):
        if max([run.advance() for run in runs]):  # every one of them, not only the first that can
            continue
        waiting = []
        for run in runs:
            item = None if run.is_done else run.part.instructions[run.next]
            if isinstance(item, Wait):
                transfer = transfers[item.transfer]
                other = transfer.source if transfer.target == run.r else transfer.target
                waiting.append(f"pipeline {run.r} for pipeline {other} to start transfer {item.transfer}")
        _refuse(f"deadlock: these wait for each other: {'; '.join(waiting)}")


# Pairs


def _prove_pairs(plan: AttnPlan, run: _Run) -> None:
    """That the pairs of one pipeline are those of the mask, each once."""
    group, _ = plan.layout.place(run.r)
    spans, tokens = run.part.spans, run.tokens
    span, key, since = (np.concatenate(columns) for columns in zip(*run.seen, strict=True))
    position, step, length = spans.position, spans.step, spans.length
    k = tokens.position[key]

    def pair(i: int, row: int, what: str) -> NoReturn:
        query = position[span[i]] + row * step[span[i]]
        _refuse(f"pipeline {run.r}, document {spans.document[span[i]]}: query position {query} and key {what}")

    foreign = (tokens.group[key] != group.index) | (tokens.document[key] != spans.document[span])
    if foreign.any():
        i = int(foreign.argmax())
        pair(i, int(since[i]), f"{tokens.name(int(key[i]))} are attended, though they belong to different documents")
    # The first row of the span that the mask lets see the key.
    allowed = np.maximum(-((position[span] - k) // step[span]), 0) if plan.is_causal else np.zeros_like(k)
    early, late = since < allowed, since > allowed
    if early.any():
        i = int(early.argmax())
        pair(i, int(since[i]), f"position {k[i]} are attended, though the mask hides the key")
    if late.any():
        i = int(late.argmax())
        pair(i, int(allowed[i]), f"position {k[i]} are not attended by the segment that should")

    last = position + (length - 1) * step
    number = last + 1 if plan.is_causal else group.lengths[spans.document]
    first = number.cumsum() - number
    times = np.bincount(first[span] + k, minlength=int(number.sum()))
    if (times != 1).any():
        place = int((times != 1).argmax())
        owner = int(first.searchsorted(place, "right")) - 1
        missing = int(place - first[owner])
        how = "never" if times[place] == 0 else f"{times[place]} times"
        _refuse(
            f"pipeline {run.r}, document {spans.document[owner]}: query position {last[owner]} and key position "
            f"{missing} are attended {how}, expected once"
        )


def _check_memory(plan: AttnPlan, max_bytes: int | None) -> None:
    for r, part in enumerate(plan.pipelines):
        group, _ = plan.layout.place(r)
        held = sum(part.buffers)
        if held > group.tokens:
            _refuse(f"pipeline {r} holds {held} rows in buffers {part.buffers}; its group has {group.tokens}")
        if max_bytes is not None and plan.peak_bytes(r) > max_bytes:
            _refuse(f"pipeline {r} needs {plan.peak_bytes(r):,} bytes, but may take {max_bytes:,}")
