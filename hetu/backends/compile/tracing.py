"""A region as a graph of ATen's ops in which every size is a symbol without a value.

Such a symbol, which torch calls unbacked, stands for any size: nothing that is decided while tracing can depend on one,
so there are no guards, and what is compiled holds for all lengths, 0 and 1 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from hetu.backends.compile.regions import Region
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.traced import TRACED
from hetu.backends.lower.values import SIZE, VALUE
from hetu.backends.torch_private import SymbolicSizes, check
from hetu.symbols import IntSymbol


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """A region that was traced.

    Attributes:
        module: ATen's ops, from the inputs to a list of tensors.
        inputs: Descriptions of the inputs: fake tensors and symbolic ints.
        outputs: Which item of the list each output of the region is. Those that are computed alike are one.
    """

    module: fx.GraphModule
    inputs: Sequence[Any]
    outputs: Sequence[int]


def trace(region: Region, device: torch.device) -> Traced:
    """Traces a region.

    Args:
        region: What to trace.
        device: Where it will run.

    Raises:
        Exception: Whatever torch raises where something depends on a size, or it has no rule for an op.
    """
    symbols = SymbolicSizes()
    sizes = _Sizes(symbols)
    inputs = [sizes.input(node, device) for node in region.inputs]

    def compute(*values: Any) -> list[Any]:
        env = dict(zip(region.inputs, values, strict=True))
        for node in region.nodes:
            function: Any = TRACED.get(node.target, node.target)  # type: ignore[arg-type]
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = function(*args, **kwargs)
        return [env[node] for node in region.outputs]

    with torch.no_grad(), symbols.tensors:
        module = make_fx(compute)(*inputs)
    return Traced(module, inputs, _merge_outputs(module.graph))


class _Sizes:
    """The symbols of one region: one for each size of each pipeline, however often it comes."""

    def __init__(self, symbols: SymbolicSizes) -> None:
        self._symbols = symbols
        self._known: dict[tuple[IntSymbol, int], Any] = {}

    def input(self, node: fx.Node, device: torch.device) -> Any:
        """The description of what a node gives."""
        if SIZE in node.meta:
            return self._symbol(*node.meta[SIZE])
        tensor, pipeline = node.meta[VALUE]
        shape = [self._dim(dim, pipeline) for dim in tensor.symbolic_shape]
        where = torch.device("cpu") if tensor.on_cpu else device
        with self._symbols.tensors:
            return torch.empty(shape, dtype=TORCH_DTYPES[tensor.dtype], device=where)

    def _dim(self, dim: IntSymbol, pipeline: int) -> Any:
        if dim.constant is not None:
            return dim.constant
        size = self._symbol(dim, pipeline)
        check(size >= 0)
        return size

    def _symbol(self, expr: IntSymbol, pipeline: int) -> Any:
        key = expr, pipeline
        if key not in self._known:
            self._known[key] = self._symbols.new()
        return self._known[key]


def _merge_outputs(graph: fx.Graph) -> list[int]:
    """Leaves one of outputs that are computed alike, which Inductor would merge; tells which item is which output."""
    numbers: dict[fx.Node, int] = {}
    known: dict[Any, int] = {}

    def numbered(node: fx.Node) -> Any:
        return "node", numbers[node]

    for node in graph.nodes:
        key: Any = (
            (node.target, repr(fx.map_arg((node.args, node.kwargs), numbered))) if node.op == "call_function" else node
        )
        numbers[node] = known.setdefault(key, len(known))
    output: Any = graph.output_node()
    kept: dict[int, tuple[int, Any]] = {}
    which = []
    for node in output.args[0]:
        place, _ = kept.setdefault(numbers[node], (len(kept), node))
        which.append(place)
    output.args = ([node for _, node in kept.values()],)
    graph.eliminate_dead_code()
    return which
