"""The data of a plan: what each pipeline attends to, sends and receives, step by step.

A plan is a list of instructions per pipeline, over integers only. ``hetu/backends/comm`` runs it; the
verifier, the cost model, the printer and the tests read the same lists. Instructions name buffers, see
:mod:`hetu.parallel.plan.buffers`, of which the first is the pipeline's shard. Values of a token that are needed
together travel together: a row of a transfer is one token's k and v, say; see
:class:`~hetu.parallel.plan.heads.Payload`.

There are two ways to move tokens to where they are attended to, and a plan may go both. Either keys and values travel
into further buffers, and each pipeline attends for the queries of its shard (``ring``, ``direct``, ``all_gather``). Or
all that a few heads need travels to a pipeline that attends for them, and what it computes travels home (``ulysses``):
there the queries are those of another buffer, see :attr:`PipelinePlan.queries`.

In the backward (:meth:`hetu.parallel.attn_plan.AttnPlan.backward`) an ``Attend`` computes gradients: those of the
queries, and those of the keys and values of its buffer. The latter stay where they are if the buffer is the pipeline's
own shard; else ``Send`` and ``Receive`` carry them home, and ``Accumulate`` adds them to the owner's, or they come home
finished and are put there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Self, TypeVar, overload

import numpy as np

from hetu.arguments import index, items
from hetu.errors import StrategyError
from hetu.parallel.layout.layout import Layout
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import QuerySpans, SegmentTable, Turn, take_turns
from hetu.parallel.plan.buffers import Buffer
from hetu.parallel.plan.heads import HeadRange, Heads, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Instruction, Receive, Send
from hetu.parallel.plan.own_gradients import own_gradients
from hetu.parallel.topology import Topology

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, eq=False)
class PipelinePlan:
    """One pipeline's part of a plan.

    Attributes:
        pipeline: Its number in the strategy.
        spans: The query rows that it attends for: all rows of the queries' buffer. Every ``Attend`` refers to them.
        buffers: What it holds; buffer 0 is the shard itself. Keys are never received into it.
        instructions: What it does, in order. If the queries are its own there is always at least one ``Attend`` (its
            table may be empty), so that every output row is written.
        queries: The number of the buffer whose rows it attends for: 0, its shard, for all heads at once; or one that
            holds more rows of some heads, maybe of none, where it computes results by row, which travel home.
        memo: What was found out of the others, see :meth:`known`; not part of the value.
    """

    pipeline: int
    spans: QuerySpans
    buffers: tuple[Buffer, ...]
    instructions: tuple[Instruction, ...]
    queries: int = 0
    memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def rows(self) -> int:
        """Rows of its shard."""
        return self.buffers[0].rows

    @property
    def heads(self) -> HeadRange:
        """The heads that it attends for."""
        return self.buffers[self.queries].heads

    @property
    def is_backward(self) -> bool:
        """Whether it computes gradients."""
        return Payload.QKV_GRADS in self.buffers[0].payloads

    @property
    def attends(self) -> int:
        """Number of ``Attend`` instructions."""
        return sum(isinstance(item, Attend) for item in self.instructions)

    @property
    def sums_gradients(self) -> bool:
        """Whether gradients of an own row's key and value come in several parts: they are summed up in float32."""
        return self.known("sums_gradients", self._sums_gradients)

    def _sums_gradients(self) -> bool:
        return bool(own_gradients(self).aside) or any(
            isinstance(item, Accumulate)
            or (isinstance(item, Copy) and item.target == 0 and item.payload is Payload.KV_GRADS)
            for item in self.instructions
        )

    @property
    def runs_on(self) -> bool:
        """Whether an ``Attend`` leaves results of queries that a later one adds to, so that they are kept in float32.

        Of a forward these are outputs; of a backward gradients of queries.
        """
        return self.known("runs_on", lambda: any(turn is not None and turn.runs_on for turn in turns(self).values()))

    def known(self, name: Hashable, find: Callable[[], Found]) -> Found:
        """What ``find`` gives, found once: runs ask for it each time."""
        found: Found | None = self.memo.get(name)
        if found is None:
            found = self.memo[name] = find()
        return found


def turns(part: PipelinePlan) -> dict[int, Turn | None]:
    """What each ``Attend`` of a part finds and leaves, by its number among the instructions.

    Only attends for the same heads take turns.
    """
    return part.known("turns", lambda: _find_turns(part))


def _find_turns(part: PipelinePlan) -> dict[int, Turn | None]:
    steps: dict[HeadRange, dict[int, SegmentTable]] = {}
    for number, item in enumerate(part.instructions):
        if isinstance(item, Attend):
            steps.setdefault(item.heads, {})[number] = item.table
    found: dict[int, Turn | None] = {}
    for tables in steps.values():
        found |= zip(tables, take_turns(part.spans, list(tables.values())), strict=True)
    return found


