"""The layers of a transformer in plain torch, apart from attention and products of matrices."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional

from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lowering import NodeLowering, lowering


@lowering("cast", backend="torch")
def _to(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(torch.Tensor.to, x, TORCH_DTYPES[cx.node.outputs[0].dtype])


@lowering("embedding", backend="torch")
def _embedding(cx: NodeLowering, ids: fx.Node, weight: fx.Node) -> fx.Node:
    return cx.call(functional.embedding, ids, weight)


@lowering("rms_norm", backend="torch")
def _rms_norm(cx: NodeLowering, x: fx.Node, weight: fx.Node | None) -> fx.Node:
    width = cx.size(cx.node.outputs[0].symbolic_shape[-1])
    return cx.call(torch.rms_norm, x, (width,), weight, cx.node.attrs["eps"])


@lowering("silu", backend="torch")
def _silu(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(functional.silu, x)


@lowering("gelu", backend="torch")
def _gelu(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(functional.gelu, x, approximate=cx.node.attrs["approximate"])


@lowering("softmax", backend="torch")
def _softmax(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(torch.softmax, x, cx.node.attrs["dim"])
