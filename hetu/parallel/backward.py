"""From the plan of an attention to the plan of its gradients, whatever the method that moves keys and values.

Keys and values travel once more as in the forward, for they are not kept. After each attend the gradients of foreign
rows, those that a segment names, go straight home to their owner, who adds them to the gradients of its own shard.

When does an owner wait for gradients? Late enough that they travel while it computes, and never so that pipelines wait
for each other in a circle. Counting each pipeline's own attends is not enough: in a ring over documents that lie on few
pipelines one's second attend may be at the fourth hop, and the owner would hold up the ring there while it waits for
it. So the forward's instructions are put into one order for all pipelines in which all can be followed, in rounds of at
most one attend a pipeline, and the rest is put in between:

* What was computed in round i is sent at once, and waited for and added by its owner at the end of round i + 1, in the
  order of rounds and then of the distance around the group. That order is in the plan, so sums have the same bits every
  time.
* It lands in one of two buffers that take turns. Its receive is posted as soon as one is free, but in the sender's
  order: process groups match the messages of two pipelines by their order, those of keys and values too. Where an order
  can't be kept otherwise, a further buffer is made.
* A sender waits for what it sent when its next gradients are computed, if the receive stands earlier in the common
  order; at the latest before another attend to the same buffer, and then the owner posts the receive before that.
  (Where keys and values that the owner receives late go before, the sender's attend is put off until they may.)

Why this can't deadlock: instructions are appended to the pipelines in one common order, in which a wait stands after
both ends of its transfer are posted. So of all the instructions that are not followed yet, the first in that order can
always be followed.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import NoReturn

import numpy as np

from hetu.errors import PlanError
from hetu.parallel.plan import Accumulate, Attend, AttnPlan, Instruction, Kind, PipelinePlan, Receive, Runs, Send, Wait
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
    round: int = -1
    before: int = 0
    landing: int | None = None


Returns = dict[tuple[int, int], list[_Return]]
"""What attends have to send home, by pipeline and number of the instruction; nearest owner first."""


def build_backward(plan: AttnPlan) -> AttnPlan:
    """See :meth:`hetu.parallel.plan.AttnPlan.backward`."""
    returns = _find_returns(plan)
    rounds = _Order(plan, returns).rounds()
    parts = [_Part(part) for part in plan.pipelines]
    for ret in sorted(chain.from_iterable(returns.values()), key=lambda ret: (ret.round, ret.distance, ret.transfer)):
        parts[ret.owner].expect(ret)
    for number, steps in enumerate(rounds):
        for r, step in steps:
            parts[r].follow(step, returns.get((r, step), []), parts)
        for part in parts:
            part.add_up(number)
    for part in parts:
        part.add_up(len(rounds))
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
        sent.sort(key=lambda ret: ret.distance)
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
    """Follows the forward's instructions on all pipelines; notes in which round each return is computed."""

    def __init__(self, plan: AttnPlan, returns: Returns) -> None:
        self.instructions = [part.instructions for part in plan.pipelines]
        self.returns = returns
        self.next = [0] * len(self.instructions)
        self.ends: Counter[int] = Counter()  # of transfers: how many are posted
        self.sent: Counter[tuple[int, int]] = Counter()  # messages from one pipeline to another
        self.expected: Counter[tuple[int, int]] = Counter()
        self.computed: dict[tuple[int, int], list[_Return]] = {}  # last, by pipeline and buffer

    def rounds(self) -> list[list[tuple[int, int]]]:
        """Each round's instructions as (pipeline, number), at most one attend a pipeline.

        Raises:
            PlanError: If they can't all be followed.
        """
        rounds: list[list[tuple[int, int]]] = []
        while any(done < len(items) for done, items in zip(self.next, self.instructions, strict=True)):
            steps: list[tuple[int, int]] = []
            going, before = list(range(len(self.next))), -1
            while len(steps) > before:  # one pipeline's progress may free another
                before = len(steps)
                going = [r for r in going if not self._advance(r, len(rounds), steps)]
            if not steps:
                self._refuse()
            rounds.append(steps)
        return rounds

    def _refuse(self) -> NoReturn:
        stuck = [r for r, items in enumerate(self.instructions) if self.next[r] < len(items)]
        for r in stuck:
            item = self.instructions[r][self.next[r]]
            if isinstance(item, Attend):
                what = f"gradients of buffer {item.buffer} of pipeline {r} can't leave before it is attended to again"
                what += ": their owners receive this pipeline's earlier keys and values too late"
                raise PlanError(what, op="plan", fix="post the receives of keys and values earlier")
        what = f"pipelines {stuck} wait for each other for ever"
        raise PlanError(what, op="plan", fix="see what plan.verify() says of the forward")

    def _advance(self, r: int, number: int, steps: list[tuple[int, int]]) -> bool:
        """Follows one pipeline's instructions up to an attend or a wait; says whether it attended."""
        items = self.instructions[r]
        while self.next[r] < len(items):
            step = self.next[r]
            item = items[step]
            if not self._can_follow(r, item):
                return False
            steps.append((r, step))
            self.next[r] += 1
            if isinstance(item, Attend):
                self._attend(r, step, item, number)
                return True
            if isinstance(item, Send):
                self.ends[item.transfer] += 1
                self.sent[r, item.peer] += 1
            elif isinstance(item, Receive):
                self.ends[item.transfer] += 1
                self.expected[item.peer, r] += 1
        return False

    def _can_follow(self, r: int, item: Instruction) -> bool:
        if isinstance(item, Wait):
            return self.ends[item.transfer] == 2
        if isinstance(item, Attend):
            # What it sent home of the same buffer has to be gone, so the owner must be able to receive it: messages
            # of keys and values that this pipeline sent to it before are received before.
            return all(self.expected[r, ret.owner] >= ret.before for ret in self.computed.get((r, item.buffer), ()))
        return True

    def _attend(self, r: int, step: int, item: Attend, number: int) -> None:
        self.computed[r, item.buffer] = self.returns.get((r, step), [])
        for ret in self.computed[r, item.buffer]:
            ret.round, ret.before = number, self.sent[r, ret.owner]


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
        posted: How many of these, from the first, have a receive.
        added: How many are added.
        unposted: Those of each source that have no receive, in the order in which they are sent.
        received: How many receives of keys and values from each source are posted.
        sent: What it sends home and hasn't waited for.
    """

    forward: PipelinePlan
    instructions: list[Instruction] = field(default_factory=list)
    landing: list[int] = field(default_factory=list)
    free: deque[int] = field(default_factory=deque)
    coming: list[_Return] = field(default_factory=list)
    posted: int = 0
    added: int = 0
    unposted: dict[int, deque[_Return]] = field(default_factory=dict)
    received: Counter[int] = field(default_factory=Counter)
    sent: list[_Return] = field(default_factory=list)

    def expect(self, ret: _Return) -> None:
        """Notes what will return, in the order in which it is added."""
        self.coming.append(ret)
        self.unposted.setdefault(ret.source, deque()).append(ret)

    def follow(self, step: int, returns: list[_Return], parts: list[_Part]) -> None:
        """Appends an instruction of the forward and what goes with it."""
        item = self.forward.instructions[step]
        if isinstance(item, Receive):
            # Gradients that the peer sends before these keys and values are received before them.
            first = self.unposted.get(item.peer, ())
            while first and first[0].before <= self.received[item.peer]:
                self._post(first[0])
            self.received[item.peer] += 1
        elif isinstance(item, Attend):
            for ret in [ret for ret in self.sent if ret.buffer == item.buffer]:
                parts[ret.owner].post_up_to(ret)
                self._wait_for_sent(ret)
            self._post_free()
        self.instructions.append(item)
        if isinstance(item, Attend):
            for ret in [ret for ret in self.sent if ret.landing is not None]:
                self._wait_for_sent(ret)
            self.instructions += [Send(ret.transfer, ret.owner, ret.buffer, ret.runs, Kind.KV_GRADS) for ret in returns]
            self.sent += returns

    def add_up(self, before: int) -> None:
        """Waits for and adds what was computed in earlier rounds."""
        while self.added < len(self.coming):
            ret = self.coming[self.added]
            if ret.round >= before or (ret.landing is None and self.received[ret.source] < ret.before):
                return
            self.post_up_to(ret)
            assert ret.landing is not None
            self.instructions += [Wait(ret.transfer), Accumulate(ret.landing, 0, ret.home)]
            self.added += 1
            self.free.append(ret.landing)
            self._post_free()

    def post_up_to(self, ret: _Return) -> None:
        """Sees to it that a return has a receive, after those of what its source sends earlier."""
        while ret.landing is None:
            self._post(self.unposted[ret.source][0])

    def _post_free(self) -> None:
        """Posts the receives of what is added next, as far as there is place."""
        while self.posted < len(self.coming) and (self.free or len(self.landing) < 2):
            ret = self.coming[self.posted]
            if ret.landing is None:
                if self.received[ret.source] < ret.before:
                    return
                self._post(ret)
            self.posted += 1

    def _post(self, ret: _Return) -> None:
        if not self.free:
            self.free.append(len(self.landing))
            self.landing.append(0)
        ret.landing, rows = self.free.popleft(), ret.home.rows
        self.landing[ret.landing] = max(self.landing[ret.landing], rows)
        self.instructions.append(Receive(ret.transfer, ret.source, ret.landing, 0, rows, Kind.KV_GRADS))
        self.unposted[ret.source].popleft()

    def _wait_for_sent(self, ret: _Return) -> None:
        self.instructions.append(Wait(ret.transfer))
        self.sent.remove(ret)

    def finish(self) -> PipelinePlan:
        """The part, after waiting for all that is still being sent."""
        self.instructions += [Wait(ret.transfer) for ret in self.sent]
        return replace(self.forward, landing=tuple(self.landing), instructions=tuple(self.instructions))
