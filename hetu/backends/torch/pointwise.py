"""Functions of each element, comparisons and where; and the fused kernels that gradients of activations are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.basic import number, operands
from hetu.graph import Tensor
from hetu.ops.common.build import result_type

aten = torch.ops.aten


def _of_one(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., fx.Node]:
    def lower(cx: NodeLowering, x: fx.Node) -> fx.Node:
        return cx.call(fn, x)

    return lower


for _name in ("relu", "sigmoid", "tanh", "exp", "log", "sqrt", "rsqrt"):
    lowering(_name, backend="torch")(_of_one(getattr(torch, _name)))


@lowering("pow", backend="torch")
def _pow(cx: NodeLowering, base: Any, exponent: Any) -> fx.Node:
    return cx.call(torch.pow, *operands(cx, base, exponent))


# Comparisons and choice


def _comparison(fn: Callable[..., torch.Tensor], mirrored: Callable[..., torch.Tensor]) -> Callable[..., fx.Node]:
    def lower(cx: NodeLowering, a: Any, b: Any) -> fx.Node:
        a, b = operands(cx, a, b, result_type(cx.node.inputs))
        # torch wants a tensor on the left.
        return cx.call(fn, a, b) if isinstance(cx.node.inputs[0], Tensor) else cx.call(mirrored, b, a)

    return lower


for _name, _other in {"eq": "eq", "ne": "ne", "lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}.items():
    lowering(_name, backend="torch")(_comparison(getattr(torch, _name), getattr(torch, _other)))


@lowering("where", backend="torch")
def _where(cx: NodeLowering, condition: fx.Node, a: Any, b: Any) -> fx.Node:
    (out,) = cx.node.outputs
    wanted, device = out.dtype, torch.device("cpu") if out.on_cpu else cx.device

    def operand(item: Any, value: Any) -> Any:
        # A plain number's dtype would be torch's global default where no tensor says otherwise.
        if isinstance(item, Tensor):
            return value
        value = number(value, wanted.is_floating)
        return cx.call(torch.scalar_tensor, value, dtype=TORCH_DTYPES[wanted], device=device)

    _, item_a, item_b = cx.node.inputs
    return cx.call(torch.where, condition, operand(item_a, a), operand(item_b, b))


# Gradients of activations


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
