"""The stages that compute: lower a planned run to a ``torch.fx`` module, once a structure, and launch it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hetu import rng
from hetu.backends import default_backend
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lowering import Executable, FeedInput, Input, PlanInput, RandomInput, SizeInput, lower
from hetu.binder import BoundPipeline
from hetu.cache import LRU, CacheStats
from hetu.feeds import FeedSet, split_micro_batches
from hetu.graph import Graph, Node, Tensor
from hetu.planner import STRUCTURES, Prepared
from hetu.shards import Shards
from hetu.subgraph import Subgraph
from hetu.symbols import IntSymbol


class Executor:
    """Runs one graph. Keeps executables by structure; the graph's planner keeps plans by lengths."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
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
    ) -> Any:
        """See :meth:`hetu.Graph.run`. Every micro-batch is bound, planned and lowered before the first is computed."""
        planner, place = self.graph.planner, self._device(device)
        subgraph = planner.subgraph(fetches)
        batches = split_micro_batches(feed_dict or {}, int_symbol_dict or {}, num_micro_batches)
        ready = [planner.prepare(subgraph, feeds, symbols, strategy) for feeds, symbols in batches]
        backend = default_backend(place)
        executables = [self._executable(subgraph, prepared.num_pipelines, place, backend) for prepared, _ in ready]
        results = [
            self._launch(prepared, feeds, executable, place)
            for (prepared, feeds), executable in zip(ready, executables, strict=True)
        ]
        values = results[0] if num_micro_batches == 1 else [list(group) for group in zip(*results, strict=True)]
        return values[0] if isinstance(fetches, Tensor) else values

    def _device(self, device: str | None) -> torch.device:
        wanted = device or self.graph.device
        found = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        return found

    def _executable(self, subgraph: Subgraph, num_pipelines: int, device: torch.device, backend: str) -> Executable:
        return self._executables.get(
            (subgraph.fetches, len(subgraph.nodes), num_pipelines, device, backend),
            lambda: lower(
                subgraph.nodes,
                subgraph.fetches,
                subgraph.replaced,
                num_pipelines=num_pipelines,
                device=device,
                backend=backend,
                constants=self._constants,
            ),
        )

    def _launch(
        self, prepared: Prepared, feeds: FeedSet, executable: Executable, device: torch.device
    ) -> list[torch.Tensor] | list[Shards]:
        """Fills in the module's inputs and calls it."""
        seed, offset = rng.take(prepared.subgraph.draws)
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

        with torch.no_grad():
            flat = executable.module.forward(*map(argument, executable.inputs))
        count = prepared.num_pipelines
        if count == 1:
            return list(flat)
        return [Shards(flat[i : i + count]) for i in range(0, len(flat), count)]

    def compute_on_host(self, tensor: Tensor, arrays: Mapping[Tensor, Any], bound: BoundPipeline) -> torch.Tensor:
        """Computes on the CPU what planning needs and the graph makes: ``cu_seqlens`` from lengths, say."""
        cpu = torch.device("cpu")
        executable = self._executable(self.graph.planner.subgraph(tensor), 1, cpu, "torch")
        sizes = executable.sizes(*(bound.value(leaf) for leaf in executable.leaves))
        arguments = [
            to_device(arrays[item.tensor], item.tensor, cpu) if isinstance(item, FeedInput) else sizes[item.index]
            for item in executable.inputs
            if isinstance(item, (FeedInput, SizeInput))
        ]
        with torch.no_grad():
            result: torch.Tensor = executable.module.forward(*arguments)[0]
        return result


def to_device(value: Any, tensor: Tensor, device: torch.device) -> torch.Tensor:
    """A fed array as a torch tensor of the placeholder's element type on the device; no copy where none is needed."""
    if not isinstance(value, torch.Tensor):
        # torch takes no read-only, reversed or foreign-endian memory: such arrays are copied, others shared.
        shareable = value.flags.writeable and min(value.strides, default=0) >= 0 and value.dtype.isnative
        value = torch.from_numpy(value if shareable else value.astype(value.dtype.newbyteorder("=")))
    if value.device != device or value.dtype != TORCH_DTYPES[tensor.dtype]:
        value = value.to(device=device, dtype=TORCH_DTYPES[tensor.dtype])
    return value
