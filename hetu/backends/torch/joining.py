"""Tensors put together, and cut into pieces."""

from __future__ import annotations

import torch
from torch import fx

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.common import outputs_of


@lowering("concat", backend="torch")
def _concat(cx: NodeLowering, *parts: fx.Node) -> fx.Node:
    return cx.call(torch.cat, parts, cx.node.attrs["dim"])


@lowering("split", backend="torch")
def _split(cx: NodeLowering, x: fx.Node) -> tuple[fx.Node, ...]:
    dim = cx.node.attrs["dim"]
    sizes = [cx.shape(index)[dim] for index in range(len(cx.node.outputs))]
    return outputs_of(cx, cx.call(torch.split_with_sizes, x, sizes, dim))
