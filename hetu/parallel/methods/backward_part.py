"""The instructions of one pipeline of a backward, made from when it does what of its forward and what returns when."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace

from hetu.parallel.methods.hold_back import HeldBack, hold_back
from hetu.parallel.methods.returns import Return
from hetu.parallel.plan.buffers import Buffer, shard
from hetu.parallel.plan.heads import Heads, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Instruction, Receive, Send, Wait
from hetu.parallel.plan.parts import PipelinePlan, PlanData

_FOREIGN, _LANDING = (Payload.KV, Payload.KV_GRADS), (Payload.KV_GRADS,)

When = tuple[int, int]
"""A round, and a wave of it."""


@dataclass(slots=True, eq=False)
class Event:
    """What a pipeline does in one wave of a round, in this order.

    Attributes:
        steps: The instructions of the forward that it follows, by number; at most one attend.
        sends: What it sends home of what it attended to last.
        posts: What it gets, which is sent in the same wave.
        adds: Whether it adds up what was sent in earlier rounds and waves.
    """

    steps: list[int] = field(default_factory=list)
    sends: list[Return] = field(default_factory=list)
    posts: list[Return] = field(default_factory=list)
    adds: bool = True


def build_part(plan: PlanData, pipeline: int, events: dict[When, Event]) -> PipelinePlan:
    """The part of one pipeline.

    Args:
        plan: The forward.
        pipeline: The pipeline.
        events: What it does when; what it holds back is added.
    """
    part = BackwardPart(plan.pipelines[pipeline], plan.heads)
    owned = [ret for when in sorted(events) for ret in events[when].posts]
    for ret in owned:
        part.expect(ret)
    returned = [*owned, *(ret for event in events.values() for ret in event.sends)]
    if returned and len({ret.when for ret in owned}) < 2:
        _hold_back(plan, part, events, sum(ret.runs.rows for ret in returned))
    return part.play(events)


def _hold_back(plan: PlanData, part: BackwardPart, events: dict[When, Event], rows: int) -> None:
    """Lets a pipeline hold back a part of its own rows, until the round after all else that it does.

    Only where all that returns to it is sent in one wave. Then it is added after what was held back, whose gradients
    are written where they belong, and nothing else has to land meanwhile. Otherwise rows that were added to would have
    to be computed aside, which is a pass over all of them. By then it has waited for all keys and values, so that it
    may compute.
    """
    held = hold_back(plan, part.forward.pipeline, rows * plan.heads.grad_row_bytes)
    if held is not None:
        last = max(number for (number, _), event in events.items() if event.steps or event.posts)
        events.setdefault((last + 1, 0), Event()).steps.append(part.hold_back(held))


@dataclass(slots=True, eq=False)
class BackwardPart:
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

    def play(self, events: dict[When, Event]) -> PipelinePlan:
        """The part, after all that happens, which is told by when it does."""
        for when in sorted(events):
            event = events[when]
            for step in event.steps:
                self.follow(step)
            for ret in event.sends:
                self.send(ret)
            for ret in event.posts:
                self.post_up_to(ret)
            if event.adds:
                self.add_up(when)
        self.add_up(None)
        return self.finish()

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
        elif isinstance(item, Attend) and self.sent:  # nothing reads any more what it overwrites
            self._wait_for([ret for ret in self.sent if ret.buffer == item.buffer])
            self.instructions.append(item)
            self._wait_for(list(self.sent))
            return
        self.instructions.append(item)

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

    def add_up(self, before: When | None) -> None:
        """Waits for and adds what was sent in earlier rounds and waves; all if ``before`` is None."""
        if self.held_back is not None:
            return
        while self.added < len(self.coming) and (before is None or self.coming[self.added].when < before):
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
        buffers += [Buffer(buffer.rows, buffer.heads, _FOREIGN) for buffer in foreign]
        buffers += [Buffer(rows, own.heads, _LANDING) for rows in self.landing.values()]
        return replace(self.forward, buffers=tuple(buffers), instructions=tuple(self.instructions))
