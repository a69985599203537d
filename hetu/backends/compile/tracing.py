"""A region as a graph of ATen's ops in which every size is a symbol.

It is traced in one of two ways. For typical sizes the symbols have values, by which Inductor decides which kernels to
fuse and how wide an index is; what it decided is a condition on sizes, under which alone the outcome may be used. For
all sizes the symbols, which torch then calls unbacked, have no values: nothing can depend on one, so there are no
conditions, and what is compiled holds for all lengths, 0 and 1 too; but it is fused less.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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

TYPICAL = {"cuda": 8192}
"""The first of the typical sizes, each of which is another one, by the type of device.

On a CPU Inductor sums more than 4,096 numbers by other code than fewer, so that most regions would be compiled twice,
for 3 % of a step's time.
"""

_STEP = 64

_PROBES = (2, 30, 500, 3_000, 9_000, 100_000)
"""Sizes of which most are met with while a model is trained."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a region's sizes must meet, so that what was compiled for typical ones may be used.

    Attributes:
        hold: Tells it of the sizes.
        places: Where each size is read: the number of an input, and its dimension if it is no int.
    """

    hold: Callable[..., bool]
    places: Sequence[tuple[int, int | None]]

    def sizes(self, values: Sequence[Any]) -> list[int]:
        """The sizes of a region's inputs."""
        return [values[i] if dim is None else values[i].shape[dim] for i, dim in self.places]

    def are_wide(self) -> bool:
        """Whether hardly any sizes but 0 and 1 fail to meet them."""
        return all(self.hold(*range(size, size + len(self.places))) for size in _PROBES)


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """A region that was traced.

    Attributes:
        module: ATen's ops, from the inputs to a list of tensors.
        inputs: Descriptions of the inputs: fake tensors and symbolic ints. If it was traced for typical sizes these
            come first, once more, as ints: what torch decided of other sizes would not be kept on disk.
        outputs: Which item of the list each output of the region is. Those that are computed alike are one.
        conditions: Once it is compiled: what its sizes must meet. None if it was traced for all sizes.
    """

    module: fx.GraphModule
    inputs: Sequence[Any]
    outputs: Sequence[int]
    conditions: Callable[[], Conditions] | None


def trace(region: Region, device: torch.device, is_typical: bool) -> Traced:
    """Traces a region.

    Args:
        region: What to trace.
        device: Where it will run.
        is_typical: For typical sizes, or else for all.

    Raises:
        Exception: Whatever torch raises where it has no rule for an op, or something depends on a size and it is traced
            for all.
    """
    typical = itertools.count(TYPICAL[device.type], _STEP) if is_typical else None
    sizes = _Sizes(SymbolicSizes(typical))
    inputs = [sizes.input(index, node, device) for index, node in enumerate(region.inputs)]
    first = sizes.made() if is_typical else []

    def compute(*values: Any) -> list[Any]:
        return region.compute(values[len(first) :], lambda target: TRACED.get(target, target))

    with torch.no_grad(), sizes.symbols.tensors:
        module = make_fx(compute)(*first, *inputs)
    conditions = sizes.conditions if is_typical else None
    return Traced(module, [*first, *inputs], _merge_outputs(module.graph), conditions)


class _Sizes:
    """The symbols of one region: one for each size of each pipeline, however often it comes.

    Attributes:
        symbols: Makes them.
    """

    def __init__(self, symbols: SymbolicSizes) -> None:
        self.symbols = symbols
        self._known: dict[tuple[IntSymbol, int], Any] = {}
        self._places: list[tuple[int, int | None]] = []  # of each symbol an input, and its dimension if it is no int

    def input(self, index: int, node: fx.Node, device: torch.device) -> Any:
        """The description of what a node gives, which is the input with that number."""
        if SIZE in node.meta:
            expr, pipeline = node.meta[SIZE]
            return self._symbol(expr, pipeline, (index, None))
        tensor, pipeline = node.meta[VALUE]
        shape = [self._dim(size, pipeline, (index, dim)) for dim, size in enumerate(tensor.symbolic_shape)]
        where = torch.device("cpu") if tensor.on_cpu else device
        with self.symbols.tensors:
            return torch.empty(shape, dtype=TORCH_DTYPES[tensor.dtype], device=where)

    def made(self) -> list[Any]:
        """All symbols, in the order in which :class:`Conditions` have the sizes."""
        return list(self._known.values())

    def conditions(self) -> Conditions:
        """What the sizes of inputs must meet.

        Raises:
            RuntimeError: If that can't be told.
        """
        return Conditions(self.symbols.conditions(), tuple(self._places))

    def _dim(self, size: IntSymbol, pipeline: int, place: tuple[int, int]) -> Any:
        if size.constant is not None:
            return size.constant
        symbol = self._symbol(size, pipeline, place)
        check(symbol >= 0)
        return symbol

    def _symbol(self, expr: IntSymbol, pipeline: int, place: tuple[int, int | None]) -> Any:
        key = expr, pipeline
        if key not in self._known:
            self._known[key] = self.symbols.new()
            self._places.append(place)
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
