"""Reductions: sum and mean. Half precision is accumulated in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hetu.dtypes import DType, float32, int64
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, OpDef, Tensor, TensorSpec, register
from hetu.ops._build import axes, build, floating, output, tensor
from hetu.ops._samples import eighths, whole_numbers
from hetu.ops.sources import placeholder


class _Reduction(OpDef):
    """What the two have in common. ``dim`` becomes the tuple of all reduced dimensions."""

    inputs = ("x",)

    def dtype(self, call: Call, x: Tensor) -> DType:
        raise NotImplementedError

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        dims, keepdim = axes(call, call.attrs["dim"], x.ndim), bool(call.attrs["keepdim"])
        call.attrs.update(dim=dims, keepdim=keepdim)
        sizes = enumerate(x.symbolic_shape)
        shape = [1 if place in dims else size for place, size in sizes if keepdim or place not in dims]
        return [output(call, self.dtype(call, x), shape)]


@register
class Sum(_Reduction):
    """The sum over dimensions."""

    name = "sum"

    def dtype(self, call: Call, x: Tensor) -> DType:
        return x.dtype if x.dtype.is_floating else int64

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(sum, [eighths(3, 5)], np.sum, [(0, 0)]),
            GoodSample(lambda x: sum(x, 0), [eighths(3, 5)], lambda x: x.sum(0), [(0, 0), (0, 1)]),
            GoodSample(lambda x: sum(x, (-1, 0), keepdim=True), [eighths(3, 1, 7)], _sum_outer, [(0, 2)]),
            GoodSample(lambda x: sum(x, 1), [eighths(3, 0)], lambda x: x.sum(1)),
            GoodSample(sum, [eighths()], np.sum),
            GoodSample(sum, [whole_numbers(300, dtype="uint8", low=200, high=256)], lambda x: np.sum(x, dtype="int64")),
            GoodSample(lambda x: sum(x, 0), [whole_numbers(5) > 0], lambda x: np.sum(x, 0, dtype="int64")),
            # 4099 ones: float16 has no 2049, so an accumulator of that type would stop at 2048.
            GoodSample(sum, [np.ones(4099, "float16")], np.sum),
        ]
        bad = [
            BadSample(lambda: sum(_float(2, 3), 2), ShapeError, "there is no dimension 2"),
            BadSample(lambda: sum(_float(2, 3), (0, -2)), ShapeError, "names a dimension twice"),
            BadSample(lambda: sum(_float(2, 3), ()), ShapeError, "names no dimension"),
            BadSample(lambda: sum(_float(), 0), ShapeError, "there is no dimension 0"),
            BadSample(lambda: sum(_float(2), "rows"), ShapeError, "dim to be an int, got 'rows'"),  # type: ignore[arg-type]
            BadSample(lambda: sum(1), DTypeError, "x to be a tensor, got 1"),  # type: ignore[arg-type]
        ]
        return good, bad


def _sum_outer(x: np.ndarray) -> np.ndarray:
    return np.sum(x, (0, 2), keepdims=True)


@register
class Mean(_Reduction):
    """The mean over dimensions."""

    name = "mean"

    def dtype(self, call: Call, x: Tensor) -> DType:
        floating(call, x, "x")
        return x.dtype

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(mean, [eighths(3, 5)], np.mean, [(0, 0), (0, 1)]),
            GoodSample(lambda x: mean(x, -1, keepdim=True), [eighths(3, 5, 1)], lambda x: x, [(0, 0)]),
            GoodSample(lambda x: mean(x, [0, 1]), [eighths(3, 5, 2, dtype="float64")], lambda x: x.mean((0, 1))),
            GoodSample(lambda x: mean(x, 0), [eighths(3, 0)], lambda x: x.mean(0)),
            GoodSample(mean, [eighths()], np.mean),
            GoodSample(mean, [np.full(300, 1000, "float16")], np.mean),  # the sum is too large for float16
        ]
        bad = [
            BadSample(lambda: mean(placeholder("int32", [3])), DTypeError, "expected x to be floating, got hetu.int32"),
            BadSample(lambda: mean(_float(2, 3), 2), ShapeError, "there is no dimension 2"),
        ]
        return good, bad


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def sum(x: Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, name: str | None = None) -> Tensor:
    """Sums over dimensions.

    Args:
        x: Any dtype and shape.
        dim: One dimension or several; negative ones count from the end; None for all.
        keepdim: Whether summed dimensions stay, with size 1.
        name: Unique in the graph; made up if None.

    Returns:
        A tensor of x's dtype, and of int64 where that is an int dtype or bool.

    Raises:
        ShapeError: If there is no such dimension, or one is named twice.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2, 2], name="x")
        ...     y = hetu.sum(x, 0)
        >>> g.run(y, feed_dict={x: [[1.0, 2.0], [3.0, 4.0]]})
        tensor([4., 6.])
    """
    return build("sum", (x,), {"dim": _tuple(dim), "keepdim": keepdim}, name)


def mean(x: Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, name: str | None = None) -> Tensor:
    """Averages over dimensions.

    Args:
        x: Floating, any shape.
        dim: One dimension or several; negative ones count from the end; None for all.
        keepdim: Whether averaged dimensions stay, with size 1.
        name: Unique in the graph; made up if None.

    Returns:
        A tensor of x's dtype. The mean of nothing is NaN.

    Raises:
        ShapeError: If there is no such dimension, or one is named twice.
        DTypeError: If x is not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2, 2], name="x")
        ...     y = hetu.mean(x)
        >>> g.run(y, feed_dict={x: [[1.0, 2.0], [3.0, 4.0]]})
        tensor(2.5000)
    """
    return build("mean", (x,), {"dim": _tuple(dim), "keepdim": keepdim}, name)


def _tuple(dim: Any) -> Any:
    return tuple(dim) if isinstance(dim, list) else dim
