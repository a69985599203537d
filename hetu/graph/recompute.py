"""Recomputation: the backward computes values of ops within ``hetu.recompute`` again, so that they are not kept."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, NamedTuple, NoReturn

from hetu.arguments import flag, items, shown
from hetu.errors import HetuError, caller
from hetu.graph.node import Node
from hetu.graph.opdef import OpDef, Role, registry
from hetu.graph.tensor import Tensor


class Building(NamedTuple):
    """The state of building: each node notes it when it is added to a graph.

    Attributes:
        scopes: The scopes that were entered and not left, the outermost first.
        backward: The purpose of nodes that :func:`hetu.gradients` adds, see :attr:`Node.backward`; None for others.
    """

    scopes: tuple[Scope, ...] = ()
    backward: Hashable = None


NOWHERE = Building()
"""The state outside of all scopes, where nodes have nothing to note."""

building: ContextVar[Building] = ContextVar("hetu_recompute", default=NOWHERE)


class recompute(AbstractContextManager[None]):  # noqa: N801 - used like a function, as hetu.autocast is
    """Values of ops built within it are not kept for the backward, which computes them again. The bits are the same.

    Values that ops outside of it read are kept: the input of the next layer. So with one block around each layer, each
    layer adds its input, and attention's output and lse, to the memory of a step. The step takes up to one forward
    more. Blocks may be nested: the backward of the outer one computes again all that the inner one reads. Random ops
    draw the same numbers again. ``print(g)`` shows which nodes are computed again, once there are gradients.

    Args:
        policy: Names of the ops that are computed again, as ``print(g)`` shows them; None for all.
        attention: True if attention is computed again as well, with its exchange between pipelines. It takes the most
            time, and its output and lse little memory. Results of other ops that exchange are always kept.

    Raises:
        HetuError: If the policy is no collection of names of ops that can be computed again, if it does not agree with
            ``attention``, or if ``attention`` is no bool.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     with hetu.recompute():
        ...         y = hetu.sum(hetu.exp(hetu.tanh(x)))
        ...     dx = hetu.gradients(y, x)
        >>> g.run(dx, {x: [0.0, 0.0]})
        tensor([1., 1.])
    """

    def __init__(self, policy: Collection[str] | None = None, *, attention: bool = False) -> None:
        self.attention = flag(attention, "attention", op="recompute")
        self.policy = None if policy is None else _checked(policy, self.attention)

    def __repr__(self) -> str:
        names = "" if self.policy is None else f"{sorted(self.policy)}, "
        return f"hetu.recompute({names}attention={self.attention})"

    def __enter__(self) -> None:
        now = building.get()
        building.set(now._replace(scopes=(*now.scopes, Scope(self))))

    def __exit__(self, *_: object) -> None:
        now = building.get()
        scopes = now.scopes
        last = max((i for i, scope in enumerate(scopes) if scope.rule is self), default=len(scopes))
        # This one goes, in whatever order blocks are left.
        building.set(now._replace(scopes=scopes[:last] + scopes[last + 1 :]))


@dataclass(frozen=True, slots=True, eq=False)
class Scope:
    """A :class:`recompute` that was entered: each time makes a scope of its own."""

    rule: recompute

    def covers(self, node: Node) -> bool:
        """True if the backward of this scope computes a node of it again, unless its outputs are kept anyway."""
        definition, rule = node.definition, self.rule
        if definition.is_attention and not rule.attention:
            return False
        return _can_be_repeated(definition) and (rule.policy is None or definition.name in rule.policy)


def _can_be_repeated(definition: OpDef) -> bool:
    communicates = definition.spans_pipelines and not definition.is_attention
    return definition.role is Role.COMPUTATION and not definition.is_step_wide and not communicates


def _checked(policy: Any, attention: bool) -> frozenset[str]:
    wanted, fix = "a set of names of ops", 'write {"linear", "swiglu"}, or leave it out for all ops'
    is_set = isinstance(policy, (set, frozenset))
    names = list(policy) if is_set else items(policy, "policy", wanted, op="recompute", fix=fix)
    known = {name: op for name, op in registry().items() if op.is_public}
    for name in names:
        if not isinstance(name, str) or name not in known:
            near = get_close_matches(name, known, n=3) if isinstance(name, str) else []
            fix = f"did you mean {' or '.join(near)}?" if near else "print(g) shows the names of a graph's ops"
            _refuse(f"policy names {shown(name)}, and there is no such op", fix)
        if not _can_be_repeated(known[name]):
            _refuse(f"policy names {name}, whose output is always kept", f"leave {name} out")
    named = sorted(name for name in names if known[name].is_attention)
    if named and not attention:
        _refuse(f"policy names {named[0]}, which is kept without attention=True", "pass attention=True as well")
    if attention and not named:
        _refuse("attention is True, but policy names no attention", 'add "parallel_attn" or "attn_varlen" to it')
    return frozenset(names)


def _refuse(what: str, fix: str) -> NoReturn:
    raise HetuError(what, op="recompute", where=caller(), fix=fix)


@contextmanager
def outside_of_scopes(backward: Hashable = None) -> Iterator[None]:
    """Nodes added within it stand in no scope.

    Args:
        backward: The purpose of these nodes, see :attr:`Node.backward`.
    """
    token = building.set(Building((), backward))
    try:
        yield
    finally:
        building.reset(token)


class Recomputation:
    """Adds the nodes that compute values again for one call of ``hetu.gradients``.

    It is asked for node after node, from the last to the first. When it first meets a scope it adds clones of the
    scope's nodes to the graph. They read kept values: those of originals, or of the clones that the outer scope made.
    Nodes are computed in the order in which they were added, so clones are computed when the backward gets there, and
    values of originals are freed after their last use in the forward. At the end it is known which clones gradients
    read, and the others are taken back.

    Args:
        nodes: All nodes that the ys are computed from, in computing order.
        ys: The tensors that are differentiated.
        weights: Their weights; None for ones.
    """

    def __init__(self, nodes: Sequence[Node], ys: Sequence[Tensor], weights: Sequence[Tensor | None]) -> None:
        self._members: dict[tuple[Scope, ...], list[Node]] = {}
        for node in nodes:
            for depth in range(1, len(node.scopes) + 1):
                self._members.setdefault(node.scopes[:depth], []).append(node)
        self._kept = _read_outside(nodes, ys) if self._members else {}
        self._again: dict[tuple[Scope, ...], dict[Tensor, Tensor]] = {}
        self._graph = ys[0].graph if ys else None
        self._start = len(self._graph.nodes) if self._graph else 0
        # Calls with the same ys share what they add; others would keep it alive from one's backward to the other's.
        self.key = (tuple(ys), tuple(weights)) if self._members else None

    def stand_in(self, node: Node) -> Node:
        """Gives the node as the rule of its gradient is to see it: in a scope with values that are computed again."""
        path = node.scopes
        if not path:
            return node
        for depth in range(1, len(path) + 1):
            if path[:depth] not in self._again:
                self._repeat(path[:depth])
        inputs = tuple([self._value(path, item) for item in node.inputs])
        return replace(node, inputs=inputs, outputs=tuple([self._value(path, item) for item in node.outputs]))

    def finish(self, results: Sequence[Tensor]) -> None:
        """Takes back the clones that no gradient reads.

        Args:
            results: The gradients that were asked for.
        """
        if not self._again or self._graph is None:
            return
        added = self._graph.nodes[self._start :]
        del self._graph.nodes[self._start :]
        read, needed = set(results), []
        for node in reversed(added):
            if node.original is None or not read.isdisjoint(node.outputs):
                needed.append(node)
                read.update(node.tensors)
            else:
                self._graph._names.remove(node.name)
        for node in reversed(needed):
            node.id = len(self._graph.nodes)
            self._graph.nodes.append(node)

    def _repeat(self, path: tuple[Scope, ...]) -> None:
        """Clones the nodes of a scope. Those of the scopes around it have been cloned before.

        Readers get kept values from the originals, so a clone all of whose outputs are kept is taken back at the end.
        """
        scope, again = path[-1], self._again.setdefault(path, {})
        kept = self._kept.get(scope, set())
        for node in self._members[path]:
            if scope.covers(node):
                inputs = tuple([self._value(path, item) for item in node.inputs])
                clone = node.graph._clone(node, inputs, (self.key, path))
                pairs = zip(node.outputs, clone.outputs, strict=True)
                again.update({old: new for old, new in pairs if old not in kept})

    def _value(self, path: tuple[Scope, ...], item: Any) -> Any:
        """Gives the tensor that stands for an operand in the backward of a scope: from the innermost that clones it."""
        if isinstance(item, Tensor) and item.op.scopes:
            for depth in range(len(path), 0, -1):
                found = self._again[path[:depth]].get(item)
                if found is not None:
                    return found
        return item


def _read_outside(nodes: Sequence[Node], ys: Sequence[Tensor]) -> dict[Scope, set[Tensor]]:
    """Finds for each scope its tensors that are kept anyway: ys, and those that planning or nodes outside read."""
    kept: dict[Scope, set[Tensor]] = {}

    def keep(tensor: Tensor, reader: tuple[Scope, ...] = ()) -> None:
        for scope in tensor.op.scopes:
            if scope not in reader:
                kept.setdefault(scope, set()).add(tensor)

    for y in ys:
        keep(y)
    for node in nodes:
        for tensor in node.tensors:
            keep(tensor, node.scopes)
        for name in node.definition.host_inputs:
            host = node.input(name)
            if isinstance(host, Tensor):
                keep(host)
    return kept
