"""Ops over all pipelines that run in this process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from hetu.backends.lowering import NodeLowering, lowering


def hetu_all_reduce(parts: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """The sum or the mean of one tensor a pipeline, added in their order, half precision in float32."""
    first, dtype = parts[0], parts[0].dtype
    if len(parts) == 1:
        return first
    wide = torch.float32 if dtype.is_floating_point and first.itemsize == 2 else dtype
    total = torch.add(first.to(wide), parts[1])
    for part in parts[2:]:
        total.add_(part)
    return (total.div_(len(parts)) if op == "mean" else total).to(dtype)


@lowering("all_reduce", backend="torch")
def _all_reduce(cx: NodeLowering, parts: Sequence[fx.Node]) -> list[fx.Node]:
    # One tensor for all pipelines: no op writes to its operands.
    return [cx.call(hetu_all_reduce, parts, cx.node.attrs["op"])] * cx.num_pipelines
