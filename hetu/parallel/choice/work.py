"""What each method makes of a group's counts: FLOPs of each member, bytes between members, and peak memory.

Each method is a function of :class:`GroupCounts`, on ints and on symbols alike. It says of all pieces at once what
:mod:`hetu.parallel.methods` does with them, and :mod:`hetu.parallel.plan.memory` of that: a change there is one here,
and a test holds both together without tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from hetu.parallel.choice.counts import Counts
from hetu.parallel.choice.hosts import moves
from hetu.parallel.choice.numbers import Numbers, add_up, any_of, larger, lifted, numbers, smaller
from hetu.parallel.mask.rules import Size
from hetu.parallel.methods.hosts import Hosts
from hetu.parallel.methods.ulysses import deal
from hetu.parallel.plan.heads import Heads, Payload


@dataclass(frozen=True, slots=True)
class Work:
    """What members do, of ints or symbols.

    Attributes:
        flops: ``(R,)``, as :attr:`hetu.parallel.views.cost.Cost.flops`.
        links: ``(R, R)`` bytes from each member to each other one.
        peak: ``(R,)`` bytes that each holds at most, as :meth:`~hetu.parallel.AttnPlan.peak_bytes`.
        steps: Attends of a member, at most.
        between_hosts: Transfers of a member in one direction that leave its host, at most.
    """

    flops: Numbers
    links: Numbers
    peak: Numbers
    steps: int
    between_hosts: int


class GroupCounts:
    """The counts of a group's documents, added up.

    Args:
        counts: Of each document.
        heads: Widths of a token's row.
        batch: How often each document is there.
        hosts: Which members share a host; all if it is None.

    Attributes:
        rows: ``(R,)`` of each member's shard.
    """

    def __init__(self, counts: Counts, heads: Heads, batch: Size = 1, hosts: Hosts | None = None) -> None:
        self.counts, self.heads, self.batch = counts, heads, lifted(batch)
        self.members = counts.members
        self.hosts = hosts or Hosts.of(range(self.members), None)
        self.rows = self._all(add_up(counts.pieces, 1))

    def _all(self, of_one: Numbers) -> Numbers:
        """What is counted of one batch entry, of all of them."""
        return of_one if type(self.batch) is int and self.batch == 1 else of_one * self.batch

    @property
    def elsewhere(self) -> int:
        """Members on other hosts, of the member for which these are most."""
        return self.members - min(map(len, self.hosts.members))

    @cached_property
    def pairs(self) -> Numbers:
        """``(R,)`` pairs of each member's queries."""
        return self._all(add_up(self.counts.pairs(), 1).astype(object))

    @cached_property
    def whole_pairs(self) -> Any:
        """Pairs of all tokens."""
        return (self.counts.whole_pairs().sum(keepdims=True).astype(object) * self.batch)[0]

    @cached_property
    def taken(self) -> Numbers:
        """``(R, R)`` rows that each member needs of each owner."""
        return self._all(self.counts.taken())

    @cached_property
    def taken_by_hosts(self) -> Numbers:
        """``(R, H)`` rows of each owner that anybody of each other host needs; 0 of the own host."""
        found: Numbers = np.zeros((self.members, len(self.hosts.members)), object)
        for c, own in enumerate(self.hosts.of_member):
            for number, members in enumerate(self.hosts.members):
                if number != own:
                    found[c, number] = self.counts.needed(members, c).sum()
        found *= self.batch
        return found

    @cached_property
    def carried(self) -> Numbers:
        """``(R, R)`` for each hop and owner: rows that somebody at that distance or further needs; none at home."""
        R = self.members
        found = np.zeros((R, R), object)
        for hop in range(1, R):
            for c in range(R):
                found[hop, c] = self.counts.needed(sorted((c + far) % R for far in range(hop, R)), c).sum()
        rows: Numbers = found * self.batch
        return rows

    @cached_property
    def gaps(self) -> Numbers:
        """See :meth:`Counts.gaps`."""
        return self.counts.gaps(self.batch)

    def results(self, steps_on: Any) -> Numbers:
        """``(R,)`` bytes of each member's results; ``steps_on`` is 1 where several steps add to them."""
        heads = self.heads
        row = _row_bytes(heads, Payload.OUT) + _row_bytes(heads, Payload.LSE)
        size: Numbers = self.rows * (steps_on * (max(heads.itemsize, 4) * heads.num_q * heads.head_dim) + row)
        return size

    def flops(self, pairs: Any, num_q: Any) -> Any:
        return pairs * (num_q * 4 * self.heads.head_dim)


