"""The store of parameters: what a parameter's value is here, and what of it is updated here."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hetu import rng
from hetu.backends.comm.boxes import assemble, cut, within
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.graph import Graph, Node, Role
from hetu.graph.passes import nodes_of
from hetu.parallel.placement import Box, placed
from hetu.runtime.homes import Homes, PlacementRule, Source
from hetu.runtime.ranks.digests import array_text

ParameterBox = tuple[Node, Box]
"""A box of a parameter: what storages, gradients and updates are kept by."""

ByBox = dict[ParameterBox, torch.Tensor]
"""A tensor for each box of some parameters."""

_counter = itertools.count(1)


def new_number() -> int:
    """A number that nothing else in this process has.

    What is made by itself on each rank (a first value, a loaded state, an optimiser) gets one, so that it can be told
    whether the ranks have compared it. It keeps it while steps change it: they change it alike on all ranks.
    """
    return next(_counter)


@dataclass(slots=True)
class _Stored:
    """A parameter that has a value.

    Attributes:
        number: That of its first value; see :func:`new_number`.
        storages: The storage of each box of the value that lies here: an allocation of its own.
        value: All of the value; None if it is put together from several storages for every use.
        first: What the value is that it was cut from, in a few words; "" once steps have changed it.
        is_stale: Whether other ranks have changed their parts since.
    """

    number: int
    storages: dict[Box, torch.Tensor]
    value: torch.Tensor | None
    first: str = ""
    is_stale: bool = False


class ParameterStore:
    """The parameters of one graph. It alone owns their storages.

    Args:
        graph: The graph.
        device: Gives the device of the graph, where the storages lie.
        rule: Says where a parameter lies.

    Attributes:
        homes: Where they lie, and what belongs to them.
        fresh: Those whose first value was made, and may be forgotten if the run fails that asked for it.
        version: Changes whenever a first value is made, set or forgotten, and never for a step.
    """

    def __init__(self, graph: Graph, device: Callable[[], torch.device], rule: PlacementRule = placed) -> None:
        self.graph, self.device, self.homes = graph, device, Homes(graph, rule)
        self._stored: dict[Node, _Stored] = {}
        self._homes_version = self.homes.version
        self.fresh: list[Node] = []
        self.version = new_number()

    @property
    def nodes(self) -> list[Node]:
        """All parameters of the graph."""
        return nodes_of(self.graph.nodes, Role.PARAMETER)

    def forget_fresh(self) -> None:
        """Forgets the first values that were made since they were last settled."""
        while self.fresh:
            self._stored.pop(self.fresh.pop(), None)
            self.version = new_number()

    def number(self, node: Node) -> int | None:
        """The number of a parameter's first value; None if it was not made yet."""
        stored = self._stored.get(node)
        return None if stored is None else stored.number

    def value(self, node: Node) -> torch.Tensor:
        """All of a parameter's value, as computations read it, if it lies here. It is made if it was never needed."""
        stored = self._find(node)
        return stored.value if stored.value is not None else whole_of(node, stored.storages)

    def source(self, node: Node) -> Source | None:
        """From where all of a parameter's value must be gathered now; None if it lies here. Alike on all ranks."""
        source, stored = self.homes.source(node), self._stored.get(node)
        is_here = source is None or (source.is_kept and (stored is None or not stored.is_stale))
        return None if is_here else source

    def is_elsewhere(self, node: Node) -> bool:
        """Whether only other ranks have a part of a parameter's value as it is now. Alike on all ranks."""
        return self.homes.places.is_distributed and self.source(node) is not None

    def own(self, node: Node, source: Source) -> list[torch.Tensor]:
        """What this process gives of a parameter: its boxes, in their order."""
        storages = self._find(node).storages
        return [within(storages, box) for box in source.here]

    def keep(self, node: Node, whole: torch.Tensor) -> None:
        """Takes a parameter's value, of which other ranks have changed their parts; it may lie in :meth:`value`."""
        stored = self._find(node)
        for box, storage in stored.storages.items():
            if storage is not whole:
                storage.copy_(whole[box.slices_in(Box.whole(whole.shape))])
        stored.is_stale = False

    def note_updated(self, nodes: Sequence[Node]) -> None:
        """Notes that an update has changed parameters, of which each rank has changed what it owns."""
        for node in nodes:
            source = self.homes.source(node)
            self._stored[node].is_stale = source is not None and source.is_kept
            self._stored[node].first = ""

    def told(self, node: Node) -> torch.Tensor | str:
        """What ranks compare of a parameter: its value, or what is known of it where no rank has all of it."""
        if not self.is_elsewhere(node):
            return self.value(node)
        return self._find(node).first or "as steps have left it"

    def make(self, nodes: Sequence[Node]) -> None:
        """Makes the values that were never needed before, so that an initialiser that fails does so now."""
        for node in nodes:
            if node not in self._stored:
                self._find(node)

    def storages(self, node: Node) -> Mapping[Box, torch.Tensor]:
        """The storages of a parameter in this process."""
        return self._find(node).storages

    def updated(self, nodes: Sequence[Node], stage: int) -> ByBox:
        """What an optimiser of this process updates: storages, or views of parts of them.

        Args:
            nodes: The parameters, in the order of the result.
            stage: The optimiser's ``zero_stage``.
        """
        homes = self.homes
        return {
            (node, box): within(self._find(node).storages, box)
            for node in nodes
            for box in homes.here(homes.of(node, stage).state)
        }

    def set_whole(self, node: Node, whole: torch.Tensor) -> None:
        """Gives a parameter its value, of which this process keeps a copy of what it holds."""
        self._make(node, whole)

    def _find(self, node: Node) -> _Stored:
        stored = self._stored.get(node)
        if stored is None:
            stored = self._make(node)
            self.fresh.append(node)
        elif self._homes_version != self.homes.version:
            self._cut_anew()
        return stored

    def _make(self, node: Node, whole: torch.Tensor | None = None) -> _Stored:
        is_foreign = whole is not None
        if whole is None:
            whole = initial_value(node)
        placement = self.homes.of(node).value
        self.version = number = new_number()
        stored = self._stored[node] = _Stored(number, {}, None)
        if self.homes.is_elsewhere(placement):
            stored.first = array_text(whole)
        layout = torch.contiguous_format
        parts = {box: cut(whole, box) for box in self.homes.here(placement)}
        self._put(
            stored, {b: x.to(self.device(), copy=is_foreign, memory_format=layout) for b, x in parts.items()}, node
        )
        return stored

    def _cut_anew(self) -> None:
        """Cuts what was made before the graph had an update that cuts it."""
        self._homes_version = self.homes.version
        for node, stored in self._stored.items():
            boxes = self.homes.here(self.homes.of(node).value)
            if set(boxes) != set(stored.storages):
                self._put(stored, {box: cut(whole_of(node, stored.storages), box) for box in boxes}, node)

    @staticmethod
    def _put(stored: _Stored, storages: dict[Box, torch.Tensor], node: Node) -> None:
        stored.storages, stored.value = storages, storages.get(Box.whole(node.attrs["shape"]))


