"""Masks in characters."""

from __future__ import annotations

import numpy as np

from hetu.parallel.mask.bands import Bands
from hetu.parallel.mask.segments import IntArray

ALL, SOME, NONE = "█", "▒", "·"


def edges(tokens: int, width: int) -> IntArray:
    """Where the cells of a drawing begin and the last one ends: one per token, or at most ``width`` of equal size.

    Example:
        >>> edges(3, 8).tolist(), edges(9, 4).tolist()
        ([0, 1, 2, 3], [0, 3, 6, 9])
    """
    size = max(-(-tokens // max(width, 1)), 1)
    return np.append(np.arange(0, tokens, size), tokens)


def draw_pairs(bands: Bands, tokens: int, width: int) -> str:
    """Which pairs bands of one sequence have, in a line per cell of queries and a column per cell of keys."""
    sides = edges(tokens, width)
    pairs, size = bands.pairs_in(sides, sides), np.diff(sides)
    marks = np.where(pairs == size[:, None] * size, ALL, np.where(pairs > 0, SOME, NONE))
    return "\n".join("".join(row) for row in marks.tolist())
