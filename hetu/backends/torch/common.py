"""What the lowerings of several families share: operands as torch takes them, rows, and dtypes to sum up in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.index_flags import hetu_guarded_indices, hetu_poisoned, is_deferred
from hetu.backends.lower.lowering import NodeLowering
from hetu.backends.lower.traced import aside
from hetu.backends.lower.values import VALUE
from hetu.dtypes import DType
from hetu.errors import Where
from hetu.graph import Tensor
from hetu.graph.passes import source_of_values
from hetu.planning.indices import refuse_outside


def unary(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., fx.Node]:
    """The lowering of an op that torch has as a function of one tensor."""

    def lower(cx: NodeLowering, x: fx.Node) -> fx.Node:
        return cx.call(fn, x)

    return lower


def outputs_of(cx: NodeLowering, outputs: fx.Node) -> tuple[fx.Node, ...]:
    """The items of a call that returns one tensor per output of the node."""
    return tuple(cx.item(outputs, i) for i in range(len(cx.node.outputs)))


def cast(cx: NodeLowering, x: Any, dtype: torch.dtype) -> fx.Node:
    """``x`` in another dtype."""
    return cx.call(torch.Tensor.to, x, dtype)


def operands(cx: NodeLowering, a: Any, b: Any, wanted: DType | None = None) -> tuple[Any, Any]:
    """Operands with which torch's own promotion gives the dtype ``wanted``: by default that of the node's output.

    torch asks a global for the dtype of a floating result where no operand is floating; so one is cast here.
    """
    wanted = wanted or cx.node.outputs[0].dtype
    if wanted.is_floating and not any(tensor.dtype.is_floating for tensor in cx.node.tensors):
        if isinstance(cx.node.inputs[0], Tensor):
            a = cast(cx, a, TORCH_DTYPES[wanted])
        else:
            b = cast(cx, b, TORCH_DTYPES[wanted])
    pairs = zip(cx.node.inputs, (a, b), strict=True)
    first, second = (number(cx, item, value, wanted.is_floating) for item, value in pairs)
    return first, second


def number(cx: NodeLowering, item: Any, value: Any, floating: bool) -> Any:
    """A number as torch takes it: ints have 64 bits, and to a floating result a larger one is a float anyway.

    Args:
        cx: The node's lowering.
        item: The operand: a tensor, a number or a symbol.
        value: What stands for it in the module.
        floating: Whether the result is floating.
    """
    if not floating or isinstance(item, (Tensor, bool)) or not isinstance(value, (int, fx.Node)):
        return value
    return hetu_scalar(value) if isinstance(value, int) else cx.call(hetu_scalar, value)


@aside
def hetu_scalar(size: int) -> int | float:
    """A size as torch takes it as a number in a floating computation."""
    return size if -(2**63) <= size < 2**63 else float(size)


def operand_in(cx: NodeLowering, item: Any, value: Any, wanted: DType) -> Any:
    """An operand for a result of a dtype: a tensor cast to it where it has another one, or a number as torch takes it.

    Args:
        cx: The node's lowering.
        item: The operand: a tensor, a number or a symbol.
        value: What stands for it in the module.
        wanted: The dtype.
    """
    if isinstance(item, Tensor):
        return value if item.dtype == wanted else cast(cx, value, TORCH_DTYPES[wanted])
    return as_range(number(cx, item, value, wanted.is_floating), wanted)


def as_range(value: Any, dtype: DType) -> Any:
    """A float beyond a dtype's range as infinity, which torch.scalar_tensor refuses to make of it."""
    if not isinstance(value, float) or not math.isfinite(value) or not dtype.is_floating:
        return value
    most = torch.finfo(torch.float64 if dtype.itemsize == 8 else torch.float32).max
    return value if abs(value) <= most else math.copysign(math.inf, value)


def checked_indices(cx: NodeLowering, index: fx.Node, name: str) -> fx.Node:
    """The indices that a node looks something up by: checked at once on a CPU if planning can't see them, else there.

    Args:
        cx: The node's lowering.
        index: The values of its input ``name``.
        name: The input.
    """
    node, source, waits = cx.node, source_of_values(cx.node.input(name)), not is_deferred(cx.device)
    if waits and source is not None:
        return index
    op, where = node.definition.name.removesuffix("_grad"), node.where
    site = name, op, where.filename, where.lineno
    if waits:
        checked = cx.call(hetu_checked_indices, index, *_range(cx, name), *site)
    else:
        of = None if source is None else source.name
        checked = cx.call(hetu_guarded_indices, cx.flags(), index, *_range(cx, name), of, *site)
    if VALUE in index.meta:
        checked.meta[VALUE] = index.meta[VALUE]  # of the same dtype and shape
    return checked


def looked_up(cx: NodeLowering, out: fx.Node, index: fx.Node, name: str) -> fx.Node:
    """What a node looked up by indices that :func:`checked_indices` was given, and that nothing else holds."""
    return cx.call(hetu_poisoned, cx.flags(), out, index, *_range(cx, name)) if is_deferred(cx.device) else out


def _range(cx: NodeLowering, name: str) -> tuple[Any, int | None]:
    """How many there are to choose from by an input, and a value that is no index."""
    (known,) = (item for item in cx.node.definition.index_ranges(cx.node) if item.name == name)
    return cx.size(known.size), known.ignored


@aside
def hetu_checked_indices(
    index: torch.Tensor, size: int, ignored: int | None, name: str, op: str, filename: str, lineno: int
) -> torch.Tensor:
    """The same indices, none of them out of range."""
    refuse_outside(index.numpy(), size, ignored, name, op, Where(filename, lineno))
    return index


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``(..., width)`` as ``(rows, width)``."""
    return x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 if it has half precision: half sums and statistics would lose too much."""
    return x.float() if x.itemsize == 2 else x
