"""hetu: a symbolic define-then-run graph for training with long contexts.

Sequence lengths are symbols, attention lowers to Triton kernels, and the parallel strategy is chosen anew
at every run. Importing hetu loads neither torch nor triton: graphs are built, bound and planned without them.
"""

from __future__ import annotations

from typing import Any

from hetu import graph
from hetu.config import config
from hetu.dtypes import DType, as_dtype, bfloat16, float16, float32, float64, int8, int16, int32, int64, uint8
from hetu.dtypes import bool_ as bool
from hetu.errors import (
    BindingError,
    CommunicationError,
    DTypeError,
    HetuError,
    LoweringError,
    PlanError,
    ShapeError,
    StrategyError,
    UnboundSymbolError,
)
from hetu.graph import Graph, Tensor, autocast, gradients, require
from hetu.ops import *  # noqa: F403
from hetu.ops import __all__ as _ops
from hetu.parallel import Hardware, Layout
from hetu.planner import Planner
from hetu.rng import manual_seed
from hetu.shards import Shards
from hetu.symbols import Binding, Constraint, IntSymbol, ceil_div, equal, maximum, minimum

__version__ = "0.1.0"

tensor = Tensor


def _executor(of: Graph) -> Any:
    from hetu.executor import Executor  # brings torch, which only a run needs

    return Executor(of)


Graph.planner_factory = Planner
Graph.executor_factory = _executor

__all__ = [
    "Binding",
    "BindingError",
    "CommunicationError",
    "Constraint",
    "DType",
    "DTypeError",
    "Graph",
    "Hardware",
    "HetuError",
    "IntSymbol",
    "Layout",
    "LoweringError",
    "PlanError",
    "ShapeError",
    "Shards",
    "StrategyError",
    "Tensor",
    "UnboundSymbolError",
    "as_dtype",
    "autocast",
    "bfloat16",
    "bool",
    "ceil_div",
    "config",
    "equal",
    "float16",
    "float32",
    "float64",
    "gradients",
    "graph",
    "int8",
    "int16",
    "int32",
    "int64",
    "manual_seed",
    "maximum",
    "minimum",
    "require",
    "tensor",
    "uint8",
    *_ops,
]
