"""Graphs as text that reads like a program, and as networkx graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hetu.graph.node import Node
from hetu.graph.opdef import Role
from hetu.graph.tensor import Tensor

if TYPE_CHECKING:
    import networkx

    from hetu.graph.graph import Graph


def format_graph(graph: Graph) -> str:
    """One line per node: outputs with dtype and symbolic shape, the op with its arguments, the user's line.

    With ``hetu.recompute`` it also says in which scopes a node stands, and whether a backward computes it again or
    reads what is kept of it.
    """
    marks = _recompute_marks(graph)
    lines = [(_outputs(node), _call(node), node.where.short + marks.get(node, "")) for node in graph.nodes]
    left = [f"  {outputs} = {call}" for outputs, call, _ in lines]
    width = min(max(map(len, left), default=0), 110)
    head = f"graph {graph.name}({graph.kind}, num_strategy={graph.num_strategy}):"
    body = [f"{text:<{width}}  # {place}" for text, (_, _, place) in zip(left, lines, strict=True)]
    demands = [*graph.constraints, *(item for node in graph.nodes for item in node.constraints)]
    rules = [f"  require {text}" for text in dict.fromkeys(map(str, demands))]
    rows = [f"  strategy {i}: {strategy}" for i, strategy in enumerate(graph.strategies)]
    return "\n".join([head, *rows, *body, *rules])


def _recompute_marks(graph: Graph) -> dict[Node, str]:
    """Makes the text that a line adds for recomputation: for computations within scopes, and for clones."""
    scopes = dict.fromkeys(scope for node in graph.nodes for scope in node.scopes)
    if not scopes:
        return {}
    number = {scope: str(i) for i, scope in enumerate(scopes)}
    repeated = {node.original for node in graph.nodes if node.original is not None}
    kept = {tensor.op for node in graph.nodes if node.backward is not None for tensor in node.tensors}
    marks = {}
    for node in graph.nodes:
        if node.original is not None:
            marks[node] = f", {node.original.name} again"
        elif node.scopes and node.role is Role.COMPUTATION:
            fate = ": computed again" if node in repeated else ": kept" if node in kept else ""
            marks[node] = f", recompute {'/'.join(number[scope] for scope in node.scopes)}{fate}"
    return marks


def _outputs(node: Node) -> str:
    return ", ".join(f"%{tensor.name}: {type_of(tensor)}" for tensor in node.outputs)


def type_of(tensor: Tensor) -> str:
    """Element type and symbolic shape, as ``float32[s, 64]``."""
    return f"{tensor.dtype.name}[{', '.join(map(str, tensor.shape))}]"


def _call(node: Node) -> str:
    inputs = [f"%{item.name}" if isinstance(item, Tensor) else str(item) for item in node.inputs if item is not None]
    attrs = [f"{name}={_brief(value)}" for name, value in node.attrs.items() if value is not None]
    return f"{node.definition.name}({', '.join(inputs + attrs)})"


def _brief(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<{value.dtype} {list(value.shape)}>"
    if isinstance(value, Sequence) and not isinstance(value, str):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return left + ", ".join(map(_brief, value)) + right
    text = repr(value) if isinstance(value, str) else str(value)
    return repr(value) if "\n" in text else text  # what prints as a drawing


def to_networkx(graph: Graph) -> networkx.MultiDiGraph:
    """One vertex per node (key: name; data: op, where, label), one edge per use of a tensor (data: tensor, type)."""
    import networkx

    drawn: networkx.MultiDiGraph = networkx.MultiDiGraph(name=graph.name)
    for node in graph.nodes:
        drawn.add_node(node.name, op=node.definition.name, where=node.where.short, label=_call(node))
        for tensor in node.tensors:
            drawn.add_edge(tensor.op.name, node.name, tensor=tensor.name, type=type_of(tensor))
    return drawn
