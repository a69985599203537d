"""The symbolic graph: tensors, nodes, op definitions and what can be told of them before anything runs.

The package is also the users' context: ``hetu.graph("define_and_run")`` makes a :class:`Graph`, and
``hetu.graph("eager")`` one that runs each op when it is built.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

from hetu.graph.autocast import autocast
from hetu.graph.autodiff import gradients
from hetu.graph.current import current_graph, require
from hetu.graph.graph import Graph
from hetu.graph.node import Node
from hetu.graph.opdef import (
    BadSample,
    Call,
    GoodSample,
    IndexRange,
    OpDef,
    Pipeline,
    Role,
    RunView,
    TensorSpec,
    find_op,
    register,
    registry,
)
from hetu.graph.recompute import recompute
from hetu.graph.tensor import Tensor

__all__ = [
    "BadSample",
    "Call",
    "GoodSample",
    "Graph",
    "IndexRange",
    "Node",
    "OpDef",
    "Pipeline",
    "Role",
    "RunView",
    "Tensor",
    "TensorSpec",
    "autocast",
    "current_graph",
    "find_op",
    "gradients",
    "recompute",
    "register",
    "registry",
    "require",
]


__doc__ = f"{__doc__}\n\nhetu.graph{inspect.signature(Graph)}\n\n{inspect.getdoc(Graph)}"  # what help(hetu.graph) shows


class _CallableModule(ModuleType):
    """This module is also the function that makes a graph."""

    __signature__ = inspect.signature(Graph)

    def __call__(self, *args: Any, **kwargs: Any) -> Graph:
        return Graph(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
