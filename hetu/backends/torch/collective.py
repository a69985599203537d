"""Ops over all pipelines of a strategy, wherever they run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from hetu.backends.comm import World
from hetu.backends.lowering import NodeLowering, lowering


def hetu_all_reduce(parts: Sequence[torch.Tensor], op: str, count: int, world: World) -> torch.Tensor:
    """The sum or the mean of one tensor a pipeline, of which ``parts`` are those of this process."""
    return world.all_reduce(parts, op, count)


@lowering("all_reduce", backend="torch")
def _all_reduce(cx: NodeLowering, parts: Sequence[fx.Node]) -> list[fx.Node]:
    # One tensor for all pipelines: no op writes to its operands.
    reduced = cx.call(hetu_all_reduce, parts, cx.node.attrs["op"], cx.num_pipelines, cx.world())
    return [reduced] * len(cx.pipelines)
