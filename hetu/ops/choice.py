"""The choice between elements: where, masked_fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hetu.dtypes import bool_, float32
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Tensor, TensorSpec, register
from hetu.ops.common.build import broadcast, build, output, result_type, show, stretched_to, tensor
from hetu.ops.common.elementwise import Operand, check_fits
from hetu.ops.common.gradients import single, unbroadcast
from hetu.ops.common.samples import eighths, not_zero, whole_numbers
from hetu.ops.sources import placeholder

__all__ = ["masked_fill", "where"]


@register
class Where(OpDef):
    """``a`` where a condition holds, ``b`` elsewhere."""

    name = "where"
    inputs = ("condition", "a", "b")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        condition = tensor(call, 0, "condition")
        if condition.dtype != bool_:
            fix = f"compare it with something, or cast it: hetu.cast({condition.name}, hetu.bool)"
            call.fail(DTypeError, f"expected condition to be bool, got {condition.dtype}", fix)
        dtype, shape = result_type(call.inputs[1:]), condition.shape
        for what, item in zip(self.inputs[1:], call.inputs[1:], strict=True):
            if item is None:
                call.fail(DTypeError, f"expected {what} to be a tensor or a number, got None")
            check_fits(call, item, dtype, what)
            if isinstance(item, Tensor):
                shape = broadcast(call, shape, item.shape)
        return [output(call, dtype, shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (condition, a, b) = single(grads), node.inputs
        return [
            None,
            lambda: unbroadcast(build("where", (condition, grad, 0.0)), a),
            lambda: unbroadcast(build("where", (condition, 0.0, grad)), b),
        ]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        mask = whole_numbers(3, 5) > 0
        good = [
            GoodSample(where, [mask, eighths(3, 5), eighths(3, 5, seed=1)], np.where, [(0, 0), (1, 0), (2, 0)]),
            GoodSample(where, [mask[0], eighths(3, 1), eighths(5, seed=1)], np.where),
            GoodSample(where, [mask, eighths(dtype="float64"), eighths(5, dtype="float16")], np.where),
            GoodSample(where, [mask[:, :1], whole_numbers(5), eighths(5, dtype="float16")], np.where),
            GoodSample(
                lambda c, a: where(c, a, 0), [mask, eighths(3, 5)], lambda c, a: np.where(c, a, 0), [(0, 1), (1, 1)]
            ),
            GoodSample(lambda c, b: where(c, -1.5, b), [mask, whole_numbers(5)], lambda c, b: np.where(c, -1.5, b)),
            GoodSample(lambda c: where(c, 1, 0), [mask], lambda c: np.where(c, 1, 0)),
            GoodSample(
                lambda c: where(c, 0.5, c.symbolic_shape[0]), [mask], lambda c: np.where(c, 0.5, len(c)), [(0, 0)]
            ),
            # A NaN that is not chosen leaves no trace.
            GoodSample(where, [mask[0], not_zero(5), np.full(5, np.nan, "float32")], np.where, smooth=False),
            GoodSample(where, [mask[:0], eighths(0, 5), eighths(1, 5)], np.where),
        ]
        condition = placeholder
        bad = [
            BadSample(lambda: where(_float(2), 1, 2), DTypeError, "condition to be bool, got hetu.float32"),
            BadSample(lambda: where(True, _float(2), 2), DTypeError, "condition to be a tensor"),  # type: ignore[arg-type]
            BadSample(lambda: where(condition(bool_, [2]), _float(3), 0), ShapeError, "2 and 3 differ"),
            BadSample(lambda: where(condition(bool_, [2]), None, 0), DTypeError, "expected a to be"),  # type: ignore[arg-type]
            BadSample(
                lambda: where(condition(bool_, [2]), condition("int8", [2]), 200), DTypeError, "200 does not fit"
            ),
        ]
        return good, bad


@register
class MaskedFill(OpDef):
    """``x`` with one value wherever a mask holds."""

    name = "masked_fill"
    inputs = ("x", "mask", "value")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x, mask, value = tensor(call, 0, "x"), tensor(call, 1, "mask"), call.inputs[2]
        if mask.dtype != bool_:
            fix = f"compare it with something, or cast it: hetu.cast({mask.name}, hetu.bool)"
            call.fail(DTypeError, f"expected mask to be bool, got {mask.dtype}", fix)
        if value is None or (isinstance(value, Tensor) and value.ndim):
            what = "None" if value is None else f"shape {show(value.shape)}"
            call.fail(ShapeError, f"expected value to be a number or without dimensions, got {what}", "see hetu.where")
        if result_type((x, value)) != x.dtype:
            call.fail(DTypeError, f"expected value to fit {x.dtype}, got {value}", f"cast {x.name} first")
        check_fits(call, value, x.dtype, "value")
        stretched_to(call, mask, x.symbolic_shape, "mask")
        return [output(call, x.dtype, x.symbolic_shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (_, mask, value) = single(grads), node.inputs
        return [
            lambda: build("masked_fill", (grad, mask, 0.0)),
            None,
            lambda: unbroadcast(build("where", (mask, grad, 0.0)), value),
        ]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def filled(x: np.ndarray, mask: np.ndarray, value: float = -1.5) -> np.ndarray:
            return np.where(mask, np.asarray(value, x.dtype), x)

        mask = whole_numbers(3, 5) > 0
        good = [
            GoodSample(lambda x, m: masked_fill(x, m, -1.5), [eighths(3, 5), mask], filled, [(0, 0), (1, 0)]),
            GoodSample(lambda x, m: masked_fill(x, m, -1.5), [eighths(3, 5, dtype="float16"), mask[0]], filled),
            GoodSample(masked_fill, [eighths(3, 5), mask[:, :1], eighths()], filled, [(0, 1)]),
            GoodSample(
                lambda x, m: masked_fill(x, m, x.symbolic_shape[0]),
                [whole_numbers(3), mask[:, 0]],
                lambda x, m: filled(x, m, len(x)),
                [(0, 0), (1, 0)],
            ),
            GoodSample(
                lambda x, m: masked_fill(x, m, 0),
                [np.full(5, np.nan), mask[0]],
                lambda x, m: filled(x, m, 0),
                smooth=False,
            ),
            GoodSample(lambda x, m: masked_fill(x, m, True), [mask[:0], mask[:0]], lambda x, m: x),
        ]
        bad = [
            BadSample(lambda: masked_fill(_float(2), _float(2), 0), DTypeError, "mask to be bool, got hetu.float32"),
            BadSample(lambda: masked_fill(_float(2), _mask(3), 0), ShapeError, "[3] can be stretched to"),
            BadSample(lambda: masked_fill(_float(1), _mask(3), 0), ShapeError, "[3] can be stretched to"),
            BadSample(lambda: masked_fill(_float(2), _mask(2), None), ShapeError, "without dimensions, got None"),  # type: ignore[arg-type]
            BadSample(lambda: masked_fill(_float(2), _mask(2), _float(2)), ShapeError, "got shape [2]"),
            BadSample(lambda: masked_fill(placeholder("int8", [2]), _mask(2), 0.5), DTypeError, "to fit hetu.int8"),
            BadSample(lambda: masked_fill(placeholder("int8", [2]), _mask(2), 300), DTypeError, "300 does not fit"),
        ]
        return good, bad


def _mask(*shape: int) -> Tensor:
    return placeholder(bool_, shape)


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def where(condition: Tensor, a: Operand, b: Operand, name: str | None = None) -> Tensor:
    """Takes elements of ``a`` where a condition holds, and of ``b`` elsewhere. Broadcasts as :func:`hetu.add` does.

    An element that is not chosen gets the gradient 0.

    Args:
        condition: A bool tensor of any shape.
        a: A tensor of any dtype and shape, a number, or an IntSymbol.
        b: As a.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of the common shape of all three; its dtype is that of ``torch.result_type`` of a and b.

    Raises:
        ShapeError: If the shapes don't broadcast.
        DTypeError: If the condition is no bool tensor, or an int does not fit the dtype.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.where(x > 0, x, 0.5)
        >>> g.run(y, feed_dict={x: [2.0, -2.0]})
        tensor([2.0000, 0.5000])
    """
    return build("where", (condition, a, b), name=name)


def masked_fill(x: Tensor, mask: Tensor, value: Operand, name: str | None = None) -> Tensor:
    """Puts a value wherever a mask holds, as ``torch.masked_fill``. What is overwritten gets the gradient 0.

    Args:
        x: Any dtype and shape.
        mask: A bool tensor that broadcasts to x's shape, as :func:`hetu.broadcast_to` does.
        value: A number, an IntSymbol, or a tensor without dimensions, of a kind that x's dtype holds.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        ShapeError: If the mask can't be stretched to x's shape, or the value has dimensions.
        DTypeError: If the mask is not bool, or the value does not fit x's dtype.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.masked_fill(x, x < 0, 0.5)
        >>> g.run(y, feed_dict={x: [2.0, -2.0]})
        tensor([2.0000, 0.5000])
    """
    return build("masked_fill", (x, mask, value), name=name)
