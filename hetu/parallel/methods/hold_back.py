"""Which of its own rows a pipeline of a backward attends to last, while gradients travel.

In the forward a pipeline attends to its own rows first, for keys and values travel meanwhile. In the backward the
gradients of foreign rows travel home after the last attend to a foreign buffer, and would do so while nobody computes:
on two H200 linked by NVLink that was up to a tenth of forward and backward. So the attend to the own rows is split in
two by keys: one part stays where it was, the other is held back until gradients are on their way. What that brought
is in ``docs/performance.md``.

* By keys, so that each part writes the gradients of its keys and values where they belong, and none are added. Those of
  queries are added up in float32, as they are with foreign keys anyway.
* Held back are the last keys. Under a causal mask these are seen by the fewest queries, so for the same work there are
  most of them: they are many programs of a kernel, each short, which fill a GPU evenly, and fewest queries are in both
  parts. Without a mask it makes no difference.
* Best between documents, where no query is in both parts; or at least between segments, as between the two pieces of a
  document that ``sym`` gives to a pipeline: then queries of only one piece are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable
from hetu.parallel.plan.instructions import Attend
from hetu.parallel.plan.parts import PlanData

FloatArray = NDArray[np.float64]

SHARE = 0.3
"""What to hold back of the pairs of own rows. On two H200, forward and backward over 8,192 tokens of one document took
2,750 µs, of which the backward's own pairs are about a third, and gradients were waited for up to 250 µs. The rest of
the own pairs hides keys and values, which in bfloat16 are half the bytes of their gradients."""

LEAST_SHARE, MOST_SHARE = 0.15, 0.5
"""Between these a share will do, if it can be had without cutting segments."""

MIN_FLOPS = 40e9
"""Own rows of fewer FLOPs are not split: about 80 µs on an H100. A launch more, with the end of its kernel when few
programs are left, costs about 20 µs, and no more than what is held back can be gained."""

MIN_BYTES = 4e6
"""Nor those of a pipeline that sends and gets fewer bytes of gradients: 15 µs between two H200 over NVLink. There a
backward over 8,192 tokens of real documents, of which 436 rows return, took 30 µs longer with rows held back; over
32,768 tokens and with 6,546 rows, it took 110 µs less."""

GRAIN = 128
"""Segments are cut at multiples of so many rows, blocks of keys, where a shard has enough of them."""


@dataclass(frozen=True, slots=True, eq=False)
class HeldBack:
    """An attend to own rows, split in two.

    Attributes:
        number: Which instruction of the pipeline's it was.
        first: The part that stays there.
        last: The part that is held back.
    """

    number: int
    first: Attend
    last: Attend


def hold_back(plan: PlanData, pipeline: int, returned: int) -> HeldBack | None:
    """What a pipeline of a forward plan holds back in the backward; None if it shouldn't hold back anything.

    Args:
        plan: The forward plan.
        pipeline: The pipeline.
        returned: Bytes of gradients that it sends and gets.
    """
    part = plan.pipelines[pipeline]
    own = [n for n, item in enumerate(part.instructions) if isinstance(item, Attend) and item.buffer == 0]
    item = part.instructions[own[0]] if len(own) == 1 else None
    if not isinstance(item, Attend):
        return None
    flops = 10 * plan.heads.head_dim * plan.heads.num_q * item.table.pairs(part.spans)  # see Cost.flops
    if flops < MIN_FLOPS or returned < MIN_BYTES:
        return None
    # Where no query is in several steps so far, float32 sums of their gradients would take memory that is saved so far.
    row = find_cut(item.table, part.spans, part.rows, may_share=part.runs_on)
    if row is None:
        return None
    first, last = (replace(item, table=table) for table in split_keys(item.table, row))
    return HeldBack(own[0], first, last)


def split_keys(table: SegmentTable, row: int) -> tuple[SegmentTable, SegmentTable]:
    """Splits a table in two: which keys before a row queries see, and which of the others.

    Example:
        >>> triangle = SegmentTable(*(np.array([x]) for x in (0, 0, 4, 0)))  # row i of 4 sees keys 0 .. i
        >>> for half in split_keys(triangle, 3):
        ...     print(half.k_start, half.k_len, half.diagonal)
        [0] [3] [0]
        [3] [1] [-3]
    """
    offset = np.clip(row - table.k_start, 0, table.k_len)  # how many keys of each segment lie before the row
    before, after = (offset > 0).nonzero()[0], (offset < table.k_len).nonzero()[0]
    lower, cut = table.lower, offset[after]
    first = SegmentTable(
        table.query[before],
        table.k_start[before],
        offset[before],
        table.diagonal[before],
        None if lower is None else lower[before],
    )
    last = SegmentTable(
        table.query[after],
        table.k_start[after] + cut,
        table.k_len[after] - cut,
        table.diagonal[after] - cut,
        None if lower is None else lower[after] - cut,
    )
    return first, last


def find_cut(table: SegmentTable, spans: QuerySpans, rows: int, may_share: bool = True) -> int | None:
    """The row from which on keys are held back.

    Args:
        table: Segments over the own shard; with a pair.
        spans: The queries.
        rows: Rows of the shard.
        may_share: Whether both parts may name a query span.

    Returns:
        A row between segments if there is one with a share that will do, else a row within some; None if there is none.
    """
    row = _between_segments(table, spans, may_share)
    if row is None and may_share:
        row = _within_segments(table, spans, rows)
    return row


def _between_segments(table: SegmentTable, spans: QuerySpans, may_share: bool) -> int | None:
    order = table.k_start.argsort(kind="stable")
    start, stop = table.k_start[order], np.maximum.accumulate((table.k_start + table.k_len)[order])
    pairs = table.segment_pairs(spans)[order].cumsum()
    share = 1 - pairs[:-1] / pairs[-1]
    row = start[1:]
    good = ((row >= stop[:-1]) & (share >= LEAST_SHARE) & (share <= MOST_SHARE)).nonzero()[0]
    if len(good) == 0:
        return None
    row, share = row[good], share[good]
    shared = _shared_queries(table, spans, row)
    best = _best(share, shared)
    return int(row[best]) if may_share or shared[best] == 0 else None


def _shared_queries(table: SegmentTable, spans: QuerySpans, row: IntArray) -> IntArray:
    """Rows of the query spans that have keys before a row and others: for each of some rows."""
    bounds = np.append(True, table.query[1:] != table.query[:-1]).nonzero()[0]
    length = spans.length[table.query[bounds]]
    begins = _rows_up_to(np.minimum.reduceat(table.k_start, bounds), length, row - 1)
    return begins - _rows_up_to(np.maximum.reduceat(table.k_start + table.k_len, bounds), length, row)


def _rows_up_to(place: IntArray, length: IntArray, row: IntArray) -> IntArray:
    """The sum of the lengths whose place is at most a row: for each of some rows."""
    order = place.argsort()
    total: IntArray = np.append(0, length[order].cumsum())[place[order].searchsorted(row, "right")]
    return total


def _within_segments(table: SegmentTable, spans: QuerySpans, rows: int) -> int | None:
    grain = GRAIN if rows >= 16 * GRAIN else 1
    low, high = 0, rows  # more than is wanted is behind low, and not behind high
    for _ in range(2):  # to a 64th of the rows
        row = np.append(low + (high - low) * np.arange(8) // 8 // grain * grain, high)
        last = int((_share_from(table, spans, row) > SHARE).nonzero()[0][-1])
        low, high = int(row[last]), int(row[last + 1])
    # Where a segment begins or ends near it some queries may be in one part only.
    ends = np.unique(np.concatenate([table.k_start, table.k_start + table.k_len]))
    near = ends.searchsorted(high)
    row = np.array([low, high, *ends[max(near - 1, 0) : near + 1]])
    share = _share_from(table, spans, row)
    good = ((share >= LEAST_SHARE) & (share <= MOST_SHARE)).nonzero()[0]
    if len(good) == 0:
        return None
    row, share = row[good], share[good]
    return int(row[_best(share, _shared_queries(table, spans, row))])


def _share_from(table: SegmentTable, spans: QuerySpans, row: IntArray) -> FloatArray:
    """The share of the pairs whose keys lie from a row on: for each of some rows. It never grows with the row."""
    times, size = len(row), len(table)
    query, k_start, k_len, diagonal = (
        np.tile(x, times) for x in (table.query, table.k_start, table.k_len, table.diagonal)
    )
    cut = np.clip(row.repeat(size) - k_start, 0, k_len)
    lower = None if table.lower is None else np.tile(table.lower, times) - cut
    left = SegmentTable(query, k_start, k_len - cut, diagonal - cut, lower)
    pairs = left.segment_pairs(spans).reshape(times, size).sum(1)
    share: FloatArray = pairs / table.pairs(spans)
    return share


def _best(share: FloatArray, shared: IntArray) -> int:
    """Which row is best: with the fewest queries in both parts, then with the share that is next to what is wanted."""
    return int(np.lexsort((abs(share - SHARE), shared))[0])
