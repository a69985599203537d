"""From a layout to segments under any mask: its bands are joined with the query spans and the key spans."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hetu.parallel.layout.group import GroupLayout, Spans
from hetu.parallel.mask.bands import Bands, cut_spans
from hetu.parallel.mask.joining import Runs, join_runs, only_if_needed
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import IntArray, QuerySpans, count_up, unite
from hetu.parallel.methods.reach import Reach


def see_bands(group: GroupLayout, receivers: slice, owners: slice, mask: Mask) -> Reach:
    """What the query spans of some members see of the keys of some members, as ``tables.see`` has it.

    Query spans are cut where bands begin and end.
    """
    bands = mask.bands(group.lengths, group.lengths)
    whole = group.all_query_spans(receivers, mask.joins)
    queries = _joined(whole)
    cut, of, span, band = cut_spans(queries, queries.document, bands)
    receiver = np.arange(len(whole)).repeat([len(spans) for spans in whole])[of]
    bounds = receiver.searchsorted(np.arange(len(whole) + 1))
    keys = _keys(group, owners, mask.joins)
    item, key = _meet(cut, span, bands, band, keys)

    at = span[item]
    seen = join_runs(
        Runs(cut.position[at], cut.step[at], cut.length[at]),
        Runs(keys.start[key], keys.step[key], keys.length[key]),
        bands,
        band[item],
    )
    at, key = at[seen.item], key[seen.item]
    m = owners.stop - owners.start
    pair = receiver[at] * m + keys.member[key]
    rows = _melt(pair, at, keys.row[key] + seen.offset, seen.k_len, seen.diagonal, seen.lower, cut.length)
    pair, at, row, k_len, diagonal, low = rows
    cells, needed = _cells(group.rows[owners], pair, row, k_len, len(whole), owners.start - receivers.start)
    return Reach(
        spans=[_part(cut, begin, end) for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)],
        shape=needed.shape,
        rows=cells,
        bounds=pair.searchsorted(np.arange(len(whole) * m + 1)),
        place=None,
        query=at - bounds[receiver[at]],
        row=row,
        k_len=k_len,
        diagonal=diagonal,
        lower=only_if_needed(low, cut.length[at]),
        needed=needed,
    )


_FIELDS = ("start", "length", "document", "position", "step", "slot", "slot_row", "column")


def _joined(whole: list[QuerySpans]) -> QuerySpans:
    """The spans of several members one after the other."""
    columns: dict[str, Any] = {name: np.concatenate([getattr(spans, name) for spans in whole]) for name in _FIELDS}
    return QuerySpans(**columns)


def _part(spans: QuerySpans, begin: int, end: int) -> QuerySpans:
    columns: dict[str, Any] = {name: getattr(spans, name)[begin:end] for name in _FIELDS}
    return QuerySpans(**columns)


class _Keys(NamedTuple):
    """Key spans of the owners, ordered by sequence and then by their first position.

    Attributes:
        member: Whose they are, counted among the owners.
        sequence: The sequence that the mask finds them in.
        start: Position there of the first key.
        step: Distance of neighbours.
        length: Keys.
        row: Row of the shard of the first key.
    """

    member: IntArray
    sequence: IntArray
    start: IntArray
    step: IntArray
    length: IntArray
    row: IntArray


def _keys(group: GroupLayout, owners: slice, joins: bool) -> _Keys:
    spans: Spans = group.spans
    own = slice(group.bounds[owners.start], group.bounds[owners.stop])
    sequence, start = spans.document[own], spans.start[own]
    if joins:
        sequence, start = np.zeros_like(sequence), start + group.offsets.take(sequence)
    columns = (spans.member[own] - owners.start, sequence, start, spans.step[own], spans.length[own], spans.row[own])
    order = np.lexsort((start, sequence))
    return _Keys(*(column[order] for column in columns))


def _meet(cut: QuerySpans, span: IntArray, bands: Bands, band: IntArray, keys: _Keys) -> tuple[IntArray, IntArray]:
    """Which pairs of a query span and a band may meet which key spans: indices into both.

    Of a sequence these key spans are neighbours in the order of first positions: up to the last one that begins before
    the last key that a query sees, and from the first one on by which some key span reaches the first such key.
    """
    first = cut.position[span]
    last = first + (cut.length[span] - 1) * cut.step[span]
    low = np.maximum(bands.k_start[band], first + bands.lower[band])
    high = np.minimum(bands.k_stop[band] - 1, last + bands.upper[band])
    ends = keys.start + (keys.length - 1) * keys.step
    wide = 1 + max(int(ends.max(initial=0)), int(high.max(initial=0)))
    place = bands.sequence[band] * wide
    reached = np.maximum.accumulate(keys.sequence * wide + ends)
    begin = reached.searchsorted(place + np.maximum(low, 0))
    end = (keys.sequence * wide + keys.start).searchsorted(place + high, "right")
    count = np.maximum(end - begin, 0)
    item = np.arange(len(span)).repeat(count)
    return item, count_up(count) + begin.repeat(count)


def _melt(
    pair: IntArray,
    query: IntArray,
    row: IntArray,
    k_len: IntArray,
    diagonal: IntArray,
    lower: IntArray,
    length: IntArray,
) -> tuple[IntArray, ...]:
    """Orders segments by pair, query span and row, and melts neighbours into one where they are one segment.

    They are if each diagonal of the one continues that of the other, or does not matter beyond their common edge: the
    first one shows all of its keys to all rows and the second one at least its first key; or the second one hides no
    key behind its lower diagonal, and the first one not even its end.
    """
    order = np.lexsort((row, query, pair))
    pair, query, row, k_len, diagonal, lower = (x[order] for x in (pair, query, row, k_len, diagonal, lower))
    none, rows = 1 - length[query[1:]], k_len[:-1]
    joins = (diagonal[1:] + rows == diagonal[:-1]) | ((diagonal[:-1] >= rows - 1) & (diagonal[1:] >= -1))
    joins &= (lower[1:] + rows == lower[:-1]) | ((lower[1:] <= none) & (lower[:-1] <= rows + none))
    joins &= (pair[1:] == pair[:-1]) & (query[1:] == query[:-1]) & (row[1:] == row[:-1] + rows)
    first = np.flatnonzero(np.concatenate([[True], ~joins])) if len(pair) else np.empty(0, np.int64)
    last = np.append(first[1:], len(pair)) - 1 if len(pair) else first
    melted = row[last] + k_len[last] - row[first]
    diagonal = np.minimum(diagonal[last] + melted - k_len[last], melted - 1)
    return pair[first], query[first], row[first], melted, diagonal, lower[first]


def _cells(
    rows: list[int], pair: IntArray, row: IntArray, k_len: IntArray, receivers: int, apart: int
) -> tuple[IntArray, IntArray]:
    """Cuts the shards of owners where what a receiver needs begins or ends.

    Args:
        rows: Of each owner's shard.
        pair: Of each segment, ``receiver * owners + owner``; they never decrease.
        row: First row that each segment names.
        k_len: Rows that each segment names.
        receivers: How many there are.
        apart: What leads from an owner's number to that of the receiver that it is, whose own shard is not cut for it.

    Returns:
        ``(m, C)`` where cells begin, the last ones of an owner at the end of its shard if others have more; and
        ``(n, m, C)`` how many rows of each a receiver needs: all or none.
    """
    m, wide = len(rows), 1 + max(rows, default=0)
    begin, end = unite(pair * wide + row, pair * wide + row + k_len)
    foreign = begin // wide // max(m, 1) != begin // wide % max(m, 1) + apart
    begin, end = begin[foreign], end[foreign]
    of, owner = begin // wide, begin // wide % max(m, 1)
    own, each = owner * wide, np.arange(m) * wide
    edges = np.unique(np.concatenate([own + begin % wide, own + begin % wide + end - begin, each, each + rows]))
    bounds = edges.searchsorted(np.append(each, m * wide))
    cells = max(int(np.diff(bounds).max(initial=1)) - 1, 1)
    number = np.minimum(bounds[:-1, None] + np.arange(cells + 1), bounds[1:, None] - 1)
    starts = edges[number] - each[:, None] if m else np.zeros((0, cells + 1), np.int64)
    # From where a stretch begins to where it ends cells are needed.
    steps = np.zeros((receivers * m, cells + 1), np.int64)
    for change, at in ((1, own + begin % wide), (-1, own + begin % wide + end - begin)):
        np.add.at(steps, (of, edges.searchsorted(at) - bounds[owner]), change)
    needed = (steps.cumsum(1)[:, :-1] > 0).reshape(receivers, m, cells)
    return starts[:, :-1], needed * np.diff(starts, axis=1)
