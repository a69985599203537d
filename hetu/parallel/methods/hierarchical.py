"""``hierarchical``: rows go once to each host that needs them, and are passed on inside it.

Links inside a host are faster than those between hosts. So an owner sends to one member of each other host, its
*relay* there, all that anybody of that host needs, and the relay passes on what the others need. Gradients go the same
way back: the relay adds up those that its host computed, and sends the sums to the owner. Inside a host rows go
straight from owner to receiver. Relays are members that have the same place in their hosts as the owner in its
own, so that all of a host's links are used alike. A group that lies on one host is planned by ``direct``.

There is a buffer for each *distance*, the number of hosts from the owner's to the receiver's, which is attended to at
once; distance 0 is the own host. What came from distance d + 1 is passed on before distance d is attended to, and what
comes from distance d + 2 sets out, so that all three overlap.

It can't deadlock (see :mod:`hetu.parallel.methods.method`): the common order goes stage by stage. First all members
post what travels straight over distances 0 and 1; then they attend to their own rows; then there are, distance by
distance, the stages in which they post what travels on, attend, and move gradients. Both ends of each of a stage's
transfers are in it, for distances and relays are known to all. A wait for what was posted in a stage belongs to a
later one, or stands behind that stage's batch with nothing that packs or computes between. So when a stage begins, both
ends of all that was posted before are posted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.mask.segments import IntArray
from hetu.parallel.methods import direct
from hetu.parallel.methods.hierarchical_part import BackwardBuilder
from hetu.parallel.methods.hosts import Hosts
from hetu.parallel.methods.method import AttnSpec
from hetu.parallel.methods.part import PartBuilder, cut_runs
from hetu.parallel.methods.peers import around, whole
from hetu.parallel.methods.tables import extents, held_by, joined, see
from hetu.parallel.plan.instructions import Runs
from hetu.parallel.plan.parts import PipelinePlan, PlanData


def hierarchical(group: GroupLayout, who: slice, spec: AttnSpec) -> list[PipelinePlan]:
    """Rows go once to each host that needs them; a buffer per distance, own host first."""
    hosts = Hosts.of(group.members, spec.topology)
    if len(hosts.members) < 2:
        return direct.direct(group, who, spec)
    everyone = slice(0, len(group.members))
    held = held_by(group, everyone, spec.mask)
    routes = _Routes.of(hosts, *extents(group, everyone, everyone, spec.mask, held))
    reach = see(group, who, everyone, spec.mask, held)
    first = routes.first(who)
    tables = reach.tables(first, routes.cells)
    landed, straight = cut_runs(routes.cells, routes.lands[who]), routes.sent(who)
    R = len(group.members)
    parts = []
    for i, member in enumerate(range(who.start, who.stop)):
        part = PartBuilder(group, member, spec, reach.spans[i])
        build = _Member(part, routes, first[i], [straight[r][i] for r in range(R)])
        for d in (1, 0):  # the slow links first
            build.post(d)
        part.attend(0, tables[i * R + member], [(member, whole(group.rows[member]))])
        for d, owners in enumerate(build.near):
            build.pass_on(d + 1)
            for c in owners:
                if d == 0 or not routes.is_straight[member, c]:
                    part.wait_for(*routes.way(member, c))
            if owners:
                offsets = [build.offsets[c] for c in owners]
                table = joined([tables[i * R + c] for c in owners], offsets, part.spans)
                part.attend(build.buffers[d], table, [(c, landed[i][c]) for c in owners])
        parts.append(part.finish())
    return parts


def build_backward(plan: PlanData, pipelines: Sequence[int]) -> list[PipelinePlan]:
    """See :attr:`hetu.parallel.methods.method.Method.backward`; for plans of this method."""
    parts = []
    for r in pipelines:
        group, _ = plan.layout.place(r)
        hosts = Hosts.of(group.members, plan.topology)
        if len(hosts.members) < 2:
            parts += direct.build_backward(plan, [r])
        else:
            parts.append(BackwardBuilder(plan, r, hosts).build())
    return parts


@dataclass(frozen=True, eq=False)
class _Routes:
    """Which rows go which way, for all members: ``C`` cells of each owner's shard, see :class:`Reach`.

    Attributes:
        hosts: Who shares a host.
        cells: ``(R, C)`` the row at which each cell of an owner's shard begins.
        lands: ``(R, R, C)`` rows of each cell of each owner that land on each receiver; none of its own.
        is_straight: ``(R, R)`` whether they come straight from the owner, rather than from the relay.
    """

    hosts: Hosts
    cells: IntArray
    lands: IntArray
    is_straight: NDArray[np.bool_]

    @classmethod
    def of(cls, hosts: Hosts, use: IntArray, cells: IntArray) -> _Routes:
        """From what :func:`~hetu.parallel.methods.tables.extents` says of all members."""
        R = len(hosts.of_member)
        lands = use.astype(np.int64)
        lands[np.arange(R), np.arange(R)] = 0
        is_straight = np.equal.outer(hosts.of_member, hosts.of_member)
        for c in range(R):
            for host, members in enumerate(hosts.members):
                if host != hosts.of_member[c]:
                    relay = hosts.relay(c, host)
                    lands[relay, c] = lands[members, c].max(0)
                    is_straight[relay, c] = True
        return cls(hosts, cells, lands, is_straight)

    @cached_property
    def rows(self) -> list[list[int]]:
        """For each receiver and each owner the rows that land there."""
        found: list[list[int]] = self.lands.sum(2).tolist()
        return found

    def first(self, who: slice) -> IntArray:
        """``(n, R, C)`` where each cell begins among what lands of its owner; in the own shard where it lies there."""
        lands = self.lands[who]
        first: IntArray = lands.cumsum(2) - lands
        own = np.arange(who.start, who.stop)
        first[own - who.start, own] = self.cells[own]
        return first

    def sent(self, who: slice) -> list[list[Runs]]:
        """For each receiver and each of some owners the rows that travel straight from one to the other."""
        return cut_runs(self.cells[who], (self.lands * self.is_straight[:, :, None])[:, who])

    def relayed(self, member: int, first: IntArray, offsets: dict[int, int]) -> list[tuple[int, int, Runs]]:
        """What a relay passes on: owner, receiver, and the rows of the buffer."""
        host = self.hosts.members[self.hosts.of_member[member]]
        found = []
        for c in offsets:
            if self.hosts.of_member[c] != self.hosts.of_member[member] and self.is_straight[member, c]:
                others = [r for r in host if r != member]
                runs = cut_runs(first[c][None] + offsets[c], self.lands[others, c][:, None])
                found += [(c, r, one) for r, (one,) in zip(others, runs, strict=True) if one.rows]
        return found

    def way(self, receiver: int, owner: int) -> tuple[int, int]:
        """From whom an owner's rows come, and the hop that names their transfer."""
        if self.is_straight[receiver, owner]:
            return owner, 0
        return self.hosts.relay(owner, self.hosts.of_member[receiver]), 1 + owner


