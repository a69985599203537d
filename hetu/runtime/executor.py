"""The stages that compute: lower a planned run to a ``torch.fx`` module, once a structure, and launch it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from hetu import rng
from hetu.backends import default_backend
from hetu.backends.comm import World, current_world
from hetu.backends.comm.distributed import DistributedWorld
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.lowering import (
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
from hetu.backends.precision import in_own_precision
from hetu.backends.torch_private import set_grad_enabled
from hetu.cache import LRU, CacheStats
from hetu.config import settings
from hetu.errors import HetuError, caller
from hetu.graph import Graph, Node, Tensor
from hetu.planning.binder import BoundPipeline
from hetu.planning.feeds import Feeds, FeedSet, Read, Symbols, read_feeds, split_micro_batches
from hetu.planning.planner import STRUCTURES, Prepared
from hetu.planning.subgraph import Subgraph
from hetu.runtime import checkpoint
from hetu.runtime.agreement import Agreement, Asked
from hetu.runtime.state import GraphState
from hetu.runtime.step import Fetches, Step
from hetu.symbols import IntSymbol

StepValues = Mapping[Node, torch.Tensor]


class Executor:
    """Runs one graph. Keeps executables by structure; the graph's planner keeps plans by lengths."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.state = GraphState(graph, lambda: self.device(None))
        self._fetches: LRU[tuple[Fetches, Subgraph]] = LRU(STRUCTURES)
        self._executables: LRU[Executable] = LRU(STRUCTURES)
        self._constants: dict[tuple[Node, torch.device], torch.Tensor] = {}

    def stats(self) -> dict[str, CacheStats]:
        """Counters of the caches: ``executables`` by structure, ``plans`` and ``bindings`` by lengths."""
        planner = self.graph.planner
        caches = {"executables": self._executables, "plans": planner.plans, "bindings": planner.prepared}
        return {name: cache.stats() for name, cache in caches.items()}

    def executables(self) -> list[Executable]:
        """What was lowered so far; printed, each says which kernel family runs its attention, and why no other."""
        return self._executables.values()

    @in_own_precision  # torch's autocast, that is; the graph's own casts are ops
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
        request = _Request(
            fetches, feed_dict or {}, int_symbol_dict or {}, strategy, num_micro_batches, device, run_level
        )
        world = current_world()
        if not isinstance(world, DistributedWorld):
            begun = self._begin(world, request)
            reads = [partial(read_feeds, begun.subgraph, feeds) for feeds, _ in begun.batches]
            return self._compute(self._prepare(begun, reads))
        with world.lock:
            world.control.check()
            return self._run_with_others(world, request)

    def _run_with_others(self, world: DistributedWorld, request: _Request) -> Any:
        """The same run, where other ranks run other pipelines: agreed on before anything is sent."""
        agreement, begun = Agreement(world), list[_Begun]()

        def ask() -> Asked:
            begun.append(self._begin(world, request))
            return begun[0].asked(self.graph)

        reads = agreement.hear(ask)
        run = agreement.confirm(
            lambda: self._prepare(begun[0], reads), lambda run: [prepared for prepared, _ in run.prepared]
        )
        with world.hanging_up():
            return self._compute(run)

    def _begin(self, world: World, request: _Request) -> _Begun:
        """What can be said of a run without its feeds."""
        wanted, level, planner = request.fetches, request.run_level, self.graph.planner

        def find() -> tuple[Fetches, Subgraph]:
            fetched = Fetches(wanted, level)
            return fetched, planner.subgraph(fetched.wanted)

        key = (wanted if isinstance(wanted, Tensor) else tuple(wanted), level, planner.version)
        fetched, subgraph = self._fetches.get(key, find)
        batches = split_micro_batches(request.feed_dict, request.int_symbol_dict, request.num_micro_batches)
        return _Begun(world, request, Step(fetched, self.state, world), subgraph, batches, self.device(request.device))

    def _prepare(self, begun: _Begun, reads: Sequence[Read]) -> _Run:
        """Binds, selects, plans and lowers every micro-batch."""
        ready = []
        for read, (_, symbols) in zip(reads, begun.batches, strict=True):
            ready.append(self.graph.planner.prepare_read(begun.subgraph, read, symbols, begun.request.strategy))
        executables = [self._own_executable(begun, begun.subgraph, prepared.num_pipelines) for prepared, _ in ready]
        begun.step.prepare()
        return _Run(begun, ready, executables)

    def _compute(self, run: _Run) -> Any:
        """Draws random numbers, launches every micro-batch, and ends the step."""
        begun, subgraph = run.begun, run.begun.subgraph
        random = [rng.take(subgraph.draws) for _ in run.prepared]
        with _determinism(settings().deterministic):
            values = self._step_values(run, random) if subgraph.step_wide else {}
            for (prepared, feeds), executable, draws in zip(run.prepared, run.executables, random, strict=True):
                flat = self._launch(begun, prepared, feeds, executable, draws, values)
                begun.step.collect(flat, prepared.num_pipelines, begun.place)
            return begun.step.finish(begun.place)

    def device(self, device: str | None) -> torch.device:
        """Where a run that asks for ``device`` takes place."""
        wanted, own = device or self.graph.device, current_world().device
        if wanted is None and own is not None:
            return own
        found = _device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
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

    def _own_executable(self, begun: _Begun, subgraph: Subgraph, num_pipelines: int) -> Executable | None:
        """What computes the pipelines that run in this process; None if there are none."""
        pipelines = begun.world.pipelines(num_pipelines)
        return self._executable(subgraph, num_pipelines, pipelines, begun.place) if pipelines else None

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

    def _step_values(self, run: _Run, random: Sequence[tuple[int, int]]) -> StepValues:
        """What is summed over all pipelines and micro-batches before any of them is computed in full."""
        begun, nodes, planner = run.begun, run.begun.subgraph.step_wide, self.graph.planner
        before = planner.subgraph([node.tensors[0] for node in nodes])
        sums = [torch.zeros((), dtype=torch.int64, device=begun.place) for _ in nodes]
        for (main, feeds), (_, symbols), draws in zip(run.prepared, begun.batches, random, strict=True):
            part, count = feeds.restricted(before), main.num_pipelines
            prepared, read = planner.prepare_read(before, lambda _, part=part: part, symbols, main.strategy, count)
            executable = self._own_executable(begun, before, count)
            flat = self._launch(begun, prepared, read, executable, draws, {})
            for i, values in enumerate(flat):
                for value in values:
                    sums[i] += value.sum()
        sums = begun.world.total(sums)
        return {node: s.clamp(min=node.attrs["least"]) for node, s in zip(nodes, sums, strict=True)}

    def _launch(
        self,
        begun: _Begun,
        prepared: Prepared,
        feeds: FeedSet,
        executable: Executable | None,
        draws: tuple[int, int],
        step_values: StepValues,
    ) -> list[tuple[torch.Tensor, ...]]:
        """Fills in the module's inputs and calls it; gives for each fetch one value a pipeline that runs here."""
        world, device, (seed, offset) = begun.world, begun.place, draws
        world.begin()
        if executable is None:
            return [() for _ in prepared.subgraph.fetches]
        inputs: _Inputs | None = executable.memo.get("inputs")
        if inputs is None:
            inputs = executable.memo["inputs"] = _Inputs(executable)
        known = prepared.memo.get(executable)
        if known is None:
            known = prepared.memo[executable] = inputs.known(executable, prepared)
        values: list[Any] = known.copy()
        for place, tensor, pipeline, dtype in inputs.feeds:
            values[place] = to_device(feeds.arrays[pipeline][tensor], dtype, device)
        for place, item in inputs.others:
            match item:
                case RandomInput(node):
                    values[place] = seed, offset + prepared.subgraph.random[node]
                case ParameterInput(node):
                    values[place] = self.state.value(node).to(device)
                case StepInput(node):
                    values[place] = step_values[node]
                case WorldInput():
                    values[place] = world
        is_recording = torch.is_grad_enabled()
        set_grad_enabled(False)  # what torch.no_grad does, at a tenth of its time
        try:
            flat = executable.module.forward(*values)
        finally:
            set_grad_enabled(is_recording)
        count = len(world.pipelines(prepared.num_pipelines))
        if count == 1:
            return [(value,) for value in flat]
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
            to_device(arrays[item.tensor], TORCH_DTYPES[item.tensor.dtype], cpu)
            if isinstance(item, FeedInput)
            else sizes[item.index]
            for item in executable.inputs
            if isinstance(item, (FeedInput, SizeInput))
        ]
        with torch.no_grad():
            result: torch.Tensor = executable.module.forward(*arguments)[0]
        return result


