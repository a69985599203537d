"""What a graph keeps from run to run: its parameters, gradients not yet applied, and its optimisers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hetu import rng
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.graph import Graph, Node
from hetu.optim import Optimizer, parameters_of


@dataclass(slots=True)
class BoundOptimizer:
    """An optimiser of a graph, once it has parameters.

    Attributes:
        spec: What the user made.
        optimizer: That of torch.
        schedule: That of torch, or None.
    """

    spec: Optimizer
    optimizer: torch.optim.Optimizer
    schedule: Any

    def step(self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], loss: torch.Tensor) -> torch.Tensor:
        """Clips and applies gradients; gives their norm before that. They are changed."""
        norm = torch.nn.utils.get_total_norm(grads)
        if self.spec.max_grad_norm is not None:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            torch.nn.utils.clip_grads_with_norm_(params, self.spec.max_grad_norm, norm)
        try:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            self.optimizer.step()
        finally:
            for param in params:
                param.grad = None
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(float(loss))
        elif self.schedule is not None:
            self.schedule.step()
        return norm


class GraphState:
    """The state of one graph.

    Attributes:
        graph: The graph.
        place: Gives the device of the graph, where all of this lies.
        values: Parameters that were needed so far.
        gradients: For each update node the sums that wait to be applied, in the order of its gradients.
        optimizers: For each update node its optimiser, made at its first use.
    """

    def __init__(self, graph: Graph, place: Callable[[], torch.device]) -> None:
        self.graph, self.place = graph, place
        self.values: dict[Node, torch.Tensor] = {}
        self.gradients: dict[Node, list[torch.Tensor]] = {}
        self.optimizers: dict[Node, BoundOptimizer] = {}

    @property
    def parameters(self) -> list[Node]:
        """All parameters of the graph."""
        return [node for node in self.graph.nodes if node.definition.name == "parameter"]

    @property
    def updates(self) -> list[Node]:
        """All that ``minimize`` gave."""
        return [node for node in self.graph.nodes if node.definition.name == "update"]

    def value(self, node: Node) -> torch.Tensor:
        """A parameter, made if it was never needed before."""
        if node not in self.values:
            self.values[node] = initial_value(node).to(self.place())
        return self.values[node]

    def optimizer(self, update: Node) -> BoundOptimizer:
        """The optimiser of an update node, made if it was never needed before."""
        if update not in self.optimizers:
            self.optimizers[update] = self.new_optimizer(update)
        return self.optimizers[update]

    def new_optimizer(self, update: Node) -> BoundOptimizer:
        """An optimiser without a past.

        Raises:
            HetuError: If torch refuses its options.
        """
        spec: Optimizer = update.attrs["optimizer"]
        params = iter([self.value(node) for node in parameters_of(update)])
        groups = [{"params": [next(params) for _ in range(n)], **options} for n, options in update.attrs["groups"]]
        try:
            optimizer = getattr(torch.optim, spec.kind)(groups, **spec.options)
            schedule = spec.schedule(optimizer) if spec.schedule is not None else None
        except (TypeError, ValueError) as error:
            what = f"torch.optim.{spec.kind} refuses its options: {error}"
            raise HetuError(what, op="minimize", where=spec.where, fix="see torch's documentation of it") from error
        return BoundOptimizer(spec, optimizer, schedule)

    def accumulate(self, update: Node, grads: Sequence[torch.Tensor]) -> None:
        """Adds gradients to those that wait."""
        self.gradients[update] = add_gradients(self.gradients.get(update), grads)

    def apply(self, update: Node, loss: torch.Tensor) -> torch.Tensor:
        """Applies the gradients that wait, and forgets them; gives their norm."""
        bound = self.optimizer(update)
        params = [self.value(node) for node in parameters_of(update)]
        grads = self.gradients.pop(update)
        return bound.step(params, [g.to(p) for g, p in zip(grads, params, strict=True)], loss)


def add_gradients(total: list[torch.Tensor] | None, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Adds to a running sum, in place and in at least float32; begins one with tensors that nobody else holds."""
    if total is None:
        return [_as_sum(grad) for grad in grads]
    for one, grad in zip(total, grads, strict=True):
        one.add_(grad.to(one.device))
    return total


def _as_sum(grad: torch.Tensor) -> torch.Tensor:
    return grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad


def sole_owners(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same values, copied where their memory is shared with another of the tensors, with ``others``, or in part.

    Args:
        tensors: Results that will be changed in place.
        others: Results that must stay as they are.
    """
    taken = {item.untyped_storage().data_ptr() for item in others}
    owned = []
    for item in tensors:
        place, whole = item.untyped_storage().data_ptr(), item.untyped_storage().nbytes() == item.nbytes
        is_free = place not in taken and whole and item.is_contiguous()
        taken.add(place)
        owned.append(item if is_free else item.clone(memory_format=torch.contiguous_format))
    return owned


def initial_value(node: Node) -> torch.Tensor:
    """A parameter's first value, on the CPU.

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
        made = init(blank)
    value = blank if made is None else torch.as_tensor(made, device="cpu")
    if tuple(value.shape) != tuple(shape):
        what = f"the initialiser of {node.name} gave shape {list(value.shape)}, expected {list(shape)}"
        raise ShapeError(what, op="parameter", where=node.where, fix="fill the tensor that it gets, and return it")
    if not value.is_floating_point() or (math.prod(shape) and not bool(value.isfinite().all())):
        what = f"the initialiser of {node.name} gave {value.dtype} values that are no finite numbers"
        raise DTypeError(what, op="parameter", where=node.where, fix="give finite floating numbers")
    return value.detach().to(dtype=dtype, device="cpu", copy=True)
