"""What has to return in a backward: the gradients of foreign rows that segments name, by attend and owner."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

import numpy as np

from hetu.errors import PlanError
from hetu.parallel.mask.segments import IntArray, unite
from hetu.parallel.plan.instructions import Attend, Receive, Runs, Send
from hetu.parallel.plan.parts import PlanData


@dataclass(slots=True, eq=False)
class Return:
    """Gradients that one attend computed of the rows of one owner.

    Attributes:
        transfer: Its number.
        source: Who computed them.
        owner: Whose rows they belong to.
        distance: From the owner around the group to the source.
        buffer: The source's buffer of keys and values.
        runs: Rows of that buffer.
        home: The same rows in the owner's shard.
        wave: Which of the attend's it is, nearest owner first.
        round: When they are computed.
        before: How many messages of keys and values the source sends to the owner before.
        landing: The owner's buffer, once its receive is posted.
    """

    transfer: int
    source: int
    owner: int
    distance: int
    buffer: int
    runs: Runs
    home: Runs
    wave: int = 0
    round: int = -1
    before: int = 0
    landing: int | None = None

    @property
    def when(self) -> tuple[int, int]:
        """In which round and wave they are sent."""
        return self.round, self.wave


Returns = dict[tuple[int, int], list[Return]]
"""What attends have to send home, by pipeline and number of the instruction; nearest owner first."""


def find_returns(plan: PlanData) -> Returns:
    """The gradients of foreign rows that segments name, by attend and owner."""
    attends: list[Attend] = []
    sources: list[tuple[int, int, int, int]] = []
    transfer = 0
    for r, part in enumerate(plan.pipelines):
        for number, item in enumerate(part.instructions):
            if isinstance(item, Attend) and item.buffer:
                attends.append(item)
                sources += [(r, number, item.buffer, source.owner) for source in item.sources]
            elif isinstance(item, (Send, Receive)):
                transfer = max(transfer, item.transfer + 1)
    if not sources:
        return {}
    returns: Returns = {}
    for (r, number, buffer, owner), runs, home in zip(sources, *_used(attends), strict=True):
        if len(runs.start) == 0:
            continue
        if owner == r:
            what = f"pipeline {r} attends to its own rows in buffer {buffer}, where their gradients can't be added up"
            raise PlanError(what, op="plan", fix="attend to own rows in buffer 0")
        group, member = plan.layout.place(owner)
        distance = (plan.layout.place(r)[1] - member) % len(group.members)
        returns.setdefault((r, number), []).append(Return(transfer, r, owner, distance, buffer, runs, home))
        transfer += 1
    for sent in returns.values():
        sent.sort(key=attrgetter("distance"))
        for wave, ret in enumerate(sent):
            ret.wave = wave
    return returns


def _used(attends: list[Attend]) -> tuple[list[Runs], list[Runs]]:
    """The rows that segments name, for each source of each attend: in the buffer, and in the owner's shard.

    All at once, as if the buffers lay one after the other.
    """
    sources = [source for item in attends for source in item.sources]
    count = np.array([len(item.sources) for item in attends])
    runs = np.array([len(source.runs.start) for source in sources])
    home = np.concatenate([source.runs.start for source in sources])
    length = np.concatenate([source.runs.length for source in sources])
    end = length.cumsum()
    begin = end - length
    source_of = np.arange(len(sources)).repeat(runs)
    # Where each attend's buffer begins.
    last = np.append(0, end).take(runs.cumsum())
    base = np.append(0, last).take(np.append(0, count.cumsum()))[:-1]

    start, stop = _unite(attends, base)
    # Each run against each united stretch that it overlaps.
    lo, hi = end.searchsorted(start, "right"), begin.searchsorted(stop, "left")
    number = hi - lo
    run = np.arange(number.sum()) + (lo - (number.cumsum() - number)).repeat(number)
    first = np.maximum(begin.take(run), start.repeat(number))
    size = np.minimum(end.take(run), stop.repeat(number)) - first
    owner = source_of.take(run)
    in_buffer = first - base.repeat(count).take(owner)
    return (
        _join(owner, in_buffer, size, len(sources)),
        _join(owner, home.take(run) + first - begin.take(run), size, len(sources)),
    )


def _unite(attends: list[Attend], base: IntArray) -> tuple[IntArray, IntArray]:
    """Begins and ends of the stretches of rows that segments name; those of overlapping segments are united."""
    segments = np.array([len(item.table) for item in attends])
    start = np.concatenate([item.table.k_start for item in attends]) + base.repeat(segments)
    stop = start + np.concatenate([item.table.k_len for item in attends])
    return unite(start, stop)


def _join(owner: IntArray, start: IntArray, length: IntArray, owners: int) -> list[Runs]:
    """One set of runs for each of ``owners``, whose runs follow each other; runs that touch are joined."""
    is_first = np.ones(len(start), bool)
    is_first[1:] = (start[1:] != (start + length)[:-1]) | (owner[1:] != owner[:-1])
    first = is_first.nonzero()[0]
    if len(first):
        start, length = start.take(first), np.add.reduceat(length, first)
    bounds = owner.take(first).searchsorted(np.arange(owners + 1)).tolist()
    return [Runs(start[i:j], length[i:j]) for i, j in pairwise(bounds)]