class Parts(Sequence[PipelinePlan]):
    """The parts of all pipelines, in order; each is built when it is first asked for, and kept.

    Args:
        count: How many pipelines there are.
        build: Builds the parts of some of them, or of more. A part must not depend on which others are asked for.
    """

    def __init__(self, count: int, build: Callable[[Sequence[int]], Iterable[PipelinePlan]]) -> None:
        self._count, self._build = count, build
        self._built: dict[int, PipelinePlan] = {}

    def need(self, pipelines: Iterable[int]) -> None:
        """Builds the parts of several pipelines at once, those that are not built yet: faster than one by one."""
        missing = [r for r in pipelines if r not in self._built]
        for part in self._build(missing) if missing else ():
            self._built.setdefault(part.pipeline, part)  # another thread may have been faster

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> PipelinePlan: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[PipelinePlan, ...]: ...
    def __getitem__(self, number: int | slice) -> PipelinePlan | tuple[PipelinePlan, ...]:
        found = range(self._count)[number]
        pipelines = (found,) if isinstance(found, int) else found
        self.need(pipelines)
        parts = tuple([self._built[r] for r in pipelines])
        return parts if isinstance(found, range) else parts[0]

    def __iter__(self) -> Iterator[PipelinePlan]:
        return iter(self[:])


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PlanData:
    """What a plan says; :class:`~hetu.parallel.attn_plan.AttnPlan` is what users hold.

    Attributes:
        layout: Which token lies where.
        method: ``"ring"``, ``"direct"``, ``"all_gather"``, ``"ulysses"`` or ``"hierarchical"``.
        mask: Which keys a query sees.
        heads: Widths of a token's row.
        pipelines: One part per pipeline, in order: a tuple, or :class:`Parts` that are built when they are asked for.
        is_backward: Whether it computes the gradients; see :meth:`backward`.
        topology: Which pipelines share a host; None if all do.
    """

    layout: Layout
    method: str
    mask: Mask
    heads: Heads
    pipelines: Sequence[PipelinePlan]
    is_backward: bool = False
    topology: Topology | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def need(self, pipelines: Sequence[int]) -> None:
        """Builds the parts of several pipelines at once, those that are not built yet; the others wait for who asks."""
        if isinstance(self.pipelines, Parts):
            numbers, count = items(pipelines, "pipelines", op="plan", error=StrategyError), len(self.pipelines)
            self.pipelines.need([index(r, "pipelines", count, op="plan", error=StrategyError) for r in numbers])

    def whole(self) -> Self:
        """This plan with all parts built, in a tuple."""
        return replace(self, pipelines=self.pipelines[:]) if isinstance(self.pipelines, Parts) else self

    def part(self, pipeline: int) -> PipelinePlan:
        """What one pipeline does.

        Raises:
            StrategyError: If there is no such pipeline.
        """
        return self.pipelines[index(pipeline, "pipeline", len(self.pipelines), op="plan", error=StrategyError)]

    def pairs(self, pipeline: int) -> int:
        """(query, key) pairs that a pipeline computes, for all heads or for some."""
        part = self.part(pipeline)
        pairs: dict[HeadRange, int] = {}
        for item in part.instructions:
            if isinstance(item, Attend):
                pairs[item.heads] = pairs.get(item.heads, 0) + item.table.pairs(part.spans)
        return max(pairs.values(), default=0)  # all its heads see the same pairs

    def head_pairs(self, pipeline: int) -> int:
        """The same, those of each query head counted for themselves: what the work is proportional to."""
        part = self.part(pipeline)
        attends = [item for item in part.instructions if isinstance(item, Attend)]
        return sum(item.table.pairs(part.spans) * item.heads.num_q for item in attends)

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
        items = self.part(pipeline).instructions
        return sum(item.rows for item in items if isinstance(item, end) and value in item.payload.values)

    def bytes_sent(self, pipeline: int) -> int:
        """Bytes of all that a pipeline sends."""
        sends = [item for item in self.part(pipeline).instructions if isinstance(item, Send)]
        return sum(item.rows * self.heads.row_bytes(item.payload, item.heads) for item in sends)

    def digest(self) -> str:
        """A digest of what the plan is made from: of plans that hetu built, equal if and only if these are equal.

        No part is built for it.
        """
        digest = hashlib.blake2b(digest_size=16)
        _feed(
            digest.update, (self.layout.digest(), self.method, self.mask, self.is_backward, self.heads, self.topology)
        )
        return digest.hexdigest()

    def hash(self) -> str:
        """A digest of all that the plan says: equal on every machine for equal plans. All parts are built for it."""
        digest = hashlib.blake2b(digest_size=16)
        values = (self.digest(), tuple(self.pipelines))
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
