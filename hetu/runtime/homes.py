"""Over what parameters are cut, and where each of them lies at each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from hetu.backends.comm import World, current_world
from hetu.errors import HetuError, caller
from hetu.graph import Graph, Node, Role
from hetu.graph.passes import live_nodes, nodes_of
from hetu.optim import Optimizer, parameters_of
from hetu.parallel.placement import STAGES, Box, Placement, Placements

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


class Source(NamedTuple):
    """From where all of a parameter's value is gathered.

    Attributes:
        shape: Of the whole.
        boxes: The boxes that each process gives, in their order.
        sizes: How many elements these have.
        here: Those of this process.
        is_in_order: Whether what they give, one after the other, is the whole in row-major order.
        is_kept: Whether the whole stays here once it was gathered; it is then gathered when it has changed elsewhere.
    """

    shape: tuple[int, ...]
    boxes: Sequence[Sequence[Box]]
    sizes: Sequence[int]
    here: Sequence[Box]
    is_in_order: bool
    is_kept: bool


class Homes:
    """Where the parameters of one graph lie, and what belongs to them.

    Args:
        graph: The graph.
        rule: Says it of one parameter.

    Attributes:
        version: Changes whenever something lies elsewhere than before: the graph got an update that cuts something, or
            there are other ranks.
    """

    def __init__(self, graph: Graph, rule: PlacementRule) -> None:
        self.graph, self.rule = graph, rule
        self.version = 0
        self._found: dict[tuple[Node, int], Placements] = {}
        self._sources: dict[Node, Source | None] = {}
        self._scattered: frozenset[tuple[Node, bool]] | None = None
        self._world: World | None = None
        self._places: Places | None = None
        self._is_cut = False
        self._summed: dict[Node, Node] = {}
        self._stages: dict[Node, int] = {}
        self._seen: tuple[int, int] | None = None

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
            self._forget()
        self._world, self._places = world, now
        return now

    def _forget(self) -> None:
        self._found.clear()
        self._sources.clear()
        self._scattered = None
        self.version += 1

    def check(self) -> None:
        """Refuses to go on where something was cut over others; see :attr:`places`."""
        _ = self.places

    @property
    def stages(self) -> Mapping[Node, int]:
        """The highest ``zero_stage`` of the updates that train a parameter, of those that have one.

        An update that cuts values cuts those, too, that its loss reads and nobody trains.
        """
        if self._seen != self.graph.version:
            found = dict[Node, int]()
            for update in nodes_of(self.graph.nodes, Role.UPDATE):
                if stage := stage_of(update):
                    read = live_nodes(update.tensors[:1]) if STAGES[stage].cuts_values else ()
                    for node in (*parameters_of(update), *nodes_of(read, Role.PARAMETER)):
                        found[node] = max(stage, found.get(node, 0))
            if found != self._stages:
                self._forget()
            self._stages, self._seen = found, self.graph.version
        return self._stages

    def of(self, node: Node, stage: int = 0) -> Placements:
        """Where a parameter lies, and what belongs to it.

        Its value and its updates have one placement, whatever update asks; gradients are each update's own.

        Args:
            node: The parameter.
            stage: The ``zero_stage`` of the update that asks.
        """
        places, highest = self.places, self.stages.get(node, 0)
        found = self._found.get((node, stage))
        if found is None:
            shape = node.attrs["shape"]
            found = self.rule(shape, places.total, highest)
            found = self._found[node, stage] = found._replace(gradient=self.rule(shape, places.total, stage).gradient)
            self._is_cut |= highest > 0 and (stage > 0 or found.value.is_cut)
        return found

    def source(self, node: Node) -> Source | None:
        """From where all of a parameter's value is gathered; None if it always lies here."""
        _, stages = self.places, self.stages  # they forget what does not hold any more
        if node not in stages:
            return None
        if node not in self._sources:
            value, _, state = self.of(node)
            is_needed = value.is_cut or self.is_elsewhere(state)
            self._sources[node] = self._source(node, value if value.is_cut else state, value) if is_needed else None
        return self._sources[node]

    def _source(self, node: Node, owners: Placement, value: Placement) -> Source:
        shape, places = tuple(node.attrs["shape"]), self.places
        here = self.here(owners)
        boxes = [owners.held_by(rank) for rank in range(places.total)] if places.is_distributed else [here]
        sizes = [sum(box.numel for box in own) for own in boxes]
        return Source(shape, boxes, sizes, here, owners.is_in_order(shape), not value.is_cut)

    @property
    def scattered(self) -> frozenset[tuple[Node, bool]]:
        """The parameters of which ranks have parts, and of each whether the whole of it stays where it was gathered."""
        _, stages = self.places, self.stages  # they forget what does not hold any more
        if self._scattered is None:
            sources = [(node, self.source(node)) for node in stages]
            self._scattered = frozenset((node, source.is_kept) for node, source in sources if source is not None)
        return self._scattered

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
