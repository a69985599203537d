"""hetu: a symbolic define-then-run graph for training with long contexts.

Sequence lengths are symbols, attention lowers to Triton kernels, and the parallel strategy is chosen anew
at every run. Importing hetu loads neither torch nor triton: graphs are built, bound and planned without them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hetu import graph, nn, optim
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
from hetu.graph import Graph, Tensor, autocast, gradients, recompute, require
from hetu.ops import *  # noqa: F403
from hetu.ops import PUBLIC as _OPS
from hetu.ops.common.other_names import of_module
from hetu.parallel import BatchPlan, Hardware, Layout, Mask, Strategy, Topology, plan_batch
from hetu.parallel.layout.strategy import check_strategies as _check_strategies
from hetu.planning.planner import Planner
from hetu.rng import manual_seed
from hetu.shards import Shards
from hetu.symbols import Binding, Constraint, IntSymbol, ceil_div, equal, maximum, minimum

if TYPE_CHECKING:
    from hetu import functional as functional
    from hetu import testing as testing
    from hetu.backends.comm.recorder import Recorder
    from hetu.calibration import calibrate
    from hetu.distributed import gather_shards, init_distributed, shutdown_distributed, use_hardware
    from hetu.runtime.executor import Executor

__version__ = "0.1.0"

tensor = Tensor


_ROOMS = ("functional", "testing")
"""Modules that bring torch, and are imported when they are first used."""

_DISTRIBUTED = ("init_distributed", "shutdown_distributed", "gather_shards", "use_hardware")
"""Functions of a module that brings torch."""


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("hetu.functional")
    if name == "calibrate":
        return importlib.import_module("hetu.calibration").calibrate
    if name == "testing":
        return importlib.import_module("hetu.testing")
    if name in _DISTRIBUTED:
        return getattr(importlib.import_module("hetu.distributed"), name)
    what = f"module {__name__!r} has no attribute {name!r}"
    if answer := of_module(name, __all__):  # Python's own "did you mean" would be far off
        raise AttributeError(f"{what}; {answer}")
    raise AttributeError(what, name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    """The names that users call: also those that are imported when they are first used, and none that others own."""
    return sorted({*__all__, *_ROOMS, *(name for name in globals() if name.startswith("__"))})


def _planner(of: Graph) -> Planner:
    # The executor is asked for only where the graph computes what planning reads: it brings torch.
    return Planner(of, lambda subgraph, arrays, bound: of.executor.compute_on_host(subgraph, arrays, bound))


def _executor(of: Graph) -> Executor:
    from hetu.runtime.executor import Executor  # brings torch, which only a run needs

    return Executor(of, of.planner)


def save(what: Graph | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a graph's state to a safetensors file: parameters, waiting gradients, optimisers, the generator.

    It is written beside and renamed, so that at any moment the file at ``path`` is whole: the old one or the new one.
    A link is followed, and the file keeps its mode.

    Args:
        what: A graph, or a state as ``g.state_dict()`` gives it. It may have more entries: tensors, numbers, strings,
            None, and dicts, lists and tuples of them, which :func:`load` gives back as they were. Of a graph of which
            several ranks hold parts (``zero_stage``), all ranks make the state, and one of them saves it.
        path: The file; by convention it ends in ``.safetensors``.

    Raises:
        HetuError: If the state holds something that no file can, ``path`` is no file but a folder or a device, say,
            or safetensors can't write it.
        OSError: If it can't be written. The old file is whole then, and nothing is left beside it.

    Example:
        >>> import hetu, os, tempfile
        >>> with hetu.graph("define_and_run") as g:
        ...     w = hetu.parameter(1.5, [2], name="w")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "step100.safetensors")
        ...     hetu.save(g, path)
        ...     g.load_state_dict(hetu.load(path))
        ...     hetu.load(path)["parameters"]
        {'w': tensor([1.5000, 1.5000])}
    """
    from hetu.arguments import mapping
    from hetu.arguments import path as as_path
    from hetu.runtime import state_file

    given = what if isinstance(what, Graph) else mapping(what, "what", "a graph's state", op="save")
    state_file.save(given, as_path(path, op="save"))


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a state that :func:`save` wrote; ``g.load_state_dict`` takes it.

    Args:
        path: The file.

    Returns:
        The state, with its tensors on the CPU, in memory of their own.

    Raises:
        HetuError: If the file is cut short, damaged in any bit, or not one of hetu's.
        FileNotFoundError: If there is none.

    Example:
        >>> import hetu, os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "step100.safetensors")
        ...     hetu.save({"format": "hetu", "step": 100}, path)
        ...     hetu.load(path)["step"]
        100
    """
    from hetu.arguments import path as as_path
    from hetu.runtime import state_file

    return state_file.load(as_path(path, op="load"))


def trace() -> Recorder:
    """Records what every ``parallel_attn`` of the runs in a ``with`` block really does, as a Chrome trace.

    A pipeline is a process of the trace, with a lane for what it computes and one per link, as in ``plan.trace()``,
    which predicts it; steps have the same names. A transfer lasts from when it is started to when the pipeline that
    waits for it sees that it is done. Times are the host's, and those of the stream for tensors on a GPU. It records
    its own thread; where blocks are nested the innermost records.

    Traces of several processes are put together by concatenating their events: processes have their pipelines'
    numbers, and times agree as far as the hosts' clocks do.

    Returns:
        A context manager with ``events``, filled when the block is left, and ``save(path)``.

    Example:
        >>> import hetu, numpy, os, tempfile
        >>> rows = hetu.IntSymbol("rows")
        >>> with hetu.graph("define_and_run", device="cpu") as g:
        ...     qkv = hetu.placeholder(hetu.float32, [rows, 24], name="qkv")
        ...     out, lse, rng = hetu.parallel_attn(qkv, 8, 1, [[2, 2]], [[0, 0]])
        >>> with hetu.trace() as t:
        ...     shards = g.run(out, {qkv: hetu.Shards([numpy.zeros((2, 24), numpy.float32)] * 2)})
        >>> for event in t.events:
        ...     if event["ph"] == "X" and event["pid"] == 1:
        ...         print(event["name"])
        receive 2 rows from 0 into buffer 1
        attend buffer 0 (rows of 1): 1 segment, 3 pairs
        wait for what comes from 0
        attend buffer 1 (rows of 0): 1 segment, 4 pairs
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     t.save(os.path.join(folder, "trace.json"))
    """
    from hetu.backends.comm.recorder import Recorder

    return Recorder()


Graph.planner_factory = _planner
Graph.executor_factory = _executor
Graph.check_strategies = _check_strategies

__all__ = [
    "BatchPlan",
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
    "Mask",
    "PlanError",
    "ShapeError",
    "Shards",
    "Strategy",
    "StrategyError",
    "Tensor",
    "Topology",
    "UnboundSymbolError",
    "as_dtype",
    "autocast",
    "bfloat16",
    "bool",
    "calibrate",
    "ceil_div",
    "config",
    "equal",
    "float16",
    "float32",
    "float64",
    "gather_shards",
    "gradients",
    "graph",
    "init_distributed",
    "int8",
    "int16",
    "int32",
    "int64",
    "load",
    "manual_seed",
    "maximum",
    "minimum",
    "nn",
    "optim",
    "plan_batch",
    "recompute",
    "require",
    "save",
    "shutdown_distributed",
    "tensor",
    "trace",
    "uint8",
    "use_hardware",
    *_OPS,
]
