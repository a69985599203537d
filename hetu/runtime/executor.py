"""The stages that compute: a request is agreed on, prepared, launched, and ended by its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

from hetu import rng
from hetu.backends.comm import World, current_world
from hetu.backends.comm.distributed import DistributedWorld
from hetu.backends.lower.index_flags import IndexFlags, is_deferred
from hetu.backends.lower.lowering import Executable
from hetu.cache import CacheStats
from hetu.config import settings
from hetu.errors import HetuError, caller
from hetu.graph import Graph, Tensor
from hetu.graph.running import LoadedNames
from hetu.planning import stages
from hetu.planning.binder import BoundPipeline
from hetu.planning.feeds import FeedReader, FeedSet, read_feeds
from hetu.planning.planner import Planner, Prepared
from hetu.planning.subgraph import Subgraph
from hetu.runtime import checkpoint
from hetu.runtime.determinism import deterministic
from hetu.runtime.executables import Executables
from hetu.runtime.gathering import Gathering
from hetu.runtime.launch import ModuleLauncher, StepValues
from hetu.runtime.modes import in_own_modes
from hetu.runtime.parameter_values import ParameterValues
from hetu.runtime.ranks.agreed_state import AgreedState
from hetu.runtime.ranks.agreement import Agreement
from hetu.runtime.request import RunOpener, RunRequest, device_of
from hetu.runtime.state import GraphState
from hetu.runtime.step import Step
from hetu.runtime.unseen import UnseenRun
from hetu.symbols import IntSymbol

_ANY_KERNELS = nullcontext()
"""The context of a run that takes whichever kernels torch chooses."""

_NO_LOCK = nullcontext()
"""The context of a run that leaves the state as it is."""


@dataclass(slots=True)
class ReadyRun:
    """A run of which everything is checked and made, so that it only has to be computed.

    Attributes:
        request: What was asked for.
        world: Who runs it.
        step: What takes its losses and gradients.
        prepared: Each micro-batch's plans and feeds.
        launchers: What computes each micro-batch here; None where no pipeline of it runs here.
        parameters: What they read of parameters.
        flags: Note indices out of range; None if the hosts see all indices.
    """

    request: RunRequest
    world: World
    step: Step
    prepared: Sequence[tuple[Prepared, FeedSet]]
    launchers: Sequence[ModuleLauncher | None]
    parameters: ParameterValues
    flags: IndexFlags | None


class Executor:
    """Runs one graph. It keeps executables by structure; the planner keeps plans by lengths.

    Args:
        graph: The graph.
        planner: What binds, selects and plans its runs.

    Attributes:
        graph: The graph.
        state: What lasts between its runs.
    """

    def __init__(self, graph: Graph, planner: Planner) -> None:
        self.graph, self._planner = graph, planner
        self.state = GraphState(graph, lambda: device_of(graph))
        self._opener = RunOpener(graph, planner)
        self._executables = Executables()
        self._agreed: AgreedState | None = None

    def __repr__(self) -> str:
        return f"<Executor of {self.graph.name}: {len(self.executables())} executables>"

    def stats(self) -> dict[str, CacheStats]:
        """Counters of the caches: ``executables`` by structure, ``plans`` and ``bindings`` by lengths."""
        planner = self._planner
        caches = {"executables": self._executables.launchers, "plans": planner.plans, "bindings": planner.prepared}
        return {name: cache.stats() for name, cache in caches.items()}

    def executables(self) -> list[Executable]:
        """What was lowered so far; printed, each says which kernel family runs its attention, and why no other."""
        return [launcher.executable for launcher in self._executables.launchers.values()]

    @in_own_modes
    def run(
        self,
        fetches: Any,
        feed_dict: Mapping[Any, Any] | None,
        int_symbol_dict: Mapping[IntSymbol, Any] | None,
        strategy: int | str | None,
        num_micro_batches: int,
        device: str | None,
        run_level: str,
    ) -> Any:
        """See :meth:`hetu.Graph.run`. Every micro-batch is bound, planned and lowered before the first is computed."""
        open_request = partial(
            self._opener.open,
            fetches,
            feed_dict,
            int_symbol_dict,
            strategy,
            num_micro_batches,
            device,
            run_level,
        )
        world = current_world()
        try:
            if isinstance(world, DistributedWorld):
                with world.lock:
                    world.control.check()
                    found = self._run_with_others(world, partial(self._after_a_look, open_request))
            else:
                if self.state.unseen.runs:
                    self.state.look()
                request = open_request()
                readers = [partial(read_feeds, request.subgraph, feeds) for feeds, _ in request.batches]
                with self.state.lock if request.fetches.changes_state else _NO_LOCK:
                    found = self._compute(self._prepare(world, request, readers))
        except BaseException:
            self.state.unsettle()
            if self.state.unseen.runs and world.is_distributed:  # perhaps another rank has seen its own index
                with self.state.lock:
                    self.state.unseen.settle(waits=True)
            raise
        self.state.settle()
        return found

    def _after_a_look(self, open_request: Callable[[], RunRequest]) -> RunRequest:
        """A request, once earlier runs are settled as far as their devices have come: the others hear what raises."""
        self.state.look()
        return open_request()

    def _run_with_others(self, world: DistributedWorld, open_request: Callable[[], RunRequest]) -> Any:
        """The same run, where other ranks run other pipelines: agreed on before anything is sent."""
        if self._agreed is None or self._agreed.world is not world:
            self._agreed = AgreedState(world, self.state)
        agreement = Agreement(world, self._agreed)
        try:
            request, readers = agreement.hear(open_request)
            with self.state.lock if request.fetches.changes_state else _NO_LOCK:
                run = agreement.confirm(
                    lambda: self._prepare(world, request, readers),
                    lambda run: [prepared for prepared, _ in run.prepared],
                )
                return self._compute(run)
        except Exception:  # the others know of it
            raise
        except BaseException as error:  # Ctrl-C, say, wherever it came
            world.control.fail(error)
            raise

    def _prepare(self, world: World, request: RunRequest, readers: Sequence[FeedReader]) -> ReadyRun:
        """Binds, selects, plans and lowers every micro-batch, and makes all that may fail when it is made."""
        subgraph, ready, waits = request.subgraph, [], not is_deferred(request.device)
        is_unseen = subgraph.computes_indices
        for read, (_, symbols) in zip(readers, request.batches, strict=True):
            begin = perf_counter()
            prepared, feeds = self._planner.prepare_read(subgraph, read, symbols, request.strategy)
            selected, own = perf_counter(), world.pipelines(prepared.num_pipelines)
            prepared.build_parts(own)
            if stages.are_told():
                stages.selected(prepared, request.strategy, selected - begin, perf_counter() - selected, own)
            if feeds.unseen or feeds.is_unseen_elsewhere:
                is_unseen = True
                if waits:  # they are copied to the host in any case
                    self._planner.check_indices(prepared, feeds, waits=True)
            ready.append((prepared, feeds))
        launchers = [self._launcher(world, request, subgraph, prepared.num_pipelines) for prepared, _ in ready]
        if world.is_distributed:  # in one process the launch makes them, and nobody waits for it
            for launcher in filter(None, launchers):
                self.state.parameters.make(launcher.parameters)
            if None in launchers:  # it serves the others
                gathered = self._executables.gathers(subgraph, self.state.parameters.homes.scattered)
                self.state.parameters.make(gathered.parameters)
        step = Step(request.fetches, self.state, world, request.device)
        step.prepare()
        flags = IndexFlags() if is_unseen and not waits else None
        parameters = ParameterValues(self.state.parameters, request.device)
        return ReadyRun(request, world, step, ready, launchers, parameters, flags)

    def _launcher(
        self, world: World, request: RunRequest, subgraph: Subgraph, num_pipelines: int
    ) -> ModuleLauncher | None:
        """What computes the pipelines that run in this process; None if there are none."""
        pipelines = world.pipelines(num_pipelines)
        if not pipelines:
            return None
        scattered = self.state.parameters.homes.scattered
        return self._executables.get(subgraph, num_pipelines, pipelines, request.device, scattered=scattered)

    def _compute(self, run: ReadyRun) -> Any:
        """Draws random numbers, launches every micro-batch, and ends the step.

        Args:
            run: What is computed.

        Raises:
            HetuError: If anything raises: an op, an optimiser, a schedule. Nothing has changed then.
        """
        request, count = run.request, len(run.prepared)
        draws = run.request.subgraph.draws
        seed, first = rng.get_state()
        try:
            if draws:
                seed, first = rng.take(draws * count)
            random = [(seed, first + i * draws) for i in range(count)]
            with deterministic(request.device) if settings().deterministic else _ANY_KERNELS:
                with run.world.hanging_up():  # it sees what raises as it was raised
                    self._compute_with(run, random)
                return run.step.finish()
        except BaseException as error:
            if not run.step.is_committed:
                rng.give_back(seed, first, draws * count)
            if isinstance(error, (HetuError, torch.OutOfMemoryError)) or not isinstance(error, Exception):
                raise
            what = f"the run failed, and changed nothing: {type(error).__name__}: {error}"
            raise HetuError(what, op="run", where=caller()) from error

    def _compute_with(self, run: ReadyRun, random: Sequence[tuple[int, int]]) -> None:
        """Computes all that takes messages, with each micro-batch's random numbers: the seed, and the first offset."""
        subgraph, step = run.request.subgraph, run.step
        values = self._step_values(run, random) if subgraph.step_wide else {}
        for (prepared, feeds), launcher, draws in zip(run.prepared, run.launchers, random, strict=True):
            flat = self._launch(run, prepared, feeds, launcher, draws, values)
            step.collect(flat, prepared.num_pipelines)
        run.parameters.clear()  # before optimisers need memory
        step.gather_losses()
        if run.flags is not None:
            self._judge_later(run, run.flags, random[0])

    def _judge_later(self, run: ReadyRun, flags: IndexFlags, first_draw: tuple[int, int]) -> None:
        """Leaves it to the device to say whether the indices were in range, and to the next run to look."""
        step, draws = run.step, run.request.subgraph.draws * len(run.prepared)
        flag = flags.any(run.request.device)
        if not step.fetched.changes_state:
            self.state.unseen.add(UnseenRun(flags, flag, (*first_draw, draws)))
            return
        (flag,) = run.world.total([flag])
        step.unseen = UnseenRun(flags, flag, (*first_draw, draws))

    def _step_values(self, run: ReadyRun, random: Sequence[tuple[int, int]]) -> StepValues:
        """The values that are summed over all pipelines and micro-batches before any of them is computed in full."""
        request, world, nodes = run.request, run.world, run.request.subgraph.step_wide
        before = self._planner.subgraph([node.tensors[0] for node in nodes])
        sums = [torch.zeros((), dtype=torch.int64, device=request.device) for _ in nodes]
        for (main, feeds), (_, symbols), draws in zip(run.prepared, request.batches, random, strict=True):
            part, count = feeds.restricted(before), main.num_pipelines
            prepared, read = self._planner.prepare_read(before, _always(part), symbols, main.strategy)
            launcher = self._launcher(world, request, before, count)
            flat = self._launch(run, prepared, read, launcher, draws, {})
            for i, values in enumerate(flat):
                for value in values:
                    sums[i] += value.sum()
        sums = world.total(sums)
        return {node: s.clamp(min=node.attrs["least"]) for node, s in zip(nodes, sums, strict=True)}

    def _launch(
        self,
        run: ReadyRun,
        prepared: Prepared,
        feeds: FeedSet,
        launcher: ModuleLauncher | None,
        draws: tuple[int, int],
        step_values: StepValues,
    ) -> list[tuple[torch.Tensor, ...]]:
        """Gives for each fetched tensor one value per pipeline that runs here, none on a rank without pipelines."""
        run.world.begin()
        device, store = run.request.device, self.state.parameters
        if launcher is None:
            gathers = self._executables.gathers(prepared.subgraph, store.homes.scattered)
            Gathering(store, run.world, gathers.buckets, device).serve()
            return [() for _ in prepared.subgraph.fetches]
        if run.flags is not None:
            run.flags.unseen = feeds.unseen
        begin = perf_counter()
        values = launcher.launch(prepared, feeds, run.parameters, run.world, device, draws, step_values, run.flags)
        if stages.are_told():
            stages.launched(perf_counter() - begin, device, run.world.pipelines(prepared.num_pipelines))
        return values

    @in_own_modes
    def state_dict(self) -> dict[str, Any]:
        """See :meth:`hetu.Graph.state_dict`."""
        self.state.look(waits=True)
        return checkpoint.state_dict(self.state)

    @in_own_modes
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`hetu.Graph.load_state_dict`."""
        checkpoint.load_state_dict(self.state, state)

    @in_own_modes
    def load_parameters(self, given: Mapping[str, Any], strict: bool) -> LoadedNames:
        """See :meth:`hetu.Graph.load_parameters`."""
        self.state.look(waits=True)
        return checkpoint.load_parameters(self.state, given, strict)

    def compute_on_host(self, subgraph: Subgraph, arrays: Mapping[Tensor, Any], bound: BoundPipeline) -> torch.Tensor:
        """Computes on the CPU what planning reads and the graph makes: ``cu_seqlens`` from lengths, say.

        Args:
            subgraph: What is computed, with one fetch.
            arrays: A pipeline's fed arrays.
            bound: The pipeline's symbols, as far as they are bound.
        """
        return self._executables.get(subgraph, 1, (0,), torch.device("cpu"), "torch", False).compute_on_host(
            arrays, bound
        )


def _always(feeds: FeedSet) -> FeedReader:
    """Gives feeds that are spread over the pipelines already."""
    return lambda *_: feeds
