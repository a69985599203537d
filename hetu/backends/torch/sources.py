"""What comes from outside a graph, and constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.memory import as_tensor


@lowering("placeholder", backend="torch")
def _placeholder(cx: NodeLowering) -> fx.Node:
    return cx.feed()


@lowering("parameter", backend="torch")
def _parameter(cx: NodeLowering) -> fx.Node:
    return cx.parameter(cx.node, TORCH_DTYPES[cx.node.outputs[0].dtype])


@lowering("constant", backend="torch")
def _constant(cx: NodeLowering) -> fx.Node:
    value, dtype = cx.node.attrs["value"], TORCH_DTYPES[cx.node.outputs[0].dtype]
    if isinstance(value, np.ndarray) and value.dtype.name == "bfloat16":  # ml_dtypes', which torch does not read
        value = value.astype(np.float32)
    value = as_tensor(value) if isinstance(value, np.ndarray) else torch.as_tensor(value, device="cpu")
    return cx.constant(value.to(dtype))


@lowering("full", backend="torch")
def _full(cx: NodeLowering) -> fx.Node:
    dtype = TORCH_DTYPES[cx.node.outputs[0].dtype]
    return cx.call(torch.full, tuple(cx.shape()), cx.node.attrs["value"], dtype=dtype, device=cx.device)


@lowering("arange", backend="torch")
def _arange(cx: NodeLowering, start: Any, stop: Any) -> fx.Node:
    dtype = TORCH_DTYPES[cx.node.outputs[0].dtype]
    return cx.call(torch.arange, start, stop, cx.node.attrs["step"], dtype=dtype, device=cx.device)
