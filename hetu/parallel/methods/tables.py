"""From a layout to segments: what the query spans of some members see of the keys of others.

Of one document, the keys of a member that a query may see are a prefix of the member's piece, for a piece is ordered
by position. So what a query span sees is told by how many keys each of its rows sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hetu.parallel.layout.layout import GroupLayout
from hetu.parallel.layout.splits import Parts
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import IntArray, SegmentTable


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """What query spans see, before it is known in which buffer the keys lie.

    Rows are ordered by ``pair``, then ``query``, then ``offset``; in normal form, as those of a ``SegmentTable``.

    Attributes:
        shape: ``(n, m, B)``: numbers of receivers, of owners of keys, and of documents.
        pair: ``receiver * m + owner``, both counted among those that were asked for.
        place: ``pair * B + document``.
        query: Index into the receiver's query spans.
        offset: First key, counted in the owner's piece of the document.
        k_len: Keys.
        diagonal: As in ``SegmentTable``.
    """

    shape: tuple[int, int, int]
    pair: IntArray
    place: IntArray
    query: IntArray
    offset: IntArray
    k_len: IntArray
    diagonal: IntArray

    def extents(self) -> IntArray:
        """``(n, m, B)``: how many keys of the owner's piece the receiver uses, all from the piece's beginning."""
        extents = np.zeros(self.shape, np.int64)
        place = self.place
        # The rows of one place follow each other, and the last one reaches furthest: later queries see more.
        is_last = np.ones(len(place), bool)
        np.not_equal(place[1:], place[:-1], out=is_last[:-1])
        last = is_last.nonzero()[0]
        extents.reshape(-1)[place.take(last)] = self.offset.take(last) + self.k_len.take(last)
        return extents

    def tables(self, first: IntArray) -> list[SegmentTable]:
        """One table a pair.

        Args:
            first: ``(n, m, B)`` row at which the keys of the owner's piece begin in the pair's buffer.
        """
        k_start = first.take(self.place)
        k_start += self.offset
        bounds = self.pair.searchsorted(np.arange(self.shape[0] * self.shape[1] + 1)).tolist()
        query, k_len, diagonal = self.query, self.k_len, self.diagonal
        return [SegmentTable(query[i:j], k_start[i:j], k_len[i:j], diagonal[i:j]) for i, j in pairwise(bounds)]


def see(group: GroupLayout, receivers: slice, owners: slice, mask: Mask) -> Reach:
    """What the query spans of some members see of the keys of some members.

    Args:
        group: The layout.
        receivers: Members whose queries are asked for, as a slice of step 1 with its bounds given.
        owners: Members whose keys are asked for.
        mask: Which keys a query sees.
    """
    if group.parts is None:
        return _see_any(group, receivers, owners, mask)
    return _see_parts(group, group.parts, receivers, owners, mask)


def extents(group: GroupLayout, receivers: slice, owners: slice, mask: Mask) -> IntArray:
    """``(n, m, B)``: how many keys of the owner's piece the receiver uses; arguments as of :func:`see`.

    Keys that a member uses of a document are those that its last query sees, so this looks at one part per document.
    """
    parts = group.parts
    if parts is None:
        return _see_any(group, receivers, owners, mask).extents()
    has_queries = (group.pieces[receivers] != 0)[:, None]
    if not mask.hides_later:
        return group.pieces[owners] * has_queries
    present = parts.length[receivers] != 0
    K = present.shape[1]
    if K == 0:
        return np.zeros((*present.shape[:1], owners.stop - owners.start, 0), np.int64)
    last = np.maximum.reduceat(np.arange(K) * present, parts.first, axis=1)[:, None]
    rows = np.arange(receivers.start, receivers.stop)[:, None, None] * K
    cells = np.arange(owners.start, owners.stop)[:, None] * K + last
    rows = rows + last
    seen = parts.start.take(rows) - parts.start.take(cells)
    if parts.is_dealt:
        seen >>= 63  # see _see_parts
    seen += parts.length.take(rows)
    np.minimum(seen, parts.length.take(cells), out=seen)
    np.maximum(seen, 0, out=seen)
    seen += group.part_offset.take(cells)
    seen *= has_queries
    return seen


def _see_parts(group: GroupLayout, parts: Parts, receivers: slice, owners: slice, mask: Mask) -> Reach:
    """The layouts of the splits: one row a (query span, owner), for all at once.

    Of an owner's piece, row i of a span in part k sees what lies in earlier parts of the document, ``before`` keys,
    and ``clip(i + lead + 1, 0, length)`` keys of part k itself, where lead says how far the span starts after the
    owner's run in that part, in steps. Dealt tokens start less than one step apart, so lead is 0 or -1. Of two
    blocks the one lies wholly before the other: all of the part or nothing of it is seen. In each case this is one
    segment with the diagonal ``before + max(lead, -1)``.
    """
    # Dense arrays of (receiver, owner, part) take half the memory traffic as int32; lengths are bounded to fit.
    start, length, before = (x.astype(np.int32) for x in (parts.start, parts.length, group.part_offset))
    q_length, before = length[receivers, None], before[owners]
    present = q_length != 0
    if mask.hides_later:
        lead = start[receivers, None] - start[owners]
        if parts.is_dealt:
            lead >>= 31
        seen = lead + q_length
        np.minimum(seen, length[owners], out=seen)
        np.maximum(seen, 0, out=seen)
        seen += before
        seen *= present
        np.maximum(lead, -1, out=lead)
        lead += before
    else:
        seen = group.pieces[owners].take(parts.document, axis=1) * present
    n, m, K = seen.shape
    cell = (seen.reshape(-1) != 0).nonzero()[0]
    edge = cell.searchsorted(np.arange(n * m + 1) * K)
    count = edge[1:] - edge[:-1]
    pair = np.arange(n * m)
    # What leads from a cell to its column in the receiver's rows of (n, K) arrays, for each pair.
    shift = pair * K - (pair // max(m, 1)) * K
    query = present[:, 0].cumsum(1)
    query -= 1
    k_len = seen.take(cell).astype(np.int64)
    diagonal = k_len - 1
    if mask.hides_later:
        np.minimum(diagonal, lead.take(cell), out=diagonal)
    part = cell - (pair * K).repeat(count)
    B, owner = group.pieces.shape[1], pair.repeat(count)
    return Reach(
        shape=(n, m, B),
        pair=owner,
        place=owner * B + parts.document.take(part),
        query=query.take(cell - shift.repeat(count)),
        offset=np.zeros(len(cell), np.int64),
        k_len=k_len,
        diagonal=diagonal,
    )


def _see_any(group: GroupLayout, receivers: slice, owners: slice, mask: Mask) -> Reach:
    """Any layout: joins query spans with key spans of the same document, then melts rows that are one segment."""
    spans, (n, m) = group.spans, (receivers.stop - receivers.start, owners.stop - owners.start)
    bounds, B = group.bounds, group.pieces.shape[1]
    queries = np.arange(bounds[receivers.start], bounds[receivers.stop])
    keys = np.arange(bounds[owners.start], bounds[owners.stop])
    keys = keys[np.argsort(spans.document[keys], kind="stable")]
    begin, end = (spans.document[keys].searchsorted(spans.document[queries], side) for side in ("left", "right"))
    count = end - begin
    q = queries.repeat(count)
    k = keys[np.arange(len(q)) + (begin - (count.cumsum() - count)).repeat(count)]

    # Row i of span q sees clip((apart + i * q_step) // k_step + 1, 0, length) keys of span k.
    apart, q_step, k_step, length = spans.start[q] - spans.start[k], spans.step[q], spans.step[k], spans.length[k]
    if mask.hides_later:
        seen_first = np.clip(apart // k_step + 1, 0, length)
        seen = np.clip((apart + (spans.length[q] - 1) * q_step) // k_step + 1, 0, length)
    else:
        seen_first = seen = length
    is_same = seen_first == seen
    diagonal = np.where(is_same, seen - 1, apart // k_step)
    # Unequal steps: a staircase, key by key. Key j is seen from row ceil((j * k_step - apart) / q_step) on.
    stairs = ~is_same & (q_step != k_step)
    number = np.where(stairs, seen, seen > 0)
    pick = np.arange(len(q)).repeat(number)
    key = np.arange(len(pick)) - (number.cumsum() - number).repeat(number)
    since = np.maximum(-((apart[pick] - key * k_step[pick]) // q_step[pick]), 0)
    one = stairs[pick]
    diagonal = np.where(one, -since, diagonal[pick])
    k_len = np.where(one, 1, seen[pick])
    q, k = q[pick], k[pick]
    document = spans.document[q]
    offset = spans.row[k] - group.piece_row[spans.member[k], document] + np.where(one, key, 0)

    pair = (spans.member[q] - receivers.start) * m + spans.member[k] - owners.start
    query = q - np.take(bounds, spans.member[q])
    order = np.lexsort((offset, query, pair))
    rows = (column[order] for column in (pair, pair * B + document, query, offset, k_len, diagonal))
    return Reach((n, m, B), *_melt(*rows))


def _melt(
    pair: IntArray, place: IntArray, query: IntArray, offset: IntArray, k_len: IntArray, diagonal: IntArray
) -> tuple[IntArray, ...]:
    """Melts neighbouring rows of one query span over neighbouring keys into one row where they are one segment.

    They are where the second diagonal continues the first, or where the first row is a full rectangle and the
    second shows at least its beginning right from the span's first row.
    """
    then = diagonal[1:] + k_len[:-1]
    is_full = diagonal[:-1] >= k_len[:-1] - 1
    joins = (then == diagonal[:-1]) | (is_full & (diagonal[1:] >= -1))
    joins &= (pair[1:] == pair[:-1]) & (query[1:] == query[:-1]) & (offset[1:] == offset[:-1] + k_len[:-1])
    first = np.flatnonzero(np.concatenate([[True], ~joins])) if len(pair) else np.empty(0, np.int64)
    last = np.append(first[1:], len(pair)) - 1 if len(pair) else first
    melted = offset[last] + k_len[last] - offset[first]
    diagonal = diagonal[last] + melted - k_len[last]
    return pair[first], place[first], query[first], offset[first], melted, np.minimum(diagonal, melted - 1)
