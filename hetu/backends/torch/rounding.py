"""Magnitudes, rounding and bounds of each element."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.common import operand_in, unary
from hetu.graph import Tensor

lowering("abs", backend="torch")(unary(torch.abs))
lowering("floor", backend="torch")(unary(torch.floor))
lowering("round", backend="torch")(unary(torch.round))


@lowering("clamp", backend="torch")
def _clamp(cx: NodeLowering, x: fx.Node, low: Any, high: Any) -> fx.Node:
    wanted, items = cx.node.outputs[0].dtype, cx.node.inputs
    x = operand_in(cx, items[0], x, wanted)
    for item, value, one_sided, side in (
        (items[1], low, torch.maximum, "min"),
        (items[2], high, torch.minimum, "max"),
    ):
        if item is None:
            continue
        bound = operand_in(cx, item, value, wanted)
        x = cx.call(one_sided, x, bound) if isinstance(item, Tensor) else cx.call(torch.clamp, x, **{side: bound})
    return x
