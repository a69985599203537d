"""The layers of a transformer in plain torch, apart from norms, losses, attention and products of matrices."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional

from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.lowering import NodeLowering, lowering

aten = torch.ops.aten


@lowering("cast", backend="torch")
def _to(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(torch.Tensor.to, x, TORCH_DTYPES[cx.node.outputs[0].dtype])


# Embedding


@lowering("embedding", backend="torch")
def _embedding(cx: NodeLowering, ids: fx.Node, weight: fx.Node) -> fx.Node:
    return cx.call(functional.embedding, ids, weight)


def hetu_embedding_grad(ids: torch.Tensor, grad: torch.Tensor, rows: int) -> torch.Tensor:
    """Sums up the gradients of each row's uses, in float32 at least."""
    wide = grad.float() if grad.itemsize == 2 else grad
    return aten.embedding_dense_backward(wide, ids, rows, padding_idx=-1, scale_grad_by_freq=False).to(grad.dtype)


@lowering("embedding_grad", backend="torch")
def _embedding_grad(cx: NodeLowering, ids: fx.Node, grad: fx.Node) -> fx.Node:
    return cx.call(hetu_embedding_grad, ids, grad, cx.shape()[0])


# Functions of each element


@lowering("silu", backend="torch")
def _silu(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(functional.silu, x)


@lowering("gelu", backend="torch")
def _gelu(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(functional.gelu, x, approximate=cx.node.attrs["approximate"])


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def hetu_swiglu(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """``silu(gate) * up`` in one allocation."""
    if up is None:
        gate, up = _halves(gate)
    return functional.silu(gate).mul_(up)


def hetu_swiglu_grad(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The gradients, computed in the memory that they are returned in."""
    outputs = tuple(x.new_empty(x.shape) for x in (gate, up) if x is not None)
    if up is None:
        gate, up = _halves(gate)
    d_gate, d_up = outputs if len(outputs) == 2 else _halves(outputs[0])
    torch.mul(grad, up, out=d_gate)
    aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    aten.silu.out(gate, out=d_up).mul_(grad)
    return outputs


@lowering("swiglu", backend="torch")
def _swiglu(cx: NodeLowering, gate: fx.Node, up: fx.Node | None) -> fx.Node:
    return cx.call(hetu_swiglu, gate, up)


@lowering("swiglu_grad", backend="torch")
def _swiglu_grad(cx: NodeLowering, grad: fx.Node, gate: fx.Node, up: fx.Node | None) -> tuple[fx.Node, ...]:
    outputs = cx.call(hetu_swiglu_grad, grad, gate, up)
    return tuple(cx.item(outputs, i) for i in range(len(cx.node.outputs)))


# Softmax


@lowering("softmax", backend="torch")
def _softmax(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(torch.softmax, x, cx.node.attrs["dim"])


@lowering("softmax_grad", backend="torch")
def _softmax_grad(cx: NodeLowering, grad: fx.Node, out: fx.Node) -> fx.Node:
    dtype = TORCH_DTYPES[cx.node.outputs[0].dtype]
    return cx.call(aten._softmax_backward_data.default, grad, out, cx.node.attrs["dim"], dtype)
