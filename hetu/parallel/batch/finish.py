"""When the pipelines are done with the documents that they were given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hetu.parallel.batch.cost import BatchCost, Documents


class Place(NamedTuple):
    """Where a document is.

    Attributes:
        micro_batch: Its micro-batch.
        pieces: Its pieces: ``(pipeline, tokens)``, one if it is whole.
    """

    micro_batch: int
    pieces: tuple[tuple[int, int], ...]


Placed = tuple[int, tuple[tuple[int, int], ...]]
"""The fields of a place: to make a tuple of a class takes as long as placing a document."""


def finish(
    documents: Documents, places: Sequence[Placed], pipelines: int, micro_batches: int, cost: BatchCost
) -> list[float]:
    """The second at which each pipeline is done with all of its micro-batches.

    Pipelines that share a document of a micro-batch, or share others with the same pipeline, begin it when all of them
    are done with the micro-batches before, and end it when the slowest of them is done.
    """
    held: list[list[int]] = [[] for _ in range(micro_batches)]
    for d, (micro_batch, _) in enumerate(places):
        held[micro_batch].append(d)
    ends = [0.0] * pipelines
    for own in held:
        took = _seconds(documents, places, own, pipelines, cost)
        cut = joined([[r for r, _ in pieces] for _, pieces in [places[d] for d in own] if len(pieces) > 1])
        waiting = {r for members in cut for r in members}
        ends = [end if r in waiting else end + took[r] for r, end in enumerate(ends)]
        for members in cut:
            end = max([ends[r] for r in members]) + max([took[r] for r in members])
            for r in members:
                ends[r] = end
    return ends


def _seconds(
    documents: Documents, places: Sequence[Placed], own: Sequence[int], pipelines: int, cost: BatchCost
) -> list[float]:
    """What each pipeline takes for some documents, without waiting for others to begin or end."""
    tokens, came, went, is_cut = ([0] * pipelines for _ in range(4))
    attention = [0.0] * pipelines
    for d in own:
        length, whole, (_, pieces) = documents.lengths[d], documents.attention[d], places[d]
        others = len(pieces) - 1
        if not others:
            r, x = pieces[0]
            tokens[r] += x
            attention[r] += whole * x / max(length, 1)
            continue
        edge = cost.edge(length, whole)
        for r, x in pieces:
            tokens[r] += x
            if x:
                attention[r] += whole * x / length
            attention[r] += edge
            came[r] += length - x
            went[r] += x * others
            is_cut[r] = True
    return [cost.seconds(tokens[r], attention[r], max(came[r], went[r]), bool(is_cut[r])) for r in range(pipelines)]


def joined(sets: Sequence[Sequence[int]]) -> list[list[int]]:
    """Sets that share a member put together.

    Example:
        >>> joined([[0, 1], [4], [1, 2], [4]])
        [[0, 1, 2], [4]]
    """
    leader: dict[int, int] = {}

    def find(r: int) -> int:
        while leader.setdefault(r, r) != r:
            leader[r] = r = leader[leader[r]]
        return r

    for members in sets:
        first = find(members[0])
        for r in members[1:]:
            leader[find(r)] = first
    found: dict[int, list[int]] = {}
    for r in sorted(leader):
        found.setdefault(find(r), []).append(r)
    return list(found.values())
