"""Reductions over dimensions: torch's own, which accumulate half precision in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.common import at_least_float32


def _reduction(fn: Callable[..., torch.Tensor]) -> Callable[..., fx.Node]:
    def lower(cx: NodeLowering, x: fx.Node) -> fx.Node:
        dim, keepdim = cx.node.attrs["dim"], cx.node.attrs["keepdim"]
        return cx.call(fn, x, dim, keepdim) if dim else cx.call(fn, x)

    return lower


lowering("sum", backend="torch")(_reduction(torch.sum))
lowering("mean", backend="torch")(_reduction(torch.mean))
lowering("max", backend="torch")(_reduction(torch.amax))
lowering("min", backend="torch")(_reduction(torch.amin))


def hetu_logsumexp(x: torch.Tensor, dim: tuple[int, ...] = (), keepdim: bool = False) -> torch.Tensor:
    """The logarithm of the sum of exponentials, in float32 at least. Torch asks for its size, so it is not traced."""
    wide = at_least_float32(x)
    return (torch.logsumexp(wide, dim, keepdim) if dim else wide).to(x.dtype)


lowering("logsumexp", backend="torch")(_reduction(hetu_logsumexp))
