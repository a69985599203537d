"""Views of the same elements: nothing is copied where torch can do without."""

from __future__ import annotations

import torch
from torch import fx

from hetu.backends.lower.lowering import NodeLowering, lowering


@lowering("reshape", backend="torch")
def _reshape(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(torch.reshape, x, tuple(cx.shape()))


@lowering("transpose", backend="torch")
def _transpose(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(torch.transpose, x, cx.node.attrs["dim0"], cx.node.attrs["dim1"])


@lowering("broadcast_to", backend="torch")
def _broadcast_to(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(torch.broadcast_to, x, tuple(cx.shape()))


@lowering("stop_gradient", backend="torch")
def _stop_gradient(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return x
