"""Over what parameters are cut, and where each of them lies at each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hetu.backends.comm import World, current_world
from hetu.errors import HetuError, caller
from hetu.graph import Graph, Node, Role
from hetu.graph.passes import nodes_of
from hetu.optim import Optimizer
from hetu.parallel.placement import Box, Placement, Placements

PlacementRule = Callable[[Sequence[int], int, int], Placements]
"""Places a parameter of a shape over so many places, for updates of a ``zero_stage``."""


class Places(NamedTuple):
    """Over what parameters are cut: the ranks of the world; in one process the pipelines of the largest strategy.

    Attributes:
        total: How many places there are.
        here: Those of this process.
        is_distributed: Whether there are others.
    """

    total: int
    here: tuple[int, ...]
    is_distributed: bool

    @classmethod
    def of(cls, graph: Graph) -> Places:
        """Those of a graph as it is now, in the world of this process."""
        world = current_world()
        if world.is_distributed:
            return cls(world.size, (world.rank,), True)
        count = max([graph.num_pipelines(strategy) or 1 for strategy in range(graph.num_strategy)])
        return cls(count, tuple(range(count)), False)

    def __str__(self) -> str:
        return f"rank {self.here[0]} of {self.total}" if self.is_distributed else "one process"


class Homes:
    """Where the parameters of one graph lie, and what belongs to them.

    Args:
        graph: The graph.
        rule: Says it of one parameter.
    """

    def __init__(self, graph: Graph, rule: PlacementRule) -> None:
        self.graph, self.rule = graph, rule
        self._found: dict[tuple[Node, int], Placements] = {}
        self._world: World | None = None
        self._places: Places | None = None
        self._is_cut = False
        self._summed: dict[Node, Node] = {}

    @property
    def places(self) -> Places:
        """Over what parameters are cut.

        Raises:
            HetuError: If something was cut over others: there are other processes now than there were.
        """
        world, known = current_world(), self._places
        if known is not None and (world is self._world or not (world.is_distributed or known.is_distributed)):
            return known  # a graph that grows in one process keeps them
        now = Places.of(self.graph)
        if self._is_cut and known is not None and known != now:
            raise HetuError(
                f"what this graph trains is cut over {known}, but now this is {now}",
                op="run",
                where=caller(),
                fix="call hetu.init_distributed before the first run, and hetu.shutdown_distributed after the last; "
                "to go on, load a state that was saved before: g.load_state_dict(hetu.load(path))",
            )
        if known != now:
            self._found.clear()
        self._world, self._places = world, now
        return now

    def check(self) -> None:
        """Refuses to go on where something was cut over others; see :attr:`places`."""
        _ = self.places

    def of(self, node: Node, stage: int = 0) -> Placements:
        """Where a parameter lies, and what belongs to it.

        Args:
            node: The parameter.
            stage: The ``zero_stage`` of the update that asks.
        """
        places = self.places
        found = self._found.get((node, stage))
        if found is None:
            found = self._found[node, stage] = self.rule(node.attrs["shape"], places.total, stage)
            self._is_cut |= stage > 0
        return found

    def of_sum(self, node: Node) -> Placement:
        """Where the gradient is at home that a node ``reduce_scatter`` sums up."""
        parameter = self._summed.get(node)
        if parameter is None:
            named = nodes_of(self.graph.nodes, Role.PARAMETER)
            parameter = self._summed[node] = next(x for x in named if x.name == node.attrs["parameter"])
        return self.of(parameter, node.attrs["zero_stage"]).gradient

    def here(self, placement: Placement) -> list[Box]:
        """The boxes of a placement that lie in this process."""
        return list(dict.fromkeys(box for place in self.places.here for box in placement.held_by(place)))

    def is_elsewhere(self, placement: Placement) -> bool:
        """Whether other processes hold what this one doesn't."""
        return self.places.is_distributed and placement.is_cut


def stage_of(update: Node) -> int:
    """The ``zero_stage`` of a node that ``minimize`` made."""
    optimizer: Optimizer = update.attrs["optimizer"]
    return optimizer.zero_stage
