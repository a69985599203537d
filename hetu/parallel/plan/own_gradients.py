"""Where the gradients of a pipeline's own keys and values are written, when several steps compute some.

Attends to disjoint ranges of own rows write theirs where they belong, one beside the other, and nothing has to be added
or kept in float32. What would overwrite a gradient is computed aside, for the whole shard, and added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetu.parallel.mask.segments import IntArray, unite
from hetu.parallel.plan.instructions import Accumulate, Attend, Runs

if TYPE_CHECKING:
    from hetu.parallel.plan.parts import PipelinePlan

Stretches = tuple[IntArray, IntArray]
"""Begins and ends of rows, of which none is in two."""


@dataclass(frozen=True, slots=True)
class OwnGradients:
    """What happens to the gradients of own rows.

    Attributes:
        aside: Attends to the own shard, by number of the instruction, that name a row of which there is a gradient
            already, of an earlier attend to the shard or one that was added. The others write in place.
        has_gaps: Whether no attend that writes in place names some row, which has to be 0 from the beginning.
    """

    aside: frozenset[int]
    has_gaps: bool


def own_gradients(part: PipelinePlan) -> OwnGradients:
    """Of a part of a backward plan; found once."""
    return part.known("own_gradients", lambda: _find(part))


def _find(part: PipelinePlan) -> OwnGradients:
    steps = [number for number, item in enumerate(part.instructions) if isinstance(item, Attend) and item.buffer == 0]
    aside: set[int] = set()
    taken: Stretches = np.empty(0, np.int64), np.empty(0, np.int64)  # rows of which there is a gradient
    in_place = 0
    for number, item in enumerate(part.instructions[: steps[-1] + 1] if steps else ()):
        if isinstance(item, Accumulate):
            taken = _joined(taken, _rows_of(item.runs))
        elif isinstance(item, Attend) and item.buffer == 0:
            named, before = item.table.stretches(), taken
            taken = _joined(taken, named)
            if _count(taken) < _count(before) + _count(named):
                aside.add(number)
            else:
                in_place += _count(named)
    return OwnGradients(frozenset(aside), in_place < part.rows)


def _rows_of(runs: Runs) -> Stretches:
    if runs.step is None:
        return runs.start, runs.start + runs.length
    rows = runs.indices()
    return rows, rows + 1


def _joined(one: Stretches, other: Stretches) -> Stretches:
    return unite(np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]]))


def _count(stretches: Stretches) -> int:
    return int((stretches[1] - stretches[0]).sum())
