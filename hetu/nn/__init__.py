"""Modules that models need, with the names and the initial values of PyTorch's, so that a state dict maps by name."""

from __future__ import annotations

import sys
from typing import Any

from hetu.nn.layers import Embedding, Linear, Module, RMSNorm
from hetu.nn.transformer import Attention, SwiGLU
from hetu.ops.common.other_names import of_nn

__all__ = ["Attention", "Embedding", "Linear", "Module", "RMSNorm", "SwiGLU"]


def __getattr__(name: str) -> Any:
    what = f"module {__name__!r} has no attribute {name!r}"
    if answer := of_nn(name, __all__):
        raise AttributeError(f"{what}; {answer}")
    raise AttributeError(what, name=name, obj=sys.modules[__name__])
