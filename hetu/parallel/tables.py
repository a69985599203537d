"""From a layout to segments: what the query spans of some members see of the keys of others.

Of one document, the keys of a member that a query may see are a prefix of the member's piece, for a piece is ordered
by position. So what a query span sees is told by how many keys each of its rows sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetu.parallel.layout import GroupLayout
from hetu.parallel.segments import IntArray, SegmentTable
from hetu.parallel.splits import Parts


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """What query spans see, before it is known in which buffer the keys lie.

    Rows are ordered by ``pair``, then ``query``, then ``offset``; in normal form, as those of a ``SegmentTable``.

    Attributes:
        shape: ``(n, m, B)``: numbers of receivers, of owners of keys, and of documents.
        pair: ``receiver * m + owner``, both counted among those that were asked for.
        query: Index into the receiver's query spans.
        document: The document that queries and keys belong to.
        offset: First key, counted in the owner's piece of the document.
        k_len: Keys.
        diagonal: As in ``SegmentTable``.
    """

    shape: tuple[int, int, int]
    pair: IntArray
    query: IntArray
    document: IntArray
    offset: IntArray
    k_len: IntArray
    diagonal: IntArray

    @property
    def place(self) -> IntArray:
        """Index of each row's (receiver, owner, document) in an array of :attr:`shape`."""
        return self.pair * self.shape[2] + self.document

    def extents(self) -> IntArray:
        """``(n, m, B)``: how many keys of the owner's piece the receiver uses, all from the piece's beginning."""
        extents = np.zeros(self.shape, np.int64)
        place = self.place
        # The rows of one place follow each other, and the last one reaches furthest: later queries see more.
        last = np.flatnonzero(place[1:] != place[:-1])
        extents.ravel()[place.take(last)] = self.offset.take(last) + self.k_len.take(last)
        if len(place):
            extents.ravel()[place[-1]] = self.offset[-1] + self.k_len[-1]
        return extents

    def part(self, receivers: slice) -> Reach:
        """The rows of some of the receivers."""
        n, m, B = self.shape
        if receivers.start == 0 and receivers.stop == n:
            return self
        begin, end = self.pair.searchsorted([receivers.start * m, receivers.stop * m]).tolist()
        columns = [c[begin:end] for c in (self.query, self.document, self.offset, self.k_len, self.diagonal)]
        pair = self.pair[begin:end] - receivers.start * m
        return Reach((receivers.stop - receivers.start, m, B), pair, *columns)

    def tables(self, first: IntArray) -> list[SegmentTable]:
        """One table a pair.

        Args:
            first: ``(n, m, B)`` row at which the keys of the owner's piece begin in the pair's buffer.
        """
        k_start = first.take(self.place)
        k_start += self.offset
        bounds = self.pair.searchsorted(np.arange(self.shape[0] * self.shape[1] + 1)).tolist()
        columns = self.query, k_start, self.k_len, self.diagonal
        return [SegmentTable(*[c[i:j] for c in columns]) for i, j in zip(bounds[:-1], bounds[1:], strict=True)]


def see(group: GroupLayout, receivers: slice, owners: slice, *, is_causal: bool) -> Reach:
    """What the query spans of some members see of the keys of some members.

    Args:
        group: The layout.
        receivers: Members whose queries are asked for, as a slice of step 1 with its bounds given.
        owners: Members whose keys are asked for.
        is_causal: Whether a query sees only keys up to its own position.
    """
    if group.parts is None:
        return _see_any(group, receivers, owners, is_causal)
    return _see_parts(group, group.parts, receivers, owners, is_causal)


def _see_parts(group: GroupLayout, parts: Parts, receivers: slice, owners: slice, is_causal: bool) -> Reach:
    """The layouts of the splits: one row a (query span, owner), for all at once.

    Of an owner's piece, row i of a span in part k sees what lies in earlier parts of the document, ``before`` keys,
    and ``clip(i + lead + 1, 0, length)`` keys of part k itself, where lead says how far the span starts after the
    owner's run in that part, in steps. Dealt tokens start less than one step apart, so lead is 0 or -1. Of two
    blocks the one lies wholly before the other: all of the part or nothing of it is seen. In each case this is one
    segment with the diagonal ``before + max(lead, -1)``.
    """
    q_length, k_length = parts.length[receivers, None], parts.length[owners]
    present = q_length != 0
    if is_causal:
        lead = parts.start[receivers, None] - parts.start[owners]
        if parts.is_dealt:
            lead >>= 63
        before = parts.length.cumsum(1)[owners]
        before -= k_length
        before -= group.piece_row[owners].take(parts.document, axis=1)
        seen = lead + q_length
        np.minimum(seen, k_length, out=seen)
        np.maximum(seen, 0, out=seen)
        seen += before
        seen *= present
        np.maximum(lead, -1, out=lead)
        lead += before
    else:
        seen = group.pieces[owners].take(parts.document, axis=1) * present
    n, m, K = seen.shape
    cell = np.flatnonzero(seen != 0)
    count = np.diff(cell.searchsorted(np.arange(n * m + 1) * K))
    pair = np.arange(n * m).repeat(count)
    part = cell - pair * K
    query = present[:, 0].cumsum(1)
    query -= 1
    k_len = seen.take(cell)
    diagonal = k_len - 1
    if is_causal:
        np.minimum(diagonal, lead.take(cell), out=diagonal)
    return Reach(
        shape=(n, m, group.pieces.shape[1]),
        pair=pair,
        query=query.take(part + (np.arange(n) * K).repeat(m).repeat(count)),
        document=parts.document.take(part),
        offset=np.zeros_like(pair),
        k_len=k_len,
        diagonal=diagonal,
    )


def _see_any(group: GroupLayout, receivers: slice, owners: slice, is_causal: bool) -> Reach:
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
    if is_causal:
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
    rows = (column[order] for column in (pair, query, document, offset, k_len, diagonal))
    return Reach((n, m, B), *_melt(*rows))


def _melt(
    pair: IntArray, query: IntArray, document: IntArray, offset: IntArray, k_len: IntArray, diagonal: IntArray
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
    return pair[first], query[first], document[first], offset[first], melted, np.minimum(diagonal, melted - 1)
