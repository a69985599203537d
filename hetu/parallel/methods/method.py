"""A method as a value: a builder of the forward's parts and one of the backward's, and what they build from.

Pipelines that follow a plan must never wait for each other in a circle, even if all that computes waits for the
transfers under way (:mod:`hetu.parallel.proof.follow`). Whoever writes a builder shows one *common order* of the
instructions of all pipelines, which keeps the order of each, and in which

* a wait stands after both ends of its transfer, and
* what computes, and the first instruction of a batch that packs, stands after both ends of everything that its pipeline
  has posted and not waited for.

Then of all instructions that are not followed yet the first one can always be followed: nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.mask.mask import Mask
from hetu.parallel.plan.heads import Heads
from hetu.parallel.plan.parts import PipelinePlan, PlanData
from hetu.parallel.topology import Topology


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
        backward: Builds the parts of the given pipelines, or more, of the backward of a plan that ``forward`` built.
        joins_hosts: Whether it is of use only where a group lies on several hosts.

    Example:
        >>> from hetu.parallel import METHODS
        >>> list(METHODS)
        ['ring', 'direct', 'all_gather', 'ulysses', 'hierarchical']
    """

    forward: Callable[[GroupLayout, slice, AttnSpec], list[PipelinePlan]]
    backward: Callable[[PlanData, Sequence[int]], list[PipelinePlan]]
    joins_hosts: bool = False

    def __repr__(self) -> str:
        return f"Method({self.forward.__qualname__}, {self.backward.__qualname__})"
