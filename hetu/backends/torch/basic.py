"""Sources, arithmetic, products, shapes and reductions: one torch call a node wherever torch has the op as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional

from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.dtypes import DType
from hetu.graph import Tensor

# Sources


@lowering("placeholder", backend="torch")
def _placeholder(cx: NodeLowering) -> fx.Node:
    return cx.feed()


@lowering("parameter", backend="torch")
def _parameter(cx: NodeLowering) -> fx.Node:
    return cx.parameter()


@lowering("step_sum", backend="torch")
def _step_sum(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.step_value()


@lowering("constant", backend="torch")
def _constant(cx: NodeLowering) -> fx.Node:
    value, dtype = cx.node.attrs["value"], TORCH_DTYPES[cx.node.outputs[0].dtype]
    if isinstance(value, np.ndarray) and value.dtype.name == "bfloat16":  # ml_dtypes', which torch does not read
        value = value.astype(np.float32)
    return cx.constant(torch.as_tensor(value, device="cpu").to(dtype))


@lowering("full", backend="torch")
def _full(cx: NodeLowering) -> fx.Node:
    dtype = TORCH_DTYPES[cx.node.outputs[0].dtype]
    return cx.call(torch.full, tuple(cx.shape()), cx.node.attrs["value"], dtype=dtype, device=cx.device)


# Arithmetic. torch wants a tensor on the left and, where no operand is floating, asks a global for the dtype of a
# floating result; the lowerings settle both.


def _cast(cx: NodeLowering, x: Any, dtype: torch.dtype) -> fx.Node:
    return cx.call(torch.Tensor.to, x, dtype)


def operands(cx: NodeLowering, a: Any, b: Any, wanted: DType | None = None) -> tuple[Any, Any]:
    """Operands with which torch's own promotion gives the dtype ``wanted``: by default that of the node's output."""
    wanted = wanted or cx.node.outputs[0].dtype
    if wanted.is_floating and not any(tensor.dtype.is_floating for tensor in cx.node.tensors):
        if isinstance(cx.node.inputs[0], Tensor):
            a = _cast(cx, a, TORCH_DTYPES[wanted])
        else:
            b = _cast(cx, b, TORCH_DTYPES[wanted])
    return number(a, wanted.is_floating), number(b, wanted.is_floating)


def number(item: Any, floating: bool) -> Any:
    """A number as torch takes it: ints have 64 bits, and to a floating result a larger one is a float anyway."""
    return float(item) if floating and isinstance(item, int) and not -(2**63) <= item < 2**63 else item


def _commutative(fn: Callable[..., torch.Tensor]) -> Callable[..., fx.Node]:
    def lower(cx: NodeLowering, a: Any, b: Any) -> fx.Node:
        a, b = operands(cx, a, b)
        return cx.call(fn, a, b) if isinstance(cx.node.inputs[0], Tensor) else cx.call(fn, b, a)

    return lower


lowering("add", backend="torch")(_commutative(torch.add))
lowering("mul", backend="torch")(_commutative(torch.mul))


@lowering("sub", backend="torch")
def _sub(cx: NodeLowering, a: Any, b: Any) -> fx.Node:
    a, b = operands(cx, a, b)
    return cx.call(torch.sub, a, b) if isinstance(cx.node.inputs[0], Tensor) else cx.call(torch.rsub, b, a)


@lowering("div", backend="torch")
def _div(cx: NodeLowering, a: Any, b: Any) -> fx.Node:
    a, b = operands(cx, a, b)
    if isinstance(cx.node.inputs[0], Tensor):
        return cx.call(torch.div, a, b)
    # torch has number / tensor only as reciprocal and product, which rounds twice (1/49 * 49 is not 1).
    dtype = TORCH_DTYPES[cx.node.outputs[0].dtype]
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    quotient = cx.call(torch.div, cx.call(torch.scalar_tensor, a, dtype=wide, device="cpu"), _cast(cx, b, wide))
    return quotient if wide == dtype else _cast(cx, quotient, dtype)


# Products


@lowering("matmul", backend="torch")
def _matmul(cx: NodeLowering, a: fx.Node, b: fx.Node) -> fx.Node:
    return cx.call(torch.matmul, a, b)


@lowering("linear", backend="torch")
def _linear(cx: NodeLowering, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    return cx.call(functional.linear, x, weight, bias)


# Shapes


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


# Reductions


def _reduction(fn: Callable[..., torch.Tensor]) -> Callable[..., fx.Node]:
    def lower(cx: NodeLowering, x: fx.Node) -> fx.Node:
        dim, keepdim = cx.node.attrs["dim"], cx.node.attrs["keepdim"]
        return cx.call(fn, x, dim, keepdim) if dim else cx.call(fn, x)

    return lower


lowering("sum", backend="torch")(_reduction(torch.sum))
lowering("mean", backend="torch")(_reduction(torch.mean))
lowering("max", backend="torch")(_reduction(torch.amax))
