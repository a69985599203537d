"""Where the gradients of keys and values are written that an attend computes, when several steps compute some.

Those of the queries' own buffer stay there. Attends to disjoint ranges of its rows write theirs where they belong, one
beside the other, and nothing has to be added or kept in float32. What would overwrite a gradient is computed aside, for
the whole buffer, and added. Those of foreign rows are computed anew by each attend, and only of rows that it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetu.parallel.mask.segments import IntArray, unite
from hetu.parallel.plan.heads import HeadRange, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Runs

if TYPE_CHECKING:
    from hetu.parallel.plan.parts import PipelinePlan

Stretches = tuple[IntArray, IntArray]
"""Begins and ends of rows, of which none is in two."""


@dataclass(frozen=True, slots=True)
class OwnGradients:
    """What happens to the gradients of the keys and values of the shard, and of the queries' buffer.

    Attributes:
        aside: Attends to the queries' buffer, by number of the instruction, that name a row of which there is a
            gradient already, of an earlier attend or one that was added. The others write in place.
        gaps: Those of the two buffers in which nothing writes the gradients of some row and head in place, and
            buffers of foreign rows in which gradients are summed up: they have to be 0 from the beginning.
    """

    aside: frozenset[int]
    gaps: frozenset[int]


def own_gradients(part: PipelinePlan) -> OwnGradients:
    """Of a part of a backward plan; found once."""
    return part.known("own_gradients", lambda: _find(part))


def _find(part: PipelinePlan) -> OwnGradients:
    aside: set[int] = set()
    taken: dict[HeadRange, Stretches] = {}  # rows of the queries' buffer of which there is a gradient
    written = dict.fromkeys((0, part.queries), 0)  # in place: rows times key heads
    summed: set[int] = set()
    for number, item in enumerate(part.instructions):
        match item:
            case Attend(buffer=buffer) if buffer == part.queries:
                named = item.table.stretches()
                if any(_meet(rows, named) for heads, rows in taken.items() if heads.overlaps(item.heads)):
                    aside.add(number)
                else:
                    written[buffer] += _count(named) * item.heads.num_kv
                taken[item.heads] = _joined(taken.get(item.heads, _NONE), named)
            case Accumulate() if part.queries == 0:
                taken[item.heads] = _joined(taken.get(item.heads, _NONE), _rows_of(item.runs))
            case Receive(buffer=0, payload=Payload.QKV_GRADS):
                written[0] += item.rows * item.heads.num_kv
            case Copy(target=0, payload=Payload.QKV_GRADS):
                written[0] += item.place.rows * item.heads.num_kv
            case Copy(payload=Payload.KV_GRADS) if item.target not in written:
                summed.add(item.target)
    holds = {buffer: part.buffers[buffer].rows * part.buffers[buffer].heads.num_kv for buffer in written}
    gaps = [buffer for buffer in written if written[buffer] < holds[buffer]]
    return OwnGradients(frozenset(aside), frozenset([*gaps, *summed]))


_NONE: Stretches = (np.empty(0, np.int64), np.empty(0, np.int64))


def _meet(one: Stretches, other: Stretches) -> bool:
    return _count(_joined(one, other)) < _count(one) + _count(other)


def _rows_of(runs: Runs) -> Stretches:
    if runs.step is None:
        return runs.start, runs.start + runs.length
    rows = runs.indices()
    return rows, rows + 1


def _joined(one: Stretches, other: Stretches) -> Stretches:
    return unite(np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]]))


def _count(stretches: Stretches) -> int:
    return int((stretches[1] - stretches[0]).sum())
