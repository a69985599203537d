"""Helpers of gradient rules: they undo what the forward did to shapes and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hetu.dtypes import DType
from hetu.graph import Tensor
from hetu.ops.common.build import Dim, build, plain


def single(grads: Sequence[Tensor | None]) -> Tensor:
    """The gradient of the output of an op that has one."""
    (grad,) = grads
    assert grad is not None, "a rule is asked for only if there is a gradient to pass on"
    return grad


def unbroadcast(grad: Tensor, like: Any) -> Tensor:
    """The gradient of an operand, a tensor, that was stretched to the shape of ``grad`` and promoted to its dtype."""
    return to_dtype(sum_to(grad, like.symbolic_shape), like.dtype)


def sum_to(x: Tensor, shape: Sequence[Dim]) -> Tensor:
    """Sums over the dimensions in which something of ``shape`` was stretched to x's shape."""
    extra = x.ndim - len(shape)
    ones = [place for place, size in enumerate(shape, extra) if plain(size) == 1]
    dims = tuple(place for place, size in enumerate(x.shape) if size != 1 and (place < extra or place in ones))
    return to_shape(build("sum", (x,), {"dim": dims, "keepdim": False}) if dims else x, shape)


def to_shape(x: Tensor, shape: Sequence[Dim]) -> Tensor:
    """The same elements in another shape; x itself if it has that one."""
    sizes = tuple(plain(size) for size in shape)
    return x if x.shape == sizes else build("reshape", (x,), {"shape": sizes})


def to_dtype(x: Tensor, dtype: DType) -> Tensor:
    """The same values in another dtype; x itself if it has that one."""
    return x if x.dtype == dtype else build("cast", (x,), {"dtype": dtype})


def zeros_like(x: Tensor) -> Tensor:
    """Zeros of x's shape and dtype."""
    return x.graph.apply("full", (), {"shape": x.symbolic_shape, "value": 0.0, "dtype": x.dtype})[0]
