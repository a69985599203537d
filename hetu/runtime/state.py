"""What a graph keeps from run to run: its parameters, gradients not yet applied, and its optimisers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hetu.graph import Graph, Node, Role
from hetu.graph.passes import nodes_of
from hetu.optim import parameters_of
from hetu.runtime.optimizers import BoundOptimizer
from hetu.runtime.parameters import ByBox, ParameterStore, PlacementRule
from hetu.runtime.placement import replicated


class GraphState:
    """The state of one graph.

    Args:
        graph: The graph.
        device: Gives the device of the graph, where all of this lies.
        rule: Says where a parameter lies.

    Attributes:
        graph: The graph.
        parameters: The store of parameters.
        gradients: For each update node the sums that wait to be applied.
        optimizers: For each update node its optimiser, made at its first use.
    """

    def __init__(self, graph: Graph, device: Callable[[], torch.device], rule: PlacementRule = replicated) -> None:
        self.graph = graph
        self.parameters = ParameterStore(graph, device, rule)
        self.gradients: dict[Node, ByBox] = {}
        self.optimizers: dict[Node, BoundOptimizer] = {}
        self._parameters_of: dict[Node, list[Node]] = {}

    def blank(self) -> GraphState:
        """A state of the same graph, on the same device and by the same rule, in which nothing was made yet."""
        return GraphState(self.graph, self.parameters.device, self.parameters.rule)

    def become(self, other: GraphState) -> None:
        """Takes the place of another state of the graph."""
        self.parameters, self.gradients, self.optimizers = other.parameters, other.gradients, other.optimizers

    @property
    def updates(self) -> list[Node]:
        """All nodes that ``minimize`` made."""
        return nodes_of(self.graph.nodes, Role.UPDATE)

    def parameters_of(self, update: Node) -> list[Node]:
        """The parameters that an update changes, in the order of its gradients."""
        found = self._parameters_of.get(update)
        if found is None:
            found = self._parameters_of[update] = parameters_of(update)
        return found

    def optimizer(self, update: Node) -> BoundOptimizer:
        """The optimiser of an update node, made if it was never needed before.

        Raises:
            HetuError: If torch refuses its options.
        """
        if update not in self.optimizers:
            self.optimizers[update] = BoundOptimizer.of(update, self.parameters_of(update), self.parameters)
        return self.optimizers[update]

    def accumulate(self, update: Node, grads: ByBox) -> None:
        """Adds gradients to those that wait."""
        self.gradients[update] = add_gradients(self.gradients.get(update), grads)

    def apply(self, update: Node, loss: torch.Tensor) -> torch.Tensor:
        """Applies the gradients that wait, and forgets them; gives their norm."""
        return self.optimizer(update).step(self.gradients.pop(update), loss)


def add_gradients(total: ByBox | None, grads: ByBox) -> ByBox:
    """Adds to a running sum, in place and in at least float32; begins one with tensors that nobody else holds."""
    if total is None:
        return {key: _as_sum(grad) for key, grad in grads.items()}
    for key, grad in grads.items():
        one = total[key]
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
