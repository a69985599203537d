"""Parts of tensors: slice and gather, with their gradients."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.lower.traced import traced
from hetu.backends.torch.common import at_least_float32, checked_indices, looked_up


def _places(dim: int, start: Any, stop: Any, step: int) -> tuple[slice, ...]:
    return (slice(None),) * dim + (slice(start, stop, step),)


@lowering("slice", backend="torch")
def _slice(cx: NodeLowering, x: fx.Node, start: Any, stop: Any) -> fx.Node:
    # Not torch.ops.aten.slice: indexing takes half the time.
    return cx.call(operator.getitem, x, _places(cx.node.attrs["dim"], start, stop, cx.node.attrs["step"]))


@traced
def hetu_slice_grad(
    grad: torch.Tensor, shape: Sequence[int], dim: int, start: int, stop: int, step: int
) -> torch.Tensor:
    """Zeros with the gradient in the slice's place."""
    out = grad.new_zeros(shape)
    out[_places(dim, start, stop, step)] = grad
    return out


@lowering("slice_grad", backend="torch")
def _slice_grad(cx: NodeLowering, grad: fx.Node, start: Any, stop: Any, size: Any) -> fx.Node:
    attrs = cx.node.attrs
    return cx.call(hetu_slice_grad, grad, tuple(cx.shape()), attrs["dim"], start, stop, attrs["step"])


@lowering("gather", backend="torch")
def _gather(cx: NodeLowering, x: fx.Node, index: fx.Node) -> fx.Node:
    return looked_up(cx, cx.call(torch.gather, x, cx.node.attrs["dim"], _long(cx, index)), index, "index")


def hetu_gather_grad(grad: torch.Tensor, index: torch.Tensor, shape: Sequence[int], dim: int) -> torch.Tensor:
    """Sums up the gradients of each element's uses, in float32 at least."""
    wide = at_least_float32(grad)
    return wide.new_zeros(shape).scatter_add_(dim, index, wide).to(grad.dtype)


@lowering("gather_grad", backend="torch")
def _gather_grad(cx: NodeLowering, grad: fx.Node, index: fx.Node) -> fx.Node:
    return cx.call(hetu_gather_grad, grad, _long(cx, index), tuple(cx.shape()), cx.node.attrs["dim"])


def _long(cx: NodeLowering, index: fx.Node) -> fx.Node:
    """Indices as all releases of torch take them, none out of range."""
    return cx.call(torch.Tensor.long, checked_indices(cx, index, "index"))
