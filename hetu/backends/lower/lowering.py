"""The registry of lowerings, and what a lowering sees of the ``torch.fx`` module that is being built.

A backend registers for an op a function that emits calls into an fx graph. Sizes are plain int inputs of the module, so
lengths never cause a new one. :mod:`hetu.backends.lower.module` applies lowerings to the nodes of a graph.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import fx

from hetu.backends.lower.gathers import Bucket
from hetu.backends.lower.values import MADE_BY, SIZE
from hetu.errors import LoweringError
from hetu.graph import Node, Tensor
from hetu.symbols import IntSymbol

Lower = Callable[..., Any]
Declines = Callable[[Node, torch.device], str | None]


@dataclass(frozen=True, slots=True)
class Lowering:
    """How a backend computes an op: ``lower`` emits it; ``declines`` says why it won't take a node, or None."""

    backend: str
    lower: Lower
    declines: Declines | None


_lowerings: dict[str, list[Lowering]] = {}


def lowering(op: str, *, backend: str, declines: Declines | None = None) -> Callable[[Lower], Lower]:
    """Decorator: registers ``fn(cx, *operands)`` as a backend's lowering of an op.

    The function gets a :class:`NodeLowering` and the operands: fx nodes for tensors (for an op that spans the
    pipelines: a list of them, one per pipeline), numbers, and sizes. It returns an fx node, a tuple of them for
    several outputs, or, where the op spans the pipelines, such a tuple a pipeline. A :class:`Deferred` stands for a
    value that takes its time while other nodes are computed.
    """

    def add(fn: Lower) -> Lower:
        _lowerings.setdefault(op, []).append(Lowering(backend, fn, declines))
        return fn

    return add


def find_lowering(node: Node, backend: str, device: torch.device) -> Lowering:
    """The lowering to use: the wanted backend's, else torch's.

    Raises:
        LoweringError: If no backend takes the node; gives each one's reason.
    """
    reasons = []
    for name in dict.fromkeys((backend, "torch")):
        for item in _lowerings.get(node.definition.name, ()):
            if item.backend == name:
                reason = item.declines(node, device) if item.declines else None
                if reason is None:
                    return item
                reasons.append(f"{name}: {reason}")
        if not any(item.backend == name for item in _lowerings.get(node.definition.name, ())):
            reasons.append(f"{name}: has no lowering of this op")
    raise LoweringError("no backend takes it: " + "; ".join(reasons), op=node.definition.name, where=node.where)


@dataclass(frozen=True, slots=True)
class FeedInput:
    """A module input: what is fed to a placeholder on a pipeline."""

    tensor: Tensor
    pipeline: int


@dataclass(frozen=True, slots=True)
class SizeInput:
    """A module input: the ``index``-th size of a pipeline."""

    index: int
    pipeline: int


@dataclass(frozen=True, slots=True)
class PlanInput:
    """A module input: the plan of a node (``pipeline`` is None where the node spans the pipelines)."""

    node: Node
    pipeline: int | None


@dataclass(frozen=True, slots=True)
class RandomInput:
    """A module input: ``(seed, offset)`` of a random node."""

    node: Node


@dataclass(frozen=True, slots=True)
class ParameterInput:
    """A module input: the value of a parameter, in its own dtype or another, the same on all pipelines."""

    node: Node
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class GatheringInput:
    """A module input: what gathers parameters of which there is a part here."""


@dataclass(frozen=True, slots=True)
class HomeInput:
    """A module input: where the gradient of a parameter is at home, whose sums a node starts."""

    node: Node


@dataclass(frozen=True, slots=True)
class StepInput:
    """A module input: the value of a node that is made of the whole step before the module runs."""

    node: Node


@dataclass(frozen=True, slots=True)
class FlagsInput:
    """A module input: what notes indices that are out of range on a device; None where the host looks at them."""


@dataclass(frozen=True, slots=True)
class WorldInput:
    """A module input: the world, through which pipelines reach each other."""


Input = (
    FeedInput
    | SizeInput
    | PlanInput
    | RandomInput
    | ParameterInput
    | GatheringInput
    | HomeInput
    | StepInput
    | FlagsInput
    | WorldInput
)


@dataclass(frozen=True, slots=True, eq=False)
class Executable:
    """A lowered subgraph.

    Attributes:
        module: Takes the inputs in order and returns a flat tuple, pipelines of the first fetch first.
        inputs: What each input is.
        leaves: The symbols that its sizes depend on.
        sizes: Compiled: values of ``leaves`` to the tuple of all sizes.
        notes: The choice for some nodes and its reason, one line each: which kernel family runs an attention.
        buckets: The parameters that it gathers, in the order in which it does.
    """

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    leaves: tuple[IntSymbol, ...]
    sizes: Callable[..., tuple[int, ...]]
    notes: tuple[str, ...] = ()
    buckets: tuple[Bucket, ...] = ()

    def __repr__(self) -> str:
        return f"<Executable of {len(self.inputs)} inputs: {'; '.join(self.notes) or 'no attention'}>"

    def __str__(self) -> str:
        """The notes, then the module's code."""
        return "\n".join([*(f"# {note}" for note in self.notes), self.module.code.strip()])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


