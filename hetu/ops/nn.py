"""Casts, embeddings, one_hot, softmax: what models need besides products of matrices, norms and attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetu.dtypes import DType, as_dtype, bfloat16, float32, int64
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, IndexRange, Node, OpDef, Tensor, TensorSpec, register
from hetu.ops.common.build import axis, build, floating, output, rank, size, tensor
from hetu.ops.common.layers import GradientOp, check_indices
from hetu.ops.common.samples import eighths, whole_numbers
from hetu.ops.sources import placeholder
from hetu.symbols import IntSymbol

__all__ = ["cast", "embedding", "one_hot", "softmax"]


@register
class Cast(OpDef):
    """The same values in another element type."""

    name = "cast"
    is_view = True
    inputs = ("x",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        return [output(call, call.attrs["dtype"], x.symbolic_shape)]

    def keeps_values(self, node: Node) -> bool:
        old, new = node.tensors[0].dtype, node.outputs[0].dtype
        return old == new or (old.kind == new.kind == "int" and new.itemsize > old.itemsize)

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("cast", grads, {"dtype": node.tensors[0].dtype})]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(lambda x: cast(x, bfloat16), [eighths(3, 5)], lambda x: x, [(0, 0)], smooth=False),
            GoodSample(lambda x: cast(x, "float16"), [eighths(0, 5)], lambda x: x, smooth=False),
            GoodSample(lambda x: cast(x, np.int32), [eighths(5)], np.trunc, [(0, 0)], smooth=False),
            GoodSample(lambda x: cast(x, "bool"), [whole_numbers(5)], lambda x: x != 0),
            GoodSample(lambda x: cast(x, float32), [whole_numbers(1, dtype="int8")], lambda x: x),
            GoodSample(lambda x: cast(x, "float64"), [eighths(dtype="float64")], lambda x: x),
            GoodSample(lambda x: cast(x, "float64"), [eighths(3, 5)], lambda x: x, [(0, 1)]),
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
        fix = f"cast them: hetu.cast({ids.name}, hetu.int64), and give the ids first, the table second"
        check_indices(call, ids, "ids", fix)
        floating(call, weight, "weight")
        rank(call, weight, "weight", 2, 2)
        return [output(call, weight.dtype, (*ids.symbolic_shape, weight.symbolic_shape[1]))]

    def index_ranges(self, node: Node) -> Sequence[IndexRange]:
        return [IndexRange("ids", node.tensors[1].symbolic_shape[0])]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        ids, weight = node.tensors
        return [None, lambda: build("embedding_grad", (ids, grads[0]), {"rows": weight.symbolic_shape[0]})]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def rows(ids: np.ndarray, weight: np.ndarray) -> Any:
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
class EmbeddingGrad(GradientOp):
    """The gradient of a table: each of its rows is the sum of the gradients of its uses."""

    name = "embedding_grad"
    inputs = ("ids", "grad")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        grad = tensor(call, 1, "grad")
        return [output(call, grad.dtype, (call.attrs["rows"], grad.symbolic_shape[-1]))]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [None, lambda: build("embedding", (node.inputs[0], grads[0]))]

    def index_ranges(self, node: Node) -> Sequence[IndexRange]:
        return [IndexRange("ids", node.attrs["rows"])]


@register
class OneHot(OpDef):
    """A row per id that is 1 in the id's place, and 0 elsewhere."""

    name = "one_hot"
    inputs = ("ids", "num_classes")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        ids, count = tensor(call, 0, "ids"), size(call, call.inputs[1], "num_classes")
        check_indices(call, ids, "ids")
        call.check(count >= 0, f"expected num_classes to be at least 0, got {count}")
        return [output(call, int64, (*ids.symbolic_shape, count))]

    def index_ranges(self, node: Node) -> Sequence[IndexRange]:
        count: Any = node.inputs[1]
        return [IndexRange("ids", count)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def rows(count: int) -> Callable[[np.ndarray], np.ndarray]:
            return lambda ids: np.eye(count, dtype="int64")[ids]

        def ids(*shape: int, dtype: str = "int64") -> np.ndarray:
            return whole_numbers(*shape, dtype=dtype, low=0, high=3)

        good = [
            GoodSample(lambda x: one_hot(x, 4), [ids(5)], rows(4), [(0, 0)]),
            GoodSample(lambda x: one_hot(x, 3), [ids(2, 3, dtype="int32")], rows(3), [(0, 1)]),
            GoodSample(lambda x: one_hot(x, x.symbolic_shape[0]), [ids(7)], lambda x: rows(len(x))(x), [(0, 0)]),
            GoodSample(lambda x: one_hot(x, 3), [ids()], rows(3)),
            GoodSample(lambda x: one_hot(x, 0), [ids(0, 2)], lambda x: np.zeros((0, 2, 0))),
        ]
        ints = placeholder
        bad = [
            BadSample(lambda: one_hot(_float(2), 3), DTypeError, "ids to be int32 or int64"),
            BadSample(lambda: one_hot(ints(int64, [2]), -1), ShapeError, "num_classes to be at least 0, got -1"),
            BadSample(lambda: one_hot(ints(int64, [2]), 2.0), ShapeError, "num_classes to be an int"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class Softmax(OpDef):
    """Exponentials that sum to 1 along a dimension."""

    name = "softmax"
    inputs = ("x",)
    precision = "high"

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        floating(call, x, "x")
        call.attrs["dim"] = axis(call, call.attrs["dim"], x.ndim)
        return [output(call, x.dtype, x.symbolic_shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("softmax_grad", (grads[0], node.outputs[0]), node.attrs)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def along(dim: int) -> Any:
            def reference(x: np.ndarray) -> Any:
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


@register
class SoftmaxGrad(GradientOp):
    """``out * (grad - sum(grad * out))``, the sum along the dimension of the softmax."""

    name = "softmax_grad"
    inputs = ("grad", "out")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        out = tensor(call, 1, "out")
        return [output(call, out.dtype, out.symbolic_shape)]


def _float(*shape: int | IntSymbol) -> Tensor:
    return placeholder(float32, shape)


def cast(x: Tensor, dtype: DType | Any, name: str | None = None) -> Tensor:
    """Converts to another element type.

    Floats become ints without their fraction; the result is undefined if it does not fit, as in torch. A cast to bool
    gives True for all but zero.

    Args:
        x: Any dtype and shape.
        dtype: A hetu, numpy or torch dtype, or its name.
        name: The node's name, unique in the graph; None makes one up.

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
        ids: int32 or int64, any shape, values from 0 to below the table's number of rows, which a run checks where it
            can without waiting for a device.
        weight: The table, floating, ``(rows, width)``.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        ``(*ids.shape, width)`` of the table's dtype.

    Raises:
        DTypeError: If ids are not int32 or int64, or the table is not floating.
        ShapeError: If the table does not have two dimensions.
        BindingError: If an id is out of range, which a run checks.

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


def one_hot(ids: Tensor, num_classes: int | IntSymbol, name: str | None = None) -> Tensor:
    """Gives a row per id that is 1 in the id's place and 0 elsewhere, as ``torch.nn.functional.one_hot``.

    Args:
        ids: int32 or int64, any shape, values from 0 to below ``num_classes``, which a run checks where it can without
            waiting for a device.
        num_classes: How many columns a row has.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        ``(*ids.shape, num_classes)``, int64.

    Raises:
        DTypeError: If ids are not int32 or int64.
        ShapeError: If ``num_classes`` is negative or no int.
        BindingError: If an id is out of range, which a run checks.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     ids = hetu.placeholder(hetu.int64, [2], name="ids")
        ...     rows = hetu.one_hot(ids, 3)
        >>> g.run(rows, feed_dict={ids: [2, 0]})
        tensor([[0, 0, 1],
                [1, 0, 0]])
    """
    return build("one_hot", (ids, num_classes), name=name)


def softmax(x: Tensor, dim: int = -1, name: str | None = None) -> Tensor:
    """Applies ``exp(x) / sum(exp(x))`` along a dimension. Half precision is computed in float32.

    Source: ``torch.softmax``.

    Args:
        x: Floating, at least one dimension.
        dim: The dimension; negative ones count from the end.
        name: The node's name, unique in the graph; None makes one up.

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
