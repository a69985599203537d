"""What ``hierarchical`` makes of a group's counts: rows go once to each host, and are passed on inside it.

It says of all pieces at once what :mod:`hetu.parallel.methods.hierarchical` does with them; see
:mod:`hetu.parallel.choice.work`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hetu.parallel.choice.numbers import Numbers, any_of, larger
from hetu.parallel.methods.hosts import Hosts


def moves(taken: Numbers, unions: Numbers, hosts: Hosts) -> tuple[Numbers, Numbers]:
    """Rows from each member to each other one, and the most rows that each holds beside its shard, packed or landed.

    Args:
        taken: ``(R, R)`` rows that each member needs of each owner.
        unions: ``(R, H)`` rows of each owner that anybody of each other host needs.
        hosts: Who shares one.
    """
    members = [_Member(taken, unions, hosts, m) for m in range(len(taken))]
    links = np.zeros_like(taken)
    for m, member in enumerate(members):
        for source, rows in member.sources:
            links[source, m] = links[source, m] + rows
    return links, np.array([member.most() for member in members], object)


class _Member:
    """What lands on a member, and what it sends, by distance and by batch.

    Batch d is posted before the attend to what came over distance d - 1: what goes straight over distance d + 1, and
    what is passed on of distance d; batch 0 is the first, before the attend to the own rows.

    Attributes:
        sources: From whom how many rows come, of each owner.
        straight: Rows that come straight from owners, by distance.
        come: All rows that come, by distance: those of a buffer, to which an attend belongs if there are any.
        sent: Rows that each batch sends.
    """

    def __init__(self, taken: Numbers, unions: Numbers, hosts: Hosts, m: int) -> None:
        own, count = hosts.of_member[m], len(hosts.members)
        host = hosts.members[own]
        self.sources: list[tuple[int, Any]] = []
        self.straight, self.come, self.sent = ([0] * count for _ in range(3))
        for c in range(len(taken)):
            d = hosts.distance(c, m)
            relay = m if c == m else c if d == 0 else hosts.relay(c, own)
            is_relay = d > 0 and relay == m
            rows = unions[c, own] if is_relay else taken[m, c]
            self.sources.append((c if is_relay else relay, rows))
            self.come[d] = self.come[d] + rows
            if d == 0 or is_relay:
                self.straight[d] = self.straight[d] + rows
            if is_relay:
                self.sent[d] = self.sent[d] + sum(taken[r, c] for r in host if r != m)
        self.sent[0] = sum(taken[r, m] for r in host if r != m)
        for number, members in enumerate(hosts.members):
            if number != own:
                d = hosts.distance(m, members[0])
                self.sent[d - 1] = self.sent[d - 1] + unions[m, number]

    def most(self) -> Any:
        """Most rows that are held at a time, by :mod:`hetu.parallel.plan.buffers`; of attends, for batches hold less.

        What is sent is held to the end, and a buffer from when it is made to the attend to it.
        """
        count = len(self.come)
        most: Any = 0
        gone: Any = 0
        for d in range(-1, count):  # the attend to the own rows, then that to each distance
            gone = gone + (self.sent[d + 1] if d + 1 < count else 0)
            held = gone
            for buffer in range(max(d, 0), count):
                held = held + self.come[buffer] * self._is_made(buffer, d)
            most = larger(most, held)
        return most

    def _is_made(self, buffer: int, d: int) -> Any:
        """1 if a buffer is made when the member attends to distance d, or before; of one into which anything lands."""
        if buffer == 0:
            return 1
        early = any_of(self.straight[buffer])
        found = early * self._by(d, buffer - 1)
        return found + (1 - early) * self._by(d, buffer)

    def _by(self, d: int, batch: int) -> Any:
        """1 if memory that a batch receives into first is made by the attend to distance d, else 0.

        A receive is no place to make memory while anything is under way: it is made where the member last packed or
        attended.
        """
        found: Any = 1
        for number in range(d + 2, batch + 1):
            found = found * (1 - self._makes(number))
        for number in range(d + 1, batch - 1):
            found = found * (1 - any_of(self.come[number]))
        return found

    def _makes(self, batch: int) -> Any:
        """1 if a batch packs, or nothing is under way when it begins.

        Batches follow each other without anything between, as one, where nothing is attended to or waited for.
        """
        packs, follows = self.sent[batch], 1
        for later in range(batch + 1, len(self.sent)):
            follows = follows * (1 - any_of(self.come[later - 2] + self.straight[later]))
            packs = packs + follows * self.sent[later]
        under_way = sum(self.sent[:batch]) + self.come[batch - 1] - (self.straight[batch - 1] if batch > 1 else 0)
        return 1 - (1 - any_of(packs)) * any_of(under_way)
