"""What each method makes of a group's counts: FLOPs of each member, bytes between members, and peak memory.

Each method is a function of :class:`GroupCounts`, on ints and on symbols alike. It says of all pieces at once what
:mod:`hetu.parallel.methods` does with them, and :mod:`hetu.parallel.plan.memory` of that: a change there is one here,
and a test holds both together without tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hetu.parallel.choice.counts import Counts
from hetu.parallel.choice.numbers import any_of, larger, lifted, smaller
from hetu.parallel.mask.rules import Size
from hetu.parallel.methods.ulysses import deal
from hetu.parallel.plan.heads import Heads, Payload

Links = dict[tuple[int, int], Any]
"""Bytes from one member to another."""


@dataclass(frozen=True, slots=True)
class Work:
    """What members do, of ints or symbols.

    Attributes:
        flops: Of each member, as :attr:`hetu.parallel.views.cost.Cost.flops`.
        links: Bytes from one member to another; no entry where there are never any.
        peak: Bytes that each member holds at most, as :meth:`~hetu.parallel.AttnPlan.peak_bytes`.
    """

    flops: list[Any]
    links: Links
    peak: list[Any]


class GroupCounts:
    """The counts of a group's documents, added up.

    Args:
        counts: Of each document.
        heads: Widths of a token's row.
        batch: How often each document is there.
    """

    def __init__(self, counts: Counts, heads: Heads, batch: Size = 1) -> None:
        self.counts, self.heads, self.batch = counts, heads, batch
        self.members = counts.members
        self.rows = [self._total(own) for own in counts.pieces]

    def _total(self, of_documents: Any) -> Any:
        return sum(of_documents.tolist()) * self.batch

    @cached_property
    def pairs(self) -> list[Any]:
        """Of each member's queries."""
        return [self._total(own) for own in self.counts.pairs()]

    @cached_property
    def whole_pairs(self) -> Any:
        """Of all tokens."""
        return self._total(self.counts.whole_pairs())

    @cached_property
    def taken(self) -> list[list[Any]]:
        """Rows that each member needs of each owner."""
        found: list[list[Any]] = self.counts.taken().tolist()
        return found if self.batch == 1 else [[count * self.batch for count in own] for own in found]

    @cached_property
    def carried(self) -> list[list[Any]]:
        """``[hop][owner]`` rows of the owner's shard that somebody at that distance or further needs; none at home."""
        R = self.members
        return [[0] * R] + [
            [self._total(self.counts.needed(sorted((c + far) % R for far in range(hop, R)), c)) for c in range(R)]
            for hop in range(1, R)
        ]

    @cached_property
    def gaps(self) -> list[Any]:
        """See :meth:`Counts.gaps`."""
        return list(self.counts.gaps(lifted(self.batch)))

    def results(self, rows: Any, steps_on: Any) -> Any:
        """Bytes of a member's results; ``steps_on`` is 1 where several steps add to them."""
        heads = self.heads
        wide = max(heads.itemsize, 4) * heads.num_q * heads.head_dim
        return rows * (heads.row_bytes(Payload.OUT) + heads.row_bytes(Payload.LSE)) + rows * wide * steps_on

    def flops(self, pairs: Any, num_q: int) -> Any:
        return pairs * (4 * self.heads.head_dim * num_q)


def moved_once(group: GroupCounts) -> Work:
    """``direct`` and ``all_gather``: all that travels is under way, and held, until the end."""
    row, own = group.heads.row_bytes(Payload.KV), group.heads.row_bytes(Payload.QKV)
    links, peak, R = {}, [], range(group.members)
    for r in R:
        links |= {(c, r): group.taken[r][c] * row for c in R if c != r}
    for r, rows in enumerate(group.rows):
        come, gone = sum(group.taken[r]), sum(group.taken[c][r] for c in R)
        peak.append(rows * own + (come + gone) * row + group.results(rows, any_of(come)))
    return Work([group.flops(pairs, group.heads.num_q) for pairs in group.pairs], links, peak)


def ring(group: GroupCounts) -> Work:
    """``ring``: two buffers take turns, and what is passed on is held until the next receive into its buffer."""
    R, row = group.members, group.heads.row_bytes(Payload.KV)
    links: Links = {}
    for hop in range(1, R):
        for c in range(R):
            link = (c + hop - 1) % R, (c + hop) % R
            links[link] = links.get(link, 0) + group.carried[hop][c] * row
    peak = [_ring_peak(group, member) for member in range(R)]
    return Work([group.flops(pairs, group.heads.num_q) for pairs in group.pairs], links, peak)


def _ring_peak(group: GroupCounts, m: int) -> Any:
    """The peak of a member: its shard, results, and first send are held throughout; what else is, hop by hop."""
    R, heads, rows = group.members, group.heads, group.rows[m]
    taken = [group.taken[m][(m - hop) % R] for hop in range(R)]
    come = [group.carried[hop][(m - hop) % R] for hop in range(R)] + [0]
    sent = [0, *(group.carried[hop][(m - hop + 1) % R] for hop in range(1, R)), 0]
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
    own = rows * heads.row_bytes(Payload.QKV) + group.results(rows, any_of(sum(taken)))
    return own + (sent[1] + most) * heads.row_bytes(Payload.KV)


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
    R, heads, tokens = group.members, group.heads, sum(group.rows)
    if R == 1:
        return moved_once(group)
    ranges = deal(heads, R)
    home = (Payload.OUT, Payload.LSE)
    given = [heads.row_bytes(Payload.QKV, own) for own in ranges]
    back = [sum(heads.row_bytes(payload, own) for payload in home) for own in ranges]
    links, peak = {}, []
    for r in range(R):
        links |= {(c, r): group.rows[c] * given[r] + group.rows[r] * back[c] for c in range(R) if c != r}
    for r, rows in enumerate(group.rows):
        others = [c for c in range(R) if c != r]
        shard = rows * heads.row_bytes(Payload.QKV)
        packed, landing = rows * sum(given[c] for c in others), rows * sum(back[c] for c in others)
        aside = sum(group.rows[c] * given[r] * any_of(group.gaps[c]) for c in others)
        sent_home = sum(group.rows[c] for c in others) * back[r]
        results = group.results(rows, 0) + rows * heads.row_bytes(Payload.LSE)
        gathered, computed = tokens * given[r], tokens * back[r]
        before = shard + packed + gathered + larger(aside, computed)
        after = shard + results + sent_home + larger(computed, landing)
        peak.append(larger(before, after))
    flops = [group.flops(group.whole_pairs, own.num_q) for own in ranges]
    return Work(flops, links, peak)


WORK: dict[str, Callable[[GroupCounts], Work]] = {
    "ring": ring,
    "direct": moved_once,
    "all_gather": moved_once,
    "ulysses": ulysses,
}
"""By the names of the methods."""
