"""What a graph keeps for its updates, in the boxes that ranks hold, and put together again.

Gradients that wait and the states of optimisers lie where placements say. Checkpoints hold whole tensors, by names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hetu.backends.comm import World
from hetu.backends.comm.boxes import assemble
from hetu.backends.comm.world import Named
from hetu.graph import Node
from hetu.parallel.placement import STAGES, Box, Placement
from hetu.runtime.homes import stage_of
from hetu.runtime.state import GraphState


class Key(NamedTuple):
    """Whose a piece is: names of the whole tensor, which have the same meaning on all ranks.

    Attributes:
        part: ``"parameters"``, ``"gradients"`` or ``"optimizers"``.
        update: The update's name; "" for a parameter's value.
        parameter: The parameter's name.
        name: What the optimiser calls it; "" for a value or a gradient.
    """

    part: str
    update: str
    parameter: str
    name: str


Pieces = dict[Key, dict[Box, Any]]
"""The boxes of some tensors. What is one number for a whole parameter is there once per box."""


def own_pieces(state: GraphState, updates: Sequence[Node], is_wanted: Callable[[Placement], bool]) -> Pieces:
    """What this process holds of some updates.

    Args:
        state: The state.
        updates: Nodes that ``minimize`` made.
        is_wanted: Chooses by where something lies.
    """
    homes, found = state.parameters.homes, Pieces()
    for update in updates:
        stage = stage_of(update)
        waiting, bound = state.waiting.get(update), state.optimizers.get(update)
        for (node, box), grad in waiting.grads.items() if waiting is not None else ():
            if is_wanted(homes.of(node, stage).gradient):
                found.setdefault(Key("gradients", update.name, node.name, ""), {})[box] = grad
        for (node, box), param in bound.params.items() if bound is not None else ():
            if bound is not None and is_wanted(homes.of(node, stage).state):
                for name, value in bound.optimizer.state.get(param, {}).items():
                    found.setdefault(Key("optimizers", update.name, node.name, name), {})[box] = value
    return found


def own_values(state: GraphState) -> Pieces:
    """What this process has of the values of parameters of which others have a part."""
    store, found = state.parameters, Pieces()
    for node in store.nodes:
        source = store.source(node)
        if source is not None and store.is_elsewhere(node):
            parts = store.own(node, source)
            found[Key("parameters", "", node.name, "")] = dict(zip(source.here, parts, strict=True))
    return found


def is_elsewhere(state: GraphState, updates: Sequence[Node]) -> bool:
    """Whether other ranks hold a part of what the graph keeps, for some updates too; alike on all ranks."""
    homes = state.parameters.homes
    return any(map(state.parameters.is_elsewhere, state.parameters.nodes)) or any(
        homes.is_elsewhere(homes.of(node, stage_of(update)).state)
        for update in updates
        if STAGES[stage_of(update)].cuts_state
        for node in state.parameters_of(update)
    )


def everyones_pieces(state: GraphState, updates: Sequence[Node], world: World, op: str) -> Pieces:
    """What all ranks hold of parameters and of some updates, on every rank.

    What others have a part of lies on the CPU.

    Args:
        state: This rank's state. Parameters that were never needed before are made.
        updates: The same ones on all ranks, of which some ranks hold parts.
        world: The ranks.
        op: The function that the user called.

    Raises:
        CommunicationError: If another rank refuses, or does not come.
    """
    homes = state.parameters.homes

    def read() -> list[Named]:
        state.parameters.make(state.parameters.nodes)  # what fails, fails before others wait for it
        pieces = own_values(state) | own_pieces(state, updates, homes.is_elsewhere)
        return [([*key, box], value.cpu()) for key, boxes in pieces.items() for box, value in boxes.items()]

    gathered = world.gather_values(read, op)
    found = own_pieces(state, updates, lambda placement: not homes.is_elsewhere(placement))
    for values in gathered:
        for (*key, (start, stop)), value in values:
            found.setdefault(Key(*key), {})[Box(tuple(start), tuple(stop))] = value
    return found


def whole_tensors(pieces: Pieces, part: str, update: str) -> dict[str, dict[str, Any]]:
    """Whole tensors, by the names of parameters and then by their own, of one part of the update of a name."""
    found: dict[str, dict[str, Any]] = {}
    for key, boxes in pieces.items():
        if (key.part, key.update) == (part, update):
            found.setdefault(key.parameter, {})[key.name] = _whole(boxes)
    return found


def _whole(boxes: Mapping[Box, Any]) -> Any:
    """One tensor of the boxes of it; what has no axes is the same for all boxes."""
    first = next(iter(boxes.values()))
    if not is_elementwise(first):
        return first
    return assemble(Box.whole([max(stops) for stops in zip(*(box.stop for box in boxes), strict=True)]), boxes)


def is_elementwise(value: Any) -> bool:
    """Whether a value of an optimiser's state has an element for each of a parameter's."""
    return isinstance(value, torch.Tensor) and value.ndim > 0
