"""Makes the work lists of the attention kernels from segment tables: a record per program; see ``records.py``.

Items of one document stand together, so that programs that run at the same time find the document's keys in the
cache; documents with most keys come first, and in each the blocks with most, so that what is left at the end is short.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetu.backends.attention.records import (
    CONTINUES,
    KEY_FIELDS,
    KEYS,
    MERGES,
    MORE,
    NO_FURTHER,
    QUERIES,
    QUERY_FIELDS,
    ROLE,
    WIDTH,
    Int32Array,
    WorkList,
)
from hetu.parallel.mask.segments import IntArray, QuerySpans, Ranking, SegmentTable, Turn, least

# Places in a record, looked up once: a new set of lengths waits for every microsecond spent here.
_ROW, _ROWS, _POSITION, _STEP, _SLOT_ROW = (
    QUERY_FIELDS.index(name) for name in ("row", "rows", "position", "step", "slot_row")
)
_K_START, _K_LEN, _REACH, _LOW = (QUERY_FIELDS.index(name) for name in ("k_start", "k_len", "reach", "low"))
_LENGTH, _FIRST, _LAST_KEY, _DIAGONAL, _LOWER = (
    KEY_FIELDS.index(name) for name in ("length", "first", "last_key", "diagonal", "lower")
)
_KEY_SPAN = slice(KEY_FIELDS.index("start"), KEY_FIELDS.index("slot_row") + 1)

_ALL = slice(None)
"""Stands for the indices 0, 1, 2, ... where each item has one segment: indexing with it gives a view."""

Item = IntArray | slice
Tail = tuple[int | slice, NDArray[Any]]
"""A column of the records, or several, and its values, one per segment."""


def query_work(spans: QuerySpans, table: SegmentTable, tokens: int, turn: Turn | None = None) -> WorkList:
    """Cuts query spans into blocks of rows.

    Args:
        spans: The query rows.
        table: What they see.
        tokens: Rows of a block.
        turn: Of the step, if it is one of several; blocks that see nothing are listed where it covers all rows.

    Example:
        >>> from hetu.parallel import Mask
        >>> from hetu.parallel.mask.varlen import varlen_tables
        >>> cu_seqlens = np.array([0, 5, 12])
        >>> work = query_work(*varlen_tables(cu_seqlens, cu_seqlens, 12, Mask.causal()), tokens=4)
        >>> [dict(zip(("row", "rows"), record[:2].tolist())) for record in work.items]
        [{'row': 9, 'rows': 3}, {'row': 5, 'rows': 4}, {'row': 4, 'rows': 1}, {'row': 0, 'rows': 4}]
    """
    if turn is None and table.is_plain_over(spans):
        fields = (*_fields_of(spans), table.k_start, table.k_len, table.diagonal)
        return _plain_work(fields, spans.column, spans.length, table, tokens, _QUERY_MOVES)
    ranking = _ranking(spans, table)
    order = ranking.order
    blocks = (spans.length[order] + (tokens - 1)) // tokens
    span = order.repeat(blocks)
    last = np.add.accumulate(blocks) - 1
    offset = (last.repeat(blocks) - np.arange(len(span))) * tokens  # the last block first
    documents = ranking.ranks.repeat(blocks)
    # One entry a (block, segment), of those where a row of the block sees a key: in plain attention of all.
    has_all = ranking.has_each_once and least(table.diagonal) >= 0 and table.lower is None
    item, segment = (_ALL, span) if has_all else _segments_of(span, offset, tokens, spans, table)
    role: IntArray | None = None
    if turn is not None:
        if not has_all:
            is_kept = turn.covers[span]
            is_kept[item] = True
            item = (is_kept.cumsum() - 1)[item]
            span, offset, documents = span[is_kept], offset[is_kept], documents[is_kept]
        role = QUERIES + MERGES * turn.merges[span] + CONTINUES * turn.continues[span]
    items = _parts_of(spans, span, offset, tokens)
    if role is not None:  # else QUERIES, which is 0
        items[:, ROLE] = role
    k_start, k_len, reach = table.k_start[segment], table.k_len[segment], offset[item] + table.diagonal[segment]
    tail: list[Tail] = [(_K_START, k_start), (_K_LEN, k_len), (_REACH, reach)]
    if table.lower is not None:  # the keys that no row of the block sees are cut off
        low = offset[item] + table.lower[segment]
        hidden = np.maximum(low, 0)
        tail = [(_K_START, k_start + hidden), (_K_LEN, k_len - hidden), (_REACH, reach - hidden), (_LOW, low - hidden)]
    return _work_list(items, item, tail, documents)


def key_work(spans: QuerySpans, table: SegmentTable, block_n: int) -> WorkList:
    """Cuts the keys that segments name into blocks. The blocks are disjoint.

    Args:
        spans: The query rows.
        table: What they see.
        block_n: Keys of a block.

    Example:
        >>> from hetu.parallel import Mask
        >>> from hetu.parallel.mask.varlen import varlen_tables
        >>> cu_seqlens = np.array([0, 5, 12])
        >>> work = key_work(*varlen_tables(cu_seqlens, cu_seqlens, 12, Mask.causal()), block_n=4)
        >>> [dict(zip(("k_row", "rows"), record[:2].tolist())) for record in work.items]
        [{'k_row': 5, 'rows': 4}, {'k_row': 9, 'rows': 3}, {'k_row': 0, 'rows': 4}, {'k_row': 4, 'rows': 1}]
    """
    if table.is_plain_over(spans):
        nothing, k_start, k_len = spans.column, table.k_start, table.k_len
        fields = (k_start, k_len, *_fields_of(spans)[:-1], nothing, k_len - 1, table.diagonal)
        work = _plain_work(fields, nothing, k_len, table, block_n, _KEY_MOVES)
        work.items[:, ROLE] = KEYS
        return work
    k_row, rows, item, segment = _key_blocks(table, block_n)
    ranking, ranks = _ranking(spans, table), np.empty(len(spans), np.int64)
    ranks[ranking.order] = ranking.ranks
    query = table.query[segment]
    hidden = np.maximum(k_row[item] - table.k_start[segment], 0) - table.diagonal[segment]
    length = spans.length[query]
    if table.lower is not None:
        length = _rows_that_see((k_row + rows)[item], length, segment, table)
    weight = np.maximum(length - np.maximum(hidden, 0), 0)
    if isinstance(item, slice):  # a segment per block
        rank = ranks[query]
        order = np.lexsort((-weight, rank))
        segment, query = segment[order], query[order]
    else:
        weight = np.bincount(item, weight, minlength=len(k_row))
        rank = ranks[query[np.searchsorted(item, np.arange(len(k_row)))]]
        order = np.lexsort((-weight, rank))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        moved = place[item]
        by_item = moved.argsort(kind="stable")
        item, segment, query = moved[by_item], segment[by_item], query[by_item]
    k_row, rows = k_row[order], rows[order]
    items = np.zeros((len(order), WIDTH), np.int32)
    items[:, _ROW], items[:, _ROWS], items[:, ROLE] = k_row, rows, KEYS
    tail: list[Tail] = [
        (_KEY_SPAN, _span_records(spans).take(query, axis=0)[:, : _SLOT_ROW + 1]),
        (_FIRST, k_row[item] - table.k_start[segment]),
        (_LAST_KEY, table.k_len[segment] - 1),
        (_DIAGONAL, table.diagonal[segment]),
    ]
    if table.lower is not None:
        length = _rows_that_see((k_row + rows)[item], spans.length[query], segment, table)
        tail += [(_LENGTH, length), (_LOWER, table.lower[segment])]
    return _work_list(items, item, tail, rank[order])


def _rows_that_see(stop: IntArray, length: IntArray, segment: IntArray, table: SegmentTable) -> IntArray:
    """How many rows of query spans there are up to the last one that sees a key of a block.

    Args:
        stop: The row of the buffer after each block.
        length: Rows of the span that sees it.
        segment: Through which segment.
        table: With lower diagonals.
    """
    assert table.lower is not None
    last = np.minimum(stop - table.k_start[segment], table.k_len[segment]) - 1
    rows: IntArray = np.minimum(length, last - table.lower[segment] + 1)
    return rows


def _plain_work(
    fields: Sequence[IntArray],
    nothing: IntArray,
    length: IntArray,
    table: SegmentTable,
    size: int,
    moves: tuple[tuple[int, ...], bool],
) -> WorkList:
    """The work of a table that is plain, by a third of the numpy calls that others need: a record per segment is cut.

    Args:
        fields: The columns of records of whole segments, but for the last ones, which are 0.
        nothing: A column of zeros.
        length: Rows of each, as one of the columns.
        table: The segments.
        size: Rows of a block.
        moves: By how much the columns of a record change a row further, and whether the last block comes first.
    """
    order = table.order
    if order is None:  # as _ranked would have it
        order = table.order = (-table.k_len).argsort(kind="stable")
    records = np.array((*fields, *(nothing,) * (WIDTH - len(fields)))).take(order, axis=1)
    blocks = (length.take(order) + (size - 1)) // size
    ends = np.add.accumulate(blocks)
    programs = ends.item(-1) if len(ends) else 0
    # Program j of a list that is not cut by documents begins at row j * size: documents begin before it, or after.
    a_block, offsets = _offsets(size, moves, 1 << programs.bit_length())
    records += a_block * (ends if moves[1] else blocks - ends)
    items = records.T.astype(np.int32, order="C").repeat(blocks, axis=0)
    items += offsets[:programs]
    rows = items[:, _ROWS]
    np.minimum(rows, size, out=rows)
    return WorkList(items, NO_FURTHER, table.query.repeat(blocks))


@lru_cache(maxsize=64)
def _offsets(size: int, moves: tuple[tuple[int, ...], bool], count: int) -> tuple[IntArray, Int32Array]:
    """By how much records change from a block to the next one, ``(16, 1)``, and to each of many programs."""
    columns, is_last_first = moves
    a_block, place = np.array(columns) * size, np.arange(count)
    offsets = np.multiply.outer(-1 - place if is_last_first else place, a_block)
    return a_block[:, None], offsets.astype(np.int32)


def _moves(names: Sequence[str], up: Sequence[str]) -> tuple[int, ...]:
    """By how much the fields of a record change a row further: some by one; there is one row less."""
    return tuple(1 if name in up else -1 if name == "rows" else 0 for name in names)


_QUERY_MOVES = (_moves(QUERY_FIELDS, ("row", "position", "slot_row", "reach")), True)
_KEY_MOVES = (_moves(KEY_FIELDS, ("k_row", "first")), False)


def _ranking(spans: QuerySpans, table: SegmentTable) -> Ranking:
    """The ranking by a table, made once."""
    found = table.ranking
    if found is None or found.spans is not spans:
        found = table.ranking = _ranked(spans, table)
    return found


def _ranked(spans: QuerySpans, table: SegmentTable) -> Ranking:
    query, document = table.query, spans.document
    has_each_once = len(query) == len(spans) and (len(query) < 2 or least(query[1:] > query[:-1]) == 1)
    most = table.k_len  # keys that a row sees
    if table.lower is not None:
        most = np.minimum(most, table.diagonal - table.lower + 1)
    keys = most if has_each_once else np.bincount(query, most, minlength=len(spans))
    fewer = -keys
    if _have_own_documents(spans):  # in plain attention: half the work
        return Ranking(spans, np.lexsort((document, fewer)), np.arange(len(document)), has_each_once)
    fewest = np.zeros(document.max(initial=0) + 2)  # the tail's document, -1, is the last one
    np.minimum.at(fewest, document, fewer)
    order = np.lexsort((fewer, document, fewest[document]))
    in_order = document[order]
    ranks = np.zeros(len(order), np.int64)
    (in_order[1:] != in_order[:-1]).cumsum(out=ranks[1:])
    return Ranking(spans, order, ranks, has_each_once)


def _have_own_documents(spans: QuerySpans) -> bool:
    """Whether no two spans are of one document and they are ordered, but for the tail, which is of document -1."""
    document = spans.document
    if len(document) < 2:
        return True
    rises = document[1:] > document[:-1]
    at = rises.argmin()  # the first that doesn't, if any
    return bool(rises[at] or (at == len(rises) - 1 and document[-1] < 0 <= document[0]))


def _span_records(spans: QuerySpans) -> Int32Array:
    """The fields of query spans where records of queries have them, made once for all steps and the backward."""
    if spans.records is None:
        records = np.zeros((len(spans), WIDTH), np.int32)
        records[:, :_K_START] = np.array(_fields_of(spans)).T
        spans.records = records
    return spans.records


def _fields_of(spans: QuerySpans) -> tuple[IntArray, ...]:
    """The first columns of records of queries."""
    one = spans
    return one.start, one.length, one.document, one.position, one.step, one.slot, one.slot_row, one.column


def _parts_of(spans: QuerySpans, span: IntArray, offset: IntArray, tokens: int) -> Int32Array:
    """Records of parts of query spans, without segments: columns are changed in place, all at once and few."""
    items = _span_records(spans).take(span, axis=0)
    moved = offset.astype(np.int32)
    row, rows, position, slot_row = (items[:, column] for column in (_ROW, _ROWS, _POSITION, _SLOT_ROW))
    row += moved
    slot_row += moved
    position += moved * items[:, _STEP]
    np.minimum(rows - moved, tokens, out=rows)
    return items


def _segments_of(
    span: IntArray, offset: IntArray, tokens: int, spans: QuerySpans, table: SegmentTable
) -> tuple[IntArray, IntArray]:
    """For blocks of query spans all (block, segment) pairs of which a row sees a key, ordered by block."""
    count = np.bincount(table.query, minlength=len(spans))
    first = np.add.accumulate(count) - count
    count, first = count[span], first[span]
    item = np.arange(len(span)).repeat(count)
    segment = np.arange(len(item)) + (first - (np.add.accumulate(count) - count)).repeat(count)
    last_row = np.minimum(offset + tokens, spans.length[span]) - 1
    sees = last_row[item] + table.diagonal[segment] >= 0
    if table.lower is not None:  # the first row sees most of the last keys
        sees &= offset[item] + table.lower[segment] < table.k_len[segment]
    return item[sees], segment[sees]


def _key_blocks(table: SegmentTable, block_n: int) -> tuple[IntArray, IntArray, Item, IntArray]:
    """Blocks of keys (first row, rows), and ordered by block the (block, segment) pairs that intersect."""
    if len(table) == 0:
        return (np.empty(0, np.int64),) * 4
    # Regions: unions of segments whose keys overlap, so that blocks begin where documents do.
    order = table.k_start.argsort(kind="stable")
    starts, ends = table.k_start[order], np.maximum.accumulate((table.k_start + table.k_len)[order])
    opens = np.ones(len(table), bool)
    np.greater_equal(starts[1:], ends[:-1], out=opens[1:])
    first = opens.nonzero()[0]
    begin, end = (starts, ends) if len(first) == len(table) else (starts[first], ends[np.append(first[1:], 0) - 1])
    blocks = (end - begin + (block_n - 1)) // block_n
    first_block = np.add.accumulate(blocks) - blocks
    region = np.arange(len(begin)).repeat(blocks)
    place = (np.arange(len(region)) - first_block[region]) * block_n
    k_row = begin[region] + place
    rows = np.minimum(end[region] - k_row, block_n)
    if len(begin) == len(table):
        return k_row, rows, _ALL, order[region]  # segments share no keys, as in plain attention: one per block

    region_of = np.empty(len(table), np.int64)
    region_of[order] = opens.cumsum() - 1
    low = (table.k_start - begin[region_of]) // block_n
    high = (table.k_start + table.k_len - 1 - begin[region_of]) // block_n
    count = high - low + 1
    segment = np.arange(len(table)).repeat(count)
    block = first_block[region_of][segment] + low[segment]
    block += np.arange(len(segment)) - (count.cumsum() - count).repeat(count)
    by_block = block.argsort(kind="stable")
    return k_row, rows, block[by_block], segment[by_block]


def _work_list(items: Int32Array, item: Item, tail: Sequence[Tail], documents: IntArray) -> WorkList:
    """Puts segments into items; ``item``, sorted, says whose each is."""
    if isinstance(item, slice):
        for column, values in tail:
            items[:, column] = values
        return WorkList(items, NO_FURTHER, documents)
    is_own = np.ones(len(item), bool)  # the first segment of its item
    is_own[1:] = item[1:] != item[:-1]
    if np.count_nonzero(is_own) == len(item):
        for column, values in tail:
            items[item, column] = values
        return WorkList(items, NO_FURTHER, documents)
    is_further = ~is_own
    own, later = item[is_own], item[is_further]
    further = np.zeros((len(later), WIDTH), np.int32)
    for column, values in tail:
        items[own, column] = values[is_own]
        further[:, column] = values[is_further]
    count = np.bincount(later, minlength=len(items))
    end = count.cumsum()
    items[:, MORE] = np.array((end - count, end)).T
    return WorkList(items, further, documents)
