"""The executables of one graph: lowered once for a structure, kept by how recently they ran."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from weakref import WeakValueDictionary

import torch

from hetu.backends import default_backend
from hetu.backends.lower.gathers import NO_GATHERS, Gathers
from hetu.backends.lower.lowering import Executable
from hetu.backends.lower.module import computing_order, lower
from hetu.cache import LRU
from hetu.config import settings
from hetu.graph import Node
from hetu.planning import stages
from hetu.planning.planner import STRUCTURES
from hetu.planning.subgraph import Subgraph
from hetu.runtime.launch import ModuleLauncher

Scattered = frozenset[tuple[Node, bool]]
"""The parameters of which ranks have parts, and of each whether the whole of it stays where it was gathered."""


class Executables:
    """Lowers subgraphs, and remembers the result by structure: lengths make no other one.

    Attributes:
        launchers: The launchers of the executables.
    """

    def __init__(self) -> None:
        self.launchers: LRU[ModuleLauncher] = LRU(STRUCTURES)
        self._gathers: LRU[Gathers] = LRU(STRUCTURES)
        # The modules hold their constants; this only lets one module find what another one has on the device.
        self._constants: WeakValueDictionary[tuple[Node, torch.device], torch.Tensor] = WeakValueDictionary()

    def get(
        self,
        subgraph: Subgraph,
        num_pipelines: int,
        pipelines: Sequence[int],
        device: torch.device,
        backend: str | None = None,
        is_compiled: bool | None = None,
        scattered: Scattered = frozenset(),
    ) -> ModuleLauncher:
        """What computes some of a strategy's pipelines.

        Args:
            subgraph: What is computed.
            num_pipelines: How many pipelines the strategy has.
            pipelines: Those that run here.
            device: Where they run.
            backend: The wanted backend; None for the one in force.
            is_compiled: Whether Inductor compiles what it can; None for the setting in force.
            scattered: See :meth:`gathers`.

        Raises:
            LoweringError: If no backend takes a node.
        """
        backend, pipelines = backend or default_backend(device), tuple(pipelines)
        is_compiled = settings().compile if is_compiled is None else is_compiled

        def make() -> Executable:
            executable = lower(
                subgraph.nodes,
                subgraph.fetches,
                subgraph.replaced,
                num_pipelines=num_pipelines,
                pipelines=pipelines,
                device=device,
                backend=backend,
                constants=self._constants,
                gathers=self.gathers(subgraph, scattered),
            )
            if not is_compiled:
                return executable
            from hetu.backends.compile.fuse import fuse  # it imports what takes torch long to import

            return fuse(executable, device)

        def told() -> ModuleLauncher:
            begin = perf_counter()
            executable = make()
            if stages.are_told():
                stages.lowered(subgraph.graph, perf_counter() - begin, executable.notes, executable.__str__)
            return ModuleLauncher(executable)

        key = subgraph.fetches, len(subgraph.nodes), num_pipelines, pipelines, device, backend, is_compiled, scattered
        return self.launchers.get(key, told)

    def gathers(self, subgraph: Subgraph, scattered: Scattered) -> Gathers:
        """What a subgraph gathers, on whichever rank: also on those that compute none of it.

        Args:
            subgraph: What is computed.
            scattered: The parameters of which ranks have parts.
        """
        if not scattered:
            return NO_GATHERS

        def make() -> Gathers:
            order = computing_order(subgraph.nodes, subgraph.replaced)
            live = set(subgraph.nodes)
            own = {node: is_kept for node, is_kept in scattered if node in live}
            return Gathers.of(order, subgraph.fetches, subgraph.replaced, own)

        return self._gathers.get((subgraph.fetches, len(subgraph.nodes), scattered), make)