_device = cache(torch.device)
"""Devices by what names them: every run asks for one, and torch takes a while to make it."""


def _determinism(wanted: bool) -> AbstractContextManager[Any]:
    """Torch's own choice of deterministic kernels, for as long as a run takes."""
    return nullcontext() if not wanted or torch.are_deterministic_algorithms_enabled() else _deterministic()


@dataclass(slots=True)
class _Request:
    """The arguments of :meth:`hetu.Graph.run`."""

    fetches: Tensor | Sequence[Tensor]
    feed_dict: Mapping[Tensor, Any]
    int_symbol_dict: Mapping[IntSymbol, Any]
    strategy: int | str | None
    num_micro_batches: int
    device: str | None
    run_level: str


@dataclass(slots=True)
class _Begun:
    """A run of which everything is known but the feeds."""

    world: World
    request: _Request
    step: Step
    subgraph: Subgraph
    batches: Sequence[tuple[Feeds, Symbols]]
    place: torch.device

    def asked(self, graph: Graph) -> Asked:
        """What the ranks have to agree on."""
        others = {
            "run_level": self.request.run_level,
            "the kind of device": self.place.type,
            "the backend": default_backend(self.place),
            "hetu.config(deterministic=...)": settings().deterministic,
        }
        return Asked(graph, self.subgraph, self.batches, self.request.strategy, others)


