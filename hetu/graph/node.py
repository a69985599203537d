"""A node: one use of an op in a graph."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hetu.errors import Where
from hetu.graph.tensor import Tensor
from hetu.symbols import Constraint, IntSymbol

if TYPE_CHECKING:
    from hetu.graph.graph import Graph
    from hetu.graph.opdef import OpDef, Role
    from hetu.graph.recompute import Scope

Operand = Tensor | IntSymbol | int | float | bool | None


@dataclass(eq=False, slots=True)
class Node:
    """One use of an op.

    Attributes:
        graph: The graph it stands in.
        id: Its place in ``graph.nodes``, which is an order in which the graph can be computed.
        definition: The op.
        inputs: Tensors, and numbers or symbols used as operands; None for an optional input left out.
        attrs: The op's other arguments, hashable values (arrays aside).
        name: Unique in the graph.
        where: The line of the user's script that made it.
        outputs: What it makes.
        symbols: Symbols of its own that the op gives a value at run time (``batch``), by name.
        constraints: What must hold in every run that computes it.
        scopes: The ``hetu.recompute`` blocks that it stands in, the outermost first.
        original: The node that it computes again for a backward; None for all other nodes.
        backward: In a graph with ``hetu.recompute``, which call of ``hetu.gradients`` and which scope it was added for.
            Only nodes for which this is equal are merged: a clone that is merged with its original would keep what it
            is there to free. None for a node of the forward.
    """

    graph: Graph
    id: int
    definition: OpDef
    inputs: tuple[Operand, ...]
    attrs: dict[str, Any]
    name: str
    where: Where
    outputs: tuple[Tensor, ...] = ()
    symbols: dict[str, IntSymbol] = field(default_factory=dict)
    constraints: tuple[Constraint, ...] = ()
    scopes: tuple[Scope, ...] = ()
    original: Node | None = None
    backward: Hashable = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The inputs that are tensors."""
        return tuple(item for item in self.inputs if isinstance(item, Tensor))

    @property
    def names(self) -> tuple[str, ...]:
        """Its own name, and those of its outputs."""
        return (self.name, *(item.name for item in self.outputs))

    @property
    def role(self) -> Role:
        """What the node is to a run."""
        return self.definition.role

    def input(self, name: str) -> Any:
        """The input that the op's definition calls ``name``."""
        return self.inputs[self.definition.inputs.index(name)]

    def __repr__(self) -> str:
        return f"<Node {self.name}: {self.definition.name}>"
