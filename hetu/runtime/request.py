"""Opening a run: what its arguments ask for, and where it takes place. Nothing is read from feeds yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from hetu.arguments import device as as_device
from hetu.arguments import shown
from hetu.backends.comm import current_world
from hetu.cache import LRU
from hetu.errors import HetuError, caller
from hetu.graph import Graph, Node, Role, Tensor
from hetu.planning.feeds import Feeds, Symbols, split_micro_batches, tensors_of
from hetu.planning.names import find_feeds, find_fetches
from hetu.planning.planner import STRUCTURES, Planner
from hetu.planning.subgraph import Subgraph
from hetu.shards import Shards
from hetu.symbols import IntSymbol

RUN_LEVELS = ("update", "grad", "compute_only")


class Fetches:
    """What a run fetches. What ``minimize`` gave is computed by the step; the modules compute what that needs.

    Args:
        fetches: What the user fetches.
        run_level: See :meth:`hetu.Graph.run`.
        keys: What the results are called, where the run gives a dict; None otherwise.

    Attributes:
        wanted: What the modules must compute.
        updates: The update nodes, which ``minimize`` made.
        plain: The tensors that are fetched besides.
        changes_state: True if the run makes gradients wait or applies them.
        is_as_computed: True if a run gives just what the modules compute, in their order.
    """

    def __init__(
        self, fetches: Tensor | tuple[Tensor, ...], run_level: str, keys: tuple[Any, ...] | None = None
    ) -> None:
        self.keys = keys
        self.run_level = _checked_level(run_level)
        self.is_single = isinstance(fetches, Tensor)
        self.fetches = tuple(tensors_of(fetches))
        self.updates = list(dict.fromkeys(item.op for item in self.fetches if _is_update(item)))
        self.plain = tuple(dict.fromkeys(item for item in self.fetches if not _is_update(item)))
        self.changes_state = bool(self.updates) and run_level != "compute_only"
        needed = [item for node in self.updates for item in self.needs(node)]
        self.wanted: tuple[Tensor, ...] = (*self.plain, *needed)
        self.is_as_computed = keys is None and self.fetches == self.wanted
        self._is_repeated = len(set(self.fetches)) < len(self.fetches)

    def needs(self, update: Node) -> tuple[Tensor, ...]:
        """What an update takes: the loss, and unless nothing is done with them the gradients."""
        return update.tensors[:1] if self.run_level == "compute_only" else update.tensors

    def give(self, values: Mapping[Tensor, Any]) -> Any:
        """What the run returns: each fetched tensor's value, of which no two share memory."""
        if self.is_single:
            return values[self.fetches[0]]
        found = [values[item] for item in self.fetches]
        if self._is_repeated:
            first = [self.fetches.index(item) for item in self.fetches]
            found = [value if first[i] == i else _copy(value) for i, value in enumerate(found)]
        return found if self.keys is None else dict(zip(self.keys, found, strict=True))


def _copy(value: Any) -> Any:
    """A result's copy: of a tensor, of one per pipeline, of one per micro-batch, or None where nothing ran here."""
    if isinstance(value, Shards):
        return Shards(map(_copy, value))
    if isinstance(value, list):
        return list(map(_copy, value))
    return value if value is None else value.clone()


def _checked_level(run_level: Any) -> str:
    if not isinstance(run_level, str) or run_level not in RUN_LEVELS:
        names = ", ".join(f'"{name}"' for name in RUN_LEVELS)
        raise HetuError(
            f"there is no run_level {shown(run_level)}", op="run", where=caller(), fix=f"use one of {names}"
        )
    return run_level


def _is_update(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.op.role is Role.UPDATE


@dataclass(slots=True)  # not frozen: every run makes one
class RunRequest:
    """A run as it is asked for.

    Attributes:
        graph: The graph that runs.
        fetches: What the run gives.
        subgraph: What is computed for that.
        batches: The feeds and symbols of each micro-batch, as the user gave them.
        strategy: The strategy, as the user gave it.
        device: Where the run takes place.
    """

    graph: Graph
    fetches: Fetches
    subgraph: Subgraph
    batches: Sequence[tuple[Feeds, Symbols]]
    strategy: int | str | None
    device: torch.device


class RunOpener:
    """Opens the runs of one graph, and remembers by fetches what they need."""

    def __init__(self, graph: Graph, planner: Planner) -> None:
        self.graph, self._planner = graph, planner
        self._needs: LRU[tuple[Fetches, Subgraph]] = LRU(STRUCTURES)

    def open(
        self,
        fetches: Any,
        feed_dict: Mapping[Any, Any] | None,
        int_symbol_dict: Mapping[IntSymbol, Any] | None,
        strategy: int | str | None,
        num_micro_batches: int,
        device: str | None,
        run_level: str,
    ) -> RunRequest:
        """The request that the arguments of :meth:`hetu.Graph.run` make.

        Raises:
            HetuError: If something fetched is no tensor of the graph, there is no such run level, the micro-batches
                don't fit, or this rank can't run on the device.
        """
        keys: tuple[Any, ...] | None = None
        if not isinstance(fetches, Tensor):
            fetches, keys = find_fetches(self.graph, fetches)
        if not isinstance(fetches, Tensor):  # what can be read once is read once
            fetches = tuple(fetches if isinstance(fetches, (list, tuple)) else tensors_of(fetches))
        wanted = fetches

        def find() -> tuple[Fetches, Subgraph]:
            fetched = Fetches(wanted, run_level, keys)
            return fetched, self._planner.subgraph(fetched.wanted)

        key = (wanted, keys, run_level, self.graph.version)
        try:
            fetched, subgraph = self._needs.get(key, find)
        except TypeError:  # the key has no hash: something in it is refused where it is read
            fetched, subgraph = find()
        feed_dict = find_feeds(self.graph, feed_dict)
        batches = split_micro_batches(feed_dict, int_symbol_dict, num_micro_batches)
        return RunRequest(self.graph, fetched, subgraph, batches, strategy, device_of(self.graph, device))


def device_of(graph: Graph, wanted: str | None = None) -> torch.device:
    """The device of a graph's runs.

    Args:
        graph: The graph.
        wanted: What the run asks for; None for the graph's own device.

    Raises:
        HetuError: If this rank reaches the other ranks from another device only.
    """
    if wanted is None:
        wanted = graph.device
    elif type(wanted) is not str:
        wanted = as_device(wanted, op="run")
    own = current_world().device
    if wanted is None and own is not None:
        return own
    found = _device(wanted if wanted is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if found.type == "cuda" and found.index is None:
        if own is not None and own.type == "cuda":
            return own  # torch's current device is that of a thread
        found = _device("cuda", torch.cuda.current_device())
    if own is not None and (found.type != own.type or (found.type == "cuda" and found != own)):
        raise HetuError(
            f"the graph runs on {found}, but this rank of the run reaches the others from {own} only",
            op="run",
            where=caller(),
            fix="name 'cuda' without a number, or give init_distributed the device's backend: nccl or gloo",
        )
    return found


@cache  # every run asks for one, and torch takes a while to make it
def _device(name: str, index: int | None = None) -> torch.device:
    """The device of a name, which must be there."""
    checked = as_device(name, op="run")
    found = torch.device(checked or "cpu") if index is None else torch.device(name, index)
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if found.type == "cuda" and not (found.index or 0) < count:
        there = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
        raise HetuError(
            f"device is {name!r}, but this machine has {there}", op="run", where=caller(), fix="name one that is there"
        )
    return found
