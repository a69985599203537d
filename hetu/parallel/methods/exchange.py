"""What goes straight from owners to receivers, of the methods in which keys and values make one hop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from hetu.parallel.layout.group import GroupLayout, Held
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import QuerySpans, SegmentTable
from hetu.parallel.methods.part import cut_runs
from hetu.parallel.methods.peers import whole
from hetu.parallel.methods.sight import Viewer, viewer
from hetu.parallel.methods.tables import extents, held_by, see
from hetu.parallel.plan.instructions import Runs

_CELLS = 2**15
"""How many cells of dense tables are worked on at once: as many as a core's own cache holds. Where everybody is
everybody's neighbour there are millions."""

_NONE = whole(0)


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """What goes straight from owners to receivers, for some members of a group.

    Attributes:
        taken: For each of them and each owner the number of rows that it takes; 0 of itself.
        tables: Likewise what it sees; key rows are counted from the first one that it takes of the owner, or in its own
            shard.
        landed: Likewise which rows of the owner's shard it takes.
        given: For each receiver and each of them the number of rows that it is given; 0 by itself.
        sent: Likewise which rows of their own shards these are.
        spans: The query spans of each of them.
    """

    taken: list[list[int]]
    tables: list[list[SegmentTable]]
    landed: list[list[Runs]]
    given: list[list[int]] = field(default_factory=list)
    sent: list[list[Runs]] = field(default_factory=list)
    spans: list[QuerySpans] = field(default_factory=list)


def exchange(group: GroupLayout, who: slice, mask: Mask) -> Exchange:
    """What goes straight from owners to receivers, for members given as a slice."""
    R, n = len(group.members), who.stop - who.start
    held = held_by(group, who, mask)
    found = Exchange([[] for _ in range(n)], [[] for _ in range(n)], [[] for _ in range(n)])
    alone = viewer(group, held, mask) if held is not None and n == 1 else None
    if alone is not None:
        _look(found, alone, R)
    else:
        for owners in _blocks(R, n, held):
            _take(found, group, who, owners, mask, held)
    if n == R:  # who builds all parts knows already what every receiver takes
        found.given.extend(found.taken)
        found.sent.extend(found.landed)
        return found
    for receivers in _blocks(R, n, held):
        given, rows = extents(group, receivers, who, mask, held)
        for member in range(max(who.start, receivers.start), min(who.stop, receivers.stop)):
            given[member - receivers.start, member - who.start] = 0
        found.given.extend(given.sum(2, dtype=given.dtype).tolist())
        found.sent.extend(cut_runs(rows, given))
    return found


def _take(found: Exchange, group: GroupLayout, who: slice, owners: slice, mask: Mask, held: Held | None) -> None:
    """Adds what members take of some more owners."""
    reach, m = see(group, who, owners, mask, held), owners.stop - owners.start
    taken = reach.needed
    both = np.arange(max(who.start, owners.start), min(who.stop, owners.stop))
    taken[both - who.start, both - owners.start] = 0
    first = taken.cumsum(2, dtype=taken.dtype)
    first -= taken
    first[both - who.start, both - owners.start] = reach.rows[both - owners.start]
    tables, sizes, landed = (
        reach.tables(first, reach.rows),
        taken.sum(2, dtype=taken.dtype).tolist(),
        cut_runs(reach.rows, taken),
    )
    for i in range(who.stop - who.start):
        found.taken[i] += sizes[i]
        found.landed[i] += landed[i]
        found.tables[i] += tables[i * m : i * m + m]
    if owners.start == 0:
        found.spans.extend(reach.spans)


def _look(found: Exchange, alone: Viewer, members: int) -> None:
    """Adds what one member takes of all owners."""
    found.spans.append(alone.spans)
    for owner in range(members):
        rows, landed, table = (0, _NONE, alone.own) if owner == alone.member else alone.take(owner)
        found.taken[0].append(rows)
        found.landed[0].append(landed)
        found.tables[0].append(table)


def _blocks(members: int, others: int, held: Held | None) -> Iterator[slice]:
    """All members, in as many blocks as fit a cache; in one where there are no closed forms."""
    cells = 1 if held is None else max(others * len(held.parts.document), 1)
    size = members if held is None else max(_CELLS // cells, 1)
    return (slice(begin, min(begin + size, members)) for begin in range(0, members, size))
