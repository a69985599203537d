"""Reductions: sum, mean, max, min and logsumexp. Half precision is accumulated in float32.

Under several pipelines each reduces its own rows; ``hetu.all_reduce`` adds up or compares what they found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetu.arguments import flag
from hetu.dtypes import DType, float32, int64
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Tensor, TensorSpec, register
from hetu.ops.common.build import Dim, axes, build, floating, output, show, tensor
from hetu.ops.common.gradients import single, to_dtype, to_shape
from hetu.ops.common.samples import eighths, whole_numbers
from hetu.ops.compare import eq
from hetu.ops.pointwise import exp
from hetu.ops.sources import placeholder
from hetu.symbols import IntSymbol

__all__ = ["logsumexp", "max", "mean", "min", "sum"]


class _Reduction(OpDef):
    """The base of all reductions. ``dim`` becomes the tuple of all reduced dimensions."""

    inputs = ("x",)

    def dtype(self, call: Call, x: Tensor) -> DType:
        raise NotImplementedError

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        dims, keepdim = axes(call, call.attrs["dim"], x.ndim), flag(call.attrs["keepdim"], "keepdim", op=call.op)
        call.attrs.update(dim=dims, keepdim=keepdim)
        sizes = enumerate(x.symbolic_shape)
        shape = [1 if place in dims else size for place, size in sizes if keepdim or place not in dims]
        return [output(call, self.dtype(call, x), shape)]

    def kept(self, node: Node) -> list[Dim]:
        """The shape of x with 1 for reduced dimensions: what the output is reshaped to before it is stretched."""
        sizes = enumerate(node.tensors[0].shape)
        return [1 if place in node.attrs["dim"] else size for place, size in sizes]

    def stretched(self, grad: Tensor, node: Node) -> Tensor:
        """The output's gradient, given to every element of x."""
        x, kept = node.tensors[0], self.kept(node)
        grad = to_shape(grad, kept)
        return grad if tuple(kept) == x.shape else build("broadcast_to", (grad,), {"shape": x.shape})


@register
class Sum(_Reduction):
    """The sum over dimensions."""

    name = "sum"
    precision = "high"

    def dtype(self, call: Call, x: Tensor) -> DType:
        return x.dtype if x.dtype.is_floating else int64

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: self.stretched(single(grads), node)]

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
            BadSample(lambda: sum(_float(2), "rows"), ShapeError, "dim to be an int or a list of ints, got 'rows'"),  # type: ignore[arg-type]
            BadSample(lambda: sum(1), DTypeError, "x to be a tensor, got 1"),  # type: ignore[arg-type]
        ]
        return good, bad


def _sum_outer(x: np.ndarray) -> Any:
    return np.sum(x, (0, 2), keepdims=True)


@register
class Mean(_Reduction):
    """The mean over dimensions."""

    name = "mean"

    def dtype(self, call: Call, x: Tensor) -> DType:
        floating(call, x, "x")
        return x.dtype

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        count = math.prod(size for place, size in enumerate(node.tensors[0].shape) if place in node.attrs["dim"])
        return [lambda: self.stretched(single(grads) / count, node)]

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


class _Extreme(_Reduction):
    """The largest or the least element over dimensions."""

    def dtype(self, call: Call, x: Tensor) -> DType:
        for place in call.attrs["dim"]:
            what = f"expected at least one element in dimension {place}, got {show(x.shape)}"
            call.check(x.shape[place] >= 1, f"{what}: there is no {self.name} of nothing")
        return x.dtype

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (x,) = single(grads), node.tensors

        def shared() -> Tensor:
            """The gradient in equal parts to all elements that the output is."""
            kept = self.kept(node)
            is_it = eq(x, to_shape(node.outputs[0], kept))
            return is_it * (to_shape(grad, kept) / sum(is_it, node.attrs["dim"] or None, keepdim=True))

        return [shared]


