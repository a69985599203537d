"""What a graph keeps from run to run: its parameters, gradients not yet applied, and its optimisers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hetu.graph import Graph, Node, Role
from hetu.graph.passes import nodes_of
from hetu.optim import parameters_of
from hetu.parallel.placement import placed
from hetu.runtime.before import Before
from hetu.runtime.homes import PlacementRule
from hetu.runtime.optimizers import BoundOptimizer
from hetu.runtime.parameters import ByBox, ParameterStore
from hetu.runtime.unseen import UnseenRun, UnseenRuns


@dataclass(frozen=True, slots=True)
class Waiting:
    """Gradients that wait to be applied.

    Attributes:
        grads: The sums over the runs that computed them.
        loss: The sum of these runs' losses.
    """

    grads: ByBox
    loss: torch.Tensor

    def plus(self, other: Waiting | None) -> Waiting:
        """The sum with what waited before, which stays as it is; the gradients of this one are changed."""
        if other is None:
            return self
        own = {key: grad.to(other.grads[key].device) for key, grad in self.grads.items()}
        return Waiting(add_gradients(own, other.grads), other.loss + self.loss.to(other.loss.device))


class GraphState:
    """The state of one graph.

    Args:
        graph: The graph.
        device: Gives the device of the graph, where all of this lies.
        rule: Says where a parameter lies.

    Attributes:
        graph: The graph.
        parameters: The store of parameters.
        waiting: For each update node the gradients that wait to be applied.
        optimizers: For each update node its optimiser, made at its first use.
        version: Changes whenever something is made, loaded or forgotten, and never for a step.
        loaded: For each update by name, digests of what was cut for it from a loaded state.
        unseen: Runs of which a device has yet to say whether their indices were in range.
        lock: Held while the state is changed, or read as a whole. A schedule may read it in the midst of a change.
    """

    def __init__(self, graph: Graph, device: Callable[[], torch.device], rule: PlacementRule = placed) -> None:
        self.graph = graph
        self.parameters = ParameterStore(graph, device, rule)
        self.waiting: dict[Node, Waiting] = {}
        self.optimizers: dict[Node, BoundOptimizer] = {}
        self.loaded: dict[str, dict[str, dict[str, str]]] = {}
        self.unseen = UnseenRuns()
        self.lock = threading.RLock()
        self._new_optimizers: list[Node] = []
        self._parameters_of: dict[Node, list[Node]] = {}

    def blank(self) -> GraphState:
        """A state of the same graph, on the same device and by the same rule, in which nothing was made yet."""
        return GraphState(self.graph, self.parameters.device, self.parameters.homes.rule)

    def become(self, other: GraphState) -> None:
        """Takes the place of another state of the graph."""
        self.parameters, self.waiting, self.optimizers = other.parameters, other.waiting, other.optimizers
        self.loaded, self._new_optimizers = other.loaded, []
        self.unseen.forget()

    def look(self, waits: bool = False) -> None:
        """Looks at what devices said of the indices of earlier runs.

        Args:
            waits: Whether to wait until they have said it.

        Raises:
            HetuError: If one was out of range: that run and those after it have changed nothing.
        """
        if not self.unseen.runs:
            return
        with self.lock:
            found = self.unseen.settle(waits)
        if found is not None:
            flags, later = found
            flags.refuse(f" of an earlier run{f' ({later} came after it)' if later else ''}")

    def refuse(self, run: UnseenRun) -> None:
        """Looks at the indices of a run that makes parameters or optimisers, for which its device is waited for.

        Raises:
            HetuError: If an index is out of range.
        """
        if not self.is_settled and run.is_flagged():
            run.flags.refuse()

    def protect(self, run: UnseenRun, before: Sequence[Before]) -> None:
        """Adds a run whose indices its device has yet to judge, before what it changed is committed.

        From here on its device takes back what it has changed there, and :class:`Before` can't any more.

        Args:
            run: The run.
            before: What its updates have changed, as it was.
        """
        run.protect(before, self.unseen.last)
        waiting = self.waiting
        run.undo_by(lambda: setattr(self, "waiting", waiting))
        self.unseen.add(run)

    @property
    def is_settled(self) -> bool:
        """True if the run at hand has made no parameter and no optimiser."""
        return not self._new_optimizers and not self.parameters.fresh

    @property
    def version(self) -> tuple[int, ...]:
        return self.parameters.version, *[bound.number for bound in self.optimizers.values()]

    def settle(self) -> None:
        """Ends a run: what it made of parameters and optimisers stays."""
        if self._new_optimizers:
            self._new_optimizers.clear()
        if self.parameters.fresh:
            self.parameters.fresh.clear()

    def unsettle(self) -> None:
        """Ends a run that failed: what it made is forgotten, for the seed may be another when it is made again.

        Runs of several threads may forget, or keep, each other's first values. They never forget what was changed:
        that only happens under the lock, and is settled there.
        """
        with self.lock:
            self.parameters.forget_fresh()
            while self._new_optimizers:
                self.optimizers.pop(self._new_optimizers.pop(), None)

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
            self._new_optimizers.append(update)
        self.optimizers[update].check_places(update, self.parameters)
        return self.optimizers[update]

    def commit(self, waiting: dict[Node, Waiting], updated: Sequence[Node]) -> None:
        """Ends a step that changed parameters in place or made gradients wait.

        Args:
            waiting: The gradients that wait after it. Until this one assignment nothing of the step has happened.
            updated: The parameters that it changed.
        """
        self.parameters.note_updated(updated)
        self.settle()  # first: a signal right after the assignment must not find anything to forget
        self.waiting = waiting


def add_gradients(total: ByBox | None, grads: ByBox) -> ByBox:
    """Adds to a running sum, in place and in at least float32; begins one with tensors that nobody else holds."""
    if total is None:
        return {key: as_sum(grad) for key, grad in grads.items()}
    for key, grad in grads.items():
        total[key].add_(grad.to(total[key].device))
    return total


def as_sum(value: torch.Tensor) -> torch.Tensor:
    """A value in the dtype in which such values are added up: at least float32."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


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
