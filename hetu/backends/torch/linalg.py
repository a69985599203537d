"""Products of matrices."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional

from hetu.backends.lower.lowering import NodeLowering, lowering


@lowering("matmul", backend="torch")
def _matmul(cx: NodeLowering, a: fx.Node, b: fx.Node) -> fx.Node:
    return cx.call(torch.matmul, a, b)


@lowering("linear", backend="torch")
def _linear(cx: NodeLowering, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    return cx.call(functional.linear, x, weight, bias)
