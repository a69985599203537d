"""The stages that compute: lower a planned run to a ``torch.fx`` module, once a structure, and launch it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from hetu import checkpoint, rng
from hetu.backends import default_backend
from hetu.backends.comm import LocalWorld, World
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lowering import (
    Executable,
    FeedInput,
    Input,
    ParameterInput,
    PlanInput,
    RandomInput,
    SizeInput,
    StepInput,
    WorldInput,
    lower,
)
from hetu.binder import BoundPipeline
from hetu.cache import LRU, CacheStats
from hetu.config import settings
from hetu.feeds import FeedSet, split_micro_batches
from hetu.graph import Graph, Node, Tensor
from hetu.planner import STRUCTURES, Prepared
from hetu.state import GraphState
from hetu.step import Step
from hetu.subgraph import Subgraph
from hetu.symbols import IntSymbol

StepValues = Mapping[Node, torch.Tensor]


class Executor:
    """Runs one graph. Keeps executables by structure; the graph's planner keeps plans by lengths."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.world: World = LocalWorld()
        self.state = GraphState(graph, lambda: self.device(None))
        self._executables: LRU[Executable] = LRU(STRUCTURES)
        self._constants: dict[tuple[Node, torch.device], torch.Tensor] = {}

    def stats(self) -> dict[str, CacheStats]:
        """Counters of the caches: ``executables`` by structure, ``plans`` and ``bindings`` by lengths."""
        planner = self.graph.planner
        caches = {"executables": self._executables, "plans": planner.plans, "bindings": planner.prepared}
        return {name: cache.stats() for name, cache in caches.items()}

    def run(
        self,
        fetches: Tensor | Sequence[Tensor],
        feed_dict: Mapping[Tensor, Any] | None,
        int_symbol_dict: Mapping[IntSymbol, Any] | None,
        strategy: int | str | None,
        num_micro_batches: int,
        device: str | None,
        run_level: str,
    ) -> Any:
        """See :meth:`hetu.Graph.run`. Every micro-batch is bound, planned and lowered before the first is computed."""
        planner, place = self.graph.planner, self.device(device)
        step = Step(fetches, run_level, self.state)
        subgraph = planner.subgraph(step.wanted)
        batches = split_micro_batches(feed_dict or {}, int_symbol_dict or {}, num_micro_batches)
        ready = [planner.prepare(subgraph, feeds, symbols, strategy) for feeds, symbols in batches]
        executables = [self._own_executable(subgraph, prepared.num_pipelines, place) for prepared, _ in ready]
        step.prepare()
        random = [rng.take(subgraph.draws) for _ in ready]
        with _determinism(settings().deterministic):
            values = self._step_values(subgraph, batches, ready, random, place) if subgraph.step_wide else {}
            for (prepared, feeds), executable, draws in zip(ready, executables, random, strict=True):
                step.collect(self._launch(prepared, feeds, executable, place, draws, values))
            return step.finish()

    def device(self, device: str | None) -> torch.device:
        """Where a run that asks for ``device`` takes place."""
        wanted = device or self.graph.device
        found = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        return found

    def _own_executable(self, subgraph: Subgraph, num_pipelines: int, device: torch.device) -> Executable:
        """What computes the pipelines that run in this process."""
        return self._executable(subgraph, num_pipelines, self.world.pipelines(num_pipelines), device)

    def _executable(
        self,
        subgraph: Subgraph,
        num_pipelines: int,
        pipelines: Sequence[int],
        device: torch.device,
        backend: str | None = None,
    ) -> Executable:
        backend, pipelines = backend or default_backend(device), tuple(pipelines)
        return self._executables.get(
            (subgraph.fetches, len(subgraph.nodes), num_pipelines, pipelines, device, backend),
            lambda: lower(
                subgraph.nodes,
                subgraph.fetches,
                subgraph.replaced,
                num_pipelines=num_pipelines,
                pipelines=pipelines,
                device=device,
                backend=backend,
                constants=self._constants,
            ),
        )

    def _step_values(
        self,
        subgraph: Subgraph,
        batches: Sequence[tuple[Mapping[Tensor, Any], Mapping[IntSymbol, Any]]],
        ready: Sequence[tuple[Prepared, FeedSet]],
        random: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> StepValues:
        """What is summed over all pipelines and micro-batches before any of them is computed in full."""
        inputs = [node.tensors[0] for node in subgraph.step_wide]
        before = self.graph.planner.subgraph(inputs)
        sums = [torch.zeros((), dtype=torch.int64, device=device) for _ in inputs]
        for (feeds, symbols), (main, _), draws in zip(batches, ready, random, strict=True):
            needed = {tensor: feeds[tensor] for tensor in before.feeds if tensor in feeds}
            prepared, read = self.graph.planner.prepare(before, needed, symbols, main.strategy, main.num_pipelines)
            executable = self._own_executable(before, prepared.num_pipelines, device)
            flat = self._launch(prepared, read, executable, device, draws, {})
            for i, values in enumerate(flat):
                for value in values:
                    sums[i] += value.sum()
        least = [node.attrs["least"] for node in subgraph.step_wide]
        return {node: s.clamp(min=n) for node, s, n in zip(subgraph.step_wide, sums, least, strict=True)}

    def _launch(
        self,
        prepared: Prepared,
        feeds: FeedSet,
        executable: Executable,
        device: torch.device,
        draws: tuple[int, int],
        step_values: StepValues,
    ) -> list[tuple[torch.Tensor, ...]]:
        """Fills in the module's inputs and calls it; gives for each fetch one value a pipeline."""
        seed, offset = draws
        sizes = prepared.memo.get(executable)
        if sizes is None:
            leaves = executable.leaves
            sizes = tuple(executable.sizes(*(binding[leaf] for leaf in leaves)) for binding in prepared.bindings)
            prepared.memo[executable] = sizes

        def argument(item: Input) -> Any:
            match item:
                case FeedInput(tensor, pipeline):
                    return to_device(feeds.arrays[pipeline][tensor], tensor, device)
                case SizeInput(index, pipeline):
                    return sizes[pipeline][index]
                case PlanInput(node, pipeline):
                    return prepared.plans[node][pipeline or 0]
                case RandomInput(node):
                    return seed, offset + prepared.subgraph.random[node]
                case ParameterInput(node):
                    return self.state.value(node).to(device)
                case StepInput(node):
                    return step_values[node]
                case WorldInput():
                    return self.world

        with torch.no_grad():
            flat = executable.module.forward(*map(argument, executable.inputs))
        count = len(self.world.pipelines(prepared.num_pipelines))
        return [tuple(flat[i : i + count]) for i in range(0, len(flat), count)]

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`hetu.Graph.state_dict`."""
        return checkpoint.state_dict(self.state, copy=True)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`hetu.Graph.load_state_dict`."""
        checkpoint.load_state_dict(self.state, state)

    def compute_on_host(self, tensor: Tensor, arrays: Mapping[Tensor, Any], bound: BoundPipeline) -> torch.Tensor:
        """Computes on the CPU what planning needs and the graph makes: ``cu_seqlens`` from lengths, say."""
        cpu = torch.device("cpu")
        executable = self._executable(self.graph.planner.subgraph(tensor), 1, (0,), cpu, "torch")
        sizes = executable.sizes(*(bound.value(leaf) for leaf in executable.leaves))
        arguments = [
            to_device(arrays[item.tensor], item.tensor, cpu) if isinstance(item, FeedInput) else sizes[item.index]
            for item in executable.inputs
            if isinstance(item, (FeedInput, SizeInput))
        ]
        with torch.no_grad():
            result: torch.Tensor = executable.module.forward(*arguments)[0]
        return result


def _determinism(wanted: bool) -> AbstractContextManager[Any]:
    """Torch's own choice of deterministic kernels, for as long as a run takes."""
    return nullcontext() if not wanted or torch.are_deterministic_algorithms_enabled() else _deterministic()


@contextmanager
def _deterministic() -> Iterator[None]:
    # cuBLAS gives the same bits with a fixed workspace only; it reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def to_device(value: Any, tensor: Tensor, device: torch.device) -> torch.Tensor:
    """A fed array as a torch tensor of the placeholder's element type on the device; no copy where none is needed."""
    if not isinstance(value, torch.Tensor):
        # torch takes no read-only, reversed or foreign-endian memory: such arrays are copied, others shared.
        shareable = value.flags.writeable and min(value.strides, default=0) >= 0 and value.dtype.isnative
        value = torch.from_numpy(value if shareable else value.astype(value.dtype.newbyteorder("=")))
    if value.device != device or value.dtype != TORCH_DTYPES[tensor.dtype]:
        value = value.to(device=device, dtype=TORCH_DTYPES[tensor.dtype])
    return value