def whole_of(node: Node, parts: Mapping[Box, torch.Tensor]) -> torch.Tensor:
    """A tensor for all of a parameter, as a checkpoint holds it, that is put together from parts."""
    return assemble(Box.whole(node.attrs["shape"]), parts)


def sum_dtype(node: Node) -> torch.dtype:
    """The dtype in which gradients of a parameter are added up: its own, but at least float32."""
    dtype = TORCH_DTYPES[node.attrs["dtype"]]
    return torch.float32 if dtype.itemsize < 4 else dtype


def widest(nodes: Sequence[Node]) -> torch.dtype:
    """The dtype of a number that is made of the gradients of all of some parameters."""
    return max(map(sum_dtype, nodes), key=lambda dtype: dtype.itemsize)


def initial_value(node: Node) -> torch.Tensor:
    """A parameter's first value, on the CPU: that of the whole tensor, however it is placed.

    Raises:
        HetuError: If its initialiser fails, or gives something else than what was asked for.
    """
    init, shape, dtype = node.attrs["init"], node.attrs["shape"], TORCH_DTYPES[node.attrs["dtype"]]
    if isinstance(init, (bool, int, float)):
        return torch.full(shape, float(init), dtype=dtype, device="cpu")
    if not callable(init):
        array = init.astype(np.float32) if isinstance(init, np.ndarray) and init.dtype.name == "bfloat16" else init
        return torch.as_tensor(array, device="cpu").to(dtype=dtype, copy=True)
    seed, _ = rng.get_state()
    digest = hashlib.blake2b(f"{seed} {node.name}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        blank = torch.zeros(shape, dtype=torch.float32 if dtype.itemsize < 4 else dtype, device="cpu")
        try:
            made = init(blank)
            value = blank if made is None else torch.as_tensor(made, device="cpu")
        except Exception as error:  # it is the user's
            what = f"the initialiser of {node.name} raised {type(error).__name__}: {error}"
            fix = "see that it can fill a tensor of the parameter's shape on the CPU"
            raise HetuError(what, op="parameter", where=node.where, fix=fix) from error
    if tuple(value.shape) != tuple(shape):
        what = f"the initialiser of {node.name} gave shape {list(value.shape)}, expected {list(shape)}"
        raise ShapeError(what, op="parameter", where=node.where, fix="fill the tensor that it gets, and return it")
    if not value.is_floating_point() or (math.prod(shape) and not bool(value.isfinite().all())):
        what = f"the initialiser of {node.name} gave {value.dtype} values that are no finite numbers"
        raise DTypeError(what, op="parameter", where=node.where, fix="give finite floating numbers")
    return value.detach().to(dtype=dtype, device="cpu", copy=True)
