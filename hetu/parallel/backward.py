"""From the plan of an attention to the plan of its gradients, whatever the method that moves keys and values.

Keys and values travel once more as in the forward, for they are not kept. After each attend the gradients of foreign
rows, those that a segment names, go straight home to their owner, who adds them to the gradients of its own shard.

When does an owner wait for gradients? Late enough that they travel while it computes, and never so that pipelines wait
for each other in a circle. Counting each pipeline's own attends is not enough: in a ring over documents that lie on few
pipelines one's second attend may be at the fourth hop, and the owner would hold up the ring there while it waits for
it. So the forward's instructions are put into one order for all pipelines in which all can be followed, in rounds of at
most one attend a pipeline, and the rest is put in between:

* What was computed in round i is sent at its end, in waves: each pipeline sends the gradients of one owner a wave,
  nearest first, and owners post the receives before anybody computes again. They are added at the end of round i + 1,
  or after the next wave, in the order of rounds, waves and the distance around the group. That order is in the plan,
  so sums have the same bits every time.
* So two landing buffers that take turns are enough, unless several pipelines send to one in the same wave.
* Process groups match the messages of two pipelines by their order, those of keys and values too: where an owner posts
  the receive of keys and values early, it posts those of gradients that are sent before them first.
* A sender waits for what it sent when its next gradients are computed.

Why this can't deadlock, even if all that computes waits for the transfers under way (see
:mod:`hetu.parallel.verify_follow`): instructions are appended to the pipelines in one common order, in which a wait
stands after both ends of its transfer are posted, and so does whatever a pipeline computes after it posted an end. So
of all the instructions that are not followed yet, the first in that order can always be followed.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from operator import attrgetter

import numpy as np

from hetu.errors import PlanError
from hetu.parallel.plan import (
    Accumulate,
    Attend,
    AttnPlan,
    Instruction,
    Kind,
    PipelinePlan,
    Receive,
    Runs,
    Send,
    Wait,
    batches,
)
from hetu.parallel.segments import IntArray


@dataclass(slots=True, eq=False)
class _Return:
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


Returns = dict[tuple[int, int], list[_Return]]
"""What attends have to send home, by pipeline and number of the instruction; nearest owner first."""


def build_backward(plan: AttnPlan) -> AttnPlan:
    """See :meth:`hetu.parallel.plan.AttnPlan.backward`."""
    returns = _find_returns(plan)
    rounds = _Order(plan, returns).rounds()
    parts = [_Part(part) for part in plan.pipelines]
    waves: dict[tuple[int, int], list[_Return]] = {}
    for ret in sorted(chain.from_iterable(returns.values()), key=attrgetter("when", "distance", "transfer")):
        waves.setdefault(ret.when, []).append(ret)
        parts[ret.owner].expect(ret)
    for number, (steps, clear) in enumerate(rounds):
        for r, step in steps:
            parts[r].follow(step)
        for wave in range(max(sum(when[0] == number for when in waves), 1)):
            sent = waves.get((number, wave), [])
            for ret in sent:
                parts[ret.source].send(ret)
            for ret in sent:
                parts[ret.owner].post_up_to(ret)
            for r in clear:
                parts[r].add_up((number, wave))
    for part in parts:
        part.add_up((len(rounds), 0))
    pipelines = tuple([part.finish() for part in parts])
    return AttnPlan(plan.layout, plan.method, plan.is_causal, plan.heads, pipelines, is_backward=True)


# What has to return


def _find_returns(plan: AttnPlan) -> Returns:
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
        returns.setdefault((r, number), []).append(_Return(transfer, r, owner, distance, buffer, runs, home))
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
    order = start.argsort(kind="stable")
    start, stop = start.take(order), np.maximum.accumulate(stop.take(order))
    is_first = np.ones(len(start), bool)
    np.greater(start[1:], stop[:-1], out=is_first[1:])
    first = is_first.nonzero()[0]
    return start.take(first), stop.take(np.append(first, len(start))[1:] - 1)


def _join(owner: IntArray, start: IntArray, length: IntArray, owners: int) -> list[Runs]:
    """One set of runs for each of ``owners``, whose runs follow each other; runs that touch are joined."""
    is_first = np.ones(len(start), bool)
    is_first[1:] = (start[1:] != (start + length)[:-1]) | (owner[1:] != owner[:-1])
    first = is_first.nonzero()[0]
    if len(first):
        start, length = start.take(first), np.add.reduceat(length, first)
    bounds = owner.take(first).searchsorted(np.arange(owners + 1)).tolist()
    return [Runs(start[i:j], length[i:j]) for i, j in pairwise(bounds)]


# The common order of all pipelines


class _Order:
    """Follows the forward's instructions on all pipelines; notes in which round each return is computed.

    Whoever computes has no transfer under way of which the other end is not posted.
    """

    def __init__(self, plan: AttnPlan, returns: Returns) -> None:
        self.instructions = [part.instructions for part in plan.pipelines]
        self.batches = [batches(part) for part in plan.pipelines]
        self.returns = returns
        self.next = [0] * len(self.instructions)
        self.ends: Counter[int] = Counter()  # of transfers: how many are posted
        self.open: list[set[int]] = [set() for _ in self.instructions]  # what has no other end yet
        self.sent: Counter[tuple[int, int]] = Counter()  # messages from one pipeline to another

    def rounds(self) -> list[tuple[list[tuple[int, int]], list[int]]]:
        """Each round's instructions as (pipeline, number), at most one attend a pipeline; and who may compute then.

        Raises:
            PlanError: If they can't all be followed.
        """
        rounds: list[tuple[list[tuple[int, int]], list[int]]] = []
        while any(done < len(items) for done, items in zip(self.next, self.instructions, strict=True)):
            steps: list[tuple[int, int]] = []
            going, before = list(range(len(self.next))), -1
            while len(steps) > before:  # one pipeline's progress may free another
                before = len(steps)
                going = [r for r in going if not self._advance(r, len(rounds), steps)]
            if not steps:
                stuck = [r for r, items in enumerate(self.instructions) if self.next[r] < len(items)]
                what = f"pipelines {stuck} wait for each other for ever"
                raise PlanError(what, op="plan", fix="see what plan.verify() says of the forward")
            rounds.append((steps, [r for r, transfers in enumerate(self.open) if not transfers]))
        return rounds

    def _advance(self, r: int, number: int, steps: list[tuple[int, int]]) -> bool:
        """Follows one pipeline's instructions up to an attend or a wait; says whether it attended."""
        items = self.instructions[r]
        while self.next[r] < len(items):
            step = self.next[r]
            item = items[step]
            if isinstance(item, Wait):
                if self.ends[item.transfer] < 2:
                    return False
            elif (isinstance(item, Attend) or step in self.batches[r]) and self.open[r]:
                return False
            steps.append((r, step))
            self.next[r] += 1
            if isinstance(item, Attend):
                for ret in self.returns.get((r, step), ()):
                    ret.round, ret.before = number, self.sent[r, ret.owner]
                return True
            if isinstance(item, (Send, Receive)):
                self._post(r, item)
        return False

    def _post(self, r: int, item: Send | Receive) -> None:
        self.ends[item.transfer] += 1
        if self.ends[item.transfer] == 1:
            self.open[r].add(item.transfer)
        else:
            self.open[item.peer].discard(item.transfer)
        if isinstance(item, Send):
            self.sent[r, item.peer] += 1


