"""Which pipelines share a host: links inside a host are faster than those between hosts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetu.arguments import MAX_COUNT, index, integer, integers, refuse
from hetu.errors import StrategyError, caller


@dataclass(frozen=True, slots=True)
class Topology:
    """Which pipelines share a host.

    Attributes:
        hosts: The number of each pipeline's host.

    Raises:
        StrategyError: If they are no ints.

    Example:
        >>> Topology((0, 0, 1, 1)).shares_host(1, 2), Topology.one_host(3)
        (False, Topology(hosts=(0, 0, 0)))
    """

    hosts: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "hosts", tuple(integers(self.hosts, "hosts", op="Topology", error=StrategyError)))

    @classmethod
    def one_host(cls, num_pipelines: int) -> Topology:
        """All pipelines share one host."""
        return cls((0,) * integer(num_pipelines, "num_pipelines", least=0, most=MAX_COUNT, op="Topology"))

    def shares_host(self, one: int, other: int) -> bool:
        """Whether two pipelines share a host."""
        count = len(self.hosts)
        pair = [index(r, name, count, op="Topology") for r, name in ((one, "one"), (other, "other"))]
        return self.hosts[pair[0]] == self.hosts[pair[1]]


def check_topology(topology: Topology, count: int, op: str) -> Topology:
    """Demands a topology of so many pipelines.

    Raises:
        StrategyError: If it is none, or one of another number.
    """
    if not isinstance(topology, Topology):
        refuse(topology, "topology", "a hetu.Topology or None", op=op, error=StrategyError)
    if len(topology.hosts) != count:
        what = f"the topology names the hosts of {len(topology.hosts)} pipelines, but there are {count}"
        raise StrategyError(what, op=op, where=caller(), fix="give each pipeline of the strategy its host")
    return topology


def topology_of(hosts: Sequence[int] | None, num_pipelines: int) -> Topology | None:
    """Which pipelines share a host, from the hosts of ranks, see ``hetu.config(hosts=...)``; None if nothing is said.

    Example:
        >>> topology_of((0, 1), 3)
        Topology(hosts=(0, 1, 0))
    """
    return None if hosts is None else Topology(tuple([hosts[r % len(hosts)] for r in range(num_pipelines)]))
