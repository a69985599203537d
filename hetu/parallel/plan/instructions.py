"""What a pipeline does, step by step: the instructions that plans are made of.

They are values, and nobody changes them. They are not frozen, for to make a frozen one takes four times as long, and
among a thousand pipelines a part has thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from hetu.parallel.mask.segments import IntArray, SegmentTable
from hetu.parallel.plan.heads import HeadRange, Payload


@dataclass(slots=True, eq=False, weakref_slot=True)
class Runs:
    """A set of rows as runs of evenly spaced rows, in the order they are packed.

    Attributes:
        start: First row of each run.
        length: Its rows.
        step: Distance between neighbours; None where it is 1 in all runs.
        total: Rows of all runs together, once they are known. Not part of the value, like what follows.
        kept: What backends copied to devices, once they did.
        find: Gives starts and lengths, where they are found when somebody asks for them; see :meth:`later`.
    """

    start: IntArray
    length: IntArray
    step: IntArray | None = None
    total: int | None = field(default=None, init=False, repr=False)
    kept: dict[Hashable, Any] | None = field(default=None, init=False, repr=False)
    find: Callable[[], tuple[IntArray, IntArray]] | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, start: IntArray, length: IntArray, rows: int) -> Self:
        """Runs at distance 1, of which it is known how many rows they have together."""
        runs = cls(start, length)
        runs.total = rows
        return runs

    @classmethod
    def later(cls, rows: int, find: Callable[[], tuple[IntArray, IntArray]]) -> Self:
        """Runs at distance 1 that are found when somebody asks for them; how many rows they have is known."""
        runs = cls.__new__(cls)
        runs.total, runs.find, runs.step, runs.kept = rows, find, None, None
        return runs

    def __getattr__(self, name: str) -> Any:
        if name not in ("start", "length") or self.find is None:
            raise AttributeError(name)
        self.start, self.length = self.find()
        return getattr(self, name)

    @property
    def copies(self) -> dict[Hashable, Any]:
        """What backends copied to devices; see :class:`hetu.backends.memory.DeviceCopies`."""
        if self.kept is None:
            self.kept = {}
        return self.kept

    @property
    def rows(self) -> int:
        """Rows of all runs together."""
        if self.total is None:
            self.total = int(self.length.sum())
        return self.total

    @property
    def as_slice(self) -> slice | None:
        """The rows as a slice, if they are a single run."""
        if len(self.start) != 1:
            return None
        start, step = int(self.start[0]), 1 if self.step is None else int(self.step[0])
        return slice(start, start + (int(self.length[0]) - 1) * step + 1, step)

    def indices(self) -> IntArray:
        """Every row number, in packing order."""
        if len(self.start) == 1 and self.step is None:
            return np.arange(self.start[0], self.start[0] + self.length[0])
        before = self.length.cumsum() - self.length
        if self.step is None:
            rows: IntArray = (self.start - before).repeat(self.length)
            rows += np.arange(len(rows))
            return rows
        number = np.arange(self.rows) - before.repeat(self.length)
        return number * self.step.repeat(self.length) + self.start.repeat(self.length)


@dataclass(slots=True, eq=False)
class Send:
    """Packs ``runs`` of ``buffer`` and starts sending them to ``peer``; the buffer is read until waited for.

    Attributes:
        transfer: Its number, the same at both ends.
        peer: Who receives.
        buffer: Whose rows these are.
        runs: Which.
        payload: Which of their values are sent. Gradients are those that the last ``Attend`` to ``buffer`` computed.
        heads: The heads of which they are sent.
    """

    transfer: int
    peer: int
    buffer: int
    runs: Runs
    payload: Payload
    heads: HeadRange

    @property
    def rows(self) -> int:
        """Rows that are sent."""
        return self.runs.rows

    @property
    def grads(self) -> bool:
        """Whether these are gradients of keys and values that the owner adds up."""
        return self.payload is Payload.KV_GRADS


@dataclass(slots=True, eq=False)
class Receive:
    """Starts receiving ``rows`` rows from ``peer`` into ``buffer[offset : offset + rows]``, or rows ``runs`` of it.

    Attributes:
        transfer: Its number, the same at both ends.
        peer: Who sends.
        buffer: Where the rows belong.
        offset: First row.
        rows: How many.
        payload: What they are.
        heads: The heads of which they hold values.
        runs: The rows of the buffer, if they don't follow each other, or if they hold more heads than come: they land
            aside then, and are copied there when they are waited for.
    """

    transfer: int
    peer: int
    buffer: int
    offset: int
    rows: int
    payload: Payload
    heads: HeadRange
    runs: Runs | None = None

    @property
    def grads(self) -> bool:
        """Whether these are gradients of keys and values that are added up."""
        return self.payload is Payload.KV_GRADS

    def indices(self) -> IntArray:
        """Every row of the buffer that is filled, in the order in which rows come."""
        return np.arange(self.offset, self.offset + self.rows) if self.runs is None else self.runs.indices()


@dataclass(slots=True, eq=False)
class Wait:
    """Blocks until this pipeline's end of ``transfer`` is done: landed, or its buffer free to be reused."""

    transfer: int


@dataclass(slots=True, eq=False)
class Copy:
    """Copies rows from one of the pipeline's buffers to another: what a transfer from a pipeline to itself would do.

    Attributes:
        payload: Which values of the rows; ``KV_GRADS`` are added to what the target holds.
        heads: The heads of which they are copied.
        buffer: The buffer that is read.
        runs: The rows of it.
        target: The buffer that is written.
        place: The rows of it.
    """

    payload: Payload
    heads: HeadRange
    buffer: int
    runs: Runs
    target: int
    place: Runs


@dataclass(slots=True, eq=False)
class Source:
    """What rows of a buffer are: rows ``runs`` of ``owner``'s shard, in packing order.

    They lie behind those of the source before, or in rows ``place`` of the buffer.
    """

    owner: int
    runs: Runs
    place: Runs | None = None


@dataclass(slots=True, eq=False)
class Attend:
    """Attends the rows of the queries' buffer to ``buffer`` by ``table`` and merges into the running (out, lse).

    In the backward: adds to the gradients of the queries, and computes those of the buffer's keys and values.

    Attributes:
        buffer: Index of the buffer of keys and values; 0 is the pipeline's own shard.
        table: The segments; rows of ``k_start`` count in the buffer.
        sources: What the buffer holds, from its row 0 on.
        heads: The heads that attend. The query heads are those of a whole number of key heads, or of one.
    """

    buffer: int
    table: SegmentTable
    sources: tuple[Source, ...]
    heads: HeadRange

    @property
    def rows(self) -> int:
        """Rows that the buffer holds."""
        return sum([source.runs.rows for source in self.sources])


@dataclass(slots=True, eq=False)
class Accumulate:
    """Adds rows ``offset .. offset + runs.rows`` of ``buffer`` to the gradients of own rows ``runs``, of ``heads``."""

    buffer: int
    offset: int
    runs: Runs
    heads: HeadRange


Instruction = Send | Receive | Wait | Copy | Attend | Accumulate
