"""From nodes to a ``torch.fx`` module: the walk that applies lowerings.

All pipelines of a strategy are lowered into one module: a node becomes one call per pipeline, a node that spans the
pipelines one call over all of them. Where other processes run the other pipelines, a module holds those that run here,
and such a call reaches the rest through the world, which is an input too.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import fx

from hetu.backends.lower.gathers import NO_GATHERS, GatherCalls, Gathers, Place
from hetu.backends.lower.lowering import Builder, Executable, NodeLowering, find_lowering
from hetu.backends.lower.values import VALUE, Deferred, finished
from hetu.graph import Node, Tensor
from hetu.symbols import IntSymbol, compile_exprs


def lower(
    nodes: Sequence[Node],
    fetches: Sequence[Tensor],
    replaced: Mapping[Tensor, Tensor],
    *,
    num_pipelines: int,
    pipelines: Sequence[int],
    device: torch.device,
    backend: str,
    constants: MutableMapping[tuple[Node, torch.device], torch.Tensor],
    gathers: Gathers = NO_GATHERS,
) -> Executable:
    """Lowers live nodes into one fx module over all pipelines that run in this process.

    Args:
        nodes: In computing order.
        fetches: What the module returns.
        replaced: Tensors to be read instead of others (common subexpressions).
        num_pipelines: Pipelines of the strategy.
        pipelines: Those of them that the module computes, in order.
        device: Where it will run.
        backend: The wanted backend: ops that it has no lowering of take torch's, and attention goes to it or to the
            next kernel family that takes it.
        constants: Where constants on a device are kept from one module to the next.
        gathers: What is decided of the parameters that it gathers, for the same nodes.

    Raises:
        LoweringError: If no backend takes a node.
    """
    builder = Builder(device, backend, constants, _readers(nodes, fetches, replaced))
    walk = _Walk(builder, replaced, num_pipelines, tuple(pipelines), gathers)
    for node in computing_order(nodes, replaced):
        walk.lower(node)
    fetched = [replaced.get(tensor, tensor) for tensor in fetches]
    builder.graph.output(tuple(_results(fetched, walk.fetched(fetched), replaced, builder)))
    builder.graph.eliminate_dead_code()  # outputs that nobody reads, and what only the whole step's values need
    for item, placeholder in list(builder.inputs.items()):
        if not placeholder.users:  # lengths that are in a plan already: they need not go to the device
            builder.graph.erase_node(placeholder)
            del builder.inputs[item]
    builder.graph.lint()
    exprs = list(builder.exprs)
    leaves = tuple(dict.fromkeys(leaf for expr in exprs for leaf in expr.leaves))
    module = fx.GraphModule(builder.root, builder.graph, class_name="HetuExecutable")
    notes = tuple(
        f"{node.name} ({node.definition.name}, {node.where.short}): {text}" for node, text in builder.notes.items()
    )
    notes += tuple(
        f"gather {i}: {', '.join(f'{x.parameter.name} ({x.dtype.name})' for x in bucket)}"
        for i, bucket in enumerate(gathers.buckets)
    )
    sizes = compile_exprs(exprs, leaves)
    return Executable(module, tuple(builder.inputs), leaves, sizes, notes, gathers.buckets)


def _readers(
    nodes: Sequence[Node], fetches: Sequence[Tensor], replaced: Mapping[Tensor, Tensor]
) -> dict[Tensor, set[str]]:
    """By tensor, the names of the ops that read it, and ``"run"`` where it is fetched."""
    readers: dict[Tensor, set[str]] = {}
    for tensor in fetches:
        readers.setdefault(replaced.get(tensor, tensor), set()).add("run")
    for node in nodes:
        for tensor in node.tensors:
            readers.setdefault(replaced.get(tensor, tensor), set()).add(node.definition.name)
    return readers


def computing_order(nodes: Sequence[Node], replaced: Mapping[Tensor, Tensor]) -> list[Node]:
    """The nodes in the order of lowering: what overlaps with computation starts as soon as its operands are there."""
    place: dict[Node, tuple[int, int]] = {}
    for i, node in enumerate(nodes):
        operands = [place[replaced.get(tensor, tensor).op] for tensor in node.tensors]
        number, depth = max(operands, default=(i, 0))
        place[node] = (number, depth + 1) if node.definition.overlaps else (i, 0)
    return sorted(nodes, key=place.__getitem__)


def _results(
    fetched: Sequence[Tensor],
    values: Mapping[Tensor, Sequence[Any]],
    replaced: Mapping[Tensor, Tensor],
    builder: Builder,
) -> list[fx.Node]:
    """The fetched tensors' values, each in memory of its own, which the caller may write to.

    Those are copied that lie in the memory of a constant, of what was fed or of another result, and those of which
    several elements are one.
    """
    taken: set[Any] = set()
    results = []
    for tensor in fetched:
        root, is_repeated = _root(tensor, replaced)
        is_foreign = root.op.definition.is_source or root.op.definition.is_step_wide
        is_copied = is_repeated or is_foreign or root in taken
        taken.add(root)
        for value in map(finished, values[tensor]):
            # Pipelines may share a value, and tensors that nothing else shows to be one.
            own = is_copied or value in taken
            results.append(builder.graph.call_function(torch.clone, (value,)) if own else value)
            taken.add(value)
    return results


def _root(tensor: Tensor, replaced: Mapping[Tensor, Tensor]) -> tuple[Tensor, bool]:
    """The tensor in whose memory another may lie, and whether elements are repeated on the way."""
    is_repeated = False
    while tensor.op.definition.is_view:
        is_repeated |= tensor.op.definition.repeats
        tensor = replaced.get(tensor.op.tensors[0], tensor.op.tensors[0])
    return tensor, is_repeated


class _Walk:
    """Lowers nodes one after the other, and knows the values that came of them.

    Args:
        builder: The module.
        replaced: Tensors to be read instead of others.
        num_pipelines: Pipelines of the strategy.
        pipelines: Those that the module computes.
        gathers: What is gathered. Values that are made of it have no place of their own in the order: they are made
            when they are first read after it was gathered.
    """

    def __init__(
        self,
        builder: Builder,
        replaced: Mapping[Tensor, Tensor],
        num_pipelines: int,
        pipelines: tuple[int, ...],
        gathers: Gathers,
    ) -> None:
        self._builder, self._replaced, self._gathers = builder, replaced, gathers
        self._num_pipelines, self._pipelines = num_pipelines, pipelines
        self._values: dict[Tensor, list[Any]] = {}
        self._calls = GatherCalls(gathers, builder.graph, builder.gathering, pipelines[0])
        self._views: dict[tuple[Tensor, Place, int], fx.Node] = {}

    def lower(self, node: Node) -> None:
        """Emits the calls of a node."""
        if self._gathers.is_made_of(node):
            return
        if node.definition.spans_pipelines:
            results = self._emit(node, None, node)
        else:
            results = [self._emit(node, pipeline, node) for pipeline in self._pipelines]
        for index, tensor in enumerate(node.outputs):
            self._values[tensor] = [item[index] if isinstance(item, (tuple, list)) else item for item in results]
            for pipeline, value in zip(self._pipelines, self._values[tensor], strict=True):
                if isinstance(value, fx.Node):
                    value.meta.setdefault(VALUE, (tensor, pipeline))
                elif isinstance(value, Deferred) and value.known is None:
                    value.known = tensor, pipeline

    def fetched(self, fetches: Sequence[Tensor]) -> Mapping[Tensor, list[Any]]:
        """The values of what is fetched, one per pipeline."""
        return {tensor: self._shards(tensor, None) for tensor in fetches}

    def _emit(self, node: Node, pipeline: int | None, reader: Node | None) -> Any:
        """Emits the calls of a node on a pipeline, for a reader of what is gathered."""
        builder = self._builder
        cx = NodeLowering(node, pipeline, self._num_pipelines, self._pipelines, builder.device, builder)
        chosen = find_lowering(node, builder.backend, builder.device)
        return chosen.lower(cx, *(self._operand(item, cx, reader) for item in node.inputs))

    def _operand(self, item: Any, cx: NodeLowering, reader: Node | None) -> Any:
        if not isinstance(item, Tensor):
            return cx.size(item) if isinstance(item, IntSymbol) else item
        tensor = self._replaced.get(item, item)
        return self._shards(tensor, reader) if cx.pipeline is None else self._shard(tensor, cx.pipeline, reader)

    def _shards(self, tensor: Tensor, reader: Node | None) -> list[Any]:
        return [self._shard(tensor, pipeline, reader) for pipeline in self._pipelines]

    def _shard(self, tensor: Tensor, pipeline: int, reader: Node | None) -> Any:
        """A pipeline's value of a tensor."""
        if tensor in self._gathers.roots:
            return self._calls.value(self._calls.place(reader, tensor))
        if tensor in self._gathers.views:
            return self._view(tensor, self._calls.place(reader, tensor), pipeline, reader)
        return finished(self._values[tensor][self._pipelines.index(pipeline)])

    def _view(self, tensor: Tensor, place: Place, pipeline: int, reader: Node | None) -> fx.Node:
        """A view of a gathered parameter, made when it is first read."""
        if (tensor, place, pipeline) not in self._views:
            made = self._emit(tensor.op, pipeline, reader)
            for index, output in enumerate(tensor.op.outputs):
                value = made[index] if isinstance(made, (tuple, list)) else made
                value.meta.setdefault(VALUE, (output, pipeline))
                self._views[output, place, pipeline] = value
        return self._views[tensor, place, pipeline]
