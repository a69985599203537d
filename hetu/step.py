"""One step: what a run that trains does with the losses and gradients of its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hetu.backends.comm.world import Spec, World
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.errors import HetuError, caller
from hetu.graph import Node, Tensor
from hetu.shards import Shards
from hetu.state import GraphState, add_gradients, sole_owners

RUN_LEVELS = ("update", "grad", "compute_only")


class Step:
    """Takes what ``minimize`` gave out of the fetches, and what it needs in.

    The modules that run compute the loss and the gradients; this adds them up over micro-batches, and only once all of
    them are there are they kept or applied: a run that fails changes nothing.

    Attributes:
        wanted: What the modules must compute.
    """

    def __init__(self, fetches: Tensor | Sequence[Tensor], run_level: str, state: GraphState, world: World) -> None:
        if run_level not in RUN_LEVELS:
            names = ", ".join(f'"{name}"' for name in RUN_LEVELS)
            raise HetuError(f"there is no run_level {run_level!r}", op="run", where=caller(), fix=f"use one of {names}")
        self.is_single = isinstance(fetches, Tensor)
        self.fetches = [fetches] if isinstance(fetches, Tensor) else list(fetches)
        self.run_level, self.state, self.world = run_level, state, world
        self.updates = list(dict.fromkeys(item.op for item in self.fetches if _is_update(item)))
        self.plain = tuple(dict.fromkeys(item for item in self.fetches if not _is_update(item)))
        needed = [item for node in self.updates for item in self._needs(node)]
        self.wanted: Tensor | tuple[Tensor, ...] = (*self.plain, *needed)
        self.results: list[list[Any]] = []
        self.counts: list[int] = []
        self.losses: dict[Node, list[torch.Tensor]] = {node: [] for node in self.updates}
        self.grads: dict[Node, list[torch.Tensor] | None] = dict.fromkeys(self.updates)

    def _needs(self, update: Node) -> tuple[Tensor, ...]:
        return update.tensors[:1] if self.run_level == "compute_only" else update.tensors

    def prepare(self) -> None:
        """Makes the optimisers, so that options that torch refuses are refused before anything is computed."""
        if self.run_level == "update":
            for node in self.updates:
                self.state.optimizer(node)

    def collect(self, values: Sequence[Sequence[torch.Tensor]], num_pipelines: int, device: torch.device) -> None:
        """Takes what one micro-batch gave.

        Args:
            values: For each wanted tensor one value a pipeline that runs here.
            num_pipelines: Pipelines of its strategy.
            device: Where it ran.
        """
        count = len(self.plain)
        self.counts.append(num_pipelines)
        self.results.append([_as_result(shards) for shards in values[:count]])
        kept = [shard for shards in values[:count] for shard in shards]
        for node in self.updates:
            loss, *grads = values[count : count + len(self._needs(node))]
            count += 1 + len(grads)
            self.losses[node] += loss
            if grads:
                # They are sums over the pipelines, the same on all of them, and on ranks that have none.
                there = sole_owners([shards[0] for shards in grads], [*kept, *loss]) if grads[0] else None
                own = self.world.share(there, [_spec(tensor) for tensor in node.tensors[1:]], num_pipelines, device)
                kept += own
                self.grads[node] = add_gradients(self.grads[node], own)

    def finish(self, device: torch.device) -> Any:
        """Keeps or applies the gradients; gives what the run returns."""
        totals: dict[Tensor, torch.Tensor] = {}
        for node in self.updates:
            dtype = TORCH_DTYPES[node.tensors[0].dtype]
            loss = torch.stack(self.world.gather(self.losses[node], self.counts, dtype, device)).sum()
            totals[node.outputs[0]], totals[node.outputs[1]] = loss, self._apply(node, loss)
        many = len(self.results) > 1
        columns = list(zip(*self.results, strict=True))
        found = {item: list(column) if many else column[0] for item, column in zip(self.plain, columns, strict=True)}
        values = [totals[item] if _is_update(item) else found[item] for item in self.fetches]
        return values[0] if self.is_single else values

    def _apply(self, update: Node, loss: torch.Tensor) -> torch.Tensor:
        """Does what the run level says with the gradients; gives the norm of those that wait or were applied."""
        grads = self.grads[update]
        if grads is None:
            return torch.tensor(math.nan)
        with torch.no_grad():
            self.state.accumulate(update, grads)
            if self.run_level == "update":
                return self.state.apply(update, loss).float()
            return torch.nn.utils.get_total_norm(self.state.gradients[update]).float()


def _as_result(shards: Sequence[torch.Tensor]) -> Any:
    """What a run gives of a tensor: the value of the one pipeline that runs here, of several, or None of none."""
    return Shards(shards) if len(shards) > 1 else next(iter(shards), None)


def _spec(tensor: Tensor) -> Spec:
    """Shape and dtype of a parameter's gradient."""
    return tuple(dim.constant or 0 for dim in tensor.symbolic_shape), TORCH_DTYPES[tensor.dtype]


def _is_update(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.op.definition.name == "update"
