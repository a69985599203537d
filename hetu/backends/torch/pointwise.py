"""Functions of each element: torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.common import operands, unary

lowering("exp", backend="torch")(unary(torch.exp))
lowering("log", backend="torch")(unary(torch.log))
lowering("sin", backend="torch")(unary(torch.sin))
lowering("cos", backend="torch")(unary(torch.cos))
lowering("sqrt", backend="torch")(unary(torch.sqrt))
lowering("rsqrt", backend="torch")(unary(torch.rsqrt))


@lowering("pow", backend="torch")
def _pow(cx: NodeLowering, base: Any, exponent: Any) -> fx.Node:
    return cx.call(torch.pow, *operands(cx, base, exponent))
