"""The work lists of the attention kernels: one record of 16 integers a program, made of segment tables.

The first rows of a list are its *items*, one for each block of rows, in the order in which the GPU starts them. An item
holds all that its program has to know, its first segment included, so that the program reads a single row before it
loads data. An item with several segments continues in rows after all items.

Items of one document stand together, so that programs that run at the same time find the document's keys in the
cache; documents with most keys come first, and in each the blocks with most, so that what is left at the end is short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetu.parallel.segments import IntArray, QuerySpans, SegmentTable, Turn

Int32Array = NDArray[np.int32]

WIDTH = 16

_SPAN_FIELDS = ("document", "position", "step", "slot", "slot_row")

QUERY_FIELDS = (
    "row", "rows", *_SPAN_FIELDS, "column",
    "k_start", "k_len", "reach", "", "", "more_begin", "more_end", "role",
)  # fmt: skip
"""A block of query rows: its first row of q and how many it has, fields of its span as of its first row (``position``,
``slot_row``), then a segment: its first key, how many, and the last key that the block's first row sees (the next row
sees one more). ``more_begin .. more_end`` are the rows with further segments, of which only the segment counts."""

KEY_FIELDS = (
    "k_row", "rows", "start", "length", *_SPAN_FIELDS,
    "first", "last_key", "diagonal", "", "more_begin", "more_end", "role",
)  # fmt: skip
"""A block of keys: its first row of k and how many it has, then a segment that names it: the query span that sees it,
the place of the block's first row among the segment's keys (negative where the segment begins later), its last key, and
its diagonal."""

QUERIES, KEYS, KEYS_ONLY, VALUES_ONLY = 0, 1, 2, 3
"""Roles of programs: for queries (in the forward all are); in the backward also for gradients of keys and values; of
keys alone; of values alone."""

MERGES, CONTINUES = 4, 8
"""Added to the role of a program for queries: whether there is a running result to add to, and whether what it computes
is one; see :class:`hetu.parallel.segments.Turn`."""

_MORE = slice(QUERY_FIELDS.index("more_begin"), QUERY_FIELDS.index("more_end") + 1)
_ROLE = QUERY_FIELDS.index("role")
assert len(QUERY_FIELDS) == len(KEY_FIELDS) == WIDTH
assert KEY_FIELDS.index("more_begin") == _MORE.start and KEY_FIELDS.index("role") == _ROLE


@dataclass(frozen=True, slots=True)
class WorkList:
    """Records of work.

    Attributes:
        items: int32 ``(items, 16)``; ``more_begin`` and ``more_end`` count rows of ``further``.
        further: int32 ``(rows, 16)``, the segments of items after their first.
        documents: ``(items,)``, the rank of each item's document.
    """

    items: Int32Array
    further: Int32Array
    documents: IntArray

    @property
    def has_more(self) -> bool:
        """Whether an item has several segments."""
        return len(self.further) > 0

    def records(self) -> Int32Array:
        """What kernels read: the items, then the further rows and one that is read as the last one's next."""
        if len(self.further) == 0:
            return self.items
        items = self.items.copy()
        items[:, _MORE] += len(items)
        return np.concatenate([items, self.further, np.zeros((1, WIDTH), np.int32)])

    def with_roles(self, *roles: int) -> WorkList:
        """The list with as many programs an item as there are roles."""
        items = np.repeat(self.items, len(roles), axis=0)
        items[:, _ROLE] = np.tile(roles, len(self.items))
        return WorkList(items, self.further, np.repeat(self.documents, len(roles)))

    def joined(self, other: WorkList) -> WorkList:
        """Both lists as one: of each document this one's items, then the other's."""
        moved = other.items.copy()
        moved[:, _MORE] += len(self.further)
        documents = np.concatenate([self.documents, other.documents])
        order = np.argsort(documents, kind="stable")
        further = np.concatenate([self.further, other.further])
        return WorkList(np.concatenate([self.items, moved])[order], further, documents[order])