@register
class Max(_Extreme):
    """The largest element over dimensions; NaN where there is one."""

    name = "max"

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        distinct = np.random.default_rng(0).permutation(15).reshape(3, 5).astype("float32") / 8
        good = [
            GoodSample(max, [distinct], np.max, [(0, 0)]),
            GoodSample(lambda x: max(x, 1), [distinct], lambda x: x.max(1), [(0, 0), (0, 1)]),
            GoodSample(lambda x: max(x, (0, -1), keepdim=True), [distinct], lambda x: x.max(keepdims=True)),
            GoodSample(lambda x: max(x, 0), [distinct[:, :0]], lambda x: x.max(0)),
            GoodSample(max, [eighths()], np.max),
            GoodSample(lambda x: max(x, 0), [eighths(9, 2, dtype="float16")], lambda x: x.max(0), smooth=False),
            GoodSample(max, [whole_numbers(7, dtype="uint8", low=0)], np.max),
            GoodSample(lambda x: max(x, 0), [whole_numbers(3, 2) > 2], lambda x: x.max(0)),
            GoodSample(lambda x: max(x, -1), [np.array([[1.0, np.nan], [-np.inf, -np.inf]])], _last_max, smooth=False),
        ]
        s = IntSymbol("s", max=0)
        bad = [
            BadSample(lambda: max(_float(2, 0)), ShapeError, "element in dimension 1, got [2, 0]: there is no max"),
            BadSample(lambda: max(placeholder(float32, [s]), 0), ShapeError, "there is no max of nothing"),
            BadSample(lambda: max(_float(2, 3), 2), ShapeError, "there is no dimension 2"),
            BadSample(lambda: max(1), DTypeError, "x to be a tensor, got 1"),  # type: ignore[arg-type]
        ]
        return good, bad


def _last_max(x: np.ndarray) -> Any:
    return x.max(-1)