class _Member:
    """Posts what one member sends and receives, distance by distance.

    Attributes:
        near: The owners whose rows land on it, by distance.
        offsets: The row of its buffer at which what lands of each of these begins.
        buffers: The buffer of each distance at which there are any.
    """

    def __init__(self, part: PartBuilder, routes: _Routes, first: IntArray, straight: list[Runs]) -> None:
        self.part, self.routes, self.straight = part, routes, straight
        member, hosts = part.member, routes.hosts
        self.near: list[list[int]] = [[] for _ in hosts.members]
        self.offsets: dict[int, int] = {}
        begins = [0] * len(hosts.members)
        for c in around(len(straight), member, -1):
            if rows := routes.rows[member][c]:
                d = hosts.distance(c, member)
                self.near[d].append(c)
                self.offsets[c], begins[d] = begins[d], begins[d] + rows
        self.buffers = {d: number for number, d in enumerate([d for d, rows in enumerate(begins) if rows], 1)}
        self.relayed = routes.relayed(member, first, self.offsets)

    def post(self, d: int) -> None:
        """Posts what travels straight over a distance; receives first, for a send from a buffer keeps others off it."""
        member, hosts = self.part.member, self.routes.hosts
        if d >= len(self.near):
            return
        for c in self.near[d]:
            if self.routes.is_straight[member, c]:
                self.part.receive(c, self.buffers[d], self.routes.rows[member][c], self.offsets[c])
        targets = [r for r in around(len(self.straight), member, 1) if hosts.distance(member, r) == d]
        self.part.send_all([(r, self.straight[r]) for r in targets if self.straight[r].rows])

    def pass_on(self, d: int) -> None:
        """A relay waits for what owners sent over a distance and passes it on; others get that. Then the next one."""
        if d >= len(self.near):
            return
        member, is_straight = self.part.member, self.routes.is_straight
        for c in self.near[d]:
            if is_straight[member, c]:
                self.part.wait_for(c)
        self.post(d + 1)
        # By owner's number, as whoever sends them: messages between two pipelines have one order.
        for c in sorted(self.near[d]):
            if not is_straight[member, c]:
                relay, hop = self.routes.way(member, c)
                self.part.receive(relay, self.buffers[d], self.routes.rows[member][c], self.offsets[c], hop)
        for c, receiver, runs in sorted(self.relayed, key=lambda sent: sent[:2]):
            if c in self.near[d]:
                self.part.send(receiver, self.buffers[d], runs, 1 + c)
