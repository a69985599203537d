"""Passes over a graph's nodes. They change nothing: each returns what it found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hetu.errors import HetuError
from hetu.graph.node import Node
from hetu.graph.opdef import Call, Role
from hetu.graph.tensor import Tensor
from hetu.symbols import IntSymbol, as_symbol

if TYPE_CHECKING:
    from hetu.graph.graph import Graph


def live_nodes(fetches: Iterable[Tensor]) -> list[Node]:
    """The nodes that the fetched tensors need, in computing order. All others are dead."""
    stack = [tensor.op for tensor in fetches]
    found: dict[int, Node] = {}
    while stack:
        node = stack.pop()
        if node.id not in found:
            found[node.id] = node
            stack += [tensor.op for tensor in node.tensors]
    return [found[key] for key in sorted(found)]


def nodes_of(nodes: Iterable[Node], role: Role) -> list[Node]:
    """Those of the nodes that have a role."""
    return [node for node in nodes if node.definition.role is role]


def source_of_values(tensor: Tensor) -> Tensor | None:
    """The placeholder or constant that has just the values of a tensor, in whatever shape; None if it is computed."""
    while tensor.op.definition.keeps_values(tensor.op):
        tensor = tensor.op.tensors[0]
    return tensor if tensor.op.role in (Role.PLACEHOLDER, Role.CONSTANT) else None


def merge_duplicates(nodes: Sequence[Node]) -> dict[Tensor, Tensor]:
    """Common-subexpression elimination: which tensor each duplicate can be replaced by.

    Two nodes are the same computation when op, operands (after replacement) and arguments are equal. Sources,
    random ops, and ops with symbols or plans of their own are left alone. Nodes that a backward with recomputation
    added are merged with those of the same backward and scope only.

    Args:
        nodes: In computing order.

    Returns:
        For each output of a duplicate the same output of the first node of its kind.
    """
    replaced: dict[Tensor, Tensor] = {}
    first: dict[Any, Node] = {}
    for node in nodes:
        definition = node.definition
        if node.role is not Role.COMPUTATION or definition.is_random or definition.has_plan or node.symbols:
            continue
        operands = tuple(_operand_key(item, replaced) for item in node.inputs)
        attrs = tuple((name, value_key(node.attrs[name])) for name in sorted(node.attrs))
        key = (definition.name, operands, attrs, node.backward)
        original = first.setdefault(key, node)
        if original is not node:
            replaced.update(zip(node.outputs, original.outputs, strict=True))
    return replaced


def _operand_key(item: Any, replaced: dict[Tensor, Tensor]) -> Any:
    if isinstance(item, Tensor):
        return replaced.get(item, item)
    return value_key(item)


def value_key(value: Any) -> Any:
    """What tells a value from all others, also from those that are equal to it and hash alike.

    1, 1.0 and True are equal, but give other dtypes; so are 0.0 and -0.0, which give other results.
    """
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(map(value_key, value)))
    return (type(value), repr(value)) if isinstance(value, (float, complex)) else (type(value), value)


def verify(graph: Graph) -> None:
    """See :meth:`Graph.verify`."""
    made: set[Tensor] = set()
    names: set[str] = set()
    for place, node in enumerate(graph.nodes):
        if node.graph is not graph or node.id != place:
            raise HetuError(
                f"node {node.name} is not at its place {node.id}", op=node.definition.name, where=node.where
            )
        if twice := names.intersection(node.names):
            what = f"two nodes or tensors are named {min(twice)}"
            raise HetuError(what, op=node.definition.name, where=node.where)
        for tensor in node.tensors:
            if tensor not in made:
                raise HetuError(
                    f"{node.name} uses {tensor.name} before it is made", op=node.definition.name, where=node.where
                )
        _check_outputs(node)
        names.update(node.names)
        made.update(node.outputs)


def _check_outputs(node: Node) -> None:
    """Asks the op again and compares: a tensor whose dtype or shape was tampered with is found here."""
    op = node.definition
    call = Call(node.graph, op.name, node.name, node.inputs, dict(node.attrs), node.where, symbols=dict(node.symbols))
    specs = op.infer(call)
    if len(specs) != len(node.outputs):
        raise HetuError(f"{node.name} has {len(node.outputs)} outputs, not {len(specs)}", op=op.name, where=node.where)
    for tensor, spec in zip(node.outputs, specs, strict=True):
        shape = tuple(as_symbol(dim) for dim in spec.shape)
        if node.graph.eager is not None:  # whose tensors have plain sizes
            shape = tuple(map(as_symbol, plain_shape(shape, node.graph.eager.sizes)))
        if tensor.dtype != spec.dtype or tensor.symbolic_shape != shape:
            raise HetuError(
                f"{tensor!r} should be {spec.dtype.name}[{', '.join(map(str, shape))}]", op=op.name, where=node.where
            )


def plain_shape(shape: Sequence[IntSymbol], sizes: Mapping[IntSymbol, int]) -> tuple[IntSymbol | int, ...]:
    """A shape with the values of those sizes that are known."""
    return tuple(dim.evaluate(sizes) if all(leaf in sizes for leaf in dim.leaves) else dim for dim in shape)
