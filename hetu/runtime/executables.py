"""The executables of one graph: lowered once for a structure, kept by how recently they ran."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from weakref import WeakValueDictionary

import torch

from hetu.backends import default_backend
from hetu.backends.lower.lowering import Executable, lower
from hetu.cache import LRU
from hetu.config import settings
from hetu.graph import Node
from hetu.planning import stages
from hetu.planning.planner import STRUCTURES
from hetu.planning.subgraph import Subgraph
from hetu.runtime.launch import ModuleLauncher


class Executables:
    """Lowers subgraphs, and remembers the result by structure: lengths make no other one.

    Attributes:
        launchers: The launchers of the executables.
    """

    def __init__(self) -> None:
        self.launchers: LRU[ModuleLauncher] = LRU(STRUCTURES)
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
    ) -> ModuleLauncher:
        """What computes some of a strategy's pipelines.

        Args:
            subgraph: What is computed.
            num_pipelines: How many pipelines the strategy has.
            pipelines: Those that run here.
            device: Where they run.
            backend: The wanted backend; None for the one in force.
            is_compiled: Whether Inductor compiles what it can; None for the setting in force.

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
            )
            if not is_compiled:
                return executable
            from hetu.backends.compile.fuse import fuse  # it imports what takes torch long to import

            return fuse(executable, device)

        def told() -> ModuleLauncher:
            begin = perf_counter()
            executable = make()
            if stages.are_told():
                graph = subgraph.fetches[0].graph
                stages.lowered(graph, perf_counter() - begin, executable.notes, executable.__str__)
            return ModuleLauncher(executable)

        key = subgraph.fetches, len(subgraph.nodes), num_pipelines, pipelines, device, backend, is_compiled
        return self.launchers.get(key, told)
