"""Magnitudes, rounding and bounds of each element."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.common import as_range, cast, number, unary
from hetu.graph import Tensor

lowering("abs", backend="torch")(unary(torch.abs))
lowering("floor", backend="torch")(unary(torch.floor))
lowering("round", backend="torch")(unary(torch.round))


@lowering("clamp", backend="torch")
def _clamp(cx: NodeLowering, x: fx.Node, low: Any, high: Any) -> fx.Node:
    wanted, items = cx.node.outputs[0].dtype, cx.node.inputs
    x = x if cx.node.tensors[0].dtype == wanted else cast(cx, x, TORCH_DTYPES[wanted])
    for item, value, one_sided in ((items[1], low, torch.maximum), (items[2], high, torch.minimum)):
        if isinstance(item, Tensor):
            bound = value if item.dtype == wanted else cast(cx, value, TORCH_DTYPES[wanted])
            x = cx.call(one_sided, x, bound)
        elif item is not None:
            side = "min" if one_sided is torch.maximum else "max"
            x = cx.call(torch.clamp, x, **{side: as_range(number(cx, item, value, wanted.is_floating), wanted)})
    return x
