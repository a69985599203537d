"""From a layout to segments: what the query spans of some members see of the keys of others.

Of one document and under a plain mask, the keys of a member that a query may see are a prefix of the member's piece,
for a piece is ordered by position. So what a query span sees is told by how many keys its last row sees, which a split
says in closed form (:mod:`hetu.parallel.layout.splits`). Any other mask turns into bands, and these are joined with the
spans (:mod:`hetu.parallel.methods.banded`).
"""

from __future__ import annotations

import numpy as np

from hetu.parallel.layout.group import GroupLayout, Held
from hetu.parallel.layout.splits import Ints
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable
from hetu.parallel.methods.banded import see_bands
from hetu.parallel.methods.reach import Reach


def held_by(group: GroupLayout, members: slice, mask: Mask) -> Held | None:
    """What closed forms need to know of the documents of some members; None where there are none under this mask."""
    return group.held_by(members) if group.split is not None and mask.is_plain else None


def see(group: GroupLayout, receivers: slice, owners: slice, mask: Mask, held: Held | None = None) -> Reach:
    """What the query spans of some members see of the keys of some members.

    Args:
        group: The layout.
        receivers: Members whose queries are asked for, as a slice of step 1 with its bounds given.
        owners: Members whose keys are asked for.
        mask: Which keys a query sees.
        held: What :func:`held_by` gives for the receivers, or for more members; None takes all members.
    """
    held = held or held_by(group, slice(0, len(group.members)), mask)
    if held is None:
        return see_bands(group, receivers, owners, mask)
    return _see_parts(group, held, receivers, owners, mask)


def extents(
    group: GroupLayout, receivers: slice, owners: slice, mask: Mask, held: Held | None = None
) -> tuple[IntArray, IntArray]:
    """``Reach.needed`` and ``Reach.rows`` of what :func:`see` gives; ``held`` may be that of the owners as well."""
    held = held or held_by(group, slice(0, len(group.members)), mask)
    if held is None:
        reach = see_bands(group, receivers, owners, mask)
        return reach.needed, reach.rows
    return _used(held, receivers, owners, mask), held.rows[owners]


def _used(held: Held, receivers: slice, owners: slice, mask: Mask) -> Ints:
    """``(n, m, C)`` keys of each piece of each owner that each receiver uses."""
    if mask.hides_later:
        return held.parts.used(receivers, owners)
    pieces = held.parts.pieces
    return pieces[owners] * (pieces[receivers, None] > 0)


def _see_parts(group: GroupLayout, held: Held, receivers: slice, owners: slice, mask: Mask) -> Reach:
    """The layouts of the splits: a row per query span and an entry per owner, for all at once."""
    present = held.runs.length[held.within(receivers)] != 0
    columns = present.any(0).nonzero()[0]  # parts of which no receiver has tokens show nothing
    present = present.take(columns, axis=1)
    document = held.parts.document.take(columns)
    seen, diagonals = _seen(held, receivers, owners, columns, present, mask)
    n, m, K = seen.shape
    C, pairs = len(held.documents), np.arange(n * m + 1)
    cell = (seen.reshape(-1) != 0).nonzero()[0]
    bounds = cell.searchsorted(pairs * K)
    count = bounds[1:] - bounds[:-1]
    column = query = cell - (pairs[:-1] * K).repeat(count)
    place = document.take(column)
    place += (pairs[:-1] * C).repeat(count)
    if n > 1:
        query = (present.cumsum(1) - 1).take(column + (pairs[:-1] // m * K).repeat(count))
    k_len = seen.take(cell).astype(np.int64)
    return Reach(
        spans=group.all_query_spans(receivers, held=held),
        shape=(n, m, C),
        rows=held.rows[owners],
        bounds=bounds,
        place=place,
        query=query,
        row=None,
        k_len=k_len,
        diagonal=k_len - 1 if diagonals is None else diagonals.take(cell).astype(np.int64),
        needed=_used(held, receivers, owners, mask),
    )


def _seen(
    held: Held, receivers: slice, owners: slice, columns: IntArray, present: Ints, mask: Mask
) -> tuple[Ints, Ints | None]:
    """``(n, m, K)`` keys that spans see of owners' pieces, 0 for those that are not there; and the diagonals.

    None stands for diagonals that hide nothing.
    """
    parts = held.parts
    if not mask.hides_later:
        return parts.pieces[owners].take(parts.document.take(columns), axis=1) * present[:, None], None
    found = [parts.seen(member, owners, columns) for member in range(receivers.start, receivers.stop)]
    if len(found) == 1:
        return found[0][0][None], found[0][1]
    seen = np.stack([one for one, _ in found])
    diagonals = np.stack([one - 1 if diagonal is None else diagonal for one, diagonal in found])
    seen *= present[:, None]
    return seen, diagonals


def joined(tables: list[SegmentTable], offsets: list[int], spans: QuerySpans) -> SegmentTable:
    """Tables over parts of one buffer as one, ordered by query."""
    query = np.concatenate([table.query for table in tables])
    k_start = np.concatenate([table.k_start + offset for table, offset in zip(tables, offsets, strict=True)])
    k_len = np.concatenate([table.k_len for table in tables])
    diagonal = np.concatenate([table.diagonal for table in tables])
    order, lower = query.argsort(kind="stable"), None
    if any(table.lower is not None for table in tables):
        lower = np.concatenate([table.lower_over(spans) for table in tables]).take(order)
    return SegmentTable(query.take(order), k_start.take(order), k_len.take(order), diagonal.take(order), lower)
