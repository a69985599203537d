"""Launching an executable: its inputs are filled in and its module is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hetu.backends.comm import World
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.index_flags import IndexFlags
from hetu.backends.lower.lowering import (
    Executable,
    FeedInput,
    FlagsInput,
    GatheringInput,
    HomeInput,
    Input,
    ParameterInput,
    PlanInput,
    RandomInput,
    SizeInput,
    StepInput,
    WorldInput,
)
from hetu.backends.memory import as_tensor, sent_to
from hetu.backends.torch_private import set_grad_enabled
from hetu.graph import Node, Tensor
from hetu.planning.binder import BoundPipeline
from hetu.planning.feeds import FeedSet
from hetu.planning.planner import Prepared
from hetu.runtime.gathering import Gathering
from hetu.runtime.parameter_values import ParameterValues

StepValues = Mapping[Node, torch.Tensor]
"""The values that are made of a whole step before the rest of it is computed."""


class ModuleLauncher:
    """An executable with its inputs sorted by when they are known: once, for all its launches.

    Attributes:
        executable: The executable.
        parameters: The parameters that it reads.
    """

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        gathered = [item.parameter for bucket in executable.buckets for item in bucket]
        whole = [item.node for item in executable.inputs if isinstance(item, ParameterInput)]
        self.parameters = list(dict.fromkeys([*whole, *gathered]))
        # Each with its position among all inputs.
        self._sizes: list[tuple[int, int, int]] = []
        self._plans: list[tuple[int, Node, int]] = []
        self._feeds: list[tuple[int, Tensor, int, torch.dtype]] = []
        self._parameters: list[tuple[int, ParameterInput]] = []
        self._others: list[tuple[int, Input]] = []
        for position, item in enumerate(executable.inputs):
            match item:
                case FeedInput(tensor, pipeline):
                    self._feeds.append((position, tensor, pipeline, TORCH_DTYPES[tensor.dtype]))
                case SizeInput(index, pipeline):
                    self._sizes.append((position, index, pipeline))
                case PlanInput(node, pipeline):
                    self._plans.append((position, node, pipeline or 0))
                case ParameterInput():
                    self._parameters.append((position, item))
                case _:
                    self._others.append((position, item))
        # The planner remembers length sets for longer than executables are kept, and forgets them by itself: neither
        # may hold the other.
        self._known: WeakKeyDictionary[Prepared, list[Any]] = WeakKeyDictionary()

    def launch(
        self,
        prepared: Prepared,
        feeds: FeedSet,
        parameters: ParameterValues,
        world: World,
        device: torch.device,
        draws: tuple[int, int],
        step_values: StepValues,
        flags: IndexFlags | None,
    ) -> list[tuple[torch.Tensor, ...]]:
        """Computes one micro-batch on the pipelines that run here.

        Args:
            prepared: Its lengths and plans.
            feeds: Its arrays.
            parameters: Their values, as all micro-batches of the run read them.
            world: Through which its pipelines reach the others.
            device: Where it runs.
            draws: The seed, and the offset of the first random node of the graph.
            step_values: The values that are made of the whole step.
            flags: Note indices that are out of range where the host can't see them.

        Returns:
            For each fetched tensor one value per pipeline that runs here.
        """
        known = self._known.get(prepared)
        if known is None:
            known = self._known[prepared] = self._decided_by_lengths(prepared)
        values = known.copy()
        for position, tensor, pipeline, dtype in self._feeds:
            values[position] = to_device(feeds.arrays[pipeline][tensor], dtype, device)
        found = parameters.values([item for _, item in self._parameters])
        for (position, _), value in zip(self._parameters, found, strict=True):
            values[position] = value
        for position, item in self._others:
            match item:
                case RandomInput(node):
                    seed, offset = draws
                    values[position] = seed, offset + prepared.subgraph.random[node]
                case GatheringInput():
                    values[position] = Gathering(parameters.store, world, self.executable.buckets, device)
                case HomeInput(node):
                    values[position] = parameters.store.homes.of_sum(node)
                case StepInput(node):
                    values[position] = step_values[node]
                case FlagsInput():
                    values[position] = flags
                case WorldInput():
                    values[position] = world
        is_recording = torch.is_grad_enabled()
        try:  # a signal may come before the next line as well as after it
            set_grad_enabled(False)  # what torch.no_grad does, at a tenth of its time
            flat = self.executable.module.forward(*values)
        finally:
            set_grad_enabled(is_recording)
        count = len(world.pipelines(prepared.num_pipelines))
        if count == 1:
            return [(value,) for value in flat]
        return [tuple(flat[i : i + count]) for i in range(0, len(flat), count)]

    def _decided_by_lengths(self, prepared: Prepared) -> list[Any]:
        """All inputs, of which those are filled in that lengths decide."""
        executable = self.executable
        values: list[Any] = [None] * len(executable.inputs)
        if self._sizes:
            leaves = executable.leaves
            sizes = [executable.sizes(*[binding[leaf] for leaf in leaves]) for binding in prepared.bindings]
            for position, index, pipeline in self._sizes:
                values[position] = sizes[pipeline][index]
        for position, node, pipeline in self._plans:
            values[position] = prepared.plans[node][pipeline]
        return values

    def compute_on_host(self, arrays: Mapping[Tensor, Any], bound: BoundPipeline) -> torch.Tensor:
        """Computes the one fetch on the CPU from feeds and sizes alone, before anything is planned."""
        executable, cpu = self.executable, torch.device("cpu")
        values: list[Any] = [None] * len(executable.inputs)
        sizes = executable.sizes(*(bound.value(leaf) for leaf in executable.leaves))
        for position, index, _ in self._sizes:
            values[position] = sizes[index]
        for position, tensor, _, dtype in self._feeds:
            values[position] = to_device(arrays[tensor], dtype, cpu)
        with torch.no_grad():
            result: torch.Tensor = executable.module.forward(*values)[0]
        return result


def to_device(value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A fed array as a torch tensor of an element type on the device; no copy where none is needed."""
    x = value if isinstance(value, torch.Tensor) else as_tensor(value)
    if x.device == device and x.dtype == dtype:
        return x
    if x.device.type == "cpu" and device.type == "cuda":
        x = sent_to(x, device)
    return x.to(device=device, dtype=dtype)
