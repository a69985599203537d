"""Sums, differences, products and quotients. torch wants a tensor on the left: the lowerings see to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.common import as_range, cast, operands
from hetu.graph import Tensor


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
    a = as_range(a, cx.node.outputs[0].dtype)
    quotient = cx.call(torch.div, cx.call(torch.scalar_tensor, a, dtype=wide, device="cpu"), cast(cx, b, wide))
    return quotient if wide == dtype else cast(cx, quotient, dtype)
