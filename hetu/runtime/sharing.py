"""What ranks send each other of a step beside what its graph does: gradients and norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hetu.backends.comm import World
from hetu.backends.comm.boxes import cut, unflat
from hetu.graph import Node
from hetu.parallel.placement import STAGES
from hetu.runtime.homes import stage_of
from hetu.runtime.parameters import ByBox, ParameterStore, sum_dtype


def bring_home(
    store: ParameterStore,
    update: Node,
    nodes: Sequence[Node],
    sums: Sequence[torch.Tensor] | None,
    count: int,
    world: World,
    device: torch.device,
) -> ByBox:
    """Brings the gradients of an update to where they are at home.

    The graph itself adds them up over the pipelines of the strategy (``minimize`` builds the sums, which start
    while other gradients are still computed). What is left is to give them to ranks without a pipeline.

    Args:
        store: Says where that is.
        update: The update.
        nodes: Its parameters.
        sums: What the graph gives of each; None on a rank that has no pipeline.
        count: How many pipelines the strategy has.
        world: The processes that run them.
        device: Where the gradients lie.

    Returns:
        The gradient of each box that is at home in this process.
    """
    stage, homes = stage_of(update), store.homes
    placements = [homes.of(node, stage).gradient for node in nodes]
    dtypes = [sum_dtype(node) for node in nodes]
    found = ByBox()
    if STAGES[stage].cuts_gradients:
        delivered = world.deliver(sums, placements, dtypes, count, device)
        for node, placement, own in zip(nodes, placements, delivered, strict=True):
            boxes = homes.here(placement)
            found.update(zip([(node, box) for box in boxes], unflat(own, boxes), strict=True))
        return found
    like = [(tuple(node.attrs["shape"]), dtype) for node, dtype in zip(nodes, dtypes, strict=True)]
    shared = world.share(sums, like, count, device)
    for node, placement, whole in zip(nodes, placements, shared, strict=True):
        found.update(((node, box), cut(whole, box)) for box in homes.here(placement))
    return found


def has_norm_elsewhere(store: ParameterStore, update: Node, nodes: Sequence[Node]) -> bool:
    """Whether other ranks have a part of an update's gradients, and so of their norm."""
    homes, stage = store.homes, stage_of(update)
    return STAGES[stage].cuts_gradients and any(homes.is_elsewhere(homes.of(node, stage).gradient) for node in nodes)


def norms_of_all(own: Sequence[torch.Tensor], world: World, device: torch.device) -> list[torch.Tensor]:
    """The norms of what all ranks hold together, the same on all of them.

    Args:
        own: The norms of what this rank holds, in the dtypes of the result.
        world: The ranks.
        device: Where the ranks reach each other.
    """
    squares = [norm.to(device, torch.float64).square() for norm in own]
    everyone = iter(world.gather(squares, [world.size] * len(own), torch.float64, device))
    return [torch.stack([next(everyone) for _ in range(world.size)]).sum().sqrt().to(norm.dtype) for norm in own]