@dataclass
class Builder:
    """The module being built."""

    device: torch.device
    backend: str
    constants: MutableMapping[tuple[Node, torch.device], torch.Tensor]
    readers: dict[Tensor, set[str]]
    root: torch.nn.Module = field(default_factory=torch.nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: dict[Input, fx.Node] = field(default_factory=dict)
    exprs: dict[IntSymbol, int] = field(default_factory=dict)
    attributes: dict[Node, fx.Node] = field(default_factory=dict)
    notes: dict[Node, str] = field(default_factory=dict)

    def input(self, key: Input, name: str) -> fx.Node:
        """The module's input for ``key``; inputs stand first in the module, in the order of first use."""
        if key not in self.inputs:
            last = next(reversed(self.inputs.values()), None)
            place = self.graph.inserting_after(last) if last else self.graph.inserting_before(None)
            with place:
                # Users' names may be any text; the number keeps keywords, and names that look alike then, apart.
                plain = re.sub(r"\W", "_", name, flags=re.ASCII)
                self.inputs[key] = self.graph.placeholder(f"in{len(self.inputs)}_{plain}")
        return self.inputs[key]

    def gathering(self) -> fx.Node:
        """The module's input that gathers parameters."""
        return self.input(GatheringInput(), "gathering")

    def constant(self, node: Node, value: torch.Tensor) -> fx.Node:
        """The module's own tensor of ``node``: one for all pipelines, and one per device for all modules."""
        if node not in self.attributes:
            name = f"constant_{len(self.attributes)}"
            self.root.register_buffer(name, self.constants.setdefault((node, self.device), value.to(self.device)))
            self.attributes[node] = self.graph.get_attr(name)
        return self.attributes[node]


@dataclass(frozen=True, slots=True)
class NodeLowering:
    """What a lowering sees of the node at hand and of the module being built.

    Attributes:
        node: The hetu node.
        pipeline: Whose call is emitted; None where the node spans the pipelines.
        num_pipelines: Of the strategy.
        pipelines: Those that the module computes, in order.
        device: Where the module runs.
    """

    node: Node
    pipeline: int | None
    num_pipelines: int
    pipelines: tuple[int, ...]
    device: torch.device
    builder: Builder

    @property
    def backend(self) -> str:
        """The kernel family that attention is offered to first."""
        return self.builder.backend

    def note(self, text: str) -> None:
        """Says what was chosen for the node, for who prints the executable."""
        self.builder.notes[self.node] = text

    def call(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Emits a call."""
        made = self.builder.graph.call_function(fn, args, kwargs)
        made.meta[MADE_BY] = self.node, self.pipeline
        return made

    def is_read(self, index: int, but_by: str = "") -> bool:
        """Whether output ``index`` of the node is fetched, or read by an op other than ``but_by``."""
        return bool(self.builder.readers.get(self.node.outputs[index], set()) - {but_by})

    def item(self, value: fx.Node, index: int) -> fx.Node:
        """Emits ``value[index]``."""
        return self.call(operator.getitem, value, index)

    def size(self, expr: IntSymbol | int, pipeline: int | None = None) -> Any:
        """A size: an int if it is the same in every run, else an input of the module."""
        if isinstance(expr, int):
            return expr
        if expr.constant is not None:
            return expr.constant
        which = self.pipeline if pipeline is None else pipeline
        assert which is not None, "a node that spans the pipelines names the pipeline"
        index = self.builder.exprs.setdefault(expr, len(self.builder.exprs))
        made = self.builder.input(SizeInput(index, which), f"size{index}_p{which}")
        made.meta[SIZE] = expr, which
        return made

    def shape(self, index: int = 0, pipeline: int | None = None) -> list[Any]:
        """Sizes of the node's output ``index``."""
        return [self.size(dim, pipeline) for dim in self.node.outputs[index].symbolic_shape]

    def feed(self) -> fx.Node:
        """The module input that the node, a placeholder, stands for."""
        assert self.pipeline is not None
        return self.builder.input(FeedInput(self.node.outputs[0], self.pipeline), f"{self.node.name}_p{self.pipeline}")

    def constant(self, value: torch.Tensor) -> fx.Node:
        """The tensor that the node, a constant, stands for; kept on the device once for all modules and pipelines."""
        return self.builder.constant(self.node, value)

    def parameter(self, node: Node, dtype: torch.dtype) -> fx.Node:
        """The module input that brings the value of a parameter in a dtype."""
        return self.builder.input(ParameterInput(node, dtype), node.name)

    def home(self) -> fx.Node:
        """The module input that says where what the node sums up is at home."""
        return self.builder.input(HomeInput(self.node), f"{self.node.name}_home")

    def step_value(self) -> fx.Node:
        """The module input that brings the node's value, which is made of the whole step."""
        return self.builder.input(StepInput(self.node), self.node.name)

    def plan(self) -> fx.Node:
        """The module input that brings the node's plan."""
        suffix = "" if self.pipeline is None else f"_p{self.pipeline}"
        return self.builder.input(PlanInput(self.node, self.pipeline), f"{self.node.name}_plan{suffix}")

    def flags(self) -> fx.Node:
        """The module input that notes indices out of range."""
        return self.builder.input(FlagsInput(), "flags")

    def world(self) -> fx.Node:
        """The module input that brings the world."""
        return self.builder.input(WorldInput(), "world")

    def random(self) -> fx.Node:
        """The module input that brings the node's ``(seed, offset)``."""
        return self.builder.input(RandomInput(self.node), f"{self.node.name}_rng")
