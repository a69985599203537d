"""The store of parameters: what a parameter's value is here, how its gradient is reduced, how it is gathered."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hetu import rng
from hetu.backends.comm import World, current_world
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.graph import Graph, Node, Role
from hetu.graph.passes import nodes_of
from hetu.runtime.placement import Box, Placements, replicated

ParameterBox = tuple[Node, Box]
"""A box of a parameter: what storages, gradients and updates are kept by."""

ByBox = dict[ParameterBox, torch.Tensor]
"""A tensor for each box of some parameters."""

PlacementRule = Callable[[Sequence[int], int], Placements]
"""Places a parameter of a shape over so many ranks."""


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
        storages: The storage of each box that this rank holds at home: an allocation of its own.
        read: The box that computations on this rank read.
        value: The storage of that box; None if it is put together from several for every use.
    """

    number: int
    storages: dict[Box, torch.Tensor]
    read: Box
    value: torch.Tensor | None


class ParameterStore:
    """The parameters of one graph. It alone owns their storages.

    Args:
        graph: The graph.
        device: Gives the device of the graph, where the storages lie.
        rule: Says where a parameter lies.

    Attributes:
        fresh: Those whose first value was made, and may be forgotten if the run fails that asked for it.
        version: Changes whenever a first value is made, set or forgotten, and never for a step.
    """

    def __init__(self, graph: Graph, device: Callable[[], torch.device], rule: PlacementRule = replicated) -> None:
        self.graph, self.device, self.rule = graph, device, rule
        self._stored: dict[Node, _Stored] = {}
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
        """What computations on this rank read of a parameter. It is made if it was never needed before."""
        stored = self._find(node)
        return stored.value if stored.value is not None else assemble(stored.read, stored.storages)

    def make(self, nodes: Sequence[Node]) -> None:
        """Makes the values that were never needed before, so that an initialiser that fails does so now."""
        for node in nodes:
            if node not in self._stored:
                self._find(node)

    def storages(self, nodes: Sequence[Node]) -> ByBox:
        """The storages of parameters on this rank: what an optimiser updates."""
        return {(node, box): own for node in nodes for box, own in self._find(node).storages.items()}

    def boxes(self, node: Node) -> list[Box]:
        """The boxes of a parameter that this rank holds at home."""
        return list(self._find(node).storages)

    def set_whole(self, node: Node, whole: torch.Tensor) -> None:
        """Gives a parameter its value, of which this rank keeps what it holds at home."""
        self._make(node, whole.to(self.device()))

    def _find(self, node: Node) -> _Stored:
        stored = self._stored.get(node)
        if stored is None:
            stored = self._make(node)
            self.fresh.append(node)
        return stored

    def _make(self, node: Node, whole: torch.Tensor | None = None) -> _Stored:
        if whole is None:
            whole = initial_value(node).to(self.device())
        world = current_world()
        work, home = self.rule(node.attrs["shape"], world.size)
        storages = {box: cut(whole, box) for box in home.held_by(world.rank)}
        (read,) = work.held_by(world.rank)
        self.version = number = new_number()
        stored = self._stored[node] = _Stored(number, storages, read, storages.get(read))
        return stored

    def cut(self, node: Node, whole: torch.Tensor) -> ByBox:
        """What this rank keeps of a tensor that has an element for each of a parameter's: its gradient, or a state."""
        return {(node, box): cut(whole, box) for box in self._find(node).storages}

    def gather(self, node: Node, parts: Mapping[Box, torch.Tensor]) -> torch.Tensor:
        """The inverse of :meth:`cut`: a tensor for all of a parameter, as a checkpoint holds it."""
        return assemble(Box.whole(node.attrs["shape"]), parts)

    def whole(self, node: Node) -> torch.Tensor:
        """All of a parameter's value, as a checkpoint holds it."""
        return self.gather(node, self._find(node).storages)

    def reduce(
        self,
        nodes: Sequence[Node],
        grads: Sequence[torch.Tensor] | None,
        num_pipelines: int,
        world: World,
        device: torch.device,
    ) -> ByBox:
        """Brings the gradients of parameters to where the parameters are at home.

        The graph itself adds them up over the pipelines of the strategy (``minimize`` builds the sums, which start
        while other gradients are still computed). What is left is to give them to ranks without a pipeline.

        Args:
            nodes: The parameters.
            grads: The gradient of each; None on a rank that has no pipeline.
            num_pipelines: How many pipelines the strategy has.
            world: The processes that run them.
            device: Where the gradients lie.

        Returns:
            The gradient of each box that this rank holds at home.
        """
        like = [(tuple(node.attrs["shape"]), sum_dtype(node)) for node in nodes]
        shared = world.share(grads, like, num_pipelines, device)
        found = ByBox()
        for node, grad in zip(nodes, shared, strict=True):
            for box in self._find(node).storages:
                found[node, box] = cut(grad, box)
        return found


def sum_dtype(node: Node) -> torch.dtype:
    """The dtype in which gradients of a parameter are added up: its own, but at least float32."""
    dtype = TORCH_DTYPES[node.attrs["dtype"]]
    return torch.float32 if dtype.itemsize < 4 else dtype


def cut(whole: torch.Tensor, box: Box) -> torch.Tensor:
    """A box of a tensor: the tensor itself if that is all of it, else a copy that keeps no memory of the rest."""
    if box.stop == whole.shape and not any(box.start):
        return whole
    return whole[box.slices_in(Box.whole(whole.shape))].clone(memory_format=torch.contiguous_format)


def assemble(wanted: Box, parts: Mapping[Box, torch.Tensor]) -> torch.Tensor:
    """A box that is put together from parts, which have no element in common.

    Args:
        wanted: The box.
        parts: Tensors by their boxes. Together they have each element of the wanted box.

    Returns:
        The part of that box itself if there is one, else a new tensor.
    """
    if wanted in parts:
        return parts[wanted]
    common = {box: box.common(wanted) for box in parts}
    assert sum(inner.numel for inner in common.values()) == wanted.numel, f"the parts don't make up {wanted}"
    made = next(iter(parts.values())).new_empty(wanted.shape)
    for box, inner in common.items():
        made[inner.slices_in(wanted)] = parts[box][inner.slices_in(box)]
    return made


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
