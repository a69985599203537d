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
  into the batch of what it posted last, before its waits (:meth:`_BackwardPart.post_up_to`). At the end they would
  begin the batch of what it packs next. That is packed before any of it is posted, so the receives would have to wait
  until the pipeline may pack; it may be these sources that it waits for.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import attrgetter

from hetu.errors import PlanError
from hetu.parallel.methods.hold_back import HeldBack, hold_back
from hetu.parallel.methods.returns import Return, Returns, find_returns
from hetu.parallel.plan.buffers import Buffer, batches, shard
from hetu.parallel.plan.heads import Heads, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Instruction, Receive, Send, Wait
from hetu.parallel.plan.parts import PipelinePlan, PlanData

_FOREIGN, _LANDING = (Payload.KV, Payload.KV_GRADS), (Payload.KV_GRADS,)

Rounds = list[tuple[list[tuple[int, int]], list[int]]]
"""Each round's instructions as (pipeline, number), at most one attend a pipeline; and who may compute after them."""


def build_backward(plan: PlanData) -> tuple[PipelinePlan, ...]:
    """See :meth:`hetu.parallel.attn_plan.AttnPlan.backward`."""
    returns = find_returns(plan)
    rounds = _Order(plan, returns).rounds()
    parts = [_BackwardPart(part, plan.heads) for part in plan.pipelines]
    _hold_back(plan, list(chain.from_iterable(returns.values())), rounds, parts)
    waves: dict[tuple[int, int], list[Return]] = {}
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
    return tuple([part.finish() for part in parts])


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


def _hold_back(plan: PlanData, returns: list[Return], rounds: Rounds, parts: list[_BackwardPart]) -> None:
    """Lets pipelines hold back a part of their own rows, until the round after all else that they do.

    Only where all that returns to a pipeline is sent in one wave. Then it is added after what was held back, whose
    gradients are written where they belong, and nothing else has to land meanwhile. Otherwise rows that were added to
    would have to be computed aside, which is a pass over all of them.
    """
    last = [-1] * len(parts)  # the round in which each pipeline does the last of the forward, or gradients come to it
    for number, (steps, _) in enumerate(rounds):
        for r, _ in steps:
            last[r] = number
    waves: list[set[tuple[int, int]]] = [set() for _ in parts]
    rows = [0] * len(parts)
    for ret in returns:
        waves[ret.owner].add(ret.when)
        for r in (ret.source, ret.owner):
            rows[r] += ret.runs.rows
        last[ret.owner] = max(last[ret.owner], ret.round)
    for r in sorted({ret.source for ret in returns} | {ret.owner for ret in returns}):
        held = hold_back(plan, r, rows[r] * plan.heads.grad_row_bytes) if len(waves[r]) < 2 else None
        if held is None:
            continue
        # By then it has waited for all keys and values, so that it may compute.
        if last[r] + 1 == len(rounds):
            rounds.append(([], list(range(len(parts)))))
        rounds[last[r] + 1][0].append((r, parts[r].hold_back(held)))


# The pipelines