# The pipelines


@dataclass(slots=True, eq=False)
class _Part:
    """Collects one pipeline's instructions.

    Attributes:
        forward: Its part of the forward.
        instructions: What was collected.
        landing: Rows of its landing buffers.
        free: Those that nothing is on its way to, longest free first.
        coming: What will return to it, in the order in which it is added.
        added: How many of these are added.
        unposted: Those of each source that have no receive, in the order in which they are sent.
        received: How many receives of keys and values from each source are posted.
        sent: What it sends home and hasn't waited for.
    """

    forward: PipelinePlan
    instructions: list[Instruction] = field(default_factory=list)
    landing: list[int] = field(default_factory=list)
    free: deque[int] = field(default_factory=deque)
    coming: list[_Return] = field(default_factory=list)
    added: int = 0
    unposted: dict[int, deque[_Return]] = field(default_factory=dict)
    received: Counter[int] = field(default_factory=Counter)
    sent: list[_Return] = field(default_factory=list)

    def expect(self, ret: _Return) -> None:
        """Notes what will return, in the order in which it is added."""
        self.coming.append(ret)
        self.unposted.setdefault(ret.source, deque()).append(ret)

    def follow(self, step: int) -> None:
        """Appends an instruction of the forward and what goes with it."""
        item = self.forward.instructions[step]
        if isinstance(item, Receive):
            # Gradients that the peer sends before these keys and values are received before them.
            first = self.unposted.get(item.peer, ())
            while first and first[0].before <= self.received[item.peer]:
                self._post(first[0])
            self.received[item.peer] += 1
        elif isinstance(item, Attend):  # nothing reads any more what it overwrites
            self._wait_for([ret for ret in self.sent if ret.buffer == item.buffer])
        self.instructions.append(item)
        if isinstance(item, Attend):
            self._wait_for(list(self.sent))

    def send(self, ret: _Return) -> None:
        """Sends home what the last attend computed of one owner's rows."""
        self.instructions.append(Send(ret.transfer, ret.owner, ret.buffer, ret.runs, Kind.KV_GRADS))
        self.sent.append(ret)

    def post_up_to(self, ret: _Return) -> None:
        """Sees to it that a return has a receive, after those of what its source sends earlier."""
        while ret.landing is None:
            self._post(self.unposted[ret.source][0])

    def add_up(self, before: tuple[int, int]) -> None:
        """Waits for and adds what was sent in earlier rounds and waves."""
        while self.added < len(self.coming) and self.coming[self.added].when < before:
            ret = self.coming[self.added]
            assert ret.landing is not None, "its receive was posted when it was sent"
            self.instructions += [Wait(ret.transfer), Accumulate(ret.landing, 0, ret.home)]
            self.added += 1
            self.free.append(ret.landing)

    def _post(self, ret: _Return) -> None:
        if not self.free:
            self.free.append(len(self.landing))
            self.landing.append(0)
        ret.landing, rows = self.free.popleft(), ret.home.rows
        self.landing[ret.landing] = max(self.landing[ret.landing], rows)
        self.instructions.append(Receive(ret.transfer, ret.source, ret.landing, 0, rows, Kind.KV_GRADS))
        self.unposted[ret.source].popleft()

    def _wait_for(self, sent: list[_Return]) -> None:
        for ret in sent:
            self.instructions.append(Wait(ret.transfer))
            self.sent.remove(ret)

    def finish(self) -> PipelinePlan:
        """The part, after waiting for all that is still being sent."""
        self._wait_for(list(self.sent))
        return replace(self.forward, landing=tuple(self.landing), instructions=tuple(self.instructions))
