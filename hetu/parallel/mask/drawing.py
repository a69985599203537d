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


NAMES = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
SEVERAL, FURTHER = "*", "#"
"""Stand for several pipelines in one cell, and for those without a character of their own."""


def draw_owners(bands: Bands, computes: IntArray, holds: IntArray, width: int) -> str:
    """Which pipeline computes which pairs: a line per cell of queries, a column per cell of keys.

    Args:
        bands: Of one sequence.
        computes: ``(tokens,)`` which pipeline computes for each query.
        holds: ``(tokens,)`` which pipeline holds each token.
        width: Most columns.

    Example:
        >>> from hetu.parallel import Mask
        >>> half = np.array([0, 0, 1, 1])
        >>> print(draw_owners(Mask.causal().bands(np.array([4]), np.array([4])), half, half, 8))
        held by  0011
              0  0···
              0  00··
              1  111·
              1  1111
    """
    sides = edges(len(holds), width)
    held, named = _names(holds, sides), _names(computes, sides)
    rows = np.where(bands.pairs_in(sides, sides) > 0, np.array(named)[:, None], NONE).tolist() if named else []
    lines = [f"held by  {''.join(held)}"]
    return "\n".join(lines + [f"{mark:>7}  {''.join(row)}" for mark, row in zip(held, rows, strict=True)])


def _names(pipelines: IntArray, sides: IntArray) -> list[str]:
    """The pipeline of each cell, as a character."""
    least, most = (ufunc.reduceat(pipelines, sides[:-1]).tolist() for ufunc in (np.minimum, np.maximum))
    return [(NAMES[a] if a < len(NAMES) else FURTHER) if a == b else SEVERAL for a, b in zip(least, most, strict=True)]
