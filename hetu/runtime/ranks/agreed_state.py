"""Which parts of a graph's state the ranks have compared, so that no two of them go on from different ones."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from hetu.backends.comm import World
from hetu.cache import LRU
from hetu.graph import Node, Role
from hetu.graph.passes import nodes_of
from hetu.planning.planner import STRUCTURES
from hetu.runtime.checkpoint import parts_of
from hetu.runtime.pieces import own_pieces
from hetu.runtime.ranks.digests import state_parts
from hetu.runtime.request import Fetches, RunRequest
from hetu.runtime.state import GraphState


class AgreedState:
    """The parts of a graph's state that are alike on all ranks of a world.

    A part is what a run needs of a parameter, or of an update. Once it was compared it stays alike, for steps change it
    alike on all ranks; so only what was made, set or loaded since is compared, by the numbers that those get.

    Args:
        world: The ranks.
        state: This rank's state.

    Attributes:
        digests: Of what runs are asked for, whatever their lengths; :class:`~hetu.runtime.ranks.agreement.Agreement`
            uses them.
    """

    def __init__(self, world: World, state: GraphState) -> None:
        self.world, self.state = world, state
        self.digests: LRU[str] = LRU(STRUCTURES)
        self._compared: dict[Node, int | None] = {}
        self._known: WeakKeyDictionary[Fetches, tuple[int, ...]] = WeakKeyDictionary()  # spares most runs a loop

    def knows(self, request: RunRequest) -> bool:
        """True if all that a run needs is made, and was compared."""
        version = self.state.version
        if self._known.get(request.fetches) == version:
            return True
        nodes, updates = _needed(self.state, request)
        is_updating = request.fetches.run_level == "update"
        is_made = all(self.state.parameters.number(node) is not None for node in nodes)
        is_made &= not is_updating or all(update in self.state.optimizers for update in updates)
        if not is_made or any(self._compared.get(node, 0) != self._number(node) for node in (*nodes, *updates)):
            return False
        self._known[request.fetches] = version
        return True

    def tell(self, request: RunRequest) -> list[str]:
        """What this rank has of all that a run needs, a line for each value; makes parameters that are not made yet."""
        with self.state.lock:
            nodes, updates = _needed(self.state, request)
            homes = self.state.parameters.homes
            pieces = own_pieces(self.state, updates, lambda placement: not homes.is_elsewhere(placement))
            loaded = {update.name: self.state.loaded.get(update.name, {}) for update in updates}
            return state_parts({**parts_of(self.state, nodes, updates, pieces), "loaded": loaded})

    def options(self, request: RunRequest) -> list[str] | None:
        """What a run's updates do that may have changed since they were made; None if not all optimisers are made.

        These are the options that schedules set, which are functions of the user's, and the norm to clip at, which the
        user may set at any time. What lies on a GPU would have to be waited for, and is left out.
        """
        lines: list[str] = []
        for update in request.fetches.updates if request.fetches.run_level == "update" else ():
            bound = self.state.optimizers.get(update)
            if bound is None:
                return None
            lines.append(f"max_grad_norm of {update.name} = {bound.spec.max_grad_norm!r}")
            for i, group in enumerate(bound.optimizer.param_groups if bound.schedule is not None else ()):
                for name, value in group.items():
                    number = value.item() if isinstance(value, torch.Tensor) and value.is_cpu else value
                    if name != "params" and not isinstance(number, torch.Tensor):
                        lines.append(f"{name} of group {i} of {update.name} = {number!r}")
        return lines

    def note(self, request: RunRequest) -> None:
        """Notes that the ranks have told each other the same."""
        nodes, updates = _needed(self.state, request)
        self._compared.update((node, self._number(node)) for node in (*nodes, *updates))
        self._known[request.fetches] = self.state.version

    def _number(self, node: Node) -> int | None:
        """The number of a parameter, or of an update's optimiser if it has one.

        Gradients that wait need none: whatever loads them loads the parameters, too.
        """
        if node.role is Role.PARAMETER:
            return self.state.parameters.number(node)
        bound = self.state.optimizers.get(node)
        return None if bound is None else bound.number


def _needed(state: GraphState, request: RunRequest) -> tuple[list[Node], list[Node]]:
    """The parameters that a run reads or updates, and the updates that it makes or collects gradients for."""
    updates = request.fetches.updates if request.fetches.changes_state else []
    read = nodes_of(request.subgraph.nodes, Role.PARAMETER)
    return list(dict.fromkeys([*read, *(node for update in updates for node in state.parameters_of(update))])), updates
