"""When a module gathers parameters of which a rank holds no more than a part, and when it lets go of them.

Such a parameter is put together shortly before the first call that reads it. After that it is there for calls nearby,
until more than a bucket of others was read; then it is gathered anew, so that the forward lets go of it and the
backward gets it again. Neighbours travel together, and a bucket is on its way while calls read the one before it.

All of this is decided by the order of the nodes alone, before anything is lowered: a rank without a pipeline has no
module, and serves the others by the same list.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from torch import fx

from hetu.backends.comm import reduce
from hetu.backends.lower.traced import aside
from hetu.backends.lower.values import VALUE
from hetu.dtypes import DType
from hetu.graph import Node, Tensor
from hetu.ops.nn import Cast


class Gathered(NamedTuple):
    """A parameter that is gathered, perhaps in another element type than its own.

    Attributes:
        parameter: The parameter.
        dtype: In which it travels: a cast of each part is a part of the cast of the whole.
    """

    parameter: Node
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return int(prod(self.parameter.attrs["shape"])) * self.dtype.itemsize


Bucket = tuple[Gathered, ...]
"""What travels together. Large element types come first, so that each part lies at a multiple of its own."""

Place = tuple[int, int]
"""The number of a bucket, and a place in it."""


@dataclass(frozen=True, slots=True, eq=False)
class Gathers:
    """What one subgraph gathers.

    Attributes:
        buckets: In the order in which they are gathered.
        roots: By tensor what is gathered for it: parameters, and narrower casts of them.
        views: Tensors that are made of one of these without computing, each with it. They are made anew for each
            time that it is gathered.
        uses: By node and by what it reads, directly or through a view, in which bucket that comes. What a run fetches
            is read by None.
    """

    buckets: tuple[Bucket, ...] = ()
    roots: Mapping[Tensor, Gathered] = field(default_factory=dict)
    views: Mapping[Tensor, Gathered] = field(default_factory=dict)
    uses: Mapping[tuple[Node | None, Gathered], Place] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        nodes: Sequence[Node],
        fetches: Sequence[Tensor],
        replaced: Mapping[Tensor, Tensor],
        is_kept: Mapping[Node, bool],
    ) -> Gathers:
        """Decides it for some nodes.

        Args:
            nodes: In the order in which they are lowered.
            fetches: What the module returns.
            replaced: Tensors to be read instead of others.
            is_kept: The parameters that are gathered, and for each whether it stays here once it was.
        """
        roots, views = _made_of(nodes, replaced, is_kept)
        recent = _Recent(is_kept)
        order, uses = list[Gathered](), dict[tuple[Node | None, Gathered], int]()
        for reader, tensor in _reads(nodes, fetches, replaced):
            item = roots.get(tensor) or views.get(tensor)
            if item is None or (reader is not None and _is_made_of(reader, roots, views)):
                continue
            if item not in recent:
                order.append(item)
            uses[reader, item] = recent.read(item, len(order) - 1)
        places, buckets = _packed(order)
        return cls(buckets, roots, views, {key: places[number] for key, number in uses.items()})

    @property
    def parameters(self) -> list[Node]:
        """Those that are gathered, each once."""
        return list(dict.fromkeys(item.parameter for bucket in self.buckets for item in bucket))

    def is_made_of(self, node: Node) -> bool:
        """Whether a node gives nothing but what is gathered, or views of it."""
        return _is_made_of(node, self.roots, self.views)


NO_GATHERS = Gathers()


class _Recent:
    """What is there at a point of a module: what was read last, as much as a bucket of it beside what is read now.

    Args:
        is_kept: The parameters, and for each whether it stays here once it was gathered.
    """

    def __init__(self, is_kept: Mapping[Node, bool]) -> None:
        self._is_kept = is_kept
        self._kept: dict[Gathered, int] = {}
        self._loose: dict[Gathered, int] = {}  # what was read last comes last

    def __contains__(self, item: Gathered) -> bool:
        return item in self._kept or item in self._loose

    def read(self, item: Gathered, number: int) -> int:
        """Reads something; gives the number of its gather.

        Args:
            item: What is read.
            number: That of the last gather, which is its own if it was not there.
        """
        if self._is_kept[item.parameter]:
            return self._kept.setdefault(item, number)
        number = self._loose.pop(item, number)
        size = sum(other.nbytes for other in self._loose)
        while size > reduce.BUCKET_BYTES:
            oldest = next(iter(self._loose))
            del self._loose[oldest]
            size -= oldest.nbytes
        self._loose[item] = number
        return number


def _made_of(
    nodes: Sequence[Node], replaced: Mapping[Tensor, Tensor], is_kept: Mapping[Node, bool]
) -> tuple[dict[Tensor, Gathered], dict[Tensor, Gathered]]:
    """The tensors that are gathered, and the views of them."""
    roots: dict[Tensor, Gathered] = {}
    views: dict[Tensor, Gathered] = {}
    for node in nodes:
        if node in is_kept:
            roots[node.outputs[0]] = Gathered(node, node.outputs[0].dtype)
        elif _is_view(node):
            source = replaced.get(node.tensors[0], node.tensors[0])
            item = roots.get(source) or views.get(source)
            if item is None:
                continue
            if source.op in is_kept and not is_kept[source.op] and _narrows(node):
                roots[node.outputs[0]] = Gathered(source.op, node.outputs[0].dtype)
            else:
                views.update(dict.fromkeys(node.outputs, item))
    return roots, views


def _is_view(node: Node) -> bool:
    """Whether a node makes something of one tensor without computing, or by a cast."""
    definition = node.definition
    is_plain = not (definition.is_random or definition.spans_pipelines or definition.has_plan)
    return definition.is_view and is_plain and len(node.tensors) == 1


def _narrows(node: Node) -> bool:
    """Whether a node is a cast to a smaller floating type."""
    old, new = node.tensors[0].dtype, node.outputs[0].dtype
    return isinstance(node.definition, Cast) and new.is_floating and new.itemsize < old.itemsize


def _is_made_of(node: Node, roots: Mapping[Tensor, Gathered], views: Mapping[Tensor, Gathered]) -> bool:
    return bool(node.outputs) and (node.outputs[0] in roots or node.outputs[0] in views)


def _reads(
    nodes: Sequence[Node], fetches: Sequence[Tensor], replaced: Mapping[Tensor, Tensor]
) -> Iterator[tuple[Node | None, Tensor]]:
    """What is read by whom, in order."""
    for node in nodes:
        yield from ((node, replaced.get(tensor, tensor)) for tensor in node.tensors)
    yield from ((None, replaced.get(tensor, tensor)) for tensor in fetches)


def _packed(order: Sequence[Gathered]) -> tuple[list[Place], tuple[Bucket, ...]]:
    """Neighbours in buckets, and where each is found."""
    groups, size = list[list[int]](), 0
    for number, item in enumerate(order):
        if not groups or size + item.nbytes > reduce.BUCKET_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(number)
        size += item.nbytes
    places = [(0, 0)] * len(order)
    for bucket, group in enumerate(groups):
        group.sort(key=lambda number: -order[number].dtype.itemsize)
        for place, number in enumerate(group):
            places[number] = bucket, place
    return places, tuple(tuple(order[number] for number in group) for group in groups)


# In a module


@aside
def hetu_start_gather(gathering: Any, bucket: int) -> Any:
    """Sends this rank's part of a bucket on its way."""
    return gathering.start(bucket)


