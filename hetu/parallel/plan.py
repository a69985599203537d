"""AttnPlan: what each pipeline attends to, sends and receives, step by step, as plain data.

A plan is a list of instructions a pipeline, over integers only. ``hetu/backends/comm`` runs it; the
verifier, the cost model, the printer and the tests read the same lists. Keys and values of a token
travel together, so a row of a buffer is one token's k and v.

In the backward (:meth:`AttnPlan.backward`) an ``Attend`` computes gradients: those of the queries, and those of the
keys and values of its buffer. The latter stay where they are if the buffer is the pipeline's own shard; else ``Send``
and ``Receive`` with ``grads`` carry them home, and ``Accumulate`` adds them to the owner's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hetu.parallel.layout import Layout
from hetu.parallel.segments import IntArray, QuerySpans, SegmentTable

if TYPE_CHECKING:
    from hetu.parallel.cost import Cost, Hardware


@dataclass(frozen=True, eq=False)
class Runs:
    """A set of rows as runs ``start[i] .. start[i] + length[i]``, in the order they are packed."""

    start: IntArray
    length: IntArray

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """Where a backend keeps what it derived from these arrays (device copies); not part of the value."""
        return {}

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
    """Packs ``runs`` of ``buffer`` and starts sending them to ``peer``; the buffer is read until waited for.

    With ``grads`` it sends the gradients of these rows that the last ``Attend`` to ``buffer`` computed.
    """

    transfer: int
    peer: int
    buffer: int
    runs: Runs
    grads: bool = False

    @property
    def rows(self) -> int:
        """Rows that are sent."""
        return self.runs.rows


@dataclass(frozen=True, slots=True, eq=False)
class Receive:
    """Starts receiving ``rows`` rows from ``peer`` into ``buffer[offset : offset + rows]``.

    With ``grads`` these are gradients, and ``buffer`` counts in :attr:`PipelinePlan.landing`.
    """

    transfer: int
    peer: int
    buffer: int
    offset: int
    rows: int
    grads: bool = False


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

    In the backward: adds to the gradients of the queries, and computes those of the buffer's keys and values.

    Attributes:
        buffer: Index of the buffer of keys and values; 0 is the pipeline's own shard.
        table: The segments; rows of ``k_start`` count in the buffer.
        sources: What the buffer holds, from its row 0 on.
    """

    buffer: int
    table: SegmentTable
    sources: tuple[Source, ...]

    @property
    def rows(self) -> int:
        """Rows that the buffer holds."""
        return sum(source.runs.rows for source in self.sources)


@dataclass(frozen=True, slots=True, eq=False)
class Accumulate:
    """Adds rows ``offset .. offset + runs.rows`` of landing buffer ``buffer`` to the gradients of own rows ``runs``."""

    buffer: int
    offset: int
    runs: Runs


