"""The data of a plan: what each pipeline attends to, sends and receives, step by step.

A plan is a list of instructions a pipeline, over integers only. ``hetu/backends/comm`` runs it; the
verifier, the cost model, the printer and the tests read the same lists. Values of a token that are needed together
travel together: a row of a transfer is one token's k and v, say; see :class:`~hetu.parallel.plan.heads.Kind`.

There are two ways to move tokens to where they are attended to. Either keys and values travel, and each pipeline
attends for its own queries (``ring``, ``direct``, ``all_gather``). Or all that a few heads need travels to a pipeline
that attends for them, and what it computes travels home (``ulysses``); such a part has :attr:`PipelinePlan.heads`.

In the backward (:meth:`hetu.parallel.attn_plan.AttnPlan.backward`) an ``Attend`` computes gradients: those of the
queries, and those of the keys and values of its buffer. The latter stay where they are if the buffer is the pipeline's
own shard; else ``Send`` and ``Receive`` with ``grads`` carry them home, and ``Accumulate`` adds them to the owner's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeGuard, TypeVar

import numpy as np

from hetu.parallel.layout.layout import Layout
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import QuerySpans, Turn, take_turns
from hetu.parallel.plan.heads import HeadRange, Heads, Kind
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Instruction, Receive, Send
from hetu.parallel.plan.own_gradients import own_gradients

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, eq=False)
class PipelinePlan:
    """One pipeline's part of a plan.

    Attributes:
        pipeline: Its number in the strategy.
        rows: Rows of its shard.
        spans: The query rows that it attends for; every ``Attend`` refers to them. Its own, unless it has ``heads``.
        buffers: Rows that each buffer holds; buffer 0 is the shard itself. Keys are never received into it.
        instructions: What it does, in order. Without ``heads`` there is always at least one ``Attend`` (its table
            may be empty), so that every output row is written.
        landing: Rows of each buffer in which gradients of own rows land that others computed; only in the backward.
        heads: If it attends for some heads only, but for all tokens of its group: which, maybe none. Then buffer 1 has
            a row a token, document after document; ``spans`` are these rows.
        memo: What was found out of the others, see :meth:`known`; not part of the value.
    """

    pipeline: int
    rows: int
    spans: QuerySpans
    buffers: tuple[int, ...]
    instructions: tuple[Instruction, ...]
    landing: tuple[int, ...] = ()
    heads: HeadRange | None = None
    memo: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def attends(self) -> int:
        """Number of ``Attend`` instructions."""
        return sum(isinstance(item, Attend) for item in self.instructions)

    @property
    def sums_gradients(self) -> bool:
        """Whether gradients of an own row's key and value come in several parts: they are summed up in float32."""
        return bool(own_gradients(self).aside) or any(
            isinstance(item, Accumulate) or (isinstance(item, Copy) and item.kind is Kind.KV_GRADS)
            for item in self.instructions
        )

    @property
    def runs_on(self) -> bool:
        """Whether an ``Attend`` leaves results of queries that a later one adds to, so that they are kept in float32.

        Of a forward these are outputs; of a backward gradients of queries.
        """
        return self.known("runs_on", lambda: any(turn is not None and turn.runs_on for turn in turns(self).values()))

    def known(self, name: str, find: Callable[[], Found]) -> Found:
        """What ``find`` gives, found once: runs ask for it each time."""
        if name not in self.memo:
            self.memo[name] = find()
        found: Found = self.memo[name]
        return found

    def last_reads(self) -> set[int]:
        """After which instructions, by number, nobody needs the gradients of their buffer any more: they may be freed.

        These are the last ``Send`` of what an ``Attend`` computed, and every ``Attend`` whose gradients none sends.
        """
        return self.known("last_reads", self._find_last_reads)

    def _find_last_reads(self) -> set[int]:
        last: set[int] = set()
        is_read_later: set[int] = set()
        for number in reversed(range(len(self.instructions))):
            item = self.instructions[number]
            if isinstance(item, Send) and item.grads:
                if item.buffer not in is_read_later:
                    last.add(number)
                is_read_later.add(item.buffer)
            elif isinstance(item, Attend):
                if item.buffer not in is_read_later:
                    last.add(number)
                is_read_later.discard(item.buffer)
        return last

    def last_uses(self) -> dict[int, tuple[Kind, ...]]:
        """After which instructions, by number, nobody needs what buffer 1 holds of some kinds any more.

        Of a part that has ``heads``: what came there is needed up to the last ``Attend``, and what that computed until
        it is sent and copied.
        """
        came = [item.kind for item in self.instructions if _fills_buffer(item)]
        last: dict[Kind, int] = {}
        for number, item in enumerate(self.instructions):
            if isinstance(item, Attend):
                last |= dict.fromkeys(came, number)
            elif isinstance(item, (Send, Copy)) and item.buffer:
                last[item.kind] = number
        return {number: tuple(kind for kind in last if last[kind] == number) for number in set(last.values())}


