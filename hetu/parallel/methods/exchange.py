"""What goes straight from owners to receivers, of the methods in which keys and values make one hop."""

from __future__ import annotations

from typing import Any

import numpy as np

from hetu.parallel.layout.layout import GroupLayout
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import SegmentTable
from hetu.parallel.methods.part import cut_runs
from hetu.parallel.methods.tables import extents, see


def exchange(group: GroupLayout, who: slice, mask: Mask) -> tuple[Any, Any, list[SegmentTable], Any, Any]:
    """What goes straight from owners to receivers.

    Returns:
        For each of ``who`` and each owner the number of rows that it takes (0 of itself); for each receiver and each of
        ``who`` the number that is given; the tables, with key rows counted from the pair's first; and the runs of the
        owners' shards, indexed as the first two.
    """
    R, n = len(group.members), who.stop - who.start
    everyone, rows, members = slice(0, R), np.arange(n), np.arange(who.start, who.stop)
    reach = see(group, who, everyone, mask)
    taken = reach.extents()
    taken[rows, members] = 0
    first = taken.cumsum(2)
    first -= taken
    first[rows, members] = group.piece_row[who]
    tables = reach.tables(first)
    if n == R:  # who builds all parts has every receiver's extents already
        sizes, landed = taken.sum(2).tolist(), cut_runs(group.piece_row, taken)
        return sizes, sizes, tables, landed, landed
    given = extents(group, everyone, who, mask).transpose(1, 0, 2)
    given[rows, members] = 0
    both = np.concatenate([taken, given])
    start = np.concatenate([group.piece_row[None].repeat(n, axis=0), group.piece_row[who, None].repeat(R, axis=1)])
    sizes, runs = both.sum(2).tolist(), cut_runs(start, both)
    # Given rows are indexed by receiver first, as those of who builds all parts.
    swap = [list(zip(*half, strict=True)) for half in (sizes[n:], runs[n:])]
    return sizes[:n], swap[0], tables, runs[:n], swap[1]