def direct(group: GroupCounts) -> Work:
    """``direct``: all that travels is under way, and held, until the end."""
    row, own = _row_bytes(group.heads, Payload.KV), _row_bytes(group.heads, Payload.QKV)
    if group.members == 1:
        flops, peak = group.flops(group.pairs, group.heads.num_q), group.rows * own + group.results(0)
        return Work(flops, group.taken, peak, 1, 0)
    come, gone = add_up(group.taken, 1), add_up(group.taken, 0)
    peak = group.rows * own + (come + gone) * row + group.results(any_of(come))
    flops = group.flops(group.pairs, group.heads.num_q)
    return Work(flops, group.taken.T * row, peak, group.members, group.elsewhere)


def all_gather(group: GroupCounts) -> Work:
    """``all_gather``: as ``direct``, in two steps."""
    return replace(direct(group), steps=2)


def ring(group: GroupCounts) -> Work:
    """``ring``: two buffers take turns, and what is passed on is held until the next receive into its buffer."""
    R, row = group.members, group.heads.row_bytes(Payload.KV)
    links = np.zeros((R, R), object)
    for hop in range(1, R):
        for c in range(R):
            source, target = (c + hop - 1) % R, (c + hop) % R
            links[source, target] = links[source, target] + group.carried[hop, c]
    most = numbers([_ring_peak(group, member) for member in range(R)])
    attended = group.results(any_of(group.taken.sum(1)))
    peak = group.rows * group.heads.row_bytes(Payload.QKV) + attended + most * row
    crosses = len(group.hosts.members) > 1  # a link between hosts is one at every hop
    return Work(group.flops(group.pairs, group.heads.num_q), links * row, peak, R, (R - 1) * crosses)


def _ring_peak(group: GroupCounts, m: int) -> Any:
    """Rows that a member holds at most beside its shard: its first send throughout, and what else is, hop by hop."""
    R, carried = group.members, group.carried.tolist()
    taken = [group.taken[m, (m - hop) % R] for hop in range(R)]
    come = [carried[hop][(m - hop) % R] for hop in range(R)] + [0]
    sent = [0, *(carried[hop][(m - hop + 1) % R] for hop in range(1, R)), 0]
    held, kept, keeping = _RingBuffers(taken, come, sent), [0, 0], list[Any]()
    for hop in range(R):  # what was sent from a buffer is waited for before the next receive into it is posted
        keeping.append(kept[0] + kept[1])
        here, other = hop % 2, (hop + 1) % 2
        kept[other] = kept[other] * (1 - any_of(come[hop + 1]))
        kept[here] = kept[here] + (sent[hop + 1] if hop else 0)
    keeping.append(kept[0] + kept[1])
    most: Any = 0
    for hop in range(R):
        most = larger(most, held.at(hop, keeping) + keeping[hop + 1])
    return most + sent[1]


def hierarchical(group: GroupCounts) -> Work:
    """``hierarchical``: rows go once to each host that needs them, and are passed on there; a buffer per distance."""
    if len(group.hosts.members) < 2:
        return direct(group)
    links, most = moves(group.taken, group.taken_by_hosts, group.hosts)
    row, own = _row_bytes(group.heads, Payload.KV), _row_bytes(group.heads, Payload.QKV)
    peak = group.rows * own + group.results(any_of(group.taken.sum(1))) + most * row
    count = len(group.hosts.members)
    return Work(group.flops(group.pairs, group.heads.num_q), links * row, peak, 1 + count, count - 1)