@dataclass(slots=True, eq=False)
class _BackwardPart:
    """Collects one pipeline's instructions.

    Attributes:
        forward: Its part of the forward.
        heads: Widths of a token's row.
        instructions: What was collected.
        landing: Rows of its landing buffers, by number; they follow the forward's buffers.
        free: Those that nothing is on its way to, longest free first.
        coming: What will return to it, in the order in which it is added.
        added: How many of these are added.
        unposted: Those of each source that have no receive, in the order in which they are sent.
        received: How many receives of keys and values from each source are posted.
        sent: What it sends home and hasn't waited for.
        held_back: The number of the attend that is held back, until it is followed; nothing is added before.
    """

    forward: PipelinePlan
    heads: Heads
    instructions: list[Instruction] = field(default_factory=list)
    landing: dict[int, int] = field(default_factory=dict)
    free: deque[int] = field(default_factory=deque)
    coming: list[Return] = field(default_factory=list)
    added: int = 0
    unposted: dict[int, deque[Return]] = field(default_factory=dict)
    received: Counter[int] = field(default_factory=Counter)
    sent: list[Return] = field(default_factory=list)
    held_back: int | None = None

    def hold_back(self, held: HeldBack) -> int:
        """Puts the held back part of an attend behind all instructions of the forward; gives its number there."""
        items = self.forward.instructions
        before, after = items[: held.number], items[held.number + 1 :]
        self.forward = replace(self.forward, instructions=(*before, held.first, *after, held.last))
        self.held_back = len(items)
        return self.held_back

    def expect(self, ret: Return) -> None:
        """Notes what will return, in the order in which it is added."""
        self.coming.append(ret)
        self.unposted.setdefault(ret.source, deque()).append(ret)

    def follow(self, step: int) -> None:
        """Appends an instruction of the forward and what goes with it."""
        item = self.forward.instructions[step]
        if step == self.held_back:
            self.held_back = None
        if isinstance(item, Receive):
            # Gradients that the peer sends before these keys and values are received before them.
            first = self.unposted.get(item.peer, ())
            while first and first[0].before <= self.received[item.peer]:
                self._post(first[0], len(self.instructions))
            self.received[item.peer] += 1
        elif isinstance(item, Attend):  # nothing reads any more what it overwrites
            self._wait_for([ret for ret in self.sent if ret.buffer == item.buffer])
        self.instructions.append(item)
        if isinstance(item, Attend):
            self._wait_for(list(self.sent))

    def send(self, ret: Return) -> None:
        """Sends home what the last attend computed of one owner's rows."""
        self.instructions.append(
            Send(ret.transfer, ret.owner, ret.buffer, ret.runs, Payload.KV_GRADS, self.forward.heads)
        )
        self.sent.append(ret)

    def post_up_to(self, ret: Return) -> None:
        """Sees to it that a return has a receive, after those of what its source sends earlier.

        Where the pipeline has only waited since its last transfer, the receive goes into the batch of that transfer.
        """
        while ret.landing is None:
            self._post(self.unposted[ret.source][0], self._end_of_batch())

    def _end_of_batch(self) -> int:
        """Behind the last transfer, if it has only waited since; else the end of all instructions."""
        place = len(self.instructions)
        while place and isinstance(self.instructions[place - 1], Wait):
            place -= 1
        follows = place > 0 and isinstance(self.instructions[place - 1], (Send, Receive))
        return place if follows else len(self.instructions)

    def add_up(self, before: tuple[int, int]) -> None:
        """Waits for and adds what was sent in earlier rounds and waves."""
        if self.held_back is not None:
            return
        while self.added < len(self.coming) and self.coming[self.added].when < before:
            ret = self.coming[self.added]
            assert ret.landing is not None, "its receive was posted when it was sent"
            self.instructions += [Wait(ret.transfer), Accumulate(ret.landing, 0, ret.home, self.forward.heads)]
            self.added += 1
            self.free.append(ret.landing)

    def _post(self, ret: Return, place: int) -> None:
        if not self.free:
            self.free.append(len(self.forward.buffers) + len(self.landing))
        ret.landing, rows, heads = self.free.popleft(), ret.home.rows, self.forward.heads
        self.landing[ret.landing] = max(self.landing.get(ret.landing, 0), rows)
        receive = Receive(ret.transfer, ret.source, ret.landing, 0, rows, Payload.KV_GRADS, heads)
        self.instructions.insert(place, receive)
        self.unposted[ret.source].popleft()

    def _wait_for(self, sent: list[Return]) -> None:
        for ret in sent:
            self.instructions.append(Wait(ret.transfer))
            self.sent.remove(ret)

    def finish(self) -> PipelinePlan:
        """The part, after waiting for all that is still being sent."""
        self._wait_for(list(self.sent))
        own, *foreign = self.forward.buffers
        buffers = [shard(own.rows, self.heads, is_backward=True)]
        buffers += [replace(buffer, payloads=_FOREIGN) for buffer in foreign]
        buffers += [Buffer(rows, own.heads, _LANDING) for rows in self.landing.values()]
        return replace(self.forward, buffers=tuple(buffers), instructions=tuple(self.instructions))
