"""What depends on the order of elements along a dimension. Sorts are stable, so that all devices choose alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.common import at_least_float32, outputs_of


def hetu_sort(x: torch.Tensor, dim: int, descending: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The elements in order, and where each stood."""
    values, indices = torch.sort(x, dim=dim, descending=descending, stable=True)
    return values, indices


@lowering("sort", backend="torch")
def _sort(cx: NodeLowering, x: fx.Node) -> tuple[fx.Node, ...]:
    return outputs_of(cx, cx.call(hetu_sort, x, cx.node.attrs["dim"], cx.node.attrs["descending"]))


def hetu_topk(x: torch.Tensor, k: int, dim: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k in order, in memory of their own. ``torch.topk`` leaves open which of equal elements it takes."""
    values, indices = hetu_sort(x, dim, largest)
    return values.narrow(dim, 0, k).clone(), indices.narrow(dim, 0, k).clone()


@lowering("topk", backend="torch")
def _topk(cx: NodeLowering, x: fx.Node, k: Any) -> tuple[fx.Node, ...]:
    return outputs_of(cx, cx.call(hetu_topk, x, k, cx.node.attrs["dim"], cx.node.attrs["largest"]))


def hetu_selected_grad(grad: torch.Tensor, index: torch.Tensor, shape: Sequence[int], dim: int) -> torch.Tensor:
    """Puts the gradient of each selected element into its place."""
    return grad.new_zeros(shape).scatter_(dim, index, grad)


@lowering("selected_grad", backend="torch")
def _selected_grad(cx: NodeLowering, grad: fx.Node, index: fx.Node) -> fx.Node:
    return cx.call(hetu_selected_grad, grad, index, tuple(cx.shape()), cx.node.attrs["dim"])


def hetu_argmax(x: torch.Tensor, dim: int | None, keepdim: bool) -> torch.Tensor:
    """Where the first largest element stands; torch has no order of bools here."""
    return torch.argmax(x.byte() if x.dtype == torch.bool else x, dim, keepdim)


@lowering("argmax", backend="torch")
def _argmax(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(hetu_argmax, x, cx.node.attrs["dim"], cx.node.attrs["keepdim"])


def hetu_cumsum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums from the beginning, in float32 at least."""
    sums = torch.cumsum(at_least_float32(x) if x.is_floating_point() else x, dim)
    return sums.to(x.dtype) if x.is_floating_point() else sums


@lowering("cumsum", backend="torch")
def _cumsum(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(hetu_cumsum, x, cx.node.attrs["dim"])


def hetu_cumsum_grad(grad: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums from the end, in float32 at least."""
    return hetu_cumsum(grad.flip(dim), dim).flip(dim)


@lowering("cumsum_grad", backend="torch")
def _cumsum_grad(cx: NodeLowering, grad: fx.Node) -> fx.Node:
    return cx.call(hetu_cumsum_grad, grad, cx.node.attrs["dim"])
