"""What one member takes and sees of others, where it is all that is taken of a piece, or nothing.

Under a plain mask, pieces that are cut into blocks lie before or behind each other. So those of a document's query
spans that see any of a foreign piece see as much of it, and which ones do is the same for all members on one side of
the own. :mod:`hetu.parallel.methods.tables` has the long way, which asks for each span and owner and serves many
members at once; parts built in either way are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from hetu.parallel.layout.group import GroupLayout, Held
from hetu.parallel.layout.splits import Ints, Sight
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable
from hetu.parallel.methods.peers import whole
from hetu.parallel.plan.instructions import Runs


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """The members on one side of the own, and which spans see their pieces.

    Attributes:
        seen: ``(R, C)`` keys of each piece that these spans see.
        query: ``(C,)`` the only span of each document; or all of them, document by document.
        first: ``(C,)`` where those of each document begin in ``query``; None if there is no more than one of each.
        count: ``(C,)`` how many there are.
    """

    seen: Ints
    query: IntArray
    first: IntArray | None
    count: IntArray

    def table(self, cell: IntArray, k_start: IntArray, k_len: IntArray) -> SegmentTable:
        """The segments of given documents, of which keys lie in a buffer."""
        at: IntArray = cell
        if self.first is not None:
            count = self.count.take(cell)
            at = self.first.take(cell) + count
            at -= count.cumsum()
            at = at.repeat(count)
            at += np.arange(len(at))
            k_start, k_len = k_start.repeat(count), k_len.repeat(count)
        return SegmentTable(self.query.take(at), k_start, k_len, k_len - 1)


_NONE = np.empty(0, np.int64)
_STRANGER = 0, whole(0), SegmentTable(_NONE, _NONE, _NONE, _NONE)
"""What a member takes of one of whom it sees nothing: most of them, where documents lie on a few members each."""


class Viewer:
    """A member that looks at others.

    Attributes:
        spans: Its query spans.
        own: What these see of its own keys, in rows of its shard.
    """

    def __init__(self, group: GroupLayout, held: Held, sides: tuple[Sight, Sight], *, is_causal: bool) -> None:
        self.group, self.member = group, held.members.start
        (self.spans,) = group.all_query_spans(held.members, held=held)
        part = (held.runs.length[0] != 0).nonzero()[0]
        cell = held.parts.document.take(part)
        k_start = held.rows[self.member].take(cell).astype(np.int64)
        if is_causal:  # up to the end of the span, and less of it the earlier a query is
            diagonal = self.spans.start - k_start
            k_len = diagonal + self.spans.length
        else:
            k_len = held.parts.pieces[self.member].take(cell).astype(np.int64)
            diagonal = k_len - 1
        self.own = SegmentTable(np.arange(len(part)), k_start, k_len, diagonal)
        self.sides = [_side(sight, part, cell, len(held.documents)) for sight in sides]

    def take(self, owner: int) -> tuple[int, Runs, SegmentTable]:
        """How many rows it takes of another member, which of its shard these are, and what it sees of them."""
        side = self.sides[owner > self.member]
        seen = side.seen[owner]
        cell = (seen != 0).nonzero()[0]
        if not len(cell):
            return _STRANGER
        length = seen.take(cell).astype(np.int64)
        end = length.cumsum()
        rows, table = int(end[-1]) if len(end) else 0, side.table(cell, end - length, length)
        return rows, Runs.later(rows, partial(_landed, self.group, owner, self.spans, table)), table


def viewer(group: GroupLayout, held: Held, mask: Mask) -> Viewer | None:
    """The one member of whom it is said what it holds; None if some of its spans see less of a piece than others."""
    parts = held.parts
    everything = Sight(parts.pieces, np.ones(len(parts.document), bool))
    sides = parts.sight() if mask.hides_later else (everything, everything)
    return None if sides is None else Viewer(group, held, sides, is_causal=mask.hides_later)


def _side(sight: Sight, part: IntArray, cell: IntArray, documents: int) -> _Side:
    query = sight.sees.take(part).nonzero()[0]
    of = cell.take(query)
    count = np.bincount(of, minlength=documents)
    if count.max(initial=0) > 1:
        return _Side(sight.seen, query, count.cumsum() - count, count)
    only = np.zeros_like(count)
    only[of] = query
    return _Side(sight.seen, only, None, count)


def _landed(group: GroupLayout, owner: int, spans: QuerySpans, table: SegmentTable) -> tuple[IntArray, IntArray]:
    """The rows of an owner's shard that a table over them names, as runs, which are joined where they touch."""
    is_other = np.ones(len(table), bool)  # than what the segment before names
    np.not_equal(table.k_start[1:], table.k_start[:-1], out=is_other[1:])
    document = spans.document.take(table.query[is_other])
    begin = group.totals[owner].take(document).astype(np.int64)
    end = begin + table.k_len[is_other]
    is_first = np.ones(len(begin) + 1, bool)
    np.not_equal(begin[1:], end[:-1], out=is_first[1:-1])
    first = is_first.nonzero()[0]
    start = begin.take(first[:-1])
    return start, end.take(first[1:] - 1) - start
