"""A layout as a small SVG: a lane per pipeline, coloured where it holds tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hetu.parallel.layout.printing import count
from hetu.parallel.mask.drawing import edges
from hetu.parallel.mask.svg import HIDDEN, Box, Words, colour_of, picture

if TYPE_CHECKING:
    from hetu.parallel.layout.layout import Layout

WIDTH, LANE, LEFT, MOST_CELLS = 480.0, 15.0, 80.0, 96

MOST_LANES, MOST_GROUPS, MOST_BOUNDS = 16, 8, 64
"""So much of a layout is drawn; how much more there is, is said."""


def draw_layout(layout: Layout) -> str:
    """A lane per pipeline, over the tokens of its group; a cell of which it holds a part is paler."""
    boxes: list[Box] = []
    texts: list[Words] = []
    y = 20.0
    for group in layout.groups[:MOST_GROUPS]:
        sides = edges(group.tokens, MOST_CELLS)
        sizes, scale = np.diff(sides), WIDTH / max(group.tokens, 1)
        head = f"group {group.value}: {count(len(group.lengths), 'document')}, {count(group.tokens, 'token')}"
        texts.append((10, y, head))
        top = y = y + 8
        for pipeline in group.members[:MOST_LANES]:
            texts.append((LEFT - 70, y + LANE - 4, f"pipeline {pipeline}"))
            boxes.append((LEFT, y, WIDTH, LANE - 2, HIDDEN, 1.0))
            held = np.histogram(layout.columns(pipeline), sides)[0] / sizes if len(sizes) else np.zeros(0)
            for begin, size, share in zip(sides, sizes, held.tolist(), strict=False):
                if share:
                    place = LEFT + begin * scale, y, size * scale, LANE - 2
                    boxes.append((*place, colour_of(pipeline), 0.3 + 0.7 * share))
            y += LANE
        bounds = group.offsets[1:].tolist() if len(group.lengths) <= MOST_BOUNDS else []
        boxes += [(LEFT + begin * scale - 0.5, top, 1, y - top - 2, "#24292f", 1.0) for begin in bounds]
        if len(group.members) > MOST_LANES:
            texts.append((LEFT, y + 12, f"... and {len(group.members) - MOST_LANES} more pipelines"))
            y += LANE
        y += 22
    if len(layout.groups) > MOST_GROUPS:
        texts.append((10, y, f"... and {len(layout.groups) - MOST_GROUPS} more groups"))
        y += 20
    return picture(WIDTH + LEFT + 14, y - 6, boxes, texts)
