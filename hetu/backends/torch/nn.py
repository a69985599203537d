"""Casts, embeddings, one_hot and softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional

from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.lower.traced import traced
from hetu.backends.torch.common import at_least_float32, cast, checked_indices, looked_up
from hetu.graph import Role

aten = torch.ops.aten


@lowering("cast", backend="torch")
def _cast(cx: NodeLowering, x: fx.Node) -> fx.Node:
    source, dtype = cx.node.tensors[0].op, TORCH_DTYPES[cx.node.outputs[0].dtype]
    if source.role is Role.PARAMETER and x.op == "placeholder":  # not where it is gathered from other ranks
        return cx.parameter(source, dtype)  # once for all micro-batches
    return cast(cx, x, dtype)


@lowering("embedding", backend="torch")
def _embedding(cx: NodeLowering, ids: fx.Node, weight: fx.Node) -> fx.Node:
    return looked_up(cx, cx.call(functional.embedding, checked_indices(cx, ids, "ids"), weight), ids, "ids")


def hetu_embedding_grad(ids: torch.Tensor, grad: torch.Tensor, rows: int) -> torch.Tensor:
    """Sums up the gradients of each row's uses, in float32 at least."""
    wide = at_least_float32(grad)
    summed: torch.Tensor = aten.embedding_dense_backward(wide, ids, rows, padding_idx=-1, scale_grad_by_freq=False)
    return summed.to(grad.dtype)


@lowering("embedding_grad", backend="torch")
def _embedding_grad(cx: NodeLowering, ids: fx.Node, grad: fx.Node) -> fx.Node:
    return cx.call(hetu_embedding_grad, checked_indices(cx, ids, "ids"), grad, cx.shape()[0])


@traced
def hetu_one_hot(ids: torch.Tensor, count: int) -> torch.Tensor:
    """Rows that are 1 in one place."""
    return (ids.unsqueeze(-1) == torch.arange(count, device=ids.device)).long()


@lowering("one_hot", backend="torch")
def _one_hot(cx: NodeLowering, ids: fx.Node, count: Any) -> fx.Node:
    return cx.call(hetu_one_hot, checked_indices(cx, ids, "ids"), count)


@lowering("softmax", backend="torch")
def _softmax(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(torch.softmax, x, cx.node.attrs["dim"])


@lowering("softmax_grad", backend="torch")
def _softmax_grad(cx: NodeLowering, grad: fx.Node, out: fx.Node) -> fx.Node:
    dtype = TORCH_DTYPES[cx.node.outputs[0].dtype]
    return cx.call(aten._softmax_backward_data.default, grad, out, cx.node.attrs["dim"], dtype)