def batches(part: PipelinePlan) -> dict[int, tuple[Send, ...]]:
    """Sends that are started together: by the number of the first of the transfers that follow each other.

    All of them are packed before any is started, see :mod:`hetu.parallel.proof.follow`.
    """
    return part.known("batches", lambda: _find_batches(part))


def _find_batches(part: PipelinePlan) -> dict[int, tuple[Send, ...]]:
    found: dict[int, tuple[Send, ...]] = {}
    first: int | None = None
    for number, item in enumerate(part.instructions):
        if not isinstance(item, (Send, Receive)):
            first = None
            continue
        first = number if first is None else first
        if isinstance(item, Send):
            found[first] = (*found.get(first, ()), item)
    return found


def turns(part: PipelinePlan) -> dict[int, Turn | None]:
    """What each ``Attend`` of a part finds and leaves, by its number among the instructions.

    Where heads are exchanged for tokens, each attend is the only one of its heads.
    """
    return part.known("turns", lambda: _find_turns(part))


def _find_turns(part: PipelinePlan) -> dict[int, Turn | None]:
    steps = {number: item.table for number, item in enumerate(part.instructions) if isinstance(item, Attend)}
    taken = take_turns(part.spans, list(steps.values())) if part.heads is None else [None] * len(steps)
    return dict(zip(steps, taken, strict=True))


def _fills_buffer(item: Instruction) -> TypeGuard[Receive | Copy]:
    """Whether an instruction brings what is attended to."""
    return isinstance(item, (Receive, Copy)) and not item.kind.is_result


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PlanData:
    """What a plan says; :class:`~hetu.parallel.attn_plan.AttnPlan` is what users hold.

    Attributes:
        layout: Which token lies where.
        method: ``"ring"``, ``"direct"``, ``"all_gather"`` or ``"ulysses"``.
        mask: Which keys a query sees.
        heads: Widths of a token's row.
        pipelines: One part a pipeline, in order.
        is_backward: Whether it computes the gradients; see :meth:`backward`.
    """

    layout: Layout
    method: str
    mask: Mask
    heads: Heads
    pipelines: tuple[PipelinePlan, ...]
    is_backward: bool = False
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def pairs(self, pipeline: int) -> int:
        """(query, key) pairs that a pipeline computes, for all heads or for some."""
        part = self.pipelines[pipeline]
        pairs = [item.table.pairs(part.spans) for item in part.instructions if isinstance(item, Attend)]
        return sum(pairs) if part.heads is None else max(pairs, default=0)  # all its heads see the same pairs

    def head_pairs(self, pipeline: int) -> int:
        """The same, those of each query head counted for themselves: what the work is proportional to."""
        part = self.pipelines[pipeline]
        attends = [item for item in part.instructions if isinstance(item, Attend)]
        return sum(item.table.pairs(part.spans) * (item.heads or self.heads.all).num_q for item in attends)

    def rows_sent(self, pipeline: int) -> int:
        """Rows whose keys and values a pipeline sends."""
        return self._rows(pipeline, Send, "k")

    def rows_received(self, pipeline: int) -> int:
        """Rows whose keys and values a pipeline receives."""
        return self._rows(pipeline, Receive, "k")

    def grad_rows_sent(self, pipeline: int) -> int:
        """Rows whose gradients of keys and values a pipeline sends home; 0 in a forward plan."""
        return self._rows(pipeline, Send, "dk")

    def grad_rows_received(self, pipeline: int) -> int:
        """Rows whose gradients of keys and values a pipeline receives from others."""
        return self._rows(pipeline, Receive, "dk")

    def _rows(self, pipeline: int, end: type[Send | Receive], value: str) -> int:
        items = self.pipelines[pipeline].instructions
        return sum(item.rows for item in items if isinstance(item, end) and value in item.kind.values)

    def bytes_sent(self, pipeline: int) -> int:
        """Bytes of all that a pipeline sends."""
        sends = [item for item in self.pipelines[pipeline].instructions if isinstance(item, Send)]
        return sum(item.rows * self.heads.row_bytes(item.kind, item.heads) for item in sends)

    def hash(self) -> str:
        """A digest of all that the plan says: equal on every machine for equal plans."""
        digest = hashlib.blake2b(digest_size=16)
        values = (self.layout.digest(), self.method, self.mask, self.is_backward, self.heads, self.pipelines)
        _feed(digest.update, values)
        return digest.hexdigest()


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    """Feeds a digest with a value of this module, however deep; what isn't shown is derived, and no part of it."""
    if isinstance(value, np.ndarray):
        update(repr(value.shape).encode() + value.astype("<i8").tobytes())
    elif is_dataclass(value):
        update(type(value).__name__.encode())
        for item in fields(value):
            if item.repr:
                _feed(update, getattr(value, item.name))
    elif isinstance(value, tuple):
        update(b"(%d" % len(value))
        for one in value:
            _feed(update, one)
    else:
        update(repr(value).encode() + b";")