Instruction = Send | Receive | Wait | Attend | Accumulate


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
        landing: Rows of each buffer in which gradients of own rows land that others computed; only in the backward.
    """

    pipeline: int
    rows: int
    spans: QuerySpans
    buffers: tuple[int, ...]
    instructions: tuple[Instruction, ...]
    landing: tuple[int, ...] = ()

    def bytes_in_flight(self, heads: Heads) -> int:
        """Most bytes at a time that are packed and not yet known to be sent."""
        flying: dict[int, int] = {}
        most = 0
        for item in self.instructions:
            if isinstance(item, Send):
                flying[item.transfer] = item.rows * heads.row_bytes(item.grads)
                most = max(most, sum(flying.values()))
            elif isinstance(item, Wait):
                flying.pop(item.transfer, None)
        return most

    @property
    def attends(self) -> int:
        """Number of ``Attend`` instructions."""
        return sum(isinstance(item, Attend) for item in self.instructions)

    @property
    def sums_gradients(self) -> bool:
        """Whether gradients of own rows come in several parts, so that they are summed up in float32."""
        return self.attends > 1 or any(isinstance(item, Accumulate) for item in self.instructions)

    def last_reads(self) -> set[int]:
        """After which instructions, by number, nobody needs the gradients of their buffer any more: they may be freed.

        These are the last ``Send`` of what an ``Attend`` computed, and every ``Attend`` whose gradients none sends.
        """
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

    @property
    def scratch_rows(self) -> int:
        """Most rows at a time whose gradients are computed aside: to be sent home, or added to those of own rows."""
        last, held, most, in_place = self.last_reads(), dict[int, int](), 0, True
        for number, item in enumerate(self.instructions):
            if isinstance(item, Attend):
                if item.buffer or not in_place:  # the first gradients of own rows are written where they belong
                    held[item.buffer] = item.rows if item.buffer else self.rows
                    most = max(most, sum(held.values()))
                in_place = in_place and item.buffer != 0
            in_place = in_place and not isinstance(item, Accumulate)
            if number in last and isinstance(item, (Send, Attend)):
                held.pop(item.buffer, None)
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

    @property
    def grad_row_bytes(self) -> int:
        """Bytes of the gradients of one token's keys and values: float32, or float64 for float64 inputs."""
        return 2 * self.num_kv * self.head_dim * max(self.itemsize, 4)

    def row_bytes(self, grads: bool) -> int:
        """Bytes of one row of a transfer."""
        return self.grad_row_bytes if grads else self.kv_row_bytes


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class AttnPlan:
    """What every pipeline of a strategy does in one ``parallel_attn``.

    Attributes:
        layout: Which token lies where.
        method: ``"ring"``, ``"direct"`` or ``"all_gather"``.
        is_causal: Whether the mask is causal.
        heads: Widths of a token's row.
        pipelines: One part a pipeline, in order.
        is_backward: Whether it computes the gradients; see :meth:`backward`.
    """

    layout: Layout
    method: str
    is_causal: bool
    heads: Heads
    pipelines: tuple[PipelinePlan, ...]
    is_backward: bool = False
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def backward(self) -> AttnPlan:
        """The plan of the gradients of the attention that this plan computes; made once.

        Keys and values travel once more, as they do here. Gradients of foreign rows return to their owner, in float32,
        and are added in an order that the plan fixes.

        Raises:
            PlanError: If this plan is a backward itself, or can't be followed to its end.

        Example:
            >>> from hetu.parallel import build_plan
            >>> plan = build_plan(Layout.build([2, 2], [0, 0]), heads=Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2))
            >>> print(plan.backward().summary())
            direct backward, causal: 4 tokens of 1 document on 2 pipelines in 1 group; 10 pairs, largest share 1.40 of
            the mean; 1.5 kB sent
        """
        if "backward" not in self.memo:
            from hetu.parallel.backward import build_backward

            self.memo["backward"] = build_backward(self)
        plan: AttnPlan = self.memo["backward"]
        return plan

    def pairs(self, pipeline: int) -> int:
        """(query, key) pairs that a pipeline computes."""
        part = self.pipelines[pipeline]
        return sum(item.table.pairs(part.spans) for item in part.instructions if isinstance(item, Attend))

    def rows_sent(self, pipeline: int) -> int:
        """Rows of keys and values that a pipeline sends."""
        return self._rows(pipeline, Send, False)

    def rows_received(self, pipeline: int) -> int:
        """Rows of keys and values that a pipeline receives."""
        return self._rows(pipeline, Receive, False)

    def grad_rows_sent(self, pipeline: int) -> int:
        """Rows whose gradients a pipeline sends home; 0 in a forward plan."""
        return self._rows(pipeline, Send, True)

    def grad_rows_received(self, pipeline: int) -> int:
        """Rows whose gradients a pipeline receives from others."""
        return self._rows(pipeline, Receive, True)

    def _rows(self, pipeline: int, kind: type[Send | Receive], grads: bool) -> int:
        items = self.pipelines[pipeline].instructions
        return sum(item.rows for item in items if isinstance(item, kind) and item.grads is grads)

    def bytes_sent(self, pipeline: int) -> int:
        """Bytes of keys and values, and of their gradients, that a pipeline sends."""
        heads = self.heads
        return self.rows_sent(pipeline) * heads.kv_row_bytes + self.grad_rows_sent(pipeline) * heads.grad_row_bytes

    def peak_bytes(self, pipeline: int) -> int:
        """Most bytes that a pipeline holds at a time.

        Its shard, its buffers and the packed rows that are still being sent; its output and lse, and with several
        steps the running output in float32. In the backward also the gradients: of output, queries, keys and values
        in the user's dtype, those that are summed up in float32, those computed of foreign rows, and landing buffers.
        """
        part, heads = self.pipelines[pipeline], self.heads
        width = heads.num_q * heads.head_dim
        moved = sum(part.buffers) * heads.kv_row_bytes + part.bytes_in_flight(heads)
        if not self.is_backward:
            query_bytes = 2 * width * heads.itemsize + 4 * heads.num_q + 4 * width * (part.attends > 1)
            return moved + part.rows * query_bytes
        # q, out, dout, dq; lse and delta; dk and dv. Where several parts are summed up, all but float32 needs a copy.
        row_bytes = 4 * width * heads.itemsize + 2 * 4 * heads.num_q + heads.kv_row_bytes
        if part.sums_gradients and heads.itemsize < 4:
            row_bytes += 4 * width + heads.grad_row_bytes
        aside = (sum(part.landing) + part.scratch_rows) * heads.grad_row_bytes
        return moved + aside + part.rows * row_bytes

    def verify(self, max_bytes: int | None = None) -> None:
        """Proves, without running it, that the plan computes the attention and can be followed.

        Every allowed (query, key) pair is computed exactly once and no other; sends and receives pair up; the
        pipelines can't wait for each other for ever; no buffer is read before its rows have landed or filled while
        it is being sent; no pipeline holds more rows than its group has tokens. In the backward also: every gradient
        of a foreign row comes home, to the very row of its owner, and is added there exactly once.

        Args:
            max_bytes: What a pipeline may take; see :meth:`peak_bytes`.

        Raises:
            PlanError: Saying which pair, which transfer, which buffer or which gradient is wrong.
        """
        from hetu.parallel.verify import verify

        verify(self, max_bytes)

    def cost(self, hardware: Hardware) -> Cost:
        """FLOPs, bytes a link, peak memory and predicted time on given hardware."""
        from hetu.parallel.cost import predict

        return predict(self, hardware)

    def trace(self, hardware: Hardware | None = None) -> dict[str, Any]:
        """The timeline that :meth:`cost` predicts, as a trace for https://ui.perfetto.dev or chrome://tracing.

        A pipeline is a process of the trace, with a lane for what it computes and one for each link; steps are named as
        in ``print(plan)``. An arrow leads from each transfer to the step that needs it.

        Args:
            hardware: What to predict for; an H100 if None.

        Returns:
            A Chrome trace, to be written by ``json.dump``.

        Raises:
            PlanError: If the plan deadlocks.

        Example:
            >>> from hetu.parallel import Hardware, build_plan
            >>> plan = build_plan(Layout.build([4, 2], [0, 0]), heads=Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2))
            >>> slow = Hardware(flops=256e6, link_bytes=128e6, latency=1e-6, memory_bytes=1e9)  # a pair takes 1 µs
            >>> for event in plan.trace(slow)["traceEvents"]:
            ...     if event["ph"] == "X":
            ...         print(event["pid"], event["tid"], event["ts"], event["dur"], event["name"])
            0 3 0.0 9.0 send 4 rows (1 run) of buffer 0 to 1
            0 0 0.0 10.0 attend buffer 0 (rows of 0): 1 segment, 10 pairs
            1 2 0.0 9.0 receive 4 rows from 0 into buffer 1
            1 0 0.0 3.0 attend buffer 0 (rows of 1): 1 segment, 3 pairs
            1 0 3.0 6.0 wait for what comes from 0
            1 0 9.0 8.0 attend buffer 1 (rows of 0): 1 segment, 8 pairs
        """
        from hetu.parallel.trace import predicted_trace

        return predicted_trace(self, hardware)

    def hash(self) -> str:
        """A digest of all that the plan says: equal on every machine for equal plans."""
        digest = hashlib.blake2b(digest_size=16)
        values = (self.layout.digest(), self.method, self.is_causal, self.is_backward, self.heads, self.pipelines)
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
