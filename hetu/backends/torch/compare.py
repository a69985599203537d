"""Comparisons, and the choice between two values that they lead to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.common import operands
from hetu.graph import Tensor
from hetu.ops.common.build import result_type


def _comparison(fn: Callable[..., torch.Tensor], mirrored: Callable[..., torch.Tensor]) -> Callable[..., fx.Node]:
    def lower(cx: NodeLowering, a: Any, b: Any) -> fx.Node:
        a, b = operands(cx, a, b, result_type(cx.node.inputs))
        # torch wants a tensor on the left.
        return cx.call(fn, a, b) if isinstance(cx.node.inputs[0], Tensor) else cx.call(mirrored, b, a)

    return lower


lowering("eq", backend="torch")(_comparison(torch.eq, torch.eq))
lowering("ne", backend="torch")(_comparison(torch.ne, torch.ne))
lowering("lt", backend="torch")(_comparison(torch.lt, torch.gt))
lowering("le", backend="torch")(_comparison(torch.le, torch.ge))
lowering("gt", backend="torch")(_comparison(torch.gt, torch.lt))
lowering("ge", backend="torch")(_comparison(torch.ge, torch.le))
