"""Products of matrices: matmul and linear. Both accumulate in float32 or better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Tensor, TensorSpec, register
from hetu.ops.common.build import broadcast, build, floating, output, rank, same_dtype, show, tensor
from hetu.ops.common.gradients import single, sum_to, to_shape
from hetu.ops.common.samples import eighths
from hetu.ops.sources import placeholder
from hetu.symbols import IntSymbol

__all__ = ["linear", "matmul"]


@register
class MatMul(OpDef):
    """``a @ b``."""

    name = "matmul"
    precision = "low"
    inputs = ("a", "b")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        a, b = tensor(call, 0, "a"), tensor(call, 1, "b")
        floating(call, a, "a")
        same_dtype(call, a, "a", b, "b")
        rank(call, a, "a", 1)
        rank(call, b, "b", 1)
        shape_a, shape_b = a.symbolic_shape, b.symbolic_shape
        inner = shape_b[0] if b.ndim == 1 else shape_b[-2]
        call.same(
            shape_a[-1],
            inner,
            f"expected as many columns of a as rows of b, got {show(shape_a)} @ {show(shape_b)}",
            "transpose one of them, or check which sizes they should share",
        )
        batch = broadcast(call, shape_a[:-2], shape_b[:-2])
        rows = shape_a[-2:-1]  # none where a is a vector; and no columns where b is one
        columns = shape_b[-1:] if b.ndim > 1 else ()
        return [output(call, a.dtype, (*batch, *rows, *columns))]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (a, b) = single(grads), node.tensors
        # Vectors as what they are multiplied as: a row and a column.
        shape_a, shape_b = (1, *a.shape)[-max(a.ndim, 2) :], (*b.shape, 1)[: max(b.ndim, 2)]
        batch = node.outputs[0].shape[: max(a.ndim, b.ndim, 2) - 2]
        d_out = to_shape(grad, (*batch, shape_a[-2], shape_b[-1]))

        def grad_a() -> Tensor:
            product = matmul(d_out, _swapped(to_shape(b, shape_b)))
            return to_shape(sum_to(product, shape_a), a.shape)

        def grad_b() -> Tensor:
            if len(shape_b) == 2:  # one product over the rows of the whole batch, and no sum after it
                return to_shape(matmul(_swapped(_rows(a)), _rows(d_out)), b.shape)
            product = matmul(_swapped(to_shape(a, shape_a)), d_out)
            return to_shape(sum_to(product, shape_b), b.shape)

        return [grad_a, grad_b]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(matmul, [eighths(3, 5), eighths(5, 2, seed=1)], np.matmul, [(0, 0), (1, 1)]),
            GoodSample(matmul, [eighths(4, 6), eighths(6, 4, seed=1)], np.matmul, [(0, 0), (0, 1), (1, 0), (1, 1)]),
            GoodSample(matmul, [eighths(2, 1, 3, 5), eighths(4, 5, 1, seed=1)], np.matmul, [(0, 0), (1, 0)]),
            GoodSample(matmul, [eighths(5), eighths(5, seed=1)], np.matmul, [(0, 0), (1, 0)]),
            GoodSample(matmul, [eighths(5), eighths(2, 5, 3, seed=1)], np.matmul),
            GoodSample(matmul, [eighths(2, 3, 5), eighths(5, seed=1)], np.matmul),
            GoodSample(matmul, [eighths(3, 0), eighths(0, 2)], np.matmul),
            GoodSample(matmul, [eighths(0, 3), eighths(3, 1)], np.matmul),
            GoodSample(matmul, [eighths(3, 4, dtype="float16"), eighths(4, 2, dtype="float16")], np.matmul),
            GoodSample(matmul, [eighths(3, 4, dtype="float64"), eighths(4, 2, dtype="float64")], np.matmul),
        ]
        bad = [
            BadSample(lambda: matmul(_float(2, 3), _float(2, 3)), ShapeError, "got [2, 3] @ [2, 3]"),
            BadSample(lambda: matmul(_float(2, 2, 3), _float(5, 3, 2)), ShapeError, "2 and 5 differ"),
            BadSample(lambda: matmul(_float(), _float(3)), ShapeError, "a to have at least 1 dimension(s)"),
            BadSample(
                lambda: matmul(_float(3), placeholder("float16", [3])), DTypeError, "one dtype, got hetu.float32"
            ),
            BadSample(lambda: matmul(placeholder("int64", [3]), _float(3)), DTypeError, "expected a to be floating"),
            BadSample(lambda: matmul(_float(3), 2), DTypeError, "b to be a tensor, got 2"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class Linear(OpDef):
    """``x @ weight.T + bias``."""

    name = "linear"
    precision = "low"
    inputs = ("x", "weight", "bias")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x, weight = tensor(call, 0, "x"), tensor(call, 1, "weight")
        floating(call, x, "x")
        same_dtype(call, x, "x", weight, "weight")
        rank(call, x, "x", 1)
        rank(call, weight, "weight", 2, 2)
        features = weight.symbolic_shape[0]
        call.same(
            x.symbolic_shape[-1],
            weight.symbolic_shape[1],
            f"expected the last dimension of x to be that of weight, got {show(x.shape)} and {show(weight.shape)}",
            "give weight the shape (out, in), as torch.nn.Linear has it",
        )
        if call.inputs[2] is not None:
            bias = tensor(call, 2, "bias")
            same_dtype(call, x, "x", bias, "bias")
            rank(call, bias, "bias", 1, 1)
            what = f"expected bias to have weight's first dimension, got {show(bias.shape)} and {show(weight.shape)}"
            call.same(bias.symbolic_shape[0], features, what)
        return [output(call, x.dtype, (*x.symbolic_shape[:-1], features))]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (x, weight) = single(grads), node.tensors[:2]
        return [
            lambda: matmul(grad, weight),
            lambda: matmul(_swapped(_rows(grad)), _rows(x)),
            lambda: sum_to(grad, weight.shape[:1]),
        ]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def plain(x: np.ndarray, weight: np.ndarray) -> Any:
            return x @ weight.T

        def biased(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> Any:
            return x @ weight.T + bias

        half = [eighths(3, 4, dtype="float16"), eighths(2, 4, dtype="float16"), eighths(2, dtype="float16")]
        good = [
            GoodSample(linear, [eighths(3, 5), eighths(2, 5, seed=1)], plain, [(0, 0)]),
            GoodSample(linear, [eighths(3, 5), eighths(2, 5, seed=1), eighths(2, seed=2)], biased, [(0, 0)]),
            GoodSample(
                linear, [eighths(2, 3, 1), eighths(4, 1, seed=1), eighths(4, seed=2)], biased, [(0, 1), (1, 0), (2, 0)]
            ),
            GoodSample(linear, [eighths(5), eighths(3, 5, seed=1)], plain),
            GoodSample(linear, [eighths(0, 5), eighths(3, 5, seed=1), eighths(3)], biased),
            GoodSample(linear, [eighths(2, 0), eighths(3, 0), eighths(3)], biased),
            GoodSample(linear, half, biased),
        ]
        bad = [
            BadSample(
                lambda: linear(_float(2, 3), _float(3, 2)), ShapeError, "the last dimension of x to be that of weight"
            ),
            BadSample(
                lambda: linear(_float(2, 3), _float(4, 3), _float(3)),
                ShapeError,
                "bias to have weight's first dimension",
            ),
            BadSample(
                lambda: linear(_float(2, 3), _float(4, 3), placeholder("float16", [4])), DTypeError, "x and bias"
            ),
            BadSample(
                lambda: linear(placeholder("int64", [3, 3]), _float(3, 3)), DTypeError, "expected x to be floating"
            ),
            BadSample(lambda: linear(_float(2, 3), _float(3)), ShapeError, "weight to have 2 dimension(s), got [3]"),
            BadSample(
                lambda: linear(_float(2, 3), placeholder("bfloat16", [4, 3])), DTypeError, "x and weight to have one"
            ),
        ]
        return good, bad


def _rows(x: Tensor) -> Tensor:
    """``(..., n)`` as a matrix with all that stands before the last dimension in its rows."""
    return x if x.ndim == 2 else to_shape(x, (math.prod(x.shape[:-1]), x.shape[-1]))


def _swapped(x: Tensor) -> Tensor:
    """The transpose of each matrix."""
    return build("transpose", (x,), {"dim0": x.ndim - 2, "dim1": x.ndim - 1})


def _float(*shape: int | IntSymbol) -> Tensor:
    return placeholder("float32", shape)


def matmul(a: Tensor, b: Tensor, name: str | None = None) -> Tensor:
    """Multiplies matrices: ``a @ b``, with the cases of ``torch.matmul``.

    Args:
        a: Floating, ``(..., n, k)`` or a vector ``(k,)``.
        b: ``(..., k, m)`` or a vector ``(k,)``, of a's dtype. Dimensions before the last two broadcast.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        ``(..., n, m)`` of the same dtype; without n if a is a vector, and without m if b is one.

    Raises:
        ShapeError: If the sizes don't fit, or an operand has no dimension.
        DTypeError: If the dtypes differ or are not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [1, 2], name="x")
        ...     y = hetu.matmul(x, hetu.transpose(x, 0, 1))
        >>> g.run(y, feed_dict={x: [[3.0, 4.0]]})
        tensor([[25.]])
    """
    return build("matmul", (a, b), name=name)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, name: str | None = None) -> Tensor:
    """Applies a linear layer: ``x @ weight.T + bias``, as ``torch.nn.functional.linear``.

    Source: ``torch.nn.functional.linear``.

    Args:
        x: Floating, ``(..., in)``.
        weight: ``(out, in)``, of x's dtype.
        bias: ``(out,)``, of x's dtype. None adds nothing.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        ``(..., out)`` of the same dtype.

    Raises:
        ShapeError: If the sizes don't fit.
        DTypeError: If the dtypes differ or are not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [1, 2], name="x")
        ...     y = hetu.linear(x, hetu.constant([[1.0, 1.0], [2.0, 0.0]]), hetu.constant([0.5, 0.0]))
        >>> g.run(y, feed_dict={x: [[3.0, 4.0]]})
        tensor([[7.5000, 6.0000]])
    """
    return build("linear", (x, weight, bias), name=name)