@dataclass(slots=True)
class _Run:
    """A run that only has to be computed: for each micro-batch its plans, feeds and executable."""

    begun: _Begun
    prepared: Sequence[tuple[Prepared, FeedSet]]
    executables: Sequence[Executable | None]


class _Inputs:
    """The inputs of an executable, by when they are known: found once for all its runs.

    Attributes:
        count: How many there are.
        sizes: Its place among all, which size it is, and of which pipeline.
        plans: Its place, whose plan it is, and of which pipeline.
        feeds: What is fed: its place, the placeholder, the pipeline, and the type that the module takes.
        others: What else differs from run to run, by its place.
    """

    def __init__(self, executable: Executable) -> None:
        self.count = len(executable.inputs)
        self.sizes: list[tuple[int, int, int]] = []
        self.plans: list[tuple[int, Node, int]] = []
        self.feeds: list[tuple[int, Tensor, int, torch.dtype]] = []
        self.others: list[tuple[int, Input]] = []
        for place, item in enumerate(executable.inputs):
            match item:
                case FeedInput(tensor, pipeline):
                    self.feeds.append((place, tensor, pipeline, TORCH_DTYPES[tensor.dtype]))
                case SizeInput(index, pipeline):
                    self.sizes.append((place, index, pipeline))
                case PlanInput(node, pipeline):
                    self.plans.append((place, node, pipeline or 0))
                case _:
                    self.others.append((place, item))

    def known(self, executable: Executable, prepared: Prepared) -> list[Any]:
        """All inputs, of which those are filled in that lengths decide."""
        values: list[Any] = [None] * self.count
        if self.sizes:
            leaves = executable.leaves
            sizes = [executable.sizes(*[binding[leaf] for leaf in leaves]) for binding in prepared.bindings]
            for place, index, pipeline in self.sizes:
                values[place] = sizes[pipeline][index]
        for place, node, pipeline in self.plans:
            values[place] = prepared.plans[node][pipeline]
        return values


@contextmanager
def _deterministic() -> Iterator[None]:
    # cuBLAS gives the same bits with a fixed workspace only; it reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def to_device(value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A fed array as a torch tensor of an element type on the device; no copy where none is needed."""
    if not isinstance(value, torch.Tensor):
        # torch takes no read-only, reversed or foreign-endian memory: such arrays are copied, others shared.
        shareable = value.flags.writeable and min(value.strides, default=0) >= 0 and value.dtype.isnative
        value = torch.from_numpy(value if shareable else value.astype(value.dtype.newbyteorder("=")))
    return value if value.device == device and value.dtype == dtype else value.to(device=device, dtype=dtype)
