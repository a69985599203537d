"""Other shapes of the same elements: reshape, transpose, slice, concat."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from hetu.dtypes import float32
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, OpDef, Tensor, TensorSpec, register
from hetu.ops._build import Dim, axis, build, output, plain, rank, result_type, show, size, tensor, whole
from hetu.ops._samples import eighths, whole_numbers
from hetu.ops.sources import placeholder
from hetu.symbols import IntSymbol, as_symbol, ceil_div, equal


@register
class Reshape(OpDef):
    """The same elements in the same order under another shape."""

    name = "reshape"
    is_view = True
    inputs = ("x",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x, wanted = tensor(call, 0, "x"), call.attrs["shape"]
        if isinstance(wanted, str) or not isinstance(wanted, Sequence):
            call.fail(
                ShapeError, f"expected shape to be a list of sizes, got {wanted!r}", "write [n] for one dimension"
            )
        sizes = [size(call, item, "a size") for item in wanted]
        holes = [place for place, item in enumerate(sizes) if item == -1]
        given = [item for item in sizes if item != -1]
        text = f"{show(x.shape)} to {show(sizes)}"
        for item in given:
            call.check(item >= 0, f"expected sizes of at least 0, or one -1, got {show(sizes)}")
        left, right = _cancel(x.symbolic_shape, given)
        if len(holes) > 1:
            call.fail(ShapeError, f"-1 is ambiguous in a reshape from {text}", "give the size instead of -1")
        if holes:
            sizes[holes[0]] = self._hole(call, left, right, text)
        else:
            call.same(left, right, f"expected as many elements before as after a reshape, got {text}")
        call.attrs["shape"] = tuple(sizes)
        return [output(call, x.dtype, sizes)]

    @staticmethod
    def _hole(call: Call, left: Dim, right: Dim, text: str) -> Dim:
        """The size that -1 stands for."""
        if right == 1:
            return left
        call.check(
            right >= 1, f"-1 is ambiguous in a reshape from {text} with a size of 0", "give the size instead of -1"
        )
        rest = left % right
        what = f"expected a whole number in the place of -1 in a reshape from {text}"
        call.check(rest == 0 if isinstance(rest, int) else equal(rest, as_symbol(0)), what)
        return left // right

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        s = IntSymbol("s")
        good = [
            GoodSample(lambda x: reshape(x, [2, 6]), [eighths(3, 4)], lambda x: x.reshape(2, 6)),
            GoodSample(lambda x: reshape(x, [-1, 3]), [eighths(4, 6)], lambda x: x.reshape(-1, 3), [(0, 0)]),
            GoodSample(
                lambda x: reshape(x, [x.symbolic_shape[0], 3, -1]),
                [eighths(5, 12)],
                lambda x: x.reshape(len(x), 3, 4),
                [(0, 0)],
            ),
            GoodSample(
                lambda x: reshape(x, [x.symbolic_shape[0] * x.symbolic_shape[1]]),
                [eighths(3, 5)],
                lambda x: x.reshape(-1),
                [(0, 0), (0, 1)],
            ),
            GoodSample(
                lambda x: reshape(x, [-1, x.symbolic_shape[1]]), [eighths(4, 3, 2)], _to_second, [(0, 0), (0, 1)]
            ),
            GoodSample(lambda x: reshape(x, [7, 0, 2]), [eighths(0, 3)], lambda x: x.reshape(7, 0, 2)),
            GoodSample(lambda x: reshape(x, []), [whole_numbers(1, 1)], lambda x: x.reshape(())),
            GoodSample(
                lambda x: reshape(transpose(x, 0, 1), [-1]), [eighths(3, 5)], lambda x: x.T.reshape(-1), [(0, 0)]
            ),
        ]
        bad = [
            BadSample(lambda: reshape(_float(2, 3), [4]), ShapeError, "as many elements before as after"),
            BadSample(lambda: reshape(_float(2, 3), [-1, 4]), ShapeError, "a whole number in the place of -1"),
            BadSample(lambda: reshape(_float(2, 3), [-1, -1]), ShapeError, "-1 is ambiguous"),
            BadSample(lambda: reshape(_float(0, 3), [-1, 0]), ShapeError, "-1 is ambiguous"),
            BadSample(lambda: reshape(_float(2, 3), [-2, -3]), ShapeError, "sizes of at least 0"),
            BadSample(lambda: reshape(_float(2, 3), 6), ShapeError, "a list of sizes, got 6"),  # type: ignore[arg-type]
            BadSample(lambda: reshape(_float(s, 3), [s, 4]), ShapeError, "got [s, 3] to [s, 4]"),
            BadSample(lambda: reshape(2, [1]), DTypeError, "x to be a tensor, got 2"),  # type: ignore[arg-type]
        ]
        return good, bad


def _to_second(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[1])


def _cancel(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, Dim]:
    """The products of two lists of sizes without the symbolic sizes that stand in both.

    They are struck out although they might be 0: a graph that holds only for empty tensors is a mistake. What is
    left is often two ints, so that no constraint and no division remains.
    """
    rest_a, rest_b = [plain(item) for item in a], [plain(item) for item in b]
    for item in [item for item in rest_a if isinstance(item, IntSymbol) and item in rest_b]:
        if item in rest_b:  # not yet struck out by an equal one
            rest_a.remove(item)
            rest_b.remove(item)
    return math.prod(rest_a), math.prod(rest_b)


@register
class Transpose(OpDef):
    """Two dimensions swapped."""

    name = "transpose"
    is_view = True
    inputs = ("x",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        one, other = (call.attrs[key] for key in ("dim0", "dim1"))
        one, other = axis(call, one, x.ndim), axis(call, other, x.ndim)
        call.attrs.update(dim0=one, dim1=other)
        shape = list(x.symbolic_shape)
        shape[one], shape[other] = shape[other], shape[one]
        return [output(call, x.dtype, shape)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(lambda x: transpose(x, 0, 1), [eighths(3, 5)], lambda x: x.T, [(0, 0)]),
            GoodSample(lambda x: transpose(x, -1, 0), [eighths(2, 1, 7)], lambda x: x.swapaxes(0, 2), [(0, 0), (0, 2)]),
            GoodSample(lambda x: transpose(x, 1, 1), [whole_numbers(0, 3)], lambda x: x),
        ]
        bad = [
            BadSample(lambda: transpose(_float(2, 3), 0, 2), ShapeError, "there is no dimension 2"),
            BadSample(lambda: transpose(_float(2, 3), 0, 1.0), ShapeError, "an int, got 1.0"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class Slice(OpDef):
    """``x[start:stop:step]`` along one dimension. The bounds are operands, so that a run needs their symbols."""

    name = "slice"
    is_view = True
    inputs = ("x", "start", "stop")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        dim = axis(call, call.attrs["dim"], x.ndim)
        start, stop = size(call, call.inputs[1], "start"), size(call, call.inputs[2], "stop")
        step = whole(call, call.attrs["step"], "step")
        if step < 1:
            call.fail(ShapeError, f"expected a step of at least 1, got {step}")
        call.attrs.update(dim=dim, step=step)
        shape = list(x.symbolic_shape)
        what = (
            f"expected 0 <= start <= stop <= {plain(shape[dim])} in dimension {dim}, got start {start} and stop {stop}"
        )
        for holds in (start >= 0, start <= stop, stop <= shape[dim]):
            call.check(holds, what, "slices are not cut to fit: hetu.minimum(...) and hetu.maximum(...) can do it")
        shape[dim] = as_symbol(stop - start if step == 1 else ceil_div(stop - start, step))
        return [output(call, x.dtype, shape)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        s = IntSymbol("s", min=10)
        good = [
            GoodSample(lambda x: slice(x, 0, 1, 3), [eighths(5, 2)], lambda x: x[1:3]),
            GoodSample(lambda x: slice(x, -1, 1, 7, 3), [eighths(2, 7)], lambda x: x[:, 1:7:3]),
            GoodSample(
                lambda x: slice(x, 0, 0, x.symbolic_shape[0] // 2), [eighths(5)], lambda x: x[: len(x) // 2], [(0, 0)]
            ),
            GoodSample(lambda x: slice(x, 0, x.symbolic_shape[0] // 2, None, 2), [eighths(7)], _odd_half, [(0, 0)]),
            GoodSample(lambda x: slice(x, 1, -2), [eighths(1, 5)], lambda x: x[:, -2:]),
            GoodSample(lambda x: slice(x, 0, 1, -1), [eighths(5)], lambda x: x[1:-1], [(0, 0)]),
            GoodSample(lambda x: slice(x, 0, 2, 2), [whole_numbers(3)], lambda x: x[2:2]),
        ]
        bad = [
            BadSample(
                lambda: slice(_float(5), 0, 0, 6), ShapeError, "stop <= 5 in dimension 0, got start 0 and stop 6"
            ),
            BadSample(lambda: slice(_float(5), 0, 3, 2), ShapeError, "got start 3 and stop 2"),
            BadSample(lambda: slice(_float(5), 0, -6), ShapeError, "got start -1"),
            BadSample(lambda: slice(_float(5), 0, s), ShapeError, "got start s and stop 5"),
            BadSample(lambda: slice(_float(5), 0, 0, 5, 0), ShapeError, "a step of at least 1"),
            BadSample(lambda: slice(_float(5), 1, 0, 5), ShapeError, "there is no dimension 1"),
            BadSample(lambda: slice(_float(5), 0, 0.5), ShapeError, "start (an int or an IntSymbol)"),  # type: ignore[arg-type]
        ]
        return good, bad


def _odd_half(x: np.ndarray) -> np.ndarray:
    return x[len(x) // 2 :: 2]


@register
class Concat(OpDef):
    """Tensors one after the other along a dimension."""

    name = "concat"
    inputs = ("*tensors",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        if not call.inputs:
            call.fail(ShapeError, "expected at least one tensor, got none")
        parts = [tensor(call, index, f"tensor {index}") for index in range(len(call.inputs))]
        first = parts[0]
        dim = axis(call, call.attrs["dim"], first.ndim)
        shape = [plain(item) for item in first.symbolic_shape]
        for index, part in enumerate(parts[1:], 1):
            rank(call, part, f"tensor {index}", first.ndim, first.ndim)
            what = f"expected shapes equal apart from dimension {dim}, got {show(first.shape)} and {show(part.shape)}"
            for place, item in enumerate(part.shape):
                if place != dim:
                    call.same(shape[place], item, what)
                    shape[place] = item if isinstance(item, int) else shape[place]
        call.attrs["dim"] = dim
        shape[dim] = plain(sum((part.symbolic_shape[dim] for part in parts), start=as_symbol(0)))
        return [output(call, result_type(parts), shape)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(lambda *x: concat(x, 0), [eighths(3, 2), eighths(1, 2, seed=1)], _join, [(0, 0), (1, 0)]),
            GoodSample(
                lambda *x: concat(x, -1),
                [eighths(3, 2), eighths(3, 0), eighths(3, 5)],
                _join_last,
                [(0, 0), (1, 0), (2, 0)],
            ),
            GoodSample(lambda *x: concat(x, 0), [whole_numbers(3), eighths(2, dtype="float16")], _join),
            GoodSample(lambda x: concat([x], 0), [whole_numbers(0, 2)], lambda x: x),
        ]
        bad = [
            BadSample(lambda: concat([], 0), ShapeError, "at least one tensor"),
            BadSample(lambda: concat([_float(2, 3), _float(2, 4)], 0), ShapeError, "equal apart from dimension 0"),
            BadSample(lambda: concat([_float(2, 3), _float(2)], 0), ShapeError, "tensor 1 to have 2 dimension(s)"),
            BadSample(lambda: concat([_float(2), 3], 0), DTypeError, "tensor 1 to be a tensor"),  # type: ignore[list-item]
            BadSample(lambda: concat([_float()], 0), ShapeError, "no dimension 0 in a tensor of 0 dimension(s)"),
        ]
        return good, bad


def _join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts)


def _join_last(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis=-1)


def _float(*shape: int | IntSymbol) -> Tensor:
    return placeholder(float32, shape)


def reshape(x: Tensor, shape: Sequence[int | IntSymbol], name: str | None = None) -> Tensor:
    """Gives the same elements, in the same order, another shape.

    Args:
        x: Any dtype and shape.
        shape: One int or IntSymbol a dimension; one of them may be -1: whatever is left.
        name: Unique in the graph; made up if None.

    Returns:
        A tensor of that shape and x's dtype.

    Raises:
        ShapeError: If the number of elements changes, or -1 is ambiguous or no whole number. What only the
            symbols' values decide is checked by every run.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run"):
        ...     x = hetu.placeholder(hetu.float32, [s, 12], name="x")
        ...     hetu.reshape(x, [s, 3, -1], name="y")
        hetu.Tensor(y: float32[s, 3, 4])
    """
    return build("reshape", (x,), {"shape": tuple(shape) if isinstance(shape, (list, tuple)) else shape}, name)


def transpose(x: Tensor, dim0: int, dim1: int, name: str | None = None) -> Tensor:
    """Swaps two dimensions, as ``torch.transpose``.

    Args:
        x: Any dtype and shape.
        dim0: One dimension; negative ones count from the end.
        dim1: The other.
        name: Unique in the graph; made up if None.

    Returns:
        A tensor of x's dtype with the two sizes swapped.

    Raises:
        ShapeError: If there is no such dimension.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [1, 2], name="x")
        ...     y = hetu.transpose(x, 0, 1)
        >>> g.run(y, feed_dict={x: [[1.0, 2.0]]})
        tensor([[1.],
                [2.]])
    """
    return build("transpose", (x,), {"dim0": dim0, "dim1": dim1}, name)


def slice(
    x: Tensor,
    dim: int,
    start: int | IntSymbol = 0,
    stop: int | IntSymbol | None = None,
    step: int = 1,
    name: str | None = None,
) -> Tensor:
    """Takes ``x[start:stop:step]`` along a dimension.

    Unlike Python's, bounds are not cut to fit: ``0 <= start <= stop <= size`` must hold, as a slice that comes out
    shorter than asked for hides mistakes.

    Args:
        x: Any dtype, at least one dimension.
        dim: Which dimension; negative ones count from the end.
        start: First index; a negative int counts from the end.
        stop: One past the last index; a negative int counts from the end, None is the end.
        step: At least 1.
        name: Unique in the graph; made up if None.

    Returns:
        A tensor of x's dtype with ``ceil_div(stop - start, step)`` elements in that dimension.

    Raises:
        ShapeError: If the bounds don't hold, or there is no such dimension. What only the symbols' values
            decide is checked by every run.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s", min=1)
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [s], name="x")
        ...     y = hetu.slice(x, 0, 1)
        >>> y
        hetu.Tensor(slice_0: float32[s - 1])
        >>> g.run(y, feed_dict={x: [1.0, 2.0, 3.0]})
        tensor([2., 3.])
    """
    start, stop = _from_front(x, dim, start, 0), _from_front(x, dim, stop, None)
    return build("slice", (x, start, stop), {"dim": dim, "step": step}, name)


def _from_front(x: Any, dim: Any, bound: Any, default: int | None) -> Any:
    """A bound counted from the front. What is wrong with x or dim is left to the shape rule to say."""
    try:
        length = x.symbolic_shape[dim]
        index = operator.index(bound) if bound is not None else default
    except (AttributeError, IndexError, TypeError):
        return bound
    if index is None:
        return length
    return length + index if index < 0 else index


def concat(tensors: Sequence[Tensor], dim: int = 0, name: str | None = None) -> Tensor:
    """Joins tensors along a dimension, as ``torch.cat``.

    Args:
        tensors: At least one, all with the same number of dimensions and of the same sizes apart from ``dim``.
        dim: Which dimension; negative ones count from the end.
        name: Unique in the graph; made up if None.

    Returns:
        A tensor whose size in ``dim`` is the sum of theirs; its dtype is their common one (``torch.result_type``).

    Raises:
        ShapeError: If there is no tensor, no such dimension, or other sizes differ.
        DTypeError: If something is no tensor.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [s], name="x")
        ...     y = hetu.concat([x, x])
        >>> y
        hetu.Tensor(concat_0: float32[2*s])
        >>> g.run(y, feed_dict={x: [1.0, 2.0]})
        tensor([1., 2., 1., 2.])
    """
    return build("concat", tuple(tensors), {"dim": dim}, name)
