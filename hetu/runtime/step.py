"""One step: what a run that trains does with the losses and gradients of its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from hetu.backends.comm.world import World
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.graph import Node, Tensor
from hetu.runtime.before import Before
from hetu.runtime.parameters import ByBox, widest
from hetu.runtime.request import Fetches
from hetu.runtime.sharing import bring_home, has_norm_elsewhere, norms_of_all
from hetu.runtime.state import GraphState, Waiting, add_gradients, as_sum, sole_owners
from hetu.runtime.unseen import UnseenRun
from hetu.shards import Shards

_Made = TypeVar("_Made")


class Step:
    """What one run makes of what the modules computed.

    They compute the loss and the gradients; this adds them up over micro-batches, and only once all of
    them are there are they kept or applied: a run that fails changes nothing.
    """

    def __init__(self, fetched: Fetches, state: GraphState, world: World, device: torch.device) -> None:
        self.fetched, self.state, self.world, self.device = fetched, state, world, device
        self.results: list[list[Any]] = []
        self.counts: list[int] = []
        self.losses: dict[Node, list[torch.Tensor]] = {node: [] for node in fetched.updates}
        self.sums: dict[Node, torch.Tensor] = {}
        self.grads: dict[Node, ByBox | None] = dict.fromkeys(fetched.updates)
        self._after: dict[Node, Waiting] | None = dict(state.waiting) if fetched.changes_state else None
        self._before: list[Before] = []
        self._totals: dict[Node, tuple[Waiting, torch.Tensor]] = {}
        self._updated: list[Node] = []
        self.unseen: UnseenRun | None = None

    def prepare(self) -> None:
        """Makes the optimisers, so that options that torch refuses are refused before anything is computed."""
        self.state.parameters.homes.check()
        if self.fetched.run_level == "update":
            for node in self.fetched.updates:
                self.state.optimizer(node)

    def collect(self, values: Sequence[Sequence[torch.Tensor]], num_pipelines: int) -> None:
        """Takes what one micro-batch gave.

        Args:
            values: For each wanted tensor one value per pipeline that runs here.
            num_pipelines: How many pipelines its strategy has.
        """
        count = len(self.fetched.plain)
        self.counts.append(num_pipelines)
        self.results.append([_as_result(shards) for shards in values[:count]])
        if not self.fetched.updates:
            return
        kept = [shard for shards in values[:count] for shard in shards]
        for node in self.fetched.updates:
            loss, *grads = values[count : count + len(self.fetched.needs(node))]
            count += 1 + len(grads)
            self.losses[node] += loss
            if grads:
                # They are sums over the pipelines, the same on all that run here.
                sums = sole_owners([shards[0] for shards in grads], [*kept, *loss]) if grads[0] else None
                of = self.state.parameters_of(node)
                own = bring_home(self.state.parameters, node, of, sums, num_pipelines, self.world, self.device)
                kept += own.values()
                self.grads[node] = add_gradients(self.grads[node], own)

    def gather_losses(self) -> None:
        """Adds up the losses of all pipelines: the last that ranks send each other before each works by itself."""
        for node, own in self.losses.items():
            dtype = TORCH_DTYPES[node.tensors[0].dtype]
            self.sums[node] = torch.stack(self.world.gather(own, self.counts, dtype, self.device)).sum()

    def finish(self) -> Any:
        """Keeps or applies the gradients; gives what the run returns.

        Whatever raises on the way, here or on another rank, all that was applied is taken back, of all updates of the
        run: the state is that of before until the one assignment that commits the step.
        """
        if self.fetched.is_as_computed and len(self.results) == 1:
            (found,) = self.results
            return found[0] if self.fetched.is_single else found
        if self._after is None:
            return self._given()
        try:
            self._share_norms()
            given = self._alone(self._given)
            if self.unseen is not None:
                self.state.protect(self.unseen, self._before)
            self.state.commit(self._after, self._updated)
        except BaseException:
            if not self.is_committed:  # a signal may come right after
                if self.unseen is not None:
                    self.state.unseen.discard(self.unseen)
                for before in reversed(self._before):
                    before.restore()
            raise
        return given

    def _alone(self, work: Callable[[], _Made]) -> _Made:
        """Does what each rank does by itself; the others hear whether it went well here."""
        try:
            made = work()
        except BaseException as error:
            self.world.confirm(error)
            raise
        self.world.confirm(None)
        return made

    def _share_norms(self) -> None:
        """Makes norms of those of which other ranks have a part."""
        store = self.state.parameters
        cut = [node for node in self.sums if has_norm_elsewhere(store, node, self.state.parameters_of(node))]
        if not cut:
            return
        own = self._alone(lambda: [self._total(node)[1] for node in cut])
        with self.world.hanging_up():
            for node, norm in zip(cut, norms_of_all(own, self.world, self.device), strict=True):
                self._totals[node] = self._totals[node][0], norm

    def _given(self) -> Any:
        """What the run returns, once its gradients are kept or applied."""
        values: dict[Tensor, Any] = {}
        for node, loss in self.sums.items():
            values[node.outputs[0]], values[node.outputs[1]] = loss, self._apply(node)
        for item, *column in zip(self.fetched.plain, *self.results, strict=True):
            values[item] = column if len(column) > 1 else column[0]
        if self.unseen is not None:
            self.state.refuse(self.unseen)
        return self.fetched.give(values)

    @property
    def is_committed(self) -> bool:
        """True once the state is that of after the run."""
        return self.state.waiting is self._after

    def _total(self, update: Node) -> tuple[Waiting, torch.Tensor]:
        """The gradients of this run and those that waited, and their norm, as far as they are at home here."""
        if update not in self._totals:
            grads = self.grads[update]
            assert grads is not None and self._after is not None
            with torch.no_grad():
                total = Waiting(grads, as_sum(self.sums[update])).plus(self._after.pop(update, None))
                norm = torch.nn.utils.get_total_norm(total.grads.values())
                if not total.grads:  # this rank has no part of any
                    norm = norm.to(self.device)
            self._totals[update] = total, norm.to(widest(self.state.parameters_of(update)))
        return self._totals[update]

    def _apply(self, update: Node) -> torch.Tensor:
        """Does what the run level says with the gradients; gives the norm of those that wait or were applied."""
        if self.grads[update] is None or self._after is None:
            return torch.tensor(math.nan, dtype=torch.float32, device="cpu")
        total, norm = self._total(update)
        if self.fetched.run_level == "update":
            optimizer = self.state.optimizer(update)
            self._before.append(optimizer.before())
            self._updated += self.state.parameters_of(update)
            with torch.no_grad():
                optimizer.step(total.grads, norm, total.loss)
        else:
            self._after[update] = total
        return norm.float()


def _as_result(shards: Sequence[torch.Tensor]) -> Any:
    """What a run gives of a tensor: the value of the one pipeline that runs here, of several, or None of none."""
    return Shards(shards) if len(shards) > 1 else shards[0] if shards else None
