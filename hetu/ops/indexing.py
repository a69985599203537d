"""Parts of a tensor: slice and gather."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetu.arguments import int_of, integer
from hetu.dtypes import float32, int64
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, IndexRange, Node, OpDef, Tensor, TensorSpec, register
from hetu.ops.common.build import axis, build, output, plain, rank, show, size, tensor
from hetu.ops.common.layers import GradientOp, check_indices
from hetu.ops.common.samples import eighths, whole_numbers
from hetu.ops.sources import placeholder
from hetu.symbols import IntSymbol, as_symbol, ceil_div

__all__ = ["gather", "slice"]


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
        step = integer(call.attrs["step"], "step", least=1, most=2**40, op=call.op, error=ShapeError)
        call.attrs.update(dim=dim, step=step)
        shape = list(x.symbolic_shape)
        what = f"expected 0 <= start <= stop <= {plain(shape[dim])} in dim {dim}, got start {start} and stop {stop}"
        for holds in (start >= 0, start <= stop, stop <= shape[dim]):
            call.check(holds, what, "slices are not cut to fit: hetu.minimum(...) and hetu.maximum(...) can do it")
        shape[dim] = as_symbol(stop - start if step == 1 else ceil_div(stop - start, step))
        return [output(call, x.dtype, shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        (x, start, stop), attrs = node.inputs, node.attrs
        assert isinstance(x, Tensor)
        return [lambda: build("slice_grad", (grads[0], start, stop, x.shape[attrs["dim"]]), attrs), None, None]

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
            BadSample(lambda: slice(_float(5), 0, 0, 6), ShapeError, "stop <= 5 in dim 0, got start 0 and stop 6"),
            BadSample(lambda: slice(_float(5), 0, 3, 2), ShapeError, "got start 3 and stop 2"),
            BadSample(lambda: slice(_float(5), 0, -6), ShapeError, "got start -1"),
            BadSample(lambda: slice(_float(5), 0, s), ShapeError, "got start s and stop 5"),
            BadSample(lambda: slice(_float(5), 0, 0, 5, 0), ShapeError, "step to be an int from 1 to"),
            BadSample(lambda: slice(_float(5), 1, 0, 5), ShapeError, "there is no dimension 1"),
            BadSample(lambda: slice(_float(5), 0, 0.5), ShapeError, "start to be an int or an IntSymbol"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class SliceGrad(GradientOp):
    """Zeros of size ``size`` in one dimension, with the gradient of a slice in its place."""

    name = "slice_grad"
    inputs = ("grad", "start", "stop", "size")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        grad = tensor(call, 0, "grad")
        shape = list(grad.symbolic_shape)
        shape[call.attrs["dim"]] = as_symbol(call.inputs[3])
        return [output(call, grad.dtype, shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("slice", (grads[0], *node.inputs[1:3]), node.attrs), None, None, None]


def _odd_half(x: np.ndarray) -> np.ndarray:
    return x[len(x) // 2 :: 2]


@register
class Gather(OpDef):
    """``x[..., index, ...]``, element by element along one dimension."""

    name = "gather"
    inputs = ("x", "index")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x, index = tensor(call, 0, "x"), tensor(call, 1, "index")
        check_indices(call, index, "index")
        dim = call.attrs["dim"] = axis(call, call.attrs["dim"], x.ndim)
        rank(call, index, "index", x.ndim, x.ndim)
        shapes = f"{show(index.shape)} and {show(x.shape)}"
        what = f"expected index to be no larger than x but for dimension {dim}, got {shapes}"
        for place, (wanted, there) in enumerate(zip(index.shape, x.shape, strict=True)):
            if place != dim:
                call.check(wanted <= there, what)
        return [output(call, x.dtype, index.symbolic_shape)]

    def index_ranges(self, node: Node) -> Sequence[IndexRange]:
        return [IndexRange("index", node.tensors[0].symbolic_shape[node.attrs["dim"]])]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        x, index = node.tensors
        attrs = {"dim": node.attrs["dim"], "shape": x.shape}
        return [lambda: build("gather_grad", (grads[0], index), attrs), None]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def along(dim: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
            def reference(x: np.ndarray, index: np.ndarray) -> np.ndarray:
                part = [np.s_[:] if place == dim % x.ndim else np.s_[:size] for place, size in enumerate(index.shape)]
                return np.take_along_axis(x[tuple(part)], index, dim)

            return reference

        def index(*shape: int, high: int, dtype: str = "int64") -> np.ndarray:
            return whole_numbers(*shape, dtype=dtype, low=0, high=high)

        good = [
            GoodSample(lambda x, i: gather(x, 1, i), [eighths(3, 5), index(3, 2, high=5)], along(1), [(0, 0), (1, 0)]),
            GoodSample(lambda x, i: gather(x, -1, i), [eighths(3, 5), index(2, 9, high=5)], along(-1)),
            GoodSample(lambda x, i: gather(x, 0, i), [eighths(3, 5), index(4, 5, high=3, dtype="int32")], along(0)),
            GoodSample(lambda x, i: gather(x, 0, i), [whole_numbers(7), index(300, high=7)], along(0), [(1, 0)]),
            GoodSample(lambda x, i: gather(x, 0, i), [eighths(3, dtype="float16"), index(0, high=3)], along(0)),
            GoodSample(
                lambda x, i: gather(x, 1, i), [eighths(2, 3, 4), index(2, 5, 4, high=3)], along(1), [(0, 2), (1, 2)]
            ),
        ]
        ids = placeholder
        bad = [
            BadSample(lambda: gather(_float(3), 0, _float(3)), DTypeError, "index to be int32 or int64"),
            BadSample(lambda: gather(_float(3), 1, ids(int64, [3])), ShapeError, "there is no dimension 1"),
            BadSample(lambda: gather(_float(3, 2), 0, ids(int64, [3])), ShapeError, "index to have 2 dimension(s)"),
            BadSample(lambda: gather(_float(3, 2), 0, ids(int64, [3, 3])), ShapeError, "got [3, 3] and [3, 2]"),
        ]
        return good, bad


@register
class GatherGrad(GradientOp):
    """Zeros with each element of a gradient added where it was gathered from."""

    name = "gather_grad"
    inputs = ("grad", "index")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        return [output(call, tensor(call, 0, "grad").dtype, call.attrs["shape"])]

    def index_ranges(self, node: Node) -> Sequence[IndexRange]:
        return [IndexRange("index", node.attrs["shape"][node.attrs["dim"]])]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("gather", (grads[0], node.inputs[1]), {"dim": node.attrs["dim"]}), None]


def _float(*shape: int | IntSymbol) -> Tensor:
    return placeholder(float32, shape)


def slice(
    x: Tensor,
    dim: int,
    start: int | IntSymbol = 0,
    stop: int | IntSymbol | None = None,
    step: int = 1,
    name: str | None = None,
) -> Tensor:
    """Takes ``x[start:stop:step]`` along a dimension.

    Bounds are not cut to fit as Python does it: ``0 <= start <= stop <= size`` must hold, because a slice that comes
    out shorter than asked for hides mistakes.

    Args:
        x: Any dtype, at least one dimension.
        dim: The dimension; negative ones count from the end.
        start: First index; a negative int counts from the end.
        stop: One past the last index; a negative int counts from the end, and None means the end.
        step: At least 1.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype with ``ceil_div(stop - start, step)`` elements in that dimension.

    Raises:
        ShapeError: If the bounds don't hold, or there is no such dimension. Every run checks what only the
            symbols' values decide.

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
    place = int_of(dim)
    if not isinstance(x, Tensor) or place is None or not -x.ndim <= place < x.ndim:
        return bound
    length, index = x.symbolic_shape[place], default if bound is None else int_of(bound)
    if bound is not None and index is None:
        return bound
    if index is None:
        return length
    return length + index if index < 0 else index


def gather(x: Tensor, dim: int, index: Tensor, name: str | None = None) -> Tensor:
    """Takes elements along a dimension, with other indices for each row, as ``torch.gather``.

    With two dimensions and ``dim=1``: ``out[i, j] = x[i, index[i, j]]``.

    Args:
        x: Any dtype, at least one dimension.
        dim: The dimension; negative ones count from the end.
        index: int32 or int64, with as many dimensions as x, and no larger than x in all but ``dim``. Values from 0
            to below x's size in ``dim``, which a run checks where it can without waiting for a device.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype and index's shape.

    Raises:
        ShapeError: If there is no such dimension, or the index does not fit x.
        DTypeError: If the index is no int32 or int64.
        BindingError: If a value of the index is out of range, which a run checks.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2, 3], name="x")
        ...     y = hetu.gather(x, 1, hetu.constant([[2], [0]]))
        >>> g.run(y, feed_dict={x: [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]})
        tensor([[3.],
                [4.]])
    """
    return build("gather", (x, index), {"dim": dim}, name)
