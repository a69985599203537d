"""Activations, and the fused kernels that their gradients are."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.common import unary

aten = torch.ops.aten

lowering("relu", backend="torch")(unary(torch.relu))
lowering("sigmoid", backend="torch")(unary(torch.sigmoid))
lowering("tanh", backend="torch")(unary(torch.tanh))
lowering("silu", backend="torch")(unary(functional.silu))


@lowering("gelu", backend="torch")
def _gelu(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.call(functional.gelu, x, approximate=cx.node.attrs["approximate"])


@lowering("relu_grad", backend="torch")
def _relu_grad(cx: NodeLowering, grad: fx.Node, out: fx.Node) -> fx.Node:
    return cx.call(aten.threshold_backward.default, grad, out, 0)


@lowering("sigmoid_grad", backend="torch")
def _sigmoid_grad(cx: NodeLowering, grad: fx.Node, out: fx.Node) -> fx.Node:
    return cx.call(aten.sigmoid_backward.default, grad, out)


@lowering("tanh_grad", backend="torch")
def _tanh_grad(cx: NodeLowering, grad: fx.Node, out: fx.Node) -> fx.Node:
    return cx.call(aten.tanh_backward.default, grad, out)


@lowering("silu_grad", backend="torch")
def _silu_grad(cx: NodeLowering, grad: fx.Node, x: fx.Node) -> fx.Node:
    return cx.call(aten.silu_backward.default, grad, x)


@lowering("gelu_grad", backend="torch")
def _gelu_grad(cx: NodeLowering, grad: fx.Node, x: fx.Node) -> fx.Node:
    return cx.call(aten.gelu_backward.default, grad, x, approximate=cx.node.attrs["approximate"])
