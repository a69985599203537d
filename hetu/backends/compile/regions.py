"""Which calls of a module are compiled together.

Calls that :mod:`hetu.backends.lower.traced` does not know stay as they are, in their order. What lies between two of
them is a region, one for each pipeline. A call that takes long or much memory, attention above all, divides those
before it from those after it, so that nothing is computed, and held, earlier than in the module as it was lowered. One
that is done *aside* divides only what it reads from what reads it: so the gradients of a layer are one region, although
a sum over the pipelines starts as soon as each is there. Nodes that a backward computes again stay apart from the
originals, whose values they are there not to keep.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from hetu.backends.lower.traced import ASIDE, TRACED
from hetu.backends.lower.values import MADE_BY, SIZE, VALUE
from hetu.backends.torch_private import op_overload
from hetu.symbols import IntSymbol

_VIEWS = {torch.reshape, torch.transpose, torch.broadcast_to, torch.split_with_sizes, operator.getitem}
"""What gives its first argument's memory, or nothing that is worth to be compiled."""

_BEFORE_ALL = -1
"""The place of inputs, and of calls that read nothing but them."""


@dataclass(slots=True)
class Region:
    """Calls that are compiled together.

    Attributes:
        nodes: The calls, in computing order.
        inputs: What they read of others: tensors and sizes, in the order of first use.
        outputs: What others read of them.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)

    def close(self) -> None:
        """Finds its inputs and outputs, once all calls are there."""
        own = set(self.nodes)
        self.inputs = list(dict.fromkeys(x for node in self.nodes for x in node.all_input_nodes if x not in own))
        self.outputs = [node for node in self.nodes if any(user not in own for user in node.users)]

    def compute(self, values: Sequence[Any], function_of: Callable[[Any], Any] = lambda target: target) -> list[Any]:
        """Its outputs, one call after the other.

        Args:
            values: Of its inputs.
            function_of: What is called in the place of a call's function.
        """
        env = dict(zip(self.inputs, values, strict=True))
        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = function_of(node.target)(*args, **kwargs)
        return [env[node] for node in self.outputs]

    def structure(self, device: torch.device) -> Hashable:
        """What tells it apart from all regions that compile to something else: other layers, pipelines, graphs."""
        sizes: dict[Any, str] = {}
        names: dict[fx.Node, Any] = {}

        def size(expr: IntSymbol, pipeline: int) -> str:
            return str(expr) if expr.constant is not None else sizes.setdefault((expr, pipeline), f"s{len(sizes)}")

        def described(node: fx.Node) -> Hashable:
            if SIZE in node.meta:
                return size(*node.meta[SIZE])
            tensor, pipeline = node.meta[VALUE]
            return tensor.dtype.name, tensor.on_cpu, *(size(dim, pipeline) for dim in tensor.symbolic_shape)

        inputs = tuple(map(described, self.inputs))
        names.update({node: _Name(i) for i, node in enumerate((*self.inputs, *self.nodes))})
        calls = tuple(
            (node.target, repr(fx.map_arg((node.args, node.kwargs), names.__getitem__))) for node in self.nodes
        )
        return device, inputs, calls, tuple(names[node].number for node in self.outputs)


@dataclass(frozen=True, slots=True)
class _Name:
    """Stands for a node."""

    number: int


Step = Region | fx.Node
"""A region, or a call that stays as it is."""


def divide(graph: fx.Graph) -> list[Step]:
    """The calls of a module in an order in which they can be computed, those that are compiled together as regions.

    Args:
        graph: A module's graph, as :func:`hetu.backends.lower.lowering.lower` makes it.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    fused, places = _placed(calls)
    regions: dict[int, dict[int | None, Region]] = {}
    others: dict[int, list[fx.Node]] = {}
    for node in calls:
        if node in fused:  # pipelines compute alike: each by itself, they need one compiled region
            regions.setdefault(places[node], {}).setdefault(node.meta[MADE_BY][1], Region()).nodes.append(node)
        else:
            others.setdefault(places[node], []).append(node)
    divided: list[Step] = []
    for place in sorted(regions.keys() | others.keys()):
        for region in regions.get(place, {}).values():
            region.close()
            divided += [region] if _is_worth_it(region) else region.nodes
        divided += others.get(place, [])
    return divided


def _is_worth_it(region: Region) -> bool:
    """Whether there is anything to be fused: more than one of torch's own kernels."""
    kernels = [node for node in region.nodes if node.target not in _VIEWS]
    return len(kernels) > 1 or any(node.target in TRACED for node in kernels)