@dataclass(frozen=True, slots=True)
class _RingBuffers:
    """When a member's two buffers are held, by :mod:`hetu.parallel.plan.buffers`; hop h lands in buffer ``h % 2``.

    Attributes:
        taken: Rows of each hop that the member attends to.
        come: Rows that land by each hop; there is one hop more, by which nothing comes.
        sent: Rows that it passes on by each hop.
    """

    taken: list[Any]
    come: list[Any]
    sent: list[Any]
    _known: dict[Any, Any] = field(default_factory=dict)

    def lands(self, side: int, hops: range) -> Any:
        """1 if anything lands in a buffer by some hops, else 0."""
        numbers = tuple(hop for hop in hops if hop % 2 == side)
        if numbers not in self._known:
            self._known[numbers] = any_of(sum(self.come[hop] for hop in numbers))
        return self._known[numbers]

    def at(self, hop: int, keeping: list[Any]) -> Any:
        """Most rows of both buffers that are held at a time in a hop: while it packs, attends, and posts the next."""
        R, here, other = len(self.taken), hop % 2, (hop + 1) % 2
        held = [0, 0]
        for side in range(2):
            size: Any = 0
            for earlier in range(side or 2, R, 2):
                size = larger(size, self.come[earlier])
            begun = larger(self.lands(side, range(1, min(hop + 2, R))), self._early(side, hop, keeping))
            held[side] = size * begun * self.lands(side, range(max(hop, 1), R))
        # What only passes through for the last time is let go of before memory is made for what comes.
        passes = (1 - any_of(self.taken[hop])) * (1 - self.lands(here, range(hop + 1, R)))
        passes = passes * (1 - self.lands(other, range(1, hop + 1)))
        return held[0] + held[1] - smaller(held[0], held[1]) * passes

    def _early(self, side: int, hop: int, keeping: list[Any]) -> Any:
        """1 if a buffer is made in this hop, or is there already, for what lands first by a later one.

        A receive is no place to make memory while anything is under way: it is made where the member last packed or
        attended.
        """
        early: Any = 0
        idle: Any = 1  # whether it neither packs nor attends between the two hops
        for later in range(hop + 1, len(self.taken) - 1):
            if (later + 1) % 2 == side and not (isinstance(idle, int) and idle == 0):
                first = any_of(self.come[later + 1]) * (1 - self.lands(side, range(1, later + 1)))
                is_under_way = any_of(self.sent[1] + keeping[later])
                early = early + idle * first * is_under_way * (1 - any_of(self.sent[later + 1]))
            idle = idle * (1 - any_of(self.taken[later] + self.sent[later + 1]))
        return early


def ulysses(group: GroupCounts) -> Work:
    """``ulysses``: everybody's rows of some heads come, and results go home."""
    R, heads, rows, tokens = group.members, group.heads, group.rows, group.rows.sum(keepdims=True)
    if R == 1:
        return direct(group)
    given, back, num_q = _head_bytes(heads, R)
    links = rows[:, None] * given + rows * back[:, None]
    np.fill_diagonal(links, 0)
    packed, landing = rows * (given.sum() - given), rows * (back.sum() - back)
    scattered = rows * any_of(group.gaps)  # what does not land in one stretch lands aside first
    aside, others = (scattered.sum(keepdims=True) - scattered) * given, (tokens - rows) * back
    results = group.results(0) + rows * heads.row_bytes(Payload.LSE)
    gathered, computed = tokens * given, tokens * back
    before = packed + gathered + larger(aside, computed)
    after = results + others + larger(computed, landing)
    peak = rows * heads.row_bytes(Payload.QKV) + larger(before, after)
    flops = group.flops(np.array([group.whole_pairs] * R, object), num_q)
    return Work(flops, links, peak, 1, group.elsewhere)


@lru_cache
def _row_bytes(heads: Heads, payload: Payload) -> int:
    """:meth:`Heads.row_bytes`, which is asked several times per group."""
    return heads.row_bytes(payload)


@lru_cache
def _head_bytes(heads: Heads, members: int) -> tuple[Numbers, Numbers, Numbers]:
    """Of each member's heads: bytes of a row on its way there, bytes of its results, and the number of query heads."""
    ranges = deal(heads, members)
    given = [heads.row_bytes(Payload.QKV, own) for own in ranges]
    back = [heads.row_bytes(Payload.OUT, own) + heads.row_bytes(Payload.LSE, own) for own in ranges]
    return numbers(given), numbers(back), np.array([own.num_q for own in ranges], object)


WORK: dict[str, Callable[[GroupCounts], Work]] = {
    "ring": ring,
    "direct": direct,
    "all_gather": all_gather,
    "ulysses": ulysses,
    "hierarchical": hierarchical,
}
"""By the names of the methods."""