@register
class Min(_Extreme):
    """The least element over dimensions; NaN where there is one."""

    name = "min"

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        distinct = np.random.default_rng(0).permutation(15).reshape(3, 5).astype("float32") / 8
        good = [
            GoodSample(lambda x: min(x, 1), [distinct], lambda x: x.min(1), [(0, 0), (0, 1)]),
            GoodSample(lambda x: min(x, (0, -1), keepdim=True), [distinct], lambda x: x.min(keepdims=True)),
            GoodSample(lambda x: min(x, 0), [eighths(9, 2, dtype="float16")], lambda x: x.min(0), smooth=False),
            GoodSample(min, [whole_numbers(7, dtype="uint8", low=0)], np.min),
            GoodSample(min, [np.array([1.0, np.nan, -np.inf])], np.min, smooth=False),
        ]
        bad = [
            BadSample(lambda: min(_float(2, 0)), ShapeError, "element in dimension 1, got [2, 0]: there is no min"),
            BadSample(lambda: min(_float(2, 3), 2), ShapeError, "there is no dimension 2"),
            BadSample(lambda: min(1), DTypeError, "x to be a tensor, got 1"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class LogSumExp(_Reduction):
    """The logarithm of the sum of exponentials over dimensions."""

    name = "logsumexp"
    precision = "high"

    def dtype(self, call: Call, x: Tensor) -> DType:
        floating(call, x, "x")
        return x.dtype

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (x,), kept = single(grads), node.tensors, self.kept(node)

        def weighted() -> Tensor:
            """The gradient by each element's share of the sum; NaN, as torch has it, of a sum of nothing but zeros."""
            wide = to_dtype(x, float32) if x.dtype.itemsize == 2 else x  # half a rounding would be one of the share
            total = node.outputs[0] if wide is x else logsumexp(wide, node.attrs["dim"] or None)
            return to_dtype(to_shape(grad, kept) * exp(wide - to_shape(total, kept)), x.dtype)

        return [weighted]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def over(dim: int, **options: Any) -> Callable[[np.ndarray], Any]:
            return lambda x: np.logaddexp.reduce(x, dim, initial=-np.inf, **options)

        nothing = np.array([[-np.inf, -np.inf], [1.0, -np.inf]])
        good = [
            GoodSample(logsumexp, [eighths(3, 5)], lambda x: over(0)(x.reshape(-1)), [(0, 0)]),
            GoodSample(lambda x: logsumexp(x, -1), [eighths(3, 5)], over(-1), [(0, 0), (0, 1)]),
            GoodSample(
                lambda x: logsumexp(x, 0, keepdim=True), [1000 * eighths(3, 5)], over(0, keepdims=True)
            ),  # exp overflows
            GoodSample(lambda x: logsumexp(x, 0), [eighths(300, 2, dtype="float16")], over(0)),
            GoodSample(lambda x: logsumexp(x, 1), [eighths(3, 0)], over(1), smooth=False),
            GoodSample(lambda x: logsumexp(x, 1), [nothing], over(1), smooth=False),
        ]
        bad = [
            BadSample(lambda: logsumexp(placeholder(int64, [3])), DTypeError, "expected x to be floating"),
            BadSample(lambda: logsumexp(_float(2, 3), 2), ShapeError, "there is no dimension 2"),
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
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype, or of int64 if x has an int dtype or bool.

    Raises:
        ShapeError: If there is no such dimension, or one is named twice.
        DTypeError: If x is no tensor.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2, 2], name="x")
        ...     y = hetu.sum(x, 0)
        >>> g.run(y, feed_dict={x: [[1.0, 2.0], [3.0, 4.0]]})
        tensor([4., 6.])
    """
    return build("sum", (x,), {"dim": dim, "keepdim": keepdim}, name)


def mean(x: Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, name: str | None = None) -> Tensor:
    """Averages over dimensions.

    Source: ``torch.mean``.

    Args:
        x: Floating, any shape.
        dim: One dimension or several; negative ones count from the end; None for all.
        keepdim: Whether averaged dimensions stay, with size 1.
        name: The node's name, unique in the graph; None makes one up.

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
    return build("mean", (x,), {"dim": dim, "keepdim": keepdim}, name)


def max(x: Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, name: str | None = None) -> Tensor:
    """Takes the largest element over dimensions, as ``torch.amax``.

    Its gradient goes in equal parts to all elements that are the largest.

    Args:
        x: Any dtype and shape, with at least one element in every reduced dimension.
        dim: One dimension or several; negative ones count from the end; None for all.
        keepdim: Whether reduced dimensions stay, with size 1.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype. It is NaN where one of the elements is.

    Raises:
        ShapeError: If there is no such dimension, one is named twice, or one has size 0. Every run checks what only
            the symbols' values decide.
        DTypeError: If x is no tensor.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2, 2], name="x")
        ...     y = hetu.max(x, 0)
        >>> g.run(y, feed_dict={x: [[1.0, 4.0], [3.0, 2.0]]})
        tensor([3., 4.])
    """
    return build("max", (x,), {"dim": dim, "keepdim": keepdim}, name)


def min(x: Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, name: str | None = None) -> Tensor:
    """Takes the least element over dimensions, as ``torch.amin``.

    Its gradient goes in equal parts to all elements that are the least.

    Args:
        x: Any dtype and shape, with at least one element in every reduced dimension.
        dim: One dimension or several; negative ones count from the end; None for all.
        keepdim: Whether reduced dimensions stay, with size 1.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype. It is NaN where one of the elements is.

    Raises:
        ShapeError: If there is no such dimension, one is named twice, or one has size 0. Every run checks what only
            the symbols' values decide.
        DTypeError: If x is no tensor.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2, 2], name="x")
        ...     y = hetu.min(x, 0)
        >>> g.run(y, feed_dict={x: [[1.0, 4.0], [3.0, 2.0]]})
        tensor([1., 2.])
    """
    return build("min", (x,), {"dim": dim, "keepdim": keepdim}, name)


def logsumexp(
    x: Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, name: str | None = None
) -> Tensor:
    """Computes ``log(sum(exp(x)))`` over dimensions, without overflow. Half precision is computed in float32.

    Source: ``torch.logsumexp``.

    Args:
        x: Floating, any shape.
        dim: One dimension or several; negative ones count from the end; None for all.
        keepdim: Whether reduced dimensions stay, with size 1.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype. It is ``-inf`` of nothing. Where all elements are ``-inf`` the gradient is NaN.

    Raises:
        ShapeError: If there is no such dimension, or one is named twice.
        DTypeError: If x is not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.logsumexp(x)
        >>> g.run(y, feed_dict={x: [1000.0, 0.0]})
        tensor(1000.)
    """
    return build("logsumexp", (x,), {"dim": dim, "keepdim": keepdim}, name)
