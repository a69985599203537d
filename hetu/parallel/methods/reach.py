"""What query spans see, before it is known in which buffer the keys lie."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """What query spans see, before it is known in which buffer the keys lie.

    The rows of each owner's shard are cut into *cells*, and each receiver needs some first rows of a cell: under a
    plain mask cells are the pieces of documents, under others what a receiver needs wholly or not at all.

    Segments are ordered by pair, then ``query``, then ``row``; in normal form, as those of a ``SegmentTable``.

    Attributes:
        spans: The query spans of each receiver.
        shape: ``(n, m, C)``: numbers of receivers, of owners of keys, and of cells.
        rows: ``(m, C)`` the row of the owner's shard at which each cell begins; they never decrease.
        bounds: ``(n * m + 1,)`` where the segments of each pair begin and the last ones end. A pair's number is
            ``receiver * m + owner``, both counted among those that were asked for.
        place: ``pair * C + cell``; None where ``row`` says it, so that any other cutting into cells may be asked for.
        query: Index into the receiver's query spans.
        row: First key: its row of the owner's shard; None where it is the first of the cell that ``place`` says.
        k_len: Keys.
        diagonal: As in ``SegmentTable``.
        lower: As in ``SegmentTable``, for all segments together.
        needed: ``(n, m, C)`` rows that each receiver needs of each cell of each owner, from its beginning.
    """

    spans: list[QuerySpans]
    shape: tuple[int, int, int]
    rows: IntArray
    bounds: IntArray
    place: IntArray | None
    query: IntArray
    row: IntArray | None
    k_len: IntArray
    diagonal: IntArray
    needed: IntArray
    lower: IntArray | None = None

    def tables(self, first: IntArray, rows: IntArray) -> list[SegmentTable]:
        """One table per pair.

        Args:
            first: ``(n, m, C)`` row at which each cell begins in the pair's buffer; cells that are needed lie there in
                their order, without gaps between those that are neighbours in the shard.
            rows: ``(m, C)`` as the attribute; another cutting only if ``place`` is None.
        """
        if self.place is not None:
            k_start = first.take(self.place).astype(np.int64, copy=False)
        else:
            assert self.row is not None, "one of the two says where the keys lie"
            pair = self._pairs()
            owner = pair % max(len(rows), 1)
            cell = _last_at(rows, owner, self.row)
            k_start = first.take(pair * rows.shape[1] + cell) + self.row - rows[owner, cell]
        bounds = self.bounds.tolist()
        query, k_len, diagonal, lower = self.query, self.k_len, self.diagonal, self.lower
        if lower is None:
            return [SegmentTable(query[i:j], k_start[i:j], k_len[i:j], diagonal[i:j]) for i, j in pairwise(bounds)]
        hides = np.append(0, (lower > 1 - self._lengths()).cumsum()).take(self.bounds).tolist()
        return [
            SegmentTable(query[i:j], k_start[i:j], k_len[i:j], diagonal[i:j], lower[i:j] if more > less else None)
            for (i, j), (less, more) in zip(pairwise(bounds), pairwise(hides), strict=True)
        ]

    def _lengths(self) -> IntArray:
        """``(segments,)`` rows of the query span of each."""
        lengths = np.concatenate([spans.length for spans in self.spans])
        first = np.cumsum([0] + [len(spans) for spans in self.spans])
        return lengths.take(first.take(self._pairs() // max(self.shape[1], 1)) + self.query)

    def _pairs(self) -> IntArray:
        """``(segments,)`` the pair of each."""
        return np.arange(len(self.bounds) - 1).repeat(np.diff(self.bounds))


def _last_at(rows: IntArray, owner: IntArray, row: IntArray) -> IntArray:
    """The last cell of an owner that begins at a row or before it, of cells that have rows."""
    wide = 1 + max(int(rows.max(initial=0)), int(row.max(initial=0)))
    begins = (rows + np.arange(len(rows))[:, None] * wide).reshape(-1)
    found: IntArray = begins.searchsorted(owner * wide + row, "right") - 1 - owner * rows.shape[1]
    return found