def _placed(calls: Sequence[fx.Node]) -> tuple[set[fx.Node], dict[fx.Node, int]]:
    """The calls that are compiled, and the place of all."""
    fused = {node for node in calls if _is_traceable(node)}
    while True:
        fused = _describable(calls, fused)
        places = _Places(fused).of(calls)
        # A value that is no tensor of the graph has no description for another region than its own.
        lost = {
            node
            for node in fused
            if any(x in fused and VALUE not in x.meta and places[x] != places[node] for x in node.all_input_nodes)
        }
        if not lost:
            return fused, places
        fused -= lost


def _describable(calls: Sequence[fx.Node], candidates: set[fx.Node]) -> set[fx.Node]:
    """Those of some calls of which all that they read can be described to who traces them."""
    found = set(candidates)
    count = -1
    while count != len(found):
        count = len(found)
        of_inputs: set[fx.Node] = set()
        for node in calls:
            if node not in found:
                continue
            if not all(x in found or VALUE in x.meta or SIZE in x.meta for x in node.all_input_nodes):
                found.discard(node)
            elif node.target in _VIEWS and (node.args[0] not in found or node.args[0] in of_inputs):
                of_inputs.add(node)
        # What a view of an input is read for elsewhere is read there of the input: no result shares memory with one.
        found -= {node for node in of_inputs if any(user not in found for user in node.users)}
    return found


def _is_traceable(node: fx.Node) -> bool:
    value = node.meta.get(VALUE)
    if value is not None and value[0].on_cpu:
        return False
    target: Any = node.target
    if MADE_BY not in node.meta:
        return False
    if target is operator.getitem:  # an item of what several are, or a slice of one
        source: Any = node.args[0]
        index: Any = node.args[1]
        return isinstance(index, int) or (VALUE in source.meta and not _reads_sizes(index))
    if target is torch.clone:  # the memory of its own that a result needs
        return False
    return target in TRACED or _is_of_torch(target)


def _reads_sizes(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    bounds = [x for part in parts if isinstance(part, slice) for x in (part.start, part.stop, part.step)]
    return any(isinstance(x, fx.Node) for x in bounds)


def _is_of_torch(target: Any) -> bool:
    if isinstance(target, op_overload):
        return True
    owner = getattr(target, "__objclass__", None)
    if owner is not None:
        return issubclass(torch.Tensor, owner)
    return (getattr(target, "__module__", None) or "").partition(".")[0] == "torch" or (
        getattr(torch, getattr(target, "__name__", ""), None) is target
    )


class _Places:
    """Where calls stand: those that are fused and have the same place are one region, before the others of that place.

    Args:
        fused: The calls that are compiled.
    """

    def __init__(self, fused: set[fx.Node]) -> None:
        self._fused = fused
        self._floor = 0  # of what comes next
        self._last = _BEFORE_ALL  # of calls that keep their order
        self._highest = _BEFORE_ALL
        self._repeated: Any = None

    def of(self, calls: Iterable[fx.Node]) -> dict[fx.Node, int]:
        """The place of each."""
        places: dict[fx.Node, int] = {}
        for node in calls:
            reads = [x for x in node.all_input_nodes if x in places]
            if node in self._fused:
                place = self._of_fused(node, reads, places)
            else:
                place = self._of_other(node, max([_BEFORE_ALL, *(places[x] for x in reads)]))
            places[node] = place
            self._highest = max(self._highest, place)
        return places

    def _of_fused(self, node: fx.Node, reads: Sequence[fx.Node], places: Mapping[fx.Node, int]) -> int:
        source: Any = node.args[0] if node.args else None
        if node.target is operator.getitem and source in self._fused and isinstance(node.args[1], int):
            return places[source]  # an item stays with what it is an item of
        made_by = node.meta[MADE_BY][0]
        if made_by.original is not None and made_by.backward != self._repeated:
            self._repeated = made_by.backward  # here a backward begins to compute others again
            self._floor = self._highest + 1
        return max([self._floor, *(places[x] + (x not in self._fused) for x in reads)])

    def _of_other(self, node: fx.Node, after: int) -> int:
        if node.target in ASIDE:
            self._last = max(after, self._last)
            return self._last
        if node.target is operator.getitem or node.target in TRACED or _is_of_torch(node.target):
            return after
        self._last = max(after, self._last, self._floor)
        self._floor = self._last + 1
        return self._last
