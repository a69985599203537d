"""What the layers of a transformer need besides attention and products of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hetu.dtypes import DType, as_dtype, bfloat16, float32, int32, int64
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, OpDef, Tensor, TensorSpec, register
from hetu.ops._build import axis, build, floating, output, rank, same_dtype, show, tensor
from hetu.ops._samples import eighths, whole_numbers
from hetu.ops.sources import placeholder
from hetu.symbols import IntSymbol


@register
class Cast(OpDef):
    """The same values in another element type."""

    name = "cast"
    is_view = True
    inputs = ("x",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        return [output(call, call.attrs["dtype"], x.symbolic_shape)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(lambda x: cast(x, bfloat16), [eighths(3, 5)], lambda x: x, [(0, 0)]),
            GoodSample(lambda x: cast(x, "float16"), [eighths(0, 5)], lambda x: x),
            GoodSample(lambda x: cast(x, np.int32), [eighths(5)], np.trunc, [(0, 0)]),
            GoodSample(lambda x: cast(x, "bool"), [whole_numbers(5)], lambda x: x != 0),
            GoodSample(lambda x: cast(x, float32), [whole_numbers(1, dtype="int8")], lambda x: x),
            GoodSample(lambda x: cast(x, "float64"), [eighths(dtype="float64")], lambda x: x),
        ]
        bad = [
            BadSample(lambda: cast(_float(2), "float8"), DTypeError, "no element type 'float8'"),
            BadSample(lambda: cast(2.0, float32), DTypeError, "x to be a tensor, got 2.0"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class Embedding(OpDef):
    """Rows of a table."""

    name = "embedding"
    inputs = ("ids", "weight")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        ids, weight = tensor(call, 0, "ids"), tensor(call, 1, "weight")
        if ids.dtype not in (int32, int64):
            call.fail(
                DTypeError,
                f"expected ids to be int32 or int64, got {ids.dtype}",
                f"cast them: hetu.cast({ids.name}, hetu.int64), and give the ids first, the table second",
            )
        floating(call, weight, "weight")
        rank(call, weight, "weight", 2, 2)
        return [output(call, weight.dtype, (*ids.symbolic_shape, weight.symbolic_shape[1]))]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def rows(ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
            return weight[ids]

        def ids(*shape: int, dtype: str = "int64") -> np.ndarray:
            return whole_numbers(*shape, dtype=dtype, low=0, high=7)

        good = [
            GoodSample(embedding, [ids(5), eighths(7, 3)], rows, [(0, 0)]),
            GoodSample(embedding, [ids(2, 3, dtype="int32"), eighths(7, 1)], rows, [(0, 0), (1, 1)]),
            GoodSample(embedding, [ids(0), eighths(7, 3, dtype="float16")], rows),
            GoodSample(embedding, [ids(), eighths(7, 3, dtype="float64")], rows),
        ]
        bad = [
            BadSample(lambda: embedding(_float(2), _float(7, 3)), DTypeError, "ids to be int32 or int64"),
            BadSample(
                lambda: embedding(placeholder(int64, [2]), _float(7)), ShapeError, "weight to have 2 dimension(s)"
            ),
            BadSample(
                lambda: embedding(placeholder(int64, [2]), placeholder(int64, [2, 3])),
                DTypeError,
                "weight to be floating",
            ),
        ]
        return good, bad


@register
class RmsNorm(OpDef):
    """Division by the root of the mean square over the last dimension."""

    name = "rms_norm"
    inputs = ("x", "weight")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x, eps = tensor(call, 0, "x"), call.attrs["eps"]
        floating(call, x, "x")
        rank(call, x, "x", 1)
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
            call.fail(HetuError, f"expected eps to be a number of at least 0, got {eps!r}")
        call.attrs["eps"] = float(eps)
        if call.inputs[1] is not None:
            weight = tensor(call, 1, "weight")
            same_dtype(call, x, "x", weight, "weight")
            rank(call, weight, "weight", 1, 1)
            what = f"expected weight to have x's last dimension, got {show(weight.shape)} and {show(x.shape)}"
            call.same(weight.symbolic_shape[0], x.symbolic_shape[-1], what)
        return [output(call, x.dtype, x.symbolic_shape)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def plain(x: np.ndarray) -> np.ndarray:
            return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6)

        def scaled(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
            return plain(x) * weight

        half = [eighths(3, 300, dtype="float16") * np.float16(64), eighths(300, dtype="float16")]
        good = [
            GoodSample(rms_norm, [eighths(3, 5)], plain, [(0, 0), (0, 1)]),
            GoodSample(rms_norm, [eighths(3, 5), eighths(5, seed=1)], scaled, [(0, 0)]),
            GoodSample(rms_norm, [eighths(2, 3, 1), eighths(1, seed=1)], scaled, [(0, 1)]),
            GoodSample(rms_norm, [eighths(0, 5), eighths(5)], scaled),
            GoodSample(rms_norm, half, scaled),  # the sum of squares is too large for float16
            GoodSample(lambda x: rms_norm(x, eps=0.5), [eighths(7)], lambda x: x / np.sqrt(np.mean(x * x) + 0.5)),
            GoodSample(lambda x: rms_norm(cast(x, bfloat16)), [eighths(3, 5)], plain, [(0, 0)]),
        ]
        bad = [
            BadSample(lambda: rms_norm(_float(2, 3), _float(2)), ShapeError, "weight to have x's last dimension"),
            BadSample(lambda: rms_norm(_float()), ShapeError, "x to have at least 1 dimension(s)"),
            BadSample(
                lambda: rms_norm(_float(3), placeholder(bfloat16, [3])), DTypeError, "x and weight to have one dtype"
            ),
            BadSample(lambda: rms_norm(placeholder(int64, [3])), DTypeError, "expected x to be floating"),
            BadSample(lambda: rms_norm(_float(3), eps=-1.0), HetuError, "eps to be a number of at least 0, got -1.0"),
        ]
        return good, bad


@register
class Softmax(OpDef):
    """Exponentials that sum to 1 along a dimension."""

    name = "softmax"
    inputs = ("x",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        floating(call, x, "x")
        call.attrs["dim"] = axis(call, call.attrs["dim"], x.ndim)
        return [output(call, x.dtype, x.symbolic_shape)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def along(dim: int) -> Any:
            def reference(x: np.ndarray) -> np.ndarray:
                power = np.exp(x - x.max(dim, keepdims=True, initial=-np.inf))
                return power / power.sum(dim, keepdims=True)

            return reference

        good = [
            GoodSample(softmax, [eighths(3, 5)], along(-1), [(0, 0), (0, 1)]),
            GoodSample(lambda x: softmax(x, 0), [eighths(3, 1, 2)], along(0), [(0, 0)]),
            GoodSample(softmax, [eighths(2, 300, dtype="float16")], along(-1)),
            GoodSample(softmax, [eighths(3, 0)], along(-1)),
            GoodSample(softmax, [1000 * eighths(3, 5)], along(-1)),  # large, so that exp alone overflows
        ]
        bad = [
            BadSample(lambda: softmax(_float(2, 3), 2), ShapeError, "there is no dimension 2"),
            BadSample(lambda: softmax(_float(), 0), ShapeError, "there is no dimension 0"),
            BadSample(lambda: softmax(placeholder(int64, [3])), DTypeError, "expected x to be floating"),
        ]
        return good, bad


def _float(*shape: int | IntSymbol) -> Tensor:
    return placeholder(float32, shape)


def cast(x: Tensor, dtype: DType | Any, name: str | None = None) -> Tensor:
    """Converts to another element type.

    Floats become ints by cutting the fraction off; what then does not fit is undefined, as in torch. Anything
    but zero becomes True.

    Args:
        x: Any dtype and shape.
        dtype: A hetu, numpy or torch dtype, or its name.
        name: Unique in the graph; made up if None.

    Returns:
        A tensor of x's shape.

    Raises:
        DTypeError: If there is no such element type.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.cast(x, hetu.int32)
        >>> g.run(y, feed_dict={x: [1.75, -1.75]})
        tensor([ 1, -1], dtype=torch.int32)
    """
    return build("cast", (x,), {"dtype": as_dtype(dtype)}, name)


def embedding(ids: Tensor, weight: Tensor, name: str | None = None) -> Tensor:
    """Looks up rows of a table, as ``torch.nn.functional.embedding``.

    Args:
        ids: int32 or int64, any shape, values from 0 to below the table's number of rows. The values are not
            looked at before the kernel does: one out of range is torch's IndexError on the CPU.
        weight: The table, floating, ``(rows, width)``.
        name: Unique in the graph; made up if None.

    Returns:
        ``(*ids.shape, width)`` of the table's dtype.

    Raises:
        DTypeError: If ids are no int32 or int64, or the table is not floating.
        ShapeError: If the table does not have two dimensions.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     ids = hetu.placeholder(hetu.int64, [3], name="ids")
        ...     rows = hetu.embedding(ids, hetu.constant([[0.0, 0.5], [1.0, 1.5]]))
        >>> g.run(rows, feed_dict={ids: [1, 0, 1]})
        tensor([[1.0000, 1.5000],
                [0.0000, 0.5000],
                [1.0000, 1.5000]])
    """
    return build("embedding", (ids, weight), name=name)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, name: str | None = None) -> Tensor:
    """Normalises over the last dimension: ``x / sqrt(mean(x ** 2) + eps) * weight``.

    Computed in float32 where x is of half precision. Source: Zhang and Sennrich, "Root Mean Square Layer
    Normalization", 2019, equation 4.

    Args:
        x: Floating, ``(..., width)``.
        weight: Of the same dtype, ``(width,)``.
        eps: At least 0.
        name: Unique in the graph; made up if None.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        ShapeError: If weight does not have the last dimension's length, or x has no dimension.
        DTypeError: If the dtypes differ or are not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.rms_norm(x)
        >>> g.run(y, feed_dict={x: [1.0, 7.0]})
        tensor([0.2000, 1.4000])
    """
    return build("rms_norm", (x, weight), {"eps": eps}, name)


def softmax(x: Tensor, dim: int = -1, name: str | None = None) -> Tensor:
    """Applies ``exp(x) / sum(exp(x))`` along a dimension. Computed in float32 where x is of half precision.

    Args:
        x: Floating, at least one dimension.
        dim: Which dimension; negative ones count from the end.
        name: Unique in the graph; made up if None.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        ShapeError: If there is no such dimension.
        DTypeError: If x is not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.softmax(x)
        >>> g.run(y, feed_dict={x: [1.0, 1.0]})
        tensor([0.5000, 0.5000])
    """
    return build("softmax", (x,), {"dim": dim}, name)
