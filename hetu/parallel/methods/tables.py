"""From a layout to segments: what the query spans of some members see of the keys of others.

Of one document and under a plain mask, the keys of a member that a query may see are a prefix of the member's piece,
for a piece is ordered by position. So what a query span sees is told by how many keys each of its rows sees. Any other
mask turns into bands, and these are joined with the spans (:mod:`hetu.parallel.methods.banded`).
"""

from __future__ import annotations

import numpy as np

from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.layout.splits import Parts
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import IntArray
from hetu.parallel.methods.banded import see_bands
from hetu.parallel.methods.reach import Reach


def see(group: GroupLayout, receivers: slice, owners: slice, mask: Mask) -> Reach:
    """What the query spans of some members see of the keys of some members.

    Args:
        group: The layout.
        receivers: Members whose queries are asked for, as a slice of step 1 with its bounds given.
        owners: Members whose keys are asked for.
        mask: Which keys a query sees.
    """
    if group.parts is None or not mask.is_plain:
        return see_bands(group, receivers, owners, mask)
    return _see_parts(group, group.parts, receivers, owners, mask)


def extents(group: GroupLayout, receivers: slice, owners: slice, mask: Mask) -> tuple[IntArray, IntArray]:
    """``Reach.extents()`` and ``Reach.rows`` of what :func:`see` gives for these arguments."""
    parts = group.parts
    if parts is None or not mask.is_plain:
        reach = see_bands(group, receivers, owners, mask)
        return reach.extents(), reach.rows
    return _prefixes(group, parts, receivers, owners, mask), group.piece_row[owners]


def _prefixes(group: GroupLayout, parts: Parts, receivers: slice, owners: slice, mask: Mask) -> IntArray:
    """``(n, m, B)``: how many keys of the owner's piece the receiver uses.

    Keys that a member uses of a document are those that its last query sees, so this looks at one part per document.
    """
    extents = np.zeros((receivers.stop - receivers.start, owners.stop - owners.start, group.pieces.shape[1]), np.int64)
    kept = (group.pieces[owners] != 0).any(0).nonzero()[0]  # no keys are used of documents of which no owner has tokens
    has_queries = (group.pieces[receivers].take(kept, axis=1) != 0)[:, None]
    if not mask.hides_later:
        extents[..., kept] = group.pieces[owners].take(kept, axis=1) * has_queries
        return extents
    is_kept = np.zeros(group.pieces.shape[1], bool)
    is_kept[kept] = True
    column = is_kept.take(parts.document).nonzero()[0]
    if len(column) == 0:
        return extents
    present = parts.length[receivers].take(column, axis=1) != 0
    first = parts.document.take(column).searchsorted(kept)
    last = column.take(np.maximum.reduceat(np.arange(len(column)) * present, first, axis=1)[:, None])
    K = parts.length.shape[1]
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
    extents[..., kept] = seen
    return extents


def _see_parts(group: GroupLayout, parts: Parts, receivers: slice, owners: slice, mask: Mask) -> Reach:
    """The layouts of the splits: one row a (query span, owner), for all at once.

    Of an owner's piece, row i of a span in part k sees what lies in earlier parts of the document, ``before`` keys,
    and ``clip(i + lead + 1, 0, length)`` keys of part k itself, where lead says how far the span starts after the
    owner's run in that part, in steps. Dealt tokens start less than one step apart, so lead is 0 or -1. Of two
    blocks the one lies wholly before the other: all of the part or nothing of it is seen. In each case this is one
    segment with the diagonal ``before + max(lead, -1)``.
    """
    B = group.pieces.shape[1]
    # Parts of which no receiver has tokens show nothing. Dense arrays of (receiver, owner, part) take half the memory
    # traffic as int32; lengths are bounded to fit.
    kept = (parts.length[receivers] != 0).any(0).nonzero()[0]
    columns = (parts.start, parts.length, group.part_offset)
    start, length, before = (x.take(kept, axis=1).astype(np.int32) for x in columns)
    document = parts.document.take(kept)
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
        seen = group.pieces[owners].take(document, axis=1) * present
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
    owner = pair.repeat(count)
    return Reach(
        spans=[group.query_spans(member) for member in range(receivers.start, receivers.stop)],
        shape=(n, m, B),
        rows=group.piece_row[owners],
        pair=owner,
        place=owner * B + document.take(part),
        query=query.take(cell - shift.repeat(count)),
        row=np.zeros(len(cell), np.int64),
        k_len=k_len,
        diagonal=diagonal,
    )
