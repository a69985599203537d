"""The choice between elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.common import operand_in
from hetu.graph import Tensor


@lowering("where", backend="torch")
def _where(cx: NodeLowering, condition: fx.Node, a: Any, b: Any) -> fx.Node:
    (out,) = cx.node.outputs
    wanted, device = out.dtype, torch.device("cpu") if out.on_cpu else cx.device

    def operand(item: Any, value: Any) -> Any:
        # A plain number's dtype would be torch's global default where no tensor says otherwise.
        if isinstance(item, Tensor):
            return value
        value = operand_in(cx, item, value, wanted)
        return cx.call(torch.scalar_tensor, value, dtype=TORCH_DTYPES[wanted], device=device)

    _, item_a, item_b = cx.node.inputs
    return cx.call(torch.where, condition, operand(item_a, a), operand(item_b, b))


@lowering("masked_fill", backend="torch")
def _masked_fill(cx: NodeLowering, x: fx.Node, mask: fx.Node, value: Any) -> fx.Node:
    item = cx.node.inputs[2]
    filling = operand_in(cx, item, value, cx.node.outputs[0].dtype)
    if isinstance(item, Tensor):
        return cx.call(torch.where, mask, filling, x)
    return cx.call(torch.masked_fill, x, mask, filling)
