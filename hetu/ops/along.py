"""What depends on the order of elements along a dimension: sort, topk, argmax, cumsum.

Under several pipelines each sees its own rows, as reductions do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetu.arguments import flag
from hetu.dtypes import float32, int64
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Tensor, TensorSpec, current_graph, register
from hetu.ops.common.build import axis, build, output, plain, show, size, tensor
from hetu.ops.common.layers import GradientOp
from hetu.ops.common.samples import eighths, whole_numbers
from hetu.ops.sources import placeholder
from hetu.symbols import IntSymbol

__all__ = ["argmax", "cumsum", "sort", "topk"]

Samples = tuple[Sequence[GoodSample], Sequence[BadSample]]


class _Selection(OpDef):
    """The base of ops that give elements in another order, and where these stood."""

    outputs = ("values", "indices")

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        attrs = {"dim": node.attrs["dim"], "shape": node.tensors[0].shape}
        of_x = None if grads[0] is None else lambda: build("selected_grad", (grads[0], node.outputs[1]), attrs)
        return [of_x, *[None] * (len(node.inputs) - 1)]


def _ordered(x: np.ndarray, dim: int, descending: bool) -> tuple[np.ndarray, np.ndarray]:
    places = np.argsort(-x if descending else x, axis=dim, kind="stable")
    return np.take_along_axis(x, places, dim), places


def _best(x: np.ndarray, k: int, dim: int = -1, largest: bool = True) -> list[np.ndarray]:
    return [np.take(item, range(k), dim) for item in _ordered(x, dim, largest)]


def _distinct(*shape: int, dtype: str = "float32") -> np.ndarray:
    """Multiples of 1/8, all different, of which order does not change under small steps."""
    return np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape).astype(dtype) / 8


@register
class Sort(_Selection):
    """Elements in order along a dimension, equal ones as they stood."""

    name = "sort"
    inputs = ("x",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        dim = axis(call, call.attrs["dim"], x.ndim)
        call.attrs.update(dim=dim, descending=flag(call.attrs["descending"], "descending", op=call.op))
        return [output(call, x.dtype, x.symbolic_shape), output(call, int64, x.symbolic_shape)]

    def samples(self) -> Samples:
        def order(dim: int, descending: bool) -> Callable[[np.ndarray], Any]:
            return lambda x: _ordered(x, dim, descending)

        good = [
            GoodSample(sort, [_distinct(3, 5)], order(-1, False), [(0, 0)]),
            GoodSample(lambda x: sort(x, 0, descending=True), [_distinct(3, 5)], order(0, True), [(0, 1)]),
            GoodSample(sort, [eighths(40, dtype="float16")], order(0, False), smooth=False),
            GoodSample(lambda x: sort(x, descending=True), [whole_numbers(2, 30)], order(-1, True), [(0, 0)]),
            GoodSample(sort, [whole_numbers(9) > 0], order(0, False)),
            GoodSample(sort, [eighths(0, 3)], order(-1, False)),
            GoodSample(sort, [np.array([np.nan, 1.0, np.inf, -np.inf])], order(0, False), smooth=False),
        ]
        bad = [
            BadSample(lambda: sort(_float(2, 3), 2), ShapeError, "there is no dimension 2"),
            BadSample(lambda: sort(_float()), ShapeError, "there is no dimension -1"),
            BadSample(lambda: sort(_float(2), 0, 1), HetuError, "descending to be a bool"),  # type: ignore[arg-type]
            BadSample(lambda: sort(1.0), DTypeError, "x to be a tensor, got 1.0"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class TopK(_Selection):
    """The first elements of the order along a dimension."""

    name = "topk"
    inputs = ("x", "k")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x, k = tensor(call, 0, "x"), size(call, call.inputs[1], "k")
        dim, largest = axis(call, call.attrs["dim"], x.ndim), flag(call.attrs["largest"], "largest", op=call.op)
        call.attrs.update(dim=dim, largest=largest)
        shape = [plain(item) for item in x.symbolic_shape]
        what = f"expected k to be from 0 to {shape[dim]}, the size of dim {dim}, got {k}"
        for holds in (k >= 0, k <= shape[dim]):
            call.check(holds, what)
        shape[dim] = k
        return [output(call, x.dtype, shape), output(call, int64, shape)]

    def samples(self) -> Samples:
        s = IntSymbol("s", min=6)
        good = [
            GoodSample(lambda x: topk(x, 2), [_distinct(3, 5)], lambda x: _best(x, 2), [(0, 0)]),
            GoodSample(lambda x: topk(x, 2, 0, largest=False), [_distinct(3, 5)], lambda x: _best(x, 2, 0, False)),
            GoodSample(
                lambda x: topk(x, x.symbolic_shape[0] // 2), [_distinct(5)], lambda x: _best(x, len(x) // 2), [(0, 0)]
            ),
            GoodSample(lambda x: topk(x, 7), [eighths(2, 40)], lambda x: _best(x, 7), [(0, 0)], smooth=False),
            GoodSample(lambda x: topk(x, 0), [whole_numbers(5)], lambda x: _best(x, 0)),
            GoodSample(lambda x: topk(x, 1), [np.array([1.0, np.nan])], lambda x: [x[1:], [1]], smooth=False),
        ]
        bad = [
            BadSample(lambda: topk(_float(2, 3), 4), ShapeError, "k to be from 0 to 3, the size of dim 1, got 4"),
            BadSample(lambda: topk(_float(5), s), ShapeError, "k to be from 0 to 5, the size of dim 0, got s"),
            BadSample(lambda: topk(_float(2), -1), ShapeError, "got -1"),
            BadSample(lambda: topk(_float(2), 0.5), ShapeError, "k to be an int or an IntSymbol"),  # type: ignore[arg-type]
            BadSample(lambda: topk(_float(2), 1, 1), ShapeError, "there is no dimension 1"),
            BadSample(lambda: topk(_float(2), 1, 0, 2), HetuError, "largest to be a bool"),  # type: ignore[arg-type]
            BadSample(lambda: topk(1.0, 1), DTypeError, "x to be a tensor, got 1.0"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class SelectedGrad(GradientOp):
    """Zeros with each element of a gradient put where it was selected from; no two come from one place."""

    name = "selected_grad"
    inputs = ("grad", "index")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        return [output(call, tensor(call, 0, "grad").dtype, call.attrs["shape"])]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("gather", (grads[0], node.inputs[1]), {"dim": node.attrs["dim"]}), None]


@register
class ArgMax(OpDef):
    """Where the largest element stands."""

    name = "argmax"
    inputs = ("x",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x, keepdim = tensor(call, 0, "x"), flag(call.attrs["keepdim"], "keepdim", op=call.op)
        dim = None if call.attrs["dim"] is None else axis(call, call.attrs["dim"], x.ndim)
        call.attrs.update(dim=dim, keepdim=keepdim)
        places = range(x.ndim) if dim is None else (dim,)
        for place in places:
            what = f"expected at least one element in dimension {place}, got {show(x.shape)}"
            call.check(x.shape[place] >= 1, f"{what}: there is no max of nothing")
        sizes = enumerate(x.symbolic_shape)
        return [output(call, int64, [1 if p in places else n for p, n in sizes if keepdim or p not in places])]

    def samples(self) -> Samples:
        x = eighths(3, 5)
        good = [
            GoodSample(lambda x: argmax(x, 1), [x], lambda x: x.argmax(1), [(0, 0), (0, 1)]),
            GoodSample(lambda x: argmax(x, 0, keepdim=True), [x], lambda x: x.argmax(0, keepdims=True)),
            GoodSample(argmax, [eighths(3, 40, dtype="float16")], np.argmax, [(0, 0)]),
            GoodSample(lambda x: argmax(x, keepdim=True), [x], lambda x: x.argmax(keepdims=True)),
            GoodSample(argmax, [eighths()], np.argmax),
            GoodSample(argmax, [whole_numbers(9) > 2], np.argmax),
            GoodSample(argmax, [np.array([1.0, np.nan, np.inf, np.nan])], np.argmax),
        ]
        bad = [
            BadSample(lambda: argmax(_float(2, 0)), ShapeError, "in dimension 1, got [2, 0]: there is no max of"),
            BadSample(lambda: argmax(_float(2, 3), 2), ShapeError, "there is no dimension 2"),
            BadSample(lambda: argmax(_float(2), 0, 1), HetuError, "keepdim to be a bool"),  # type: ignore[arg-type]
            BadSample(lambda: argmax(1.0), DTypeError, "x to be a tensor, got 1.0"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class CumSum(OpDef):
    """Sums from the beginning of a dimension to each of its elements."""

    name = "cumsum"
    inputs = ("x",)
    precision = "high"

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        call.attrs["dim"] = axis(call, call.attrs["dim"], x.ndim)
        return [output(call, x.dtype if x.dtype.is_floating else int64, x.symbolic_shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("cumsum_grad", grads, node.attrs)]

    def samples(self) -> Samples:
        good = [
            GoodSample(lambda x: cumsum(x, 0), [eighths(3, 5)], lambda x: x.cumsum(0), [(0, 0)]),
            GoodSample(lambda x: cumsum(x, -1), [eighths(3, 1, 4)], lambda x: x.cumsum(-1), [(0, 0), (0, 2)]),
            GoodSample(lambda x: cumsum(x, 0), [whole_numbers(300, dtype="uint8", low=200, high=256)], _whole_sums),
            GoodSample(lambda x: cumsum(x, 0), [whole_numbers(5) > 0], _whole_sums),
            GoodSample(lambda x: cumsum(x, 1), [eighths(3, 0)], lambda x: x),
            # 4099 ones: float16 has no 2049, so an accumulator of that type would stop at 2048.
            GoodSample(lambda x: cumsum(x, 0), [np.ones(4099, "float16")], lambda x: x.cumsum()),
        ]
        bad = [
            BadSample(lambda: cumsum(_float(2, 3), 2), ShapeError, "there is no dimension 2"),
            BadSample(lambda: cumsum(1.0, 0), DTypeError, "x to be a tensor, got 1.0"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class CumSumGrad(GradientOp):
    """Sums from each element of a dimension to its end."""

    name = "cumsum_grad"
    inputs = ("grad",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        grad = tensor(call, 0, "grad")
        return [output(call, grad.dtype, grad.symbolic_shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("cumsum", grads, node.attrs)]


def _whole_sums(x: np.ndarray) -> np.ndarray:
    return np.cumsum(x, dtype="int64")


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def sort(x: Tensor, dim: int = -1, descending: bool = False, name: str | None = None) -> tuple[Tensor, Tensor]:
    """Sorts along a dimension, as ``torch.sort(..., stable=True)``: equal elements stay as they stood.

    Under several pipelines each sorts its own rows. The gradient of a value goes to the element that it is.

    Args:
        x: Any dtype, at least one dimension. NaN counts as greater than all else.
        dim: The dimension; negative ones count from the end.
        descending: Whether the greatest come first.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        ``(values, indices)`` of x's shape: the elements in order, in x's dtype, and where each stood, int64.

    Raises:
        ShapeError: If there is no such dimension.
        DTypeError: If x is no tensor.
        HetuError: If ``descending`` is no bool.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3], name="x")
        ...     values, indices = hetu.sort(x)
        >>> g.run([values, indices], feed_dict={x: [2.0, 3.0, 1.0]})
        [tensor([1., 2., 3.]), tensor([2, 0, 1])]
    """
    values, indices = current_graph((x,), "sort").apply("sort", (x,), {"dim": dim, "descending": descending}, name)
    return values, indices


def topk(
    x: Tensor, k: int | IntSymbol, dim: int = -1, largest: bool = True, name: str | None = None
) -> tuple[Tensor, Tensor]:
    """Takes the k greatest elements along a dimension, the greatest first; of equal ones the first, on every device.

    Under several pipelines each takes those of its own rows. The gradient of a value goes to the element that it is.

    Args:
        x: Any dtype, at least one dimension. NaN counts as greater than all else.
        k: How many, from 0 to x's size in ``dim``.
        dim: The dimension; negative ones count from the end.
        largest: Whether to take the greatest; the least otherwise, the least first.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        ``(values, indices)`` with k elements in ``dim``: the elements in x's dtype, and where each stood, int64.

    Raises:
        ShapeError: If there is no such dimension, or not so many elements in it. Every run checks what only the
            symbols' values decide.
        DTypeError: If x is no tensor.
        HetuError: If ``largest`` is no bool.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3], name="x")
        ...     values, indices = hetu.topk(x, 2)
        >>> g.run([values, indices], feed_dict={x: [2.0, 3.0, 1.0]})
        [tensor([3., 2.]), tensor([1, 0])]
    """
    values, indices = current_graph((x,), "topk").apply("topk", (x, k), {"dim": dim, "largest": largest}, name)
    return values, indices


def argmax(x: Tensor, dim: int | None = None, keepdim: bool = False, name: str | None = None) -> Tensor:
    """Tells where the largest element stands; of equal ones the first, of NaN the first NaN.

    Under several pipelines each looks at its own rows, and counts from the first of them.

    Args:
        x: Any dtype and shape, with at least one element in the dimension.
        dim: The dimension; negative ones count from the end; None for the place among all elements, row by row.
        keepdim: Whether the dimension stays, with size 1.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        An int64 tensor.

    Raises:
        ShapeError: If there is no such dimension, or it has size 0. Every run checks what only the symbols' values
            decide.
        DTypeError: If x is no tensor.
        HetuError: If ``keepdim`` is no bool.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2, 2], name="x")
        ...     y = hetu.argmax(x, 1)
        >>> g.run(y, feed_dict={x: [[1.0, 4.0], [3.0, 2.0]]})
        tensor([1, 0])
    """
    return build("argmax", (x,), {"dim": dim, "keepdim": keepdim}, name)


def cumsum(x: Tensor, dim: int, name: str | None = None) -> Tensor:
    """Sums up along a dimension: element i is the sum of the elements 0 to i. Half precision is summed in float32.

    Under several pipelines each sums up its own rows, and begins with the first of them.

    Args:
        x: Any dtype, at least one dimension.
        dim: The dimension; negative ones count from the end.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's shape and dtype, or of int64 if x has an int dtype or bool.

    Raises:
        ShapeError: If there is no such dimension.
        DTypeError: If x is no tensor.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3], name="x")
        ...     y = hetu.cumsum(x, 0)
        >>> g.run(y, feed_dict={x: [1.0, 2.0, 3.0]})
        tensor([1., 3., 6.])
    """
    return build("cumsum", (x,), {"dim": dim}, name)
