"""What attends to what, as rows of integers: the only description of a mask that kernels see.

A *query span* is a run of consecutive local rows whose tokens are evenly spaced in one document.
A *segment* lets the rows of one query span see a run of consecutive key rows of a buffer up to a
diagonal. Plain varlen attention is the table with one segment per sequence; a ring step, an
all-gathered buffer or a layout that somebody invents tomorrow are other tables.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(slots=True, eq=False, weakref_slot=True)  # not frozen: making a frozen one takes three times as long
class QuerySpans:
    """The query rows of one call, cut into runs. Struct of arrays, one entry per span.

    The spans are disjoint, ordered by ``start``, none is empty, and together they cover every row of
    q: rows that attend to nothing (the tail past ``cu_seqlens[-1]``) are spans of document -1.

    Attributes:
        start: First local row of q.
        length: Rows.
        document: The document's (sequence's) number in its group, the ``b`` of dropout; -1 for the tail.
        position: Position in its document of the first row, the ``i`` of dropout.
        step: Distance in positions between neighbouring rows.
        slot: First index of ``softmax_lse`` and ``p`` for these rows; -1 where they have none (mostly the tail).
        slot_row: Last index of ``softmax_lse``, third of ``p``, of the first row; neighbours follow at distance 1.
        column: Column of ``p`` of the document's position 0.
        lse_rows: ``rows_with_lse``, once it is known. Not part of the value, like what follows.
        records: int32 ``(spans, 16)``, what work lists say of each span; made by ``hetu/backends/attention/work.py``.
        copies: What backends copied to devices; see :class:`hetu.backends.memory.DeviceCopies`.

    Example:
        >>> from hetu.parallel import Layout
        >>> spans = Layout.build([2, 2], [0, 0], split="sym").query_spans(0)
        >>> spans.start.tolist(), spans.length.tolist(), spans.position.tolist()
        ([0, 1], [1, 1], [0, 3])
    """

    start: IntArray
    length: IntArray
    document: IntArray
    position: IntArray
    step: IntArray
    slot: IntArray
    slot_row: IntArray
    column: IntArray
    lse_rows: int | None = field(default=None, repr=False)
    records: NDArray[np.int32] | None = field(default=None, repr=False)
    copies: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.start)

    @property
    def rows_with_lse(self) -> int:
        """How many rows of q have a place in ``softmax_lse``."""
        if self.lse_rows is None:
            self.lse_rows = int(self.length[self.slot >= 0].sum())
        return self.lse_rows


@dataclass(slots=True)
class Ranking:
    """The order in which query spans are computed by a table: the forward and the backward ask for it.

    Documents with most keys come first, by the keys that their rows see, and in each the spans with most. Spans that
    see nothing come last.

    Attributes:
        spans: The spans that are ranked.
        order: Their indices.
        ranks: In this order, the rank of each one's document.
        has_each_once: Whether each has one segment, as in plain attention.
    """

    spans: QuerySpans
    order: IntArray
    ranks: IntArray
    has_each_once: bool


@dataclass(slots=True, eq=False, weakref_slot=True)  # not frozen, like QuerySpans
class SegmentTable:
    """Segments of one attend step over one key buffer, ordered by ``query``.

    Row ``i`` of query span ``query`` (``0 <= i < length``) may see row ``j`` of the segment's keys
    (``0 <= j < k_len``) where ``i + lower <= j <= i + diagonal``. ``diagonal >= k_len - 1`` bounds nothing;
    a negative diagonal hides all keys from the first ``-diagonal`` rows. ``lower <= 1 - length`` bounds nothing
    either. Normal form: ``k_len`` is positive, every key is seen by a row (``k_len <= length + diagonal``,
    ``lower <= 0`` and ``lower <= diagonal``), and without a lower bound every key by the span's last row. A query
    span may have any number of segments; the keys they let a row see are disjoint.

    Attributes:
        query: Index into the pipeline's ``QuerySpans``; never decreases.
        k_start: First row of the keys in the buffer.
        k_len: Key rows.
        diagonal: See above.
        lower: See above; ``1 - length`` where it bounds nothing, and None if that is so in all segments: then kernels
            look at the upper diagonal only.
        plain_over: The spans over which this is known to be plain, see :meth:`is_plain_over`; None if there are none.
            Not part of the value, like what follows.
        order: The segments by falling ``k_len``, once somebody asked for it; of plain tables only.
        ranking: How spans were ranked by this table last; see :class:`Ranking`.
        keys_per_row: Keys that a row sees on average, once it is known.
        named_rows: How many rows of the buffer segments name, once it is known.
        key_position: int32 ``(rows of the buffer,)``, the position in its document of each key, as a step that
            attends by this table last asked for it.
        copies: What backends copied to devices; see :class:`hetu.backends.memory.DeviceCopies`.

    Example:
        >>> from hetu.parallel import Heads, Layout, build_plan
        >>> plan = build_plan(Layout.build([2, 2], [0, 0]), heads=Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2))
        >>> first, second = (item.table for item in plan.pipelines[1].instructions if hasattr(item, "table"))
        >>> first.diagonal.tolist(), second.diagonal.tolist()  # own keys are causal, all of the other's are seen
        ([0], [1])
    """

    query: IntArray
    k_start: IntArray
    k_len: IntArray
    diagonal: IntArray
    lower: IntArray | None = None
    plain_over: QuerySpans | None = field(default=None, repr=False)
    order: IntArray | None = field(default=None, repr=False)
    ranking: Ranking | None = field(default=None, repr=False)
    keys_per_row: float | None = field(default=None, repr=False)
    named_rows: int | None = field(default=None, repr=False)
    key_position: NDArray[np.int32] | None = field(default=None, repr=False)
    copies: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.query)

    def lower_over(self, spans: QuerySpans) -> IntArray:
        """``(segments,)`` the lower diagonals, those that bound nothing too."""
        return 1 - spans.length[self.query] if self.lower is None else self.lower

    def pairs(self, spans: QuerySpans) -> int:
        """Allowed (query, key) pairs of all segments together."""
        if self.is_plain_over(spans):  # row i of n sees i + diagonal + 1 keys, and the last one all
            return int(spans.length.dot(self.k_len + self.diagonal + 1)) // 2
        return int(self.segment_pairs(spans).sum())

    @property
    def is_plain(self) -> bool:
        """Whether this is known to be plain over the spans that it was made for; see :meth:`is_plain_over`."""
        return self.plain_over is not None

    def is_plain_over(self, spans: QuerySpans) -> bool:
        """Whether this is known to be the simplest of tables over these spans, by far the most common one.

        Span i is a whole document, the i-th one in order of rows and of numbers, from position 0 in steps of 1, and
        segment i is its only one: of keys that no other segment names, of which its first row sees one at least and
        its last row all; between, each row sees one more than the row before, or each sees all. It has no lower bound.
        """
        return self.plain_over is spans

    def segment_pairs(self, spans: QuerySpans) -> IntArray:
        """Allowed (query, key) pairs of each segment."""
        twice = _twice_up_to(spans.length[self.query] + self.diagonal, self.k_len)
        if len(self) and self.diagonal.item(self.diagonal.argmax()) > 0:
            twice -= _twice_up_to(self.diagonal, self.k_len)
        if self.lower is not None:  # the keys before the lower diagonal
            twice -= _twice_up_to(spans.length[self.query] + self.lower - 1, self.k_len)
        return twice // 2

    def stretches(self) -> tuple[IntArray, IntArray]:
        """Begins and ends of the stretches of key rows that segments name; see :func:`unite`."""
        return unite(self.k_start, self.k_start + self.k_len)


def _twice_up_to(end: IntArray, k_len: IntArray) -> IntArray:
    """Twice the sum of ``clip(x, 0, k_len)`` over all x up to ``end``: a triangle, and past it a rectangle.

    Row i of a segment sees ``clip(i + diagonal + 1, 0, k_len)`` keys. Their sum over the rows is the sum up to the last
    row less that up to the row before the first, which is 0 where no diagonal is positive.
    """
    side = np.clip(end, 0, k_len)
    return side * (end + end - side + 1)


def count_up(counts: IntArray) -> IntArray:
    """0, 1, 2, ... for each count, one after the other.

    Example:
        >>> count_up(np.array([2, 0, 3])).tolist()
        [0, 1, 0, 1, 2]
    """
    return np.arange(int(counts.sum())) - (counts.cumsum() - counts).repeat(counts)


def least(values: NDArray[Any]) -> int:
    """The smallest of some integers, 0 if there are none: a third of the time of ``min``, which new lengths wait for.

    Example:
        >>> least(np.array([3, 1, 2]))
        1
    """
    return int(values.item(values.argmin())) if len(values) else 0


def unite(start: IntArray, stop: IntArray) -> tuple[IntArray, IntArray]:
    """Begins and ends of the stretches that intervals cover, in order; those that overlap or touch are one stretch.

    Example:
        >>> start, stop = unite(np.array([7, 0, 2]), np.array([9, 3, 5]))
        >>> start.tolist(), stop.tolist()
        ([0, 7], [5, 9])
    """
    order = start.argsort(kind="stable")
    start, stop = start.take(order), np.maximum.accumulate(stop.take(order))
    is_first = np.ones(len(start), bool)
    np.greater(start[1:], stop[:-1], out=is_first[1:])
    first = is_first.nonzero()[0]
    return start.take(first), stop.take(np.append(first, len(start))[1:] - 1)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Turn:
    """What a step that is one of several finds and leaves, by query span: each span has a first and a last step.

    These are the first and the last one whose table names it; if none does, both are the very first one. So a span
    that is done early is written at once, and none but those that several steps attend for pass through float32.

    Attributes:
        merges: Whether an earlier step attended for the span, so that this one adds to what that left.
        continues: Whether a later step attends for it, so that this one leaves a running result.
        attends: Whether the step attends for the span; if not, the others mean nothing.
        covers: Whether every row of the span has to be written, also where it sees no key in this step: in the
            span's first step, which begins the running result, and in its last one, which ends it.
        copies: What backends copied to devices for this turn and its table; see
            :class:`hetu.backends.memory.DeviceCopies`. Not part of the value.
    """

    merges: NDArray[np.bool_]
    continues: NDArray[np.bool_]
    attends: NDArray[np.bool_]
    covers: NDArray[np.bool_]
    copies: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def runs_on(self) -> bool:
        """Whether there are running results, of earlier steps or for later ones."""
        return bool((self.attends & (self.merges | self.continues)).any())


def take_turns(spans: QuerySpans, tables: Sequence[SegmentTable]) -> list[Turn | None]:
    """The turns of steps that follow each other; None stands for that of a single step, which does it all.

    Example:
        >>> first, two = np.array([0, 2]), np.array([2, 2])
        >>> spans = QuerySpans(first, two, *np.zeros((6, 2), np.int64))
        >>> of_both, of_second = (SegmentTable(np.array(q), *[np.zeros(len(q), np.int64)] * 3) for q in ([0, 1], [1]))
        >>> first, second = take_turns(spans, [of_both, of_second])
        >>> first.continues.tolist(), first.covers.tolist(), second.covers.tolist()
        ([False, True], [True, True], [False, True])
    """
    if len(tables) < 2:
        return [None] * len(tables)
    named = np.zeros((len(tables), len(spans)), bool)
    for number, table in enumerate(tables):
        named[number, table.query] = True
    named[0] |= ~named.any(0)
    first, last = named.argmax(0), len(tables) - 1 - named[::-1].argmax(0)
    steps = np.arange(len(tables))[:, None]
    merges, continues = steps > first, steps < last
    return [Turn(m, c, n, n & ~(m & c)) for n, m, c in zip(named, merges, continues, strict=True)]
