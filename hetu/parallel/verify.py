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
4. In the backward, the gradients of foreign rows are followed too; see :mod:`hetu.parallel.verify_gradients`.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from hetu.parallel.plan import Accumulate, Attend, AttnPlan, Receive, Send, Wait
from hetu.parallel.segments import IntArray
from hetu.parallel.verify_gradients import Contributions, Gradients
from hetu.parallel.verify_structure import (
    LANDING,
    UNWRITTEN,
    Tokens,
    Transfer,
    check_part,
    instruction_name,
    pair_transfers,
    refuse,
)


def verify(plan: AttnPlan, max_bytes: int | None = None) -> None:
    """See :meth:`hetu.parallel.plan.AttnPlan.verify`."""
    tokens = Tokens.of(plan)
    if len(plan.pipelines) != plan.layout.num_pipelines:
        refuse(f"{len(plan.pipelines)} parts for {plan.layout.num_pipelines} pipelines")
    for r, part in enumerate(plan.pipelines):
        check_part(plan, r, part)
    transfers = pair_transfers(plan)
    contributions = Contributions(plan, tokens) if plan.is_backward else None
    runs = [_Run(r, plan, tokens, transfers, contributions) for r in range(len(plan.pipelines))]
    _follow(runs, transfers)
    for run in runs:
        run.check_end()
        _prove_pairs(plan, run)
    if contributions is not None:
        contributions.check_home()
    _check_memory(plan, max_bytes)


# Following the instructions


class _Run:
    """One pipeline that follows its instructions, with token numbers for keys and values.

    ``gradients`` follows those of a backward; no instruction is about any in a forward.
    """

    def __init__(
        self,
        r: int,
        plan: AttnPlan,
        tokens: Tokens,
        transfers: dict[int, Transfer],
        contributions: Contributions | None,
    ) -> None:
        self.r, self.part, self.tokens, self.transfers = r, plan.pipelines[r], tokens, transfers
        self.buffers = [tokens.shards[r], *(np.full(size, UNWRITTEN) for size in self.part.buffers[1:])]
        self.gradients = None if contributions is None else Gradients(r, plan, contributions)
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
        elif isinstance(item, Attend):
            self._attend(item)
        else:
            self._add(item)
        return True

    def _wait(self, item: Wait) -> bool:
        own = self.pending.get(item.transfer)
        if own is None:
            refuse(f"pipeline {self.r} waits for transfer {item.transfer}, which it has not started, or twice")
        transfer = self.transfers[item.transfer]
        if isinstance(own, Send):
            if not transfer.is_expected:
                return False
        else:
            if transfer.payload is None:
                return False
            place = self.gradients.landing if self.gradients and own.grads else self.buffers
            place[own.buffer][own.offset : own.offset + own.rows] = transfer.payload
        del self.pending[item.transfer]
        return True

    def _send(self, item: Send) -> None:
        payload = self.gradients.send(item) if self.gradients and item.grads else self._pack(item)
        self.transfers[item.transfer].payload = payload
        self.pending[item.transfer] = item

    def _pack(self, item: Send) -> IntArray:
        rows = item.runs.indices()
        payload = self.buffers[item.buffer][rows]
        if (payload < 0).any():
            row = int((payload < 0).argmax())
            self._refuse(
                f"{instruction_name(item)} sends row {rows[row]} of buffer {item.buffer}: "
                f"{self.tokens.name(payload[row])}"
            )
        return payload

    def _receive(self, item: Receive) -> None:
        for other in self.pending.values():
            # Gradients land in buffers of their own, and are sent from where an attend computed them.
            if other.buffer == item.buffer and other.grads == item.grads and not (item.grads and type(other) is Send):
                self._check_apart(item, other)
        if self.gradients and item.grads:
            self.gradients.receive(item)
        else:
            self.buffers[item.buffer][item.offset : item.offset + item.rows] = LANDING
        self.transfers[item.transfer].is_expected = True
        self.pending[item.transfer] = item

    def _check_apart(self, item: Receive, other: Send | Receive) -> None:
        """That a receive fills no rows that another transfer reads or fills."""
        end = item.offset + item.rows
        if isinstance(other, Send):
            runs, why = other.runs, "is still being sent"
            is_busy = bool(((runs.start < end) & (runs.start + runs.length > item.offset)).any())
        else:
            why = "is still landing"
            is_busy = other.offset < end and other.offset + other.rows > item.offset
        if is_busy:
            place = f"{'landing ' * item.grads}buffer {item.buffer}"
            self._refuse(f"{instruction_name(item)} fills {place} while {instruction_name(other)} {why}")

    def _add(self, item: Accumulate) -> None:
        assert self.gradients is not None, "only a backward accumulates; see check_part"
        self.gradients.add(item)

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
        if self.gradients:
            self.gradients.attend(item, list(self.pending.values()))

    def _refuse(self, what: str) -> NoReturn:
        refuse(f"pipeline {self.r}: {what}")

    def check_end(self) -> None:
        """Every end of every transfer was waited for: else its rows never land, or its buffer dies too early."""
        for item in self.pending.values():
            self._refuse(f"{instruction_name(item)} is never waited for")


def _follow(runs: list[_Run], transfers: dict[int, Transfer]) -> None:
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
        refuse(f"deadlock: these wait for each other: {'; '.join(waiting)}")


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
        refuse(f"pipeline {run.r}, document {spans.document[span[i]]}: query position {query} and key {what}")

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
        refuse(
            f"pipeline {run.r}, document {spans.document[owner]}: query position {last[owner]} and key position "
            f"{missing} are attended {how}, expected once"
        )


def _check_memory(plan: AttnPlan, max_bytes: int | None) -> None:
    for r, part in enumerate(plan.pipelines):
        group, _ = plan.layout.place(r)
        held = sum(part.buffers)
        if held > group.tokens:
            refuse(f"pipeline {r} holds {held} rows in buffers {part.buffers}; its group has {group.tokens}")
        if max(part.landing, default=0) > part.rows:
            refuse(f"pipeline {r} has landing buffers of {part.landing} rows, but its shard only {part.rows}")
        if max_bytes is not None and plan.peak_bytes(r) > max_bytes:
            refuse(f"pipeline {r} needs {plan.peak_bytes(r):,} bytes, but may take {max_bytes:,}")
