"""Small SVG pictures of masks and layouts, for notebooks; readable on light and on dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from hetu.parallel.mask.bands import Bands
from hetu.parallel.mask.drawing import edges
from hetu.parallel.mask.segments import IntArray

COLOURS = ("#3d7eea", "#e0812f", "#2f9e6b", "#a35bd0", "#c9446e", "#7a8b2a", "#2aa3b8", "#8c6d4f")
"""A colour per pipeline, again from the first after the last."""

HIDDEN = "#eef1f4"
"""The colour of pairs that a mask hides."""

Box = tuple[float, float, float, float, str, float]
"""x, y, width, height, colour and opacity."""

Words = tuple[float, float, str]
"""x, y of the baseline, and what is written."""


def colour_of(pipeline: int) -> str:
    """A pipeline's colour."""
    return COLOURS[pipeline % len(COLOURS)]


def picture(width: float, height: float, boxes: Sequence[Box], texts: Sequence[Words] = ()) -> str:
    """An SVG on a white card, so that a page's own colours don't matter."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" role="img">'
    parts = [head, f'<rect width="{width:g}" height="{height:g}" rx="6" fill="#ffffff"/>']
    for x, y, wide, high, colour, opacity in boxes:
        place = f'x="{x:.5g}" y="{y:.5g}" width="{wide:.5g}" height="{high:.5g}"'
        parts.append(f'<rect {place} fill="{colour}" fill-opacity="{opacity:.3g}"/>')
    font = 'font-family="system-ui, sans-serif" font-size="11" fill="#24292f"'
    parts += [f'<text x="{x:g}" y="{y:g}" {font}>{escape(words)}</text>' for x, y, words in texts]
    return "\n".join([*parts, "</svg>"])


def pairs(bands: Bands, computes: IntArray, x: float, y: float, size: float, most: int = 48) -> list[Box]:
    """Which pairs of one sequence are allowed, in the colours of who computes them: queries down, keys across.

    Args:
        bands: Of one sequence.
        computes: ``(tokens,)`` which pipeline computes for each query.
        x: Left edge.
        y: Upper edge.
        size: Of the square.
        most: Most cells along a side; a cell of which only some pairs are allowed is paler.
    """
    sides = edges(len(computes), most)
    sizes, counts = np.diff(sides), bands.pairs_in(sides, sides)
    scale, boxes = size / max(len(computes), 1), [(x, y, size, size, HIDDEN, 1.0)]
    for i, row in enumerate((counts / (sizes[:, None] * sizes)).tolist()):
        colour = colour_of(int(computes[sides[i]]))
        for j, share in enumerate(row):
            if share:
                place = x + sides[j] * scale, y + sides[i] * scale, sizes[j] * scale, sizes[i] * scale
                boxes.append((*place, colour, 0.35 + 0.65 * share))
    return boxes