def hetu_finish_gather(gathering: Any, started: Any) -> Any:
    """Gives the whole of each parameter in the bucket. Nothing is held earlier than in the module as it was lowered."""
    return gathering.finish(started)


for _function in (hetu_start_gather, hetu_finish_gather):
    fx.node.has_side_effect(_function)  # all ranks gather the same, whether somebody reads it or not


class GatherCalls:
    """The calls of a module that gather, emitted as lowering comes to the first node that reads a bucket.

    Args:
        gathers: What is gathered.
        graph: The module's graph.
        gathering: Gives the module's input that gathers.
        pipeline: A pipeline that the module computes.
    """

    def __init__(self, gathers: Gathers, graph: fx.Graph, gathering: Callable[[], fx.Node], pipeline: int) -> None:
        self.gathers, self._graph, self._gathering, self._pipeline = gathers, graph, gathering, pipeline
        self._tensors = {item: tensor for tensor, item in reversed(list(gathers.roots.items()))}
        self._started: list[fx.Node] = []
        self._values: list[list[fx.Node]] = []
        if gathers.buckets:
            self._start()

    def place(self, reader: Node | None, tensor: Tensor) -> Place:
        """Where what a node reads of a gathered tensor, or a view of one, comes from."""
        item = self.gathers.roots.get(tensor) or self.gathers.views[tensor]
        return self.gathers.uses[reader, item]

    def value(self, place: Place) -> fx.Node:
        """The whole parameter that has a place in a bucket."""
        bucket, number = place
        while len(self._values) <= bucket:
            self._finish()
        return self._values[bucket][number]

    def _start(self) -> None:
        call = self._graph.call_function(hetu_start_gather, (self._gathering(), len(self._started)))
        self._started.append(call)

    def _finish(self) -> None:
        bucket = self.gathers.buckets[len(self._values)]
        call = self._graph.call_function(hetu_finish_gather, (self._gathering(), self._started[-1]))
        values = []
        for number, item in enumerate(bucket):
            value = self._graph.call_function(operator.getitem, (call, number))
            value.meta[VALUE] = self._tensors[item], self._pipeline
            values.append(value)
        self._values.append(values)
        if len(self._started) < len(self.gathers.buckets):  # the next one travels while this one is read
            self._start()
