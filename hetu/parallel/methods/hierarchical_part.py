"""The backward of one member of ``hierarchical``, made from its own part of the forward.

What was received is computed of, and what was sent is got back, by the same transfers the other way round. Distance by
distance: after an attend a member sends the gradients of what was passed to it to who passed it on, and of what came
straight from its own host to the owner. One stage later the relay adds up what it got, and sends the sums to the owners
in other hosts; the owners add them to their own. So gradients travel while the next distance is attended to. The own
host comes last, for its gradients take the shortest way, and those of the last attend travel while nobody computes; of
two hosts it comes first, for nothing else hides the rows of the other one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np

from hetu.parallel.methods.hosts import Hosts
from hetu.parallel.methods.peers import hop_of, transfer_number, whole
from hetu.parallel.plan.buffers import Buffer, shard
from hetu.parallel.plan.heads import Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Instruction, Receive, Runs, Send, Wait
from hetu.parallel.plan.parts import PipelinePlan, PlanData

_Stage = tuple[str, int]
"""What is done in it, and at which distance."""

_FOREIGN, _LANDING = (Payload.KV, Payload.KV_GRADS), (Payload.KV_GRADS,)


@dataclass(frozen=True, slots=True, eq=False)
class _Home:
    """Gradients that travel one hop towards their owner.

    Attributes:
        owner: The member whose rows they are of.
        peer: The pipeline that sends or gets them.
        buffer: Whose rows they are of, on this pipeline: 0 for own ones.
        runs: Which rows.
    """

    owner: int
    peer: int
    buffer: int
    runs: Runs


@dataclass(slots=True, eq=False)
class _Moves:
    """What travels home at a distance, one hop: what is sent, what is got, and where and by which transfer it lands."""

    out: list[_Home] = field(default_factory=list)
    back: list[_Home] = field(default_factory=list)
    landed: list[tuple[int, int, _Home]] = field(default_factory=list)


class BackwardBuilder:
    """Collects one member's instructions.

    Args:
        plan: The forward.
        pipeline: Whose part is built.
        hosts: Those of its group.
    """

    def __init__(self, plan: PlanData, pipeline: int, hosts: Hosts) -> None:
        self.hosts, self.forward, self.num_pipelines = hosts, plan.pipelines[pipeline], plan.layout.num_pipelines
        self.pipeline, self.heads = pipeline, plan.heads
        group, self.member = plan.layout.place(pipeline)
        self.members = {r: number for number, r in enumerate(group.members)}
        self.instructions: list[Instruction] = []
        self.landing: list[Buffer] = []
        self.near, self.far = defaultdict[int, _Moves](_Moves), defaultdict[int, _Moves](_Moves)
        self.sent: list[int] = []  # transfers home that are not waited for
        self.steps = defaultdict[_Stage, list[Instruction]](list)

    def build(self) -> PipelinePlan:
        """The part."""
        self._read_forward()
        self.instructions += self.steps["start", 0] + self.steps["pass on", 1]
        last = before = -1
        # Two stages more, at no distance, in which the last gradients go on and come home.
        count = len(self.hosts.members)
        for d in (*((0, 1) if count == 2 else (*range(1, count), 0)), -1, -1):
            self.instructions += self.steps["pass on", d + 1] if d > 0 else []
            self.instructions += self.steps["attend", d]
            self._move(d, last, before)
            last, before = d, last
        self.instructions += self.steps["end", 0]
        buffers = [shard(self.forward.rows, self.heads, is_backward=True)]
        buffers += [Buffer(buffer.rows, buffer.heads, _FOREIGN) for buffer in self.forward.buffers[1:]]
        return replace(self.forward, buffers=(*buffers, *self.landing), instructions=tuple(self.instructions))

    def _read_forward(self) -> None:
        """Sorts the forward's instructions by stage, and notes what goes home which way."""
        stages: dict[int, _Stage] = {}  # of waits, by transfer
        for item in self.forward.instructions:
            match item:
                case Receive():
                    stage, stages[item.transfer] = self._receive(item)
                case Send():
                    stage, stages[item.transfer] = self._send(item), ("end", 0)
                case Wait():
                    stage = stages[item.transfer]
                case Attend() if item.buffer:
                    stage = "attend", self.hosts.distance(self.members[item.sources[0].owner], self.member)
                case _:
                    stage = "start", 0
            self.steps[stage].append(item)

    def _receive(self, item: Receive) -> tuple[_Stage, _Stage]:
        """The stages of a receive and of its wait."""
        hop = hop_of(item.transfer, self.num_pipelines)
        owner = hop - 1 if hop else self.members[item.peer]
        d = self.hosts.distance(owner, self.member)
        home = _Home(owner, item.peer, item.buffer, Runs(np.array([item.offset]), np.array([item.rows])))
        if hop:
            self.near[d].out.append(home)
            return ("pass on", d), ("attend", d)
        (self.far if d else self.near)[d].out.append(home)
        return _posted(d), ("pass on", d) if d else ("attend", 0)

    def _send(self, item: Send) -> _Stage:
        """The stage of a send."""
        hop = hop_of(item.transfer, self.num_pipelines)
        owner = hop - 1 if hop else self.member
        home = _Home(owner, item.peer, item.buffer, item.runs)
        if hop:
            d = self.hosts.distance(owner, self.member)
            self.near[d].back.append(home)
            return "pass on", d
        d = self.hosts.distance(self.member, self.members[item.peer])
        (self.far if d else self.near)[d].back.append(home)
        return _posted(d)

    def _move(self, d: int, last: int, before: int) -> None:
        """What follows the attend to a distance: its gradients set out, and those of the two before go on."""
        self._add_up(self.near[last])
        waited, self.sent = self.sent, []
        for moves in (self.far[last], self.near[d]):
            for home in sorted(moves.out, key=lambda home: self._place(home, 1)):
                self._send_home(home)
            for home in sorted(moves.back, key=lambda home: self._place(home, -1)):
                self._get_back(moves, home)
        self.instructions += [Wait(transfer) for transfer in waited]
        self._add_up(self.far[before])

    def _place(self, home: _Home, direction: int) -> tuple[int, int]:
        """In which order gradients are sent, or got in the other direction: as others follow, then by owner."""
        return direction * (self.members[home.peer] - self.member) % len(self.members), home.owner

    def _number(self, home: _Home, source: int, target: int) -> int:
        """A transfer's number: the hop says of whom the gradients are, behind those of keys and values."""
        return transfer_number(1 + len(self.members) + home.owner, source, target, self.num_pipelines)

    def _send_home(self, home: _Home) -> None:
        number = self._number(home, self.pipeline, home.peer)
        send = Send(number, home.peer, home.buffer, home.runs, Payload.KV_GRADS, self.heads.all)
        self.instructions.append(send)
        self.sent.append(number)

    def _get_back(self, moves: _Moves, home: _Home) -> None:
        number, rows = self._number(home, home.peer, self.pipeline), home.runs.rows
        landing = len(self.forward.buffers) + len(self.landing)
        self.landing.append(Buffer(rows, self.heads.all, _LANDING))
        receive = Receive(number, home.peer, landing, 0, rows, Payload.KV_GRADS, self.heads.all)
        self.instructions.append(receive)
        moves.landed.append((landing, number, home))

    def _add_up(self, moves: _Moves) -> None:
        """Waits for what was got back at a distance, and adds it to own gradients, or to those to be sent on."""
        for landing, number, home in moves.landed:
            self.instructions.append(Wait(number))
            if home.buffer == 0:
                self.instructions.append(Accumulate(landing, 0, home.runs, self.heads.all))
            else:
                rows = whole(home.runs.rows)
                copy = Copy(Payload.KV_GRADS, self.heads.all, landing, rows, home.buffer, home.runs)
                self.instructions.append(copy)


def _posted(d: int) -> _Stage:
    """The stage in which what travels straight over a distance is posted."""
    return ("pass on", d - 1) if d > 1 else ("start", 0)
