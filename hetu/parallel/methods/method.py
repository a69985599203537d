"""A method as a value: a builder of the forward's parts and one of the backward's, and what they build from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.mask.mask import Mask
from hetu.parallel.plan.heads import Heads
from hetu.parallel.plan.parts import PipelinePlan, PlanData


@dataclass(frozen=True, slots=True)
class Topology:
    """Which pipelines share a host.

    Attributes:
        hosts: The number of each pipeline's host.

    Example:
        >>> Topology((0, 0, 1, 1)).shares_host(1, 2), Topology.one_host(3)
        (False, Topology(hosts=(0, 0, 0)))
    """

    hosts: tuple[int, ...]

    @classmethod
    def one_host(cls, num_pipelines: int) -> Topology:
        """All pipelines share one host."""
        return cls((0,) * num_pipelines)

    def shares_host(self, one: int, other: int) -> bool:
        """Whether two pipelines share a host."""
        return self.hosts[one] == self.hosts[other]


@dataclass(frozen=True, slots=True)
class AttnSpec:
    """What the plan of an attention depends on, apart from its layout.

    Attributes:
        mask: Which keys a query sees.
        heads: Widths of a token's row.
        topology: Which pipelines of the strategy share a host.
    """

    mask: Mask
    heads: Heads
    topology: Topology

    @property
    def num_pipelines(self) -> int:
        """Number of pipelines of the strategy, of all groups together."""
        return len(self.topology.hosts)


@dataclass(frozen=True, slots=True)
class Method:
    """How the pipelines of a group attend to each other's tokens.

    Attributes:
        forward: Builds the parts of some members of a group, which are given as a slice.
        backward: Builds all parts of the backward of a plan that ``forward`` built.
    """

    forward: Callable[[GroupLayout, slice, AttnSpec], list[PipelinePlan]]
    backward: Callable[[PlanData], tuple[PipelinePlan, ...]]
