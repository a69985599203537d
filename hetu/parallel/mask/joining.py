"""What evenly spaced queries see of evenly spaced keys inside a band: segments, in one go for many of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetu.parallel.mask.bands import Bands
from hetu.parallel.mask.segments import IntArray, count_up


class Runs(NamedTuple):
    """Positions ``start, start + step, ...``, of which there are ``length``; an entry per run."""

    start: IntArray
    step: IntArray
    length: IntArray


class Seen(NamedTuple):
    """Segments. Columns as of a ``SegmentTable``; in normal form.

    Attributes:
        item: Of which run of queries and run of keys it is.
        offset: First key, counted in the run of keys.
        k_len: Keys.
        diagonal: Row i of the run sees no key after number ``i + diagonal`` of the segment.
        lower: Row i of the run sees no key before number ``i + lower`` of the segment.
    """

    item: IntArray
    offset: IntArray
    k_len: IntArray
    diagonal: IntArray
    lower: IntArray


def join_runs(queries: Runs, keys: Runs, bands: Bands, band: IntArray) -> Seen:
    """What runs of queries see of runs of keys.

    Row i of a run sees key j of another where ``lower <= key position - query position <= upper``. With equal steps
    that is one segment, whose diagonals are these bounds in steps. With unequal ones it is a staircase, key by key;
    only the keys that all rows see are one segment.

    Args:
        queries: ``(n,)`` runs, each inside the queries of its band.
        keys: ``(n,)`` runs.
        bands: The bands.
        band: ``(n,)`` which one lets them see each other.

    Returns:
        The segments, ordered by item and then by offset.
    """
    q, a, rows = queries
    offset = np.maximum(-((keys.start - bands.k_start[band]) // keys.step), 0)
    stop = np.minimum(-((keys.start - bands.k_stop[band]) // keys.step), keys.length)
    count = np.maximum(stop - offset, 0)
    k = keys.start + offset * keys.step
    # The step of a run of one may be anything.
    a, b = np.where(rows == 1, keys.step, a), np.where(count == 1, a, keys.step)
    b = np.where((rows == 1) & (count == 1), a, b)
    lower, upper, last = bands.lower[band], bands.upper[band], q + (rows - 1) * a
    # Keys that a row sees: first .. end; those that all rows see, where steps are equal the same.
    first, end = np.maximum(-((k - q - lower) // b), 0), np.minimum((last + upper - k) // b, count - 1)
    is_even = a == b
    all_first = np.where(is_even, first, np.clip(-((k - last - lower) // b), first, end + 1))
    all_end = np.where(is_even, end, np.clip((q + upper - k) // b, all_first - 1, end))

    k_len = all_end - all_first + 1
    # In steps from row 0 and the first key; of a rectangle beside stairs all rows see all keys.
    diagonal = np.where(is_even, (upper + q - k) // b - all_first, k_len - 1)
    low = np.where(is_even, -((k - q - lower) // b) - all_first, 1 - rows)
    # Bounds closer to each other than a step may let nobody see anything.
    whole = ((k_len > 0) & (low <= diagonal)).nonzero()[0]
    of_rectangles = [column[whole] for column in (np.arange(len(q)), all_first, k_len, diagonal, low)]
    alone = [np.maximum(all_first - first, 0), np.maximum(end - all_end, 0)]
    stairs = alone[0] + alone[1]
    item, number = np.arange(len(q)).repeat(stairs), count_up(stairs)
    key = number + np.where(number < alone[0][item], first[item], (all_end + 1 - alone[0])[item])
    of_stairs = _stairs(item, key, k[item] + key * b[item] - q[item], a[item], rows[item], (lower, upper))

    parts = [np.concatenate(columns) for columns in zip(of_rectangles, of_stairs, strict=True)]
    order = np.lexsort((parts[1], parts[0])) if len(item) else slice(None)
    item, at, k_len, diagonal, low = (column[order] for column in parts)
    diagonal, low = np.minimum(diagonal, k_len - 1), np.maximum(low, 1 - rows[item])
    return Seen(item, offset[item] + at, k_len, diagonal, low)


def _stairs(
    item: IntArray, key: IntArray, apart: IntArray, step: IntArray, rows: IntArray, bounds: tuple[IntArray, IntArray]
) -> tuple[IntArray, ...]:
    """Segments of one key each, those that a row sees; ``apart``: how far the key stands behind row 0."""
    lower, upper = (bound[item] for bound in bounds)
    since, until = np.maximum(-((upper - apart) // step), 0), np.minimum((apart - lower) // step, rows - 1)
    live = (since <= until).nonzero()[0]
    one = np.ones(len(live), np.int64)
    return item[live], key[live], one, -since[live], -until[live]


def only_if_needed(lower: IntArray, rows: IntArray) -> IntArray | None:
    """Lower diagonals as a ``SegmentTable`` has them: None where none hides anything of so many rows."""
    return lower if len(lower) and bool((lower > 1 - rows).any()) else None