def query_work(spans: QuerySpans, table: SegmentTable, tokens: int, turn: Turn | None = None) -> WorkList:
    """Cuts query spans into blocks of rows.

    Args:
        spans: The query rows.
        table: What they see.
        tokens: Rows of a block.
        turn: Of the step, if it is one of several; blocks that see nothing are listed where it covers all rows.

    Example:
        >>> from hetu.parallel.segments import varlen_tables
        >>> cu_seqlens = np.array([0, 5, 12])
        >>> work = query_work(*varlen_tables(cu_seqlens, cu_seqlens, 12, is_causal=True), tokens=4)
        >>> [dict(zip(("row", "rows"), record[:2].tolist())) for record in work.items]
        [{'row': 9, 'rows': 3}, {'row': 5, 'rows': 4}, {'row': 4, 'rows': 1}, {'row': 0, 'rows': 4}]
    """
    ranks, keys = document_ranks(spans, table)
    order = np.lexsort((-keys, ranks))
    blocks = -(-spans.length[order] // tokens)
    span = order.repeat(blocks)
    offset = (blocks.cumsum().repeat(blocks) - 1 - np.arange(len(span))) * tokens  # the last block first
    # One entry a (block, segment) from here on, of those where the block's last row sees a key.
    item, segment = _segments_of(span, table, len(spans))
    last_row = np.minimum(offset + tokens, spans.length[span]) - 1
    sees = last_row[item] + table.diagonal[segment] >= 0
    item, segment = item[sees], segment[sees]
    role: Any = QUERIES
    if turn is not None:
        is_kept = turn.covers[span]
        is_kept[item] = True
        item = (is_kept.cumsum() - 1)[item]
        span, offset = span[is_kept], offset[is_kept]
        role = QUERIES + MERGES * turn.merges[span] + CONTINUES * turn.continues[span]
    head = {
        "row": spans.start[span] + offset,
        "rows": np.minimum(spans.length[span] - offset, tokens),
        "document": spans.document[span],
        "position": spans.position[span] + offset * spans.step[span],
        "step": spans.step[span],
        "slot": spans.slot[span],
        "slot_row": spans.slot_row[span] + offset,
        "column": spans.column[span],
        "role": role,
    }
    tail = {
        "k_start": table.k_start[segment],
        "k_len": table.k_len[segment],
        "reach": offset[item] + table.diagonal[segment],
    }
    return _work_list(QUERY_FIELDS, head, item, tail, ranks[span])


def key_work(spans: QuerySpans, table: SegmentTable, block_n: int) -> WorkList:
    """Cuts the keys that segments name into blocks. The blocks are disjoint.

    Args:
        spans: The query rows.
        table: What they see.
        block_n: Keys of a block.

    Example:
        >>> from hetu.parallel.segments import varlen_tables
        >>> cu_seqlens = np.array([0, 5, 12])
        >>> work = key_work(*varlen_tables(cu_seqlens, cu_seqlens, 12, is_causal=True), block_n=4)
        >>> [dict(zip(("k_row", "rows"), record[:2].tolist())) for record in work.items]
        [{'k_row': 5, 'rows': 4}, {'k_row': 9, 'rows': 3}, {'k_row': 0, 'rows': 4}, {'k_row': 4, 'rows': 1}]
    """
    k_row, rows, block, segment = _key_blocks(table, block_n)
    ranks, _ = document_ranks(spans, table)
    query = table.query[segment]
    hidden = np.maximum(k_row[block] - table.k_start[segment], 0) - table.diagonal[segment]
    weight = np.bincount(block, np.maximum(spans.length[query] - np.maximum(hidden, 0), 0), minlength=len(k_row))
    rank = ranks[query[np.searchsorted(block, np.arange(len(k_row)))]]
    order = np.lexsort((-weight, rank))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    by_item = np.argsort(place[block], kind="stable")
    item, segment, query = place[block][by_item], segment[by_item], query[by_item]
    k_row, rows, rank = k_row[order], rows[order], rank[order]
    tail = {name: getattr(spans, name)[query] for name in ("start", "length", *_SPAN_FIELDS)}
    tail |= {
        "first": k_row[item] - table.k_start[segment],
        "last_key": table.k_len[segment] - 1,
        "diagonal": table.diagonal[segment],
    }
    head = {"k_row": k_row, "rows": rows, "role": KEYS}
    return _work_list(KEY_FIELDS, head, item, tail, rank)


def document_ranks(spans: QuerySpans, table: SegmentTable) -> tuple[IntArray, IntArray]:
    """For each query span the rank of its document by the keys that its rows see, most first, and the span's own keys.

    Spans that see nothing come last.
    """
    keys = np.bincount(table.query, table.k_len, minlength=len(spans))
    document = spans.document + 1  # the tail's is -1
    most = np.zeros(document.max(initial=0) + 1)
    np.maximum.at(most, document, keys)
    rank = np.empty(len(most), np.int64)
    rank[(-most).argsort(kind="stable")] = np.arange(len(most))
    return rank[document], keys


def _segments_of(span: IntArray, table: SegmentTable, spans: int) -> tuple[IntArray, IntArray]:
    """For blocks of query spans all (block, segment) pairs, ordered by block."""
    if (table.query[1:] > table.query[:-1]).all():  # a segment a span, as plain attention has: half the work
        of_span = np.full(spans, -1)
        of_span[table.query] = np.arange(len(table))
        segment = of_span[span]
        item = (segment >= 0).nonzero()[0]
        return item, segment[item]
    bounds = np.searchsorted(table.query, np.arange(spans + 1))
    count = (bounds[1:] - bounds[:-1])[span]
    item = np.arange(len(span)).repeat(count)
    return item, np.arange(len(item)) + (bounds[span] - (count.cumsum() - count)).repeat(count)


def _key_blocks(table: SegmentTable, block_n: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Blocks of keys (first row, rows), and ordered by block the (block, segment) pairs that intersect."""
    if len(table) == 0:
        return (np.empty(0, np.int64),) * 4
    # Regions: unions of segments whose keys overlap, so that blocks begin where documents do.
    order = np.argsort(table.k_start, kind="stable")
    starts, ends = table.k_start[order], np.maximum.accumulate((table.k_start + table.k_len)[order])
    opens = np.concatenate([[True], starts[1:] >= ends[:-1]])
    region_of = np.empty(len(table), np.int64)
    region_of[order] = opens.cumsum() - 1
    begin = starts[opens]
    end = ends[np.concatenate([np.flatnonzero(opens)[1:] - 1, [len(ends) - 1]])]
    blocks = -(-(end - begin) // block_n)
    first_block = blocks.cumsum() - blocks
    region = np.repeat(np.arange(len(begin)), blocks)
    k_row = begin[region] + (np.arange(len(region)) - first_block[region]) * block_n
    rows = np.minimum(end[region] - k_row, block_n)

    low = (table.k_start - begin[region_of]) // block_n
    high = (table.k_start + table.k_len - 1 - begin[region_of]) // block_n
    count = high - low + 1
    segment = np.repeat(np.arange(len(table)), count)
    block = first_block[region_of][segment] + low[segment]
    block += np.arange(len(segment)) - np.repeat(count.cumsum() - count, count)
    by_block = np.argsort(block, kind="stable")
    return k_row, rows, block[by_block], segment[by_block]


def _work_list(
    fields: tuple[str, ...], head: dict[str, Any], item: IntArray, tail: dict[str, IntArray], documents: IntArray
) -> WorkList:
    """Records of ``head``, one an item, and ``tail``, one a segment; ``item``, sorted, says whose each segment is."""
    items = np.zeros((len(documents), WIDTH), np.int32)
    for name, values in head.items():
        items[:, fields.index(name)] = values
    is_own = np.ones(len(item), bool)  # the first segment of its item
    is_own[1:] = item[1:] != item[:-1]
    further = np.zeros((len(item) - int(is_own.sum()), WIDTH), np.int32)
    if len(further) == 0:
        for name, values in tail.items():
            items[item, fields.index(name)] = values
        return WorkList(items, further, documents)
    for name, values in tail.items():
        items[item[is_own], fields.index(name)] = values[is_own]
        further[:, fields.index(name)] = values[~is_own]
    count = np.bincount(item[~is_own], minlength=len(items))
    items[:, _MORE] = np.stack([count.cumsum() - count, count.cumsum()], axis=1)
    return WorkList(items, further, documents)
