"""What goes straight from owners to receivers, of the methods in which keys and values make one hop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hetu.parallel.layout.layout import GroupLayout
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable
from hetu.parallel.methods.part import cut_runs
from hetu.parallel.methods.tables import extents, see
from hetu.parallel.plan.instructions import Runs


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """What goes straight from owners to receivers, for some members of a group.

    Attributes:
        taken: For each of them and each owner the number of rows that it takes; 0 of itself.
        given: For each receiver and each of them the number of rows that it is given; 0 by itself.
        tables: For each of them and each owner, in this order, what it sees; key rows are counted from the first one
            that it takes of the owner, or in its own shard.
        landed: Which rows of the owners' shards are taken, indexed as ``taken``.
        sent: Which rows of their own shards are given, indexed as ``given``.
        spans: The query spans of each of them.
    """

    taken: Any
    given: Any
    tables: list[SegmentTable]
    landed: list[list[Runs]]
    sent: list[list[Runs]]
    spans: list[QuerySpans]


def exchange(group: GroupLayout, who: slice, mask: Mask) -> Exchange:
    """What goes straight from owners to receivers, for members given as a slice."""
    R, n = len(group.members), who.stop - who.start
    everyone, rows, members = slice(0, R), np.arange(n), np.arange(who.start, who.stop)
    reach = see(group, who, everyone, mask)
    taken = reach.extents()
    taken[rows, members] = 0
    first = taken.cumsum(2)
    first -= taken
    first[rows, members] = reach.rows[who]
    tables = reach.tables(first, reach.rows)
    if n == R:  # who builds all parts has every receiver's extents already
        sizes, landed = taken.sum(2).tolist(), cut_runs(reach.rows, taken)
        return Exchange(sizes, sizes, tables, landed, landed, reach.spans)
    given, own_rows = extents(group, everyone, who, mask)
    given = given.transpose(1, 0, 2)
    given[rows, members] = 0
    cells = max(taken.shape[2], given.shape[2])
    both = np.concatenate([_widened(taken, cells), _widened(given, cells)])
    theirs, own = _widened(reach.rows, cells), _widened(own_rows, cells)
    start = np.concatenate([theirs[None].repeat(n, axis=0), own[:, None].repeat(R, axis=1)])
    sizes, runs = both.sum(2).tolist(), cut_runs(start, both)
    # Given rows are indexed by receiver first, as those of who builds all parts.
    given_rows, sent = ([list(column) for column in zip(*half, strict=True)] for half in (sizes[n:], runs[n:]))
    return Exchange(sizes[:n], given_rows, tables, runs[:n], sent, reach.spans)


def _widened(x: IntArray, cells: int) -> IntArray:
    """With so many cells: those that are added have no rows."""
    missing = cells - x.shape[-1]
    return np.concatenate([x, np.zeros((*x.shape[:-1], missing), np.int64)], axis=-1) if missing else x
