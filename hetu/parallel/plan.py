"""AttnPlan: what each pipeline attends to, sends and receives, step by step, as plain data.

A plan is a list of instructions a pipeline, over integers only. ``hetu/backends/comm`` runs it; the
verifier, the cost model, the printer and the tests read the same lists. Keys and values of a token
travel together, so a row of a buffer is one token's k and v.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hetu.parallel.layout import Layout
from hetu.parallel.segments import IntArray, QuerySpans, SegmentTable

if TYPE_CHECKING:
    from hetu.parallel.cost import Cost, Hardware


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """A set of rows as runs ``start[i] .. start[i] + length[i]``, in the order they are packed."""

    start: IntArray
    length: IntArray

    @property
    def rows(self) -> int:
        """Rows of all runs together."""
        return int(self.length.sum())

    def indices(self) -> IntArray:
        """Every row number, in packing order."""
        ends = np.cumsum(self.length)
        return np.repeat(self.start - (ends - self.length), self.length) + np.arange(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class Send:
    """Packs ``runs`` of ``buffer`` and starts sending them to ``peer``; the buffer is read until waited for."""

    transfer: int
    peer: int
    buffer: int
    runs: Runs


@dataclass(frozen=True, slots=True, eq=False)
class Receive:
    """Starts receiving ``rows`` rows from ``peer`` into ``buffer[offset : offset + rows]``."""

    transfer: int
    peer: int
    buffer: int
    offset: int
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class Wait:
    """Blocks until this pipeline's end of ``transfer`` is done: landed, or its buffer free to be reused."""

    transfer: int


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What rows of a buffer are: rows ``runs`` of ``owner``'s shard, in packing order."""

    owner: int
    runs: Runs


@dataclass(frozen=True, slots=True, eq=False)
class Attend:
    """Attends the pipeline's queries to ``buffer`` by ``table`` and merges into the running (out, lse).

    Attributes:
        buffer: Index of the buffer of keys and values; 0 is the pipeline's own shard.
        table: The segments; rows of ``k_start`` count in the buffer.
        sources: What the buffer holds, from its row 0 on.
    """

    buffer: int
    table: SegmentTable
    sources: tuple[Source, ...]


Instruction = Send | Receive | Wait | Attend


@dataclass(frozen=True, slots=True, eq=False)
class PipelinePlan:
    """One pipeline's part of a plan.

    Attributes:
        pipeline: Its number in the strategy.
        rows: Rows of its shard.
        spans: Its query rows; every ``Attend`` refers to them.
        buffers: Rows that each buffer holds; buffer 0 is the shard itself and is never received into.
        instructions: What it does, in order. There is always at least one ``Attend`` (its table may be
            empty), so that every output row is written.
    """

    pipeline: int
    rows: int
    spans: QuerySpans
    buffers: tuple[int, ...]
    instructions: tuple[Instruction, ...]

    @property
    def rows_in_flight(self) -> int:
        """Most rows at a time that are packed and not yet known to be sent."""
        flying: dict[int, int] = {}
        most = 0
        for item in self.instructions:
            if isinstance(item, Send):
                flying[item.transfer] = item.runs.rows
                most = max(most, sum(flying.values()))
            elif isinstance(item, Wait):
                flying.pop(item.transfer, None)
        return most


@dataclass(frozen=True, slots=True)
class Heads:
    """The widths of a token's row: what turns rows into bytes and FLOPs."""

    num_q: int
    num_kv: int
    head_dim: int
    itemsize: int

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.num_kv * self.head_dim * self.itemsize


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class AttnPlan:
    """What every pipeline of a strategy does in one ``parallel_attn``.

    Attributes:
        layout: Which token lies where.
        method: ``"ring"``, ``"direct"`` or ``"all_gather"``.
        is_causal: Whether the mask is causal.
        heads: Widths of a token's row.
        pipelines: One part a pipeline, in order.
    """

    layout: Layout
    method: str
    is_causal: bool
    heads: Heads
    pipelines: tuple[PipelinePlan, ...]
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def pairs(self, pipeline: int) -> int:
        """(query, key) pairs that a pipeline computes."""
        part = self.pipelines[pipeline]
        return sum(item.table.pairs(part.spans) for item in part.instructions if isinstance(item, Attend))

    def rows_sent(self, pipeline: int) -> int:
        """Rows of keys and values that a pipeline sends."""
        return sum(item.runs.rows for item in self.pipelines[pipeline].instructions if isinstance(item, Send))

    def rows_received(self, pipeline: int) -> int:
        """Rows of keys and values that a pipeline receives."""
        return sum(item.rows for item in self.pipelines[pipeline].instructions if isinstance(item, Receive))

    def bytes_sent(self, pipeline: int) -> int:
        """Bytes of keys and values that a pipeline sends."""
        return self.rows_sent(pipeline) * self.heads.kv_row_bytes

    def peak_bytes(self, pipeline: int) -> int:
        """Most bytes that a pipeline holds at a time.

        Its shard, its buffers, the packed rows that are still being sent, its output and lse, and with several
        steps the running output in float32.
        """
        part, heads = self.pipelines[pipeline], self.heads
        several = sum(isinstance(item, Attend) for item in part.instructions) > 1
        width = heads.num_q * heads.head_dim
        query_bytes = 2 * width * heads.itemsize + 4 * heads.num_q + 4 * width * several
        return (sum(part.buffers) + part.rows_in_flight) * heads.kv_row_bytes + part.rows * query_bytes

    def verify(self, max_bytes: int | None = None) -> None:
        """Proves, without running it, that the plan computes the attention and can be followed.

        Every allowed (query, key) pair is computed exactly once and no other; sends and receives pair up; the
        pipelines can't wait for each other for ever; no buffer is read before its rows have landed or filled while
        it is being sent; no pipeline holds more rows than its group has tokens.

        Args:
            max_bytes: What a pipeline may take; see :meth:`peak_bytes`.

        Raises:
            PlanError: Saying which pair, which transfer or which buffer is wrong.
        """
        from hetu.parallel.verify import verify

        verify(self, max_bytes)

    def cost(self, hardware: Hardware) -> Cost:
        """FLOPs, bytes a link, peak memory and predicted time on given hardware."""
        from hetu.parallel.cost import predict

        return predict(self, hardware)

    def hash(self) -> str:
        """A digest of all that the plan says: equal on every machine for equal plans."""
        digest = hashlib.blake2b(digest_size=16)
        values = (self.layout.digest(), self.method, self.is_causal, self.heads, self.pipelines)
        _feed(digest.update, values)
        return digest.hexdigest()

    def summary(self) -> str:
        """One line: the method, the size of the problem, its balance, and what is moved."""
        from hetu.parallel.report import summary

        return summary(self)

    def __str__(self) -> str:
        from hetu.parallel.report import table

        return table(self)

    def __repr__(self) -> str:
        return f"<AttnPlan {self.summary()}>"


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    """Feeds a digest with a value of this module, however deep; memos are no part of a value."""
    if isinstance(value, np.ndarray):
        update(repr(value.shape).encode() + value.astype("<i8").tobytes())
    elif is_dataclass(value):
        update(type(value).__name__.encode())
        for item in fields(value):
            if item.name != "memo":
                _feed(update, getattr(value, item.name))
    elif isinstance(value, tuple):
        update(b"(%d" % len(value))
        for one in value:
            _feed(update, one)
    else:
        update(repr(value).encode() + b";")
