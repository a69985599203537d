"""``hierarchical``: rows go once to each host that needs them, and are passed on inside it.

Links inside a host are faster than those between hosts. So an owner sends to one member of each other host, its
*relay* there, all that anybody of that host needs, and the relay passes on what the others need. Gradients go the same
way back: the relay adds up those that its host computed, and sends the sums to the owner. Inside a host rows go straight
from owner to receiver. Relays are members that have the same place in their hosts as the owner in its own, so that all
of a host's links are used alike. A group that lies on one host is planned by ``direct``.

There is a buffer for each *distance*, the number of hosts from the owner's to the receiver's, which is attended to at
once; distance 0 is the own host. What came from distance d + 1 is passed on before distance d is attended to, so that
both overlap.

It can't deadlock (see :mod:`hetu.parallel.methods.method`): the common order goes stage by stage. First all members
post what travels straight, in one batch; then they attend to their own rows; then there are, distance by distance, the
stages in which they pass on rows, attend, and move gradients. Every stage has one batch at most, and both ends of each of
its transfers are in it, for distances and relays are known to all. A wait for what was posted in a stage belongs to a
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
    parts = []
    R = len(group.members)
    for i, member in enumerate(range(who.start, who.stop)):
        part = PartBuilder(group, member, spec, reach.spans[i])
        near = _near(routes, member)
        offsets = _offsets(routes, member, near)
        relayed = routes.relayed(member, first[i], offsets)
        buffers = {d: number for number, d in enumerate([d for d, owners in enumerate(near) if owners], 1)}

        for d, owners in enumerate(near):
            for c in owners:
                if routes.is_straight[member, c]:
                    part.receive(c, buffers[d], routes.rows[member][c], offsets[c])
        order = sorted(around(R, member, 1), key=lambda r: hosts.distance(member, r))
        part.send_all([(r, straight[r][i]) for r in order if straight[r][i].rows])
        part.attend(0, tables[i * R + member], [(member, whole(group.rows[member]))])
        for d, owners in enumerate(near):
            if d + 1 < len(near):
                _pass_on(part, routes, near[d + 1], buffers.get(d + 1, 0), offsets, relayed)
            for c in owners:
                if d == 0 or not routes.is_straight[member, c]:
                    part.wait_for(*routes.way(member, c))
            if owners:
                table = joined([tables[i * R + c] for c in owners], [offsets[c] for c in owners], part.spans)
                part.attend(buffers[d], table, [(c, landed[i][c]) for c in owners])
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


def _near(routes: _Routes, member: int) -> list[list[int]]:
    """The owners whose rows land on a member, by distance."""
    near: list[list[int]] = [[] for _ in routes.hosts.members]
    for c in around(len(routes.cells), member, -1):
        if routes.rows[member][c]:
            near[routes.hosts.distance(c, member)].append(c)
    return near


def _offsets(routes: _Routes, member: int, near: list[list[int]]) -> dict[int, int]:
    """The row of its buffer at which what lands of each owner begins."""
    offsets = {}
    for owners in near:
        begin = 0
        for c in owners:
            offsets[c] = begin
            begin += routes.rows[member][c]
    return offsets


def _pass_on(
    part: PartBuilder,
    routes: _Routes,
    owners: list[int],
    buffer: int,
    offsets: dict[int, int],
    relayed: list[tuple[int, int, Runs]],
) -> None:
    """A relay waits for what owners sent, and passes it on; the others get what is passed on."""
    for c in owners:
        if routes.is_straight[part.member, c]:
            part.wait_for(c)
    # By owner's number, as whoever sends them: messages between two pipelines have one order.
    for c in sorted(owners):
        if not routes.is_straight[part.member, c]:
            relay, hop = routes.way(part.member, c)
            part.receive(relay, buffer, routes.rows[part.member][c], offsets[c], hop)
    for c, receiver, runs in sorted(relayed, key=lambda sent: sent[:2]):
        if c in owners:
            part.send(receiver, buffer, runs, 1 + c)
