"""``hierarchical``: rows go once to each host that needs them, and are passed on inside it.

Links inside a host are faster than those between hosts. So an owner sends to one member of each other host, its
*relay* there, all that anybody of that host needs, and the relay passes on what the others need. Gradients go the same
way back: the relay adds up those that its host computed, and sends the sums to the owner. Inside a host rows go
straight from owner to receiver. Relays are members that have the same place in their hosts as the owner in its
own, so that all of a host's links are used alike. A group that lies on one host is planned by ``direct``.

There is a buffer for each *distance*, the number of hosts from the owner's to the receiver's, which is attended to at
once; distance 0 is the own host. What came from distance d + 1 is passed on before distance d is attended to, and what
comes from distance d + 2 sets out, so that all three overlap. In each of these steps a member sends to the others of
its host in the order in which they follow it, and receives in the opposite one: nobody is everyone's first target.

It can't deadlock (see :mod:`hetu.parallel.methods.method`): the common order goes stage by stage. First all members
post what travels straight over distances 0 and 1; then they attend to their own rows; then there are, distance by
distance, the stages in which they post what travels on, attend, and move gradients. Both ends of each of a stage's
transfers are in it, for distances and relays are known to all. A wait for what was posted in a stage belongs to a
later one, or stands behind that stage's batch with nothing that packs or computes between. So when a stage begins, both
ends of all that was posted before are posted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
    return [_Member(group, member, spec, hosts).build() for member in range(who.start, who.stop)]


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


class _Member:
    """Builds the part of one member from what it takes, gives and passes on, and from nothing that others do.

    Attributes:
        landed: For each owner the rows of its shard that land here.
        near: The owners of which any do, by distance.
        offsets: The row of its buffer at which what lands of each of these begins.
        buffers: The buffer of each distance at which there are any.
        given: By distance, the members to whom rows of the own shard go straight, and these rows.
        relayed: What is passed on of each owner: the other members of the host, and rows of the buffer.
    """

    def __init__(self, group: GroupLayout, member: int, spec: AttnSpec, hosts: Hosts) -> None:
        self.hosts, self.member, self.size = hosts, member, len(group.members)
        self.host = hosts.members[hosts.of_member[member]]
        # Members of a host follow each other as a rule; otherwise those between them are looked at as well.
        self.near_by = slice(min(self.host), max(self.host) + 1)
        self.group, self.mask = group, spec.mask
        self.held = held_by(group, self.near_by, spec.mask)
        everyone, self.me = slice(0, self.size), slice(member, member + 1)
        self.reach = see(group, self.me, everyone, spec.mask, self.held)
        self.part = PartBuilder(group, member, spec, self.reach.spans[0])
        self._take()
        self._give()

    def _take(self) -> None:
        """Finds what lands here: what the member needs, and of owners whose relay it is what anybody of its host does.

        ``first`` is where each cell begins among what lands of its owner.
        """
        reach, member, hosts = self.reach, self.member, self.hosts
        needed = reach.needed[0].astype(np.int64)
        needed[member] = 0
        first = needed.cumsum(1) - needed
        first[member] = reach.rows[member]
        self.landed = cut_runs(reach.rows, needed[None])[0]
        needs: dict[int, IntArray] = {}  # (n, C) of each owner whose relay this is, of the host's members
        for c in hosts.relayed_by(member):
            if self.held is not None and not self.held.parts.pieces[c].any():
                continue  # it has no tokens of a document that anybody of this host has any of
            use, cells = extents(self.group, self.near_by, slice(c, c + 1), self.mask, self.held)
            needs[c] = use[[r - self.near_by.start for r in self.host], 0].astype(np.int64)
            ((self.landed[c],),) = cut_runs(cells, needs[c].max(0)[None, None])
            first[c] = _places(self.landed[c], reach.rows[c])
        self._lay_out()
        self.tables = reach.tables(first[None], reach.rows)
        self.relayed: dict[int, list[tuple[int, Runs]]] = {}
        for c, use in needs.items():
            lands = use.max(0)
            begins = lands.cumsum() - lands + self.offsets.get(c, 0)
            runs = cut_runs(begins[None], use[:, None])
            self.relayed[c] = [(r, one) for r, (one,) in zip(self.host, runs, strict=True) if r != member]

    def _lay_out(self) -> None:
        count = len(self.hosts.members)
        self.near: list[list[int]] = [[] for _ in range(count)]
        self.offsets: dict[int, int] = {}
        begins = [0] * count
        for c in around(self.size, self.member, -1):
            if rows := self.landed[c].rows:
                d = self.hosts.distance(c, self.member)
                self.near[d].append(c)
                self.offsets[c], begins[d] = begins[d], begins[d] + rows
        self.buffers = {d: number for number, d in enumerate([d for d, rows in enumerate(begins) if rows], 1)}

    def _give(self) -> None:
        """Finds what sets out here: what others of the host need, and to relays what anybody of their host does."""
        use, rows = extents(self.group, slice(0, self.size), self.me, self.mask, self.held)
        given = np.zeros_like(use)
        for number, members in enumerate(self.hosts.members):
            if members is self.host:
                given[list(members)] = use[list(members)]
            else:
                given[self.hosts.relay(self.member, number)] = use[list(members)].max(0)
        given[self.member] = 0
        self.given: list[list[tuple[int, Runs]]] = [[] for _ in self.hosts.members]
        sent = cut_runs(rows, given)
        for r in around(self.size, self.member, 1):
            if sent[r][0].rows:
                self.given[self.hosts.distance(self.member, r)].append((r, sent[r][0]))

    def build(self) -> PipelinePlan:
        """The part."""
        part = self.part
        for d in (1, 0):  # the slow links first
            self._post(d)
        part.attend(0, self.tables[self.member], [(self.member, whole(self.group.rows[self.member]))])
        for d, owners in enumerate(self.near):
            self._pass_on(d + 1)
            for c in owners:
                if d == 0 or not self._is_straight(c):
                    part.wait_for(*self._way(c))
            if owners:
                table = joined([self.tables[c] for c in owners], [self.offsets[c] for c in owners], part.spans)
                part.attend(self.buffers[d], table, [(c, self.landed[c]) for c in owners])
        return part.finish()

    def _is_straight(self, owner: int) -> bool:
        """Whether an owner's rows come straight from it, rather than from its relay."""
        return self._way(owner)[1] == 0

    def _way(self, owner: int) -> tuple[int, int]:
        """From whom an owner's rows come, and the hop that names their transfer."""
        own = self.hosts.of_member[self.member]
        if self.hosts.of_member[owner] == own:
            return owner, 0
        relay = self.hosts.relay(owner, own)
        return (owner, 0) if relay == self.member else (relay, 1 + owner)

    def _post(self, d: int) -> None:
        """Posts what travels straight over a distance; receives first, for a send from a buffer keeps others off it."""
        if d >= len(self.near):
            return
        for c in self.near[d]:
            if self._is_straight(c):
                self.part.receive(c, self.buffers[d], self.landed[c].rows, self.offsets[c])
        self.part.send_all(self.given[d])

    def _pass_on(self, d: int) -> None:
        """A relay waits for what owners sent over a distance and passes it on; others get that. Then the next one.

        Of what one pipeline passes on to another the owner's number says the order.
        """
        if d >= len(self.near):
            return
        straight = [c for c in self.near[d] if self._is_straight(c)]
        for c in straight:
            self.part.wait_for(c)
        self._post(d + 1)
        place = self.host.index(self.member)
        ways = sorted((c, *self._way(c)) for c in self.near[d] if c not in straight)
        for other in around(len(self.host), place, -1):
            for c, relay, hop in ways:
                if relay == self.host[other]:
                    self.part.receive(relay, self.buffers[d], self.landed[c].rows, self.offsets[c], hop)
        passed = [(c, r, runs) for c in sorted(straight) for r, runs in self.relayed[c] if runs.rows]
        for other in around(len(self.host), place, 1):
            for c, receiver, runs in passed:
                if receiver == self.host[other]:
                    self.part.send(receiver, self.buffers[d], runs, 1 + c)


def _places(runs: Runs, rows: IntArray) -> IntArray:
    """Where rows of a shard lie among some runs of it, of those that do."""
    if not runs.rows:
        return np.zeros_like(rows)
    run = np.maximum(runs.start.searchsorted(rows, "right") - 1, 0)
    before = runs.length.cumsum() - runs.length
    places: IntArray = before.take(run) + rows - runs.start.take(run)
    return places
