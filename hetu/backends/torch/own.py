"""A user's own op: the function as it is, and torch's autograd through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.common import outputs_of
from hetu.backends.torch_private import version_of
from hetu.errors import DTypeError, HetuError, ShapeError, Where

Promise = tuple[tuple[int, ...], torch.dtype]
"""The shape and the dtype of a result."""


def _caller(function: Callable[..., Any], where: Where) -> Callable[..., Any]:
    """What a module calls: torch.fx takes no functions as arguments, so each use of the op has one of its own."""

    def hetu_op(promised: Sequence[Promise], *operands: Any) -> Any:
        """What the user's function gives, as it was promised, in memory of its own: a tensor, or a list of several."""
        tensors = [item for item in operands if isinstance(item, torch.Tensor)]
        versions = _versions(tensors)
        try:
            with torch.no_grad():
                given = function(*operands)
        except (HetuError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # it is the user's
            what = f"function raised {type(error).__name__}: {error}"
            raise HetuError(what, op="op", where=where, fix="see what it is given") from error
        if versions != _versions(tensors):
            fix = "compute with copies: x.clone(), x + 1 instead of x += 1"
            raise HetuError("function changed an operand in place, which others read", op="op", where=where, fix=fix)
        results = _as_promised(given, promised, where)
        if strays := {str(item.device) for item in results} - {str(item.device) for item in tensors}:
            what, fix = (
                f"function gave a tensor on {strays.pop()}",
                "make tensors where the operands are: device=x.device",
            )
            raise HetuError(what, op="op", where=where, fix=fix)
        own = _with_own_memory(results, tensors)
        return own if len(promised) > 1 else own[0]

    return hetu_op


def _versions(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    """How often each was changed in place; those of inference mode don't count it."""
    return [0 if item.is_inference() else version_of(item) for item in tensors]


def _as_promised(given: Any, promised: Sequence[Promise], where: Where) -> list[torch.Tensor]:
    """The results, of the promised number, shapes and dtypes."""
    results = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(results) != len(promised) or not all(isinstance(item, torch.Tensor) for item in results):
        kinds = ", ".join(type(item).__name__ for item in results)
        what = (
            f"expected the function to give {len(promised)} tensor(s), as promised by shape, got {kinds or 'nothing'}"
        )
        raise ShapeError(what, op="op", where=where, fix="promise one shape per result")
    for place, (item, (shape, dtype)) in enumerate(zip(results, promised, strict=True)):
        which = f"result {place} of the function" if len(promised) > 1 else "the function's result"
        if tuple(item.shape) != tuple(shape):
            what = f"expected {which} to have shape {list(shape)}, as promised, got {list(item.shape)}"
            raise ShapeError(what, op="op", where=where, fix="promise another shape, or change the function")
        if item.dtype != dtype:
            what = f"expected {which} to be {dtype}, as promised, got {item.dtype}"
            raise DTypeError(what, op="op", where=where, fix="say dtype=..., or convert the result")
    return results


def _with_own_memory(results: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results, copied where they share memory with others, with each other, or within themselves."""
    taken = {item.untyped_storage().data_ptr() for item in others}
    own = []
    for item in results:
        place = item.untyped_storage().data_ptr()
        is_own = item.is_contiguous() and place not in taken
        own.append(item if is_own else item.clone(memory_format=torch.contiguous_format))
        taken.add(place)
    return own


@lowering("op", backend="torch")
def _op(cx: NodeLowering, *operands: Any) -> Any:
    outputs, where = cx.node.outputs, cx.node.where
    promised = [(tuple(cx.shape(i)), TORCH_DTYPES[item.dtype]) for i, item in enumerate(outputs)]
    made = cx.call(_caller(cx.node.attrs["function"], where), promised, *operands)
    return outputs_of(cx, made) if len(outputs) > 1 else made


def _differentiator(function: Callable[..., Any], wanted: Sequence[int], count: int) -> Callable[..., Any]:
    """What a module calls for the gradients of a function.

    Args:
        function: The function.
        wanted: The places of the operands that gradients are of.
        count: How many operands there are.
    """

    def hetu_op_grad(*values: Any) -> list[torch.Tensor]:
        """The gradients, from the operands and the gradients of all floating results."""
        operands, grads = list(values[:count]), values[count:]
        with torch.enable_grad():
            for place in wanted:
                operands[place] = operands[place].detach().requires_grad_()
            given = function(*operands)
            several = given if isinstance(given, (list, tuple)) else [given]
            results = [item for item in several if item.is_floating_point()]
        pairs = [(item, grad) for item, grad in zip(results, grads, strict=True) if item.requires_grad]
        sources = [operands[place] for place in wanted]
        found: Sequence[torch.Tensor | None] = [None] * len(sources)
        if pairs:
            ys, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(ys, sources, weights, allow_unused=True)
        whole = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(sources, found, strict=True)]
        return _with_own_memory([item.detach() for item in whole], [x for x in values if isinstance(x, torch.Tensor)])

    return hetu_op_grad


@lowering("op_grad", backend="torch")
def _op_grad(cx: NodeLowering, *operands: Any) -> tuple[fx.Node, ...]:
    attrs = cx.node.attrs
    made = cx.call(_differentiator(attrs["function"], attrs["wanted"], attrs["count"]), *operands)
    return outputs_of(cx, made)
