"""Reverse-mode differentiation: walks a graph backwards and lets each op add the nodes of its gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any, NoReturn

from hetu.arguments import items, shown
from hetu.dtypes import DType
from hetu.errors import DTypeError, HetuError, ShapeError, caller
from hetu.graph.autocast import no_autocast
from hetu.graph.names import all_or_nothing
from hetu.graph.node import Node
from hetu.graph.opdef import OpDef
from hetu.graph.passes import live_nodes
from hetu.graph.recompute import Recomputation, outside_of_scopes
from hetu.graph.tensor import Tensor


def gradients(
    ys: Tensor | Sequence[Tensor],
    xs: Tensor | Sequence[Tensor],
    grad_ys: Tensor | Sequence[Tensor | None] | None = None,
) -> Any:
    """Adds to the graph the gradient of ``sum(y * grad_y)`` over all ys, with respect to each x.

    With several pipelines a gradient is each pipeline's own: that of the sum of all pipelines' ys with respect to
    the pipeline's x. The gradient of something that all pipelines hold, a parameter, is the sum of these:
    ``hetu.all_reduce(gradient)``.

    Args:
        ys: Floating tensors of one graph.
        xs: Floating tensors that the ys are computed from.
        grad_ys: Weights of the ys, each of its y's dtype and shape; None means ones.

    Returns:
        For a single x its gradient, for a list a list in the same order: tensors of the xs' dtypes and shapes.

    Raises:
        DTypeError: If a y or an x is not floating, or a weight has another dtype than its y.
        ShapeError: If there are not as many weights as ys.
        HetuError: If no y depends on an x, or only through an op without a gradient; names the node.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3], name="x")
        ...     dx = hetu.gradients(x * x + x, x)
        >>> g.run(dx, feed_dict={x: [1.0, 2.0, 3.0]})
        tensor([3., 5., 7.])
    """
    targets, sources = _tensors(ys, "ys"), _tensors(xs, "xs")
    weights = [None] * len(targets) if grad_ys is None else _several(grad_ys, "grad_ys")
    if len(weights) != len(targets):
        _refuse(ShapeError, f"{len(weights)} grad_ys for {len(targets)} ys", "give one a y, or None for ones")
    whole = all_or_nothing(targets[0].graph) if targets else nullcontext()
    with whole, no_autocast(), outside_of_scopes():
        seeds = [(y, _seed(y, weight)) for y, weight in zip(targets, weights, strict=True)]
        nodes = live_nodes(targets)
        again = Recomputation(nodes, targets, weights)
        with outside_of_scopes(again.key):
            found = _walk(nodes, seeds, sources, again)
        again.finish(found)
    return found[0] if isinstance(xs, Tensor) else found


def _several(given: Any, what: str) -> list[Any]:
    if isinstance(given, Tensor):
        return [given]
    fix = "pass a graph tensor, or a list of them"
    return items(given, what, "a graph tensor or a list of them", op="gradients", error=DTypeError, fix=fix)


def _tensors(given: Tensor | Sequence[Tensor], what: str) -> list[Tensor]:
    tensors = _several(given, what)
    for item in tensors:
        if not isinstance(item, Tensor):
            _refuse(DTypeError, f"expected {what} to be graph tensors, got {shown(item)}")
        if not item.dtype.is_floating:
            name = f"{item.name}, made by {item.op.name} at {item.op.where.short},"
            _refuse(DTypeError, f"{name} is {item.dtype.name}: only floating tensors have a gradient")
    if len({item.graph for item in tensors}) > 1:
        _refuse(HetuError, f"{what} belong to different graphs", "build all of a computation in one graph")
    return tensors


def _seed(y: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return y.graph.apply("full", (), {"shape": y.symbolic_shape, "value": 1.0, "dtype": y.dtype})[0]
    if not isinstance(weight, Tensor):
        what = f"expected grad_ys to be graph tensors or None, got {shown(weight)} for {y.name}"
        _refuse(DTypeError, what, "make it a tensor with hetu.constant(...) or hetu.full(...)")
    _check_like(weight, y.dtype, y, f"grad_ys: the weight of {y.name}")
    return weight


def _check_like(grad: Tensor, dtype: DType, of: Tensor, what: str) -> None:
    if grad.dtype != dtype:
        _refuse(DTypeError, f"{what} is {grad.dtype.name}, expected {dtype.name}", "cast it")
    if grad.ndim != of.ndim:
        _refuse(ShapeError, f"{what} has shape {list(grad.shape)}, expected {list(of.shape)}")


def _walk(
    nodes: Sequence[Node], seeds: Sequence[tuple[Tensor, Tensor]], sources: Sequence[Tensor], again: Recomputation
) -> list[Tensor]:
    """Goes from the ys backwards, over nodes that lie between an x and a y only."""
    between = _reached(nodes, sources)
    terms: dict[Tensor, list[Tensor]] = {}
    for y, seed in seeds:
        terms.setdefault(y, []).append(seed)
    for node in reversed(nodes):
        if node.definition.stops_gradient or not any(item in between for item in node.tensors):
            continue
        grads = tuple(_sum(terms[item]) if item in terms else None for item in node.outputs)
        if any(grad is not None for grad in grads):
            # What is summed up once is kept, for an output may be asked for as well.
            terms.update({item: [grad] for item, grad in zip(node.outputs, grads, strict=True) if grad is not None})
            _differentiate(node, again.stand_in(node), grads, between, terms)
    missing = [x for x in sources if x not in terms]
    if missing:
        _refuse(
            HetuError,
            f"no y depends on {missing[0].name} through floating tensors (made at {missing[0].op.where.short})",
            "ask only for the gradients of what the ys are computed from",
        )
    sums = {x: _sum(terms[x]) for x in dict.fromkeys(sources)}  # in an order that all ranks share
    return [sums[x] for x in sources]


def _reached(nodes: Iterable[Node], sources: Sequence[Tensor]) -> set[Tensor]:
    """The floating tensors that depend on an x through floating tensors, the xs included."""
    found = set(sources)
    for node in nodes:
        if not node.definition.stops_gradient and any(item in found for item in node.tensors):
            found.update(item for item in node.outputs if item.dtype.is_floating)
    return found


def reached_by_gradients(y: Tensor) -> set[Tensor]:
    """The floating tensors that a gradient of y arrives at: what y depends on, but for what counts as a constant."""
    found = {y}
    for node in reversed(live_nodes([y])):
        if not node.definition.stops_gradient and not found.isdisjoint(node.outputs):
            found.update(item for item in node.tensors if item.dtype.is_floating)
    return found


def _differentiate(
    node: Node,
    stand_in: Node,
    grads: tuple[Tensor | None, ...],
    between: set[Tensor],
    terms: dict[Tensor, list[Tensor]],
) -> None:
    """Asks a node's op for the gradients of those inputs that matter.

    The op looks at the node's stand-in, whose values may be computed again; the gradients are of the node's own inputs.
    """
    op = node.definition
    rule = None if type(op).gradient is OpDef.gradient else op.gradient(stand_in, grads)
    for place, item in enumerate(node.inputs):
        if not isinstance(item, Tensor) or item not in between:
            continue
        build = None if rule is None else rule[place]
        if build is None:
            _refuse(
                HetuError,
                f"{node.name}, made at {node.where.short}, has no gradient with respect to {item.name}: "
                f"{op.name} is not differentiable there",
                "take the gradient of something else, or hetu.stop_gradient(...) of what shall count as a constant",
            )
        grad = build()
        assert grad.dtype == item.dtype and grad.ndim == item.ndim, f"{op.name} gave {grad!r} for {item!r}"
        terms.setdefault(item, []).append(grad)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return reduce(lambda a, b: a + b, terms)


def _refuse(error: type[HetuError], what: str, fix: str | None = None) -> NoReturn:
    raise error(what, op="gradients", where=caller(), fix=fix)
