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


_OTHER_HETU = {
    "AdamOptimizer": "hetu.optim.Adam or hetu.optim.AdamW",
    "AutoCast": "hetu.autocast",
    "CommGroup": "the groups of a hetu.Strategy",
    "ConstantInitializer": "a number as hetu.parameter's init",
    "DataLoader": "torch.utils.data.DataLoader",
    "Dataloader": "torch.utils.data.DataLoader",
    "DeviceGroup": "a hetu.Strategy, whose pipelines are ranks",
    "DeviceGroupHierarchy": "hetu.graph(..., strategies=[...])",
    "DeviceGroupList": "hetu.graph(..., strategies=[...])",
    "DistributedStates": "a hetu.Strategy, which says who holds which tokens",
    "DistributedStatesUnion": "hetu.graph(..., strategies=[...])",
    "Executor": "g.run",
    "GradScaler": "bfloat16 under hetu.autocast, which needs no scaling",
    "Initializer": "a function of the tensor as hetu.parameter's init",
    "NDArray": "numpy arrays and torch tensors",
    "NormalInitializer": "a function of the tensor as hetu.parameter's init",
    "Operator": "hetu.op, which makes an op of a function of torch",
    "Profile": "hetu.trace",
    "SGDOptimizer": "hetu.optim.SGD",
    "SubGraph": "names of ops, name=",
    "TruncatedNormalInitializer": "a function of the tensor as hetu.parameter's init",
    "UniformInitializer": "a function of the tensor as hetu.parameter's init",
    "Variable": "hetu.parameter",
    "XavierUniformInitializer": "a function of the tensor as hetu.parameter's init",
    "add_to_subgraph": "names of ops, name=",
    "array_reshape": "hetu.reshape",
    "array_set": "hetu.full",
    "as_strided": "hetu.slice, hetu.transpose and hetu.reshape",
    "attn": "hetu.attn_varlen",
    "attn_qkvpacked": "hetu.split, and hetu.attn_varlen",
    "attn_varlen_qkvpacked": "hetu.split, and hetu.attn_varlen",
    "avgpool": "hetu.op(torch.nn.functional.avg_pool2d, ...)",
    "batch_matmul": "hetu.matmul",
    "batch_norm": "hetu.op(torch.nn.functional.batch_norm, ...)",
    "binary_cross_entropy": "hetu.op(torch.nn.functional.binary_cross_entropy, ...)",
    "bmm": "hetu.matmul",
    "broadcast": "hetu.broadcast_to",
    "ceil": "-hetu.floor(-x)",
    "checknumeric": "torch.isfinite on what a run gives",
    "checkpoint": "hetu.save and hetu.load",
    "comm": "the strategy's lists of hetu.parallel_attn, and hetu.all_reduce",
    "context": 'a device for the whole graph: hetu.graph(..., device="cuda")',
    "contiguous": "nothing: tensors need no such call",
    "control_dependencies": "nothing: what is fetched says what is computed",
    "conv2d": "hetu.op(torch.nn.functional.conv2d, ...)",
    "cpu_offload": "hetu.recompute",
    "cross_entropy_sparse": "hetu.cross_entropy",
    "data_transfer": "hetu.cast",
    "dequantization": "hetu.op with a library's own function",
    "detach": "hetu.stop_gradient",
    "device": 'a string: hetu.graph(..., device="cuda")',
    "diagonal": "hetu.op(torch.diagonal, ...)",
    "dot": "hetu.sum(x * y)",
    "dropout2d": "hetu.op, or hetu.dropout",
    "dynamic_concat": "hetu.concat",
    "einsum": "hetu.op(torch.einsum, ...), or hetu.matmul",
    "elu": "hetu.op(torch.nn.functional.elu, ...)",
    "embedding_lookup": "hetu.embedding",
    "empty": "hetu.full",
    "flash_attn": "hetu.attn_varlen or hetu.parallel_attn",
    "from_numpy": "hetu.constant",
    "from_numpy_parallel": "hetu.constant",
    "fused_layernorm": "hetu.layer_norm",
    "fused_rmsnorm": "hetu.rms_norm",
    "global_comm_barrier_rpc": "nothing: runs wait for each other where they must",
    "global_device_group": "hetu.init_distributed, which returns the world",
    "group": "a list of fetches",
    "hardshrink": "hetu.op(torch.nn.functional.hardshrink, ...)",
    "hardsigmoid": "hetu.op(torch.nn.functional.hardsigmoid, ...)",
    "hardswish": "hetu.op(torch.nn.functional.hardswish, ...)",
    "hardtanh": "hetu.op(torch.nn.functional.hardtanh, ...)",
    "index_add_": "hetu.op(torch.index_add, ...)",
    "init_comm_group": "hetu.init_distributed",
    "instance_norm": "hetu.op(torch.nn.functional.instance_norm, ...)",
    "interpolate": "hetu.op(torch.nn.functional.interpolate, ...)",
    "kl_div": "hetu.op(torch.nn.functional.kl_div, ...)",
    "layernorm": "hetu.layer_norm",
    "leakyrelu": "hetu.op(torch.nn.functional.leaky_relu, ...)",
    "local_device": "hetu.init_distributed, which returns the world with its device",
    "logsigmoid": "hetu.op(torch.nn.functional.logsigmoid, ...)",
    "matmul4bit": "hetu.op with a library's own function",
    "maxpool": "hetu.op(torch.nn.functional.max_pool2d, ...)",
    "merge_strategy": "hetu.graph(..., strategies=[...])",
    "mish": "hetu.op(torch.nn.functional.mish, ...)",
    "mse_loss": "hetu.op(torch.nn.functional.mse_loss, ...)",
    "neg": "-x",
    "nll_loss": "hetu.cross_entropy",
    "norm": "hetu.sqrt(hetu.sum(x * x))",
    "numpy_to_NDArray": "the array itself",
    "onehot": "hetu.one_hot",
    "ones": "hetu.full(shape, 1.0)",
    "ones_like": "hetu.full(x.symbolic_shape, 1.0)",
    "pad": "hetu.op(torch.nn.functional.pad, ...)",
    "parallel_parameter": "hetu.parameter",
    "parallel_placeholder": "hetu.placeholder",
    "profiler": "hetu.trace",
    "quantization": "hetu.op with a library's own function",
    "randn": "hetu.constant(torch.randn(...))",
    "range_mask": "hetu.where",
    "reciprocal": "1 / x",
    "reduce": "hetu.sum, hetu.mean or hetu.max",
    "reduce_mean": "hetu.mean",
    "reduce_sum": "hetu.sum",
    "repeat": "hetu.op(torch.tile, ...)",
    "rmsnorm": "hetu.rms_norm",
    "roll": "hetu.op(torch.roll, ...)",
    "run_level": 'a string: g.run(..., run_level="update")',
    "set_seed": "hetu.manual_seed",
    "softmax_cross_entropy": "hetu.cross_entropy",
    "softmax_cross_entropy_sparse": "hetu.cross_entropy",
    "softplus": "hetu.op(torch.nn.functional.softplus, ...)",
    "softshrink": "hetu.op(torch.nn.functional.softshrink, ...)",
    "stream": "nothing: hetu chooses streams",
    "subgraph": "names of ops, name=",
    "triu": "hetu.op(torch.triu, ...)",
    "variable": "hetu.parameter",
    "vocab_parallel_cross_entropy": "hetu.cross_entropy",
    "xavier_normal_initializer": "a function of the tensor as hetu.parameter's init",
    "zeros": "hetu.full(shape, 0.0)",
    "zeros_initializer": "0.0 as hetu.parameter's init",
    "zeros_like": "hetu.full(x.symbolic_shape, 0.0)",
}
"""What names of the Hetu of PKU's DAIR lab are called here."""


_TORCHS = {
    "Adam": "hetu.optim.Adam",
    "AdamW": "hetu.optim.AdamW",
    "Linear": "hetu.nn.Linear",
    "SGD": "hetu.optim.SGD",
    "amax": "hetu.max",
    "amin": "hetu.min",
    "cat": "hetu.concat",
    "chunk": "hetu.split",
    "expand": "hetu.broadcast_to",
    "grad": "hetu.gradients",
    "permute": "x.permute",
    "scaled_dot_product_attention": "hetu.attn_varlen",
    "stack": "x.unsqueeze and hetu.concat",
    "tensor_split": "hetu.split",
    "unsqueeze": "x.unsqueeze",
    "view": "hetu.reshape",
}
"""What names of PyTorch are called here, where a graph has the same under another one."""


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
    if name in _OTHER_HETU:  # Python's own "did you mean" would be far off
        raise AttributeError(f"{what}; that name is of another Hetu: use {_OTHER_HETU[name]}")
    if name in _TORCHS:
        raise AttributeError(f"{what}; use {_TORCHS[name]}")
    if name.endswith("_") and name[:-1] in __all__:
        raise AttributeError(f"{what}; nothing changes a graph's tensors in place: use hetu.{name[:-1]}")
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
