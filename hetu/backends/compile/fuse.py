"""A lowered module whose regions Inductor has compiled."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from hetu.backends.compile.inductor import Compiled, Progress, compile_region
from hetu.backends.compile.regions import Region, divide
from hetu.backends.compile.tracing import TYPICAL
from hetu.backends.lower.lowering import Executable
from hetu.backends.lower.values import MADE_BY


def fuse(executable: Executable, device: torch.device) -> Executable:
    """The same executable with its regions compiled. What can't be compiled runs as it was, and a warning says why.

    Args:
        executable: As it was lowered.
        device: Where it will run.
    """
    old = executable.module
    steps = divide(old.graph)
    regions = [step for step in steps if isinstance(step, Region)]
    if not regions:
        return executable
    functions, refused = _compiled(regions, device)
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in old.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            new[node] = graph.node_copy(node, new.__getitem__)
    for step in steps:
        if isinstance(step, fx.Node):
            new[step] = graph.node_copy(step, new.__getitem__)
        elif (function := functions.get(id(step))) is None:
            for node in step.nodes:
                new[node] = graph.node_copy(node, new.__getitem__)
        else:
            results = graph.call_function(function, tuple(new[x] for x in step.inputs))
            for i, node in enumerate(step.outputs):
                new[node] = graph.call_function(operator.getitem, (results, i))
    graph.output(fx.map_arg(old.graph.output_node().args[0], new.__getitem__))
    graph.lint()
    for reason in refused:
        warnings.warn(f"hetu.config(compile=True): {reason}", RuntimeWarning, stacklevel=2)
    notes = f"Inductor compiled {len(functions)} of {len(regions)} regions", *refused
    return replace(
        executable,
        module=fx.GraphModule(old, graph, class_name="HetuExecutable"),
        notes=(*executable.notes, *notes),
    )


def _compiled(regions: Sequence[Region], device: torch.device) -> tuple[dict[int, Callable[..., Any]], list[str]]:
    """What computes each region that could be compiled, by its ``id``; why the others could not, each reason once."""
    functions: dict[int, Callable[..., Any]] = {}
    refused: dict[str, None] = {}
    with Progress(len(regions)) as progress:
        for number, region in enumerate(regions):
            versions = _versions(region, device)
            if reasons := [version.reason for version in versions if version.call is None]:
                refused.setdefault(f"{_where(region)} runs uncompiled: {reasons[0]}")
            else:
                functions[id(region)] = _region_function(number, region, versions)
            progress.advance()
    return functions, list(refused)


def _versions(region: Region, device: torch.device) -> list[Compiled]:
    """What a region is compiled to: each takes what those before it don't; all of it now, so that no length waits.

    The first is for typical sizes. The second, for all, is made where many don't decide as these do, or if the first
    can't be.
    """
    typical = [compile_region(region, device, is_typical=True)] if device.type in TYPICAL else []
    made = [version for version in typical if version.call is not None]
    if any(version.conditions is None or version.conditions.are_wide() for version in made):
        return made
    return [*made, compile_region(region, device)]


def _where(region: Region) -> str:
    made_by = [node.meta[MADE_BY][0] for node in region.nodes]
    first, last = made_by[0], made_by[-1]
    return f"what lies from {first.name} ({first.where.short}) to {last.name} ({last.where.short})"


def _region_function(number: int, region: Region, versions: Sequence[Compiled]) -> Callable[..., Any]:
    """A region as a module calls it: each input laid out as it was described, each output in memory of its own.

    Inputs that no version takes, such as those of length 0, are computed by the region's calls as they are.
    """
    owners = [(version, _Owners(version.outputs)) for version in versions]

    def function(*values: Any) -> Sequence[torch.Tensor]:
        given = [_dense(x) for x in values]
        for version, owner in owners:
            sizes = version.sizes(given)
            if sizes is not None:
                found = version.call(*sizes, *given)  # type: ignore[misc]
                return found if owner.is_simple else owner.of(given, found)
        return region.compute(values)

    function.__name__ = function.__qualname__ = f"region_{number}"
    return function


def _dense(x: Any) -> Any:
    return x if not isinstance(x, torch.Tensor) or x.is_contiguous() else x.contiguous()


class _Owners:
    """Sees to it that outputs share memory neither with inputs nor, where they are alike, with each other.

    Inductor leaves out what does nothing, say a product with ones, and then gives an input itself. Whether it did shows
    the first time that none of these tensors is empty, and is the same ever after.

    Args:
        which: The item of the compiled list that each output is.
    """

    def __init__(self, which: Sequence[int]) -> None:
        self._which = which
        self._shared: set[int] | None = None
        self.is_simple = False

    def of(self, given: Sequence[Any], found: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs of a call."""
        shared = self._shared
        if shared is None:
            tensors = [x for x in given if isinstance(x, torch.Tensor)]
            own = {x.untyped_storage().data_ptr() for x in tensors if x.numel()}
            shared = {i for i, x in enumerate(found) if x.numel() and x.untyped_storage().data_ptr() in own}
            if all(x.numel() for x in (*tensors, *found)):
                self._shared = shared
                self.is_simple = not shared and list(self._which) == list(range(len(found)))
        taken: set[int] = set(shared)
        outputs = []
        for i in self._which:
            outputs.append(found[i].clone() if i in taken else found[i])
            taken.add(i)
        return outputs
