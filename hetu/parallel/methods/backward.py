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

What the last attends computed would travel while nobody computes. So a pipeline may hold back a part of its own rows,
see :mod:`hetu.parallel.methods.hold_back`, and attend to it while the last gradients travel that it sends or that come
to it.

Why this can't deadlock, see :mod:`hetu.parallel.methods.method`: what is appended to the pipelines in turn is the
common order. A wait is appended after both ends of its transfer. As to what computes or begins a batch that packs:

* The forward's instructions are appended when both ends are posted of all keys and values that the pipeline has under
  way (:class:`_Order`), and sums at the end of rounds for which this holds.
* Gradients are sent, and received by their owners, between two rounds: so in each round all of them that are under way
  have both ends. They are packed after an attend, before which nothing was open, or after a wave.
* Gradients that are received early, for the order of messages, are sent before the keys and values that are received
  with them. While the former are open the latter are, and the pipeline does not compute.
* An owner that can't compute yet posts receives of gradients all the same, for their sources wait for that. They go
  into the batch of what it posted last, before its waits (:meth:`BackwardPart.post_up_to`). At the end they would
  begin the batch of what it packs next. That is packed before any of it is posted, so the receives would have to wait
  until the pipeline may pack; it may be these sources that it waits for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter

from hetu.errors import PlanError
from hetu.parallel.methods.backward_part import Event, When, build_part
from hetu.parallel.methods.returns import Returns, find_returns
from hetu.parallel.plan.buffers import batches
from hetu.parallel.plan.instructions import Attend, Receive, Send, Wait
from hetu.parallel.plan.parts import PipelinePlan, PlanData

Rounds = list[tuple[list[tuple[int, int]], set[int]]]
"""Each round's instructions as (pipeline, number), at most one attend a pipeline; and who may compute after them."""


def build_backward(plan: PlanData, pipelines: Sequence[int]) -> list[PipelinePlan]:
    """See :attr:`hetu.parallel.methods.method.Method.backward`; all parts, for the order is one of all of them."""
    found = find_returns(plan)
    rounds = _Order(plan, found).rounds()
    returns = sorted(chain.from_iterable(found.values()), key=attrgetter("when", "distance", "transfer"))
    waves = Counter(ret.round for ret in {ret.when: ret for ret in returns}.values())
    events: list[dict[When, Event]] = [{} for _ in plan.pipelines]
    for number, (steps, clear) in enumerate(rounds):
        for wave in range(max(waves[number], 1)):
            for r, own in enumerate(events):
                own[number, wave] = Event(adds=r in clear)
        for r, step in steps:
            events[r][number, 0].steps.append(step)
    for ret in returns:
        events[ret.source][ret.when].sends.append(ret)
        events[ret.owner][ret.when].posts.append(ret)
    return [build_part(plan, r, own) for r, own in enumerate(events)]


# The common order of all pipelines


class _Order:
    """Follows the forward's instructions on all pipelines; notes in which round each return is computed.

    Whoever computes has no transfer under way of which the other end is not posted.
    """

    def __init__(self, plan: PlanData, returns: Returns) -> None:
        self.instructions = [part.instructions for part in plan.pipelines]
        self.packs = [{n for n, batch in batches(part).items() if batch.sends} for part in plan.pipelines]
        self.returns = returns
        self.next = [0] * len(self.instructions)
        self.ends: Counter[int] = Counter()  # of transfers: how many are posted
        self.open: list[set[int]] = [set() for _ in self.instructions]  # what has no other end yet
        self.sent: Counter[tuple[int, int]] = Counter()  # messages from one pipeline to another

    def rounds(self) -> Rounds:
        """The rounds of all pipelines.

        Raises:
            PlanError: If they can't all be followed.
        """
        rounds: Rounds = []
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
            rounds.append((steps, {r for r, transfers in enumerate(self.open) if not transfers}))
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
            elif (isinstance(item, Attend) or step in self.packs[r]) and self.open[r]:
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
