"""The hosts of a group's members, and who relays what between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from hetu.parallel.topology import Topology


@dataclass(frozen=True, slots=True)
class Hosts:
    """Which members of a group share a host.

    Attributes:
        of_member: The host of each member; hosts are numbered in the order in which members first name them.
        members: The members of each host, in order.

    Example:
        >>> hosts = Hosts.of((0, 1, 2, 3, 4), Topology((7, 7, 5, 5, 5)))
        >>> hosts.members, hosts.relay(4, 0), hosts.distance(4, 0)
        (((0, 1), (2, 3, 4)), 0, 1)
    """

    of_member: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, pipelines: Sequence[int], topology: Topology | None) -> Hosts:
        """Those of the members that are these pipelines; one if there is no topology."""
        if topology is None:
            return _one_host(len(pipelines))
        named = [topology.hosts[r] for r in pipelines]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(named))}
        members: list[list[int]] = [[] for _ in numbers]
        for member, name in enumerate(named):
            members[numbers[name]].append(member)
        return cls(tuple([numbers[name] for name in named]), tuple(map(tuple, members)))

    def distance(self, owner: int, receiver: int) -> int:
        """Number of hosts from one member's to another's, around all hosts."""
        return (self.of_member[receiver] - self.of_member[owner]) % len(self.members)

    def relay(self, owner: int, host: int) -> int:
        """The member of a host that gets an owner's rows for all of it."""
        place = self.members[self.of_member[owner]].index(owner)
        return self.members[host][place % len(self.members[host])]

    def relayed_by(self, member: int) -> list[int]:
        """The owners of other hosts whose relay a member is, for its host.

        Example:
            >>> Hosts.of((0, 1, 2, 3, 4), Topology((7, 7, 5, 5, 5))).relayed_by(0)
            [2, 4]
        """
        own = self.members[self.of_member[member]]
        place = own.index(member)
        return [c for members in self.members if members is not own for c in members[place :: len(own)]]


@lru_cache
def _one_host(members: int) -> Hosts:
    """All members on one host; none, if there are none."""
    return Hosts((0,) * members, (tuple(range(members)),) if members else ())
