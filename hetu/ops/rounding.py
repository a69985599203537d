"""Magnitudes, rounding and bounds of each element: abs, floor, round, clamp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetu.dtypes import bool_, float32, int64
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Tensor, TensorSpec, register
from hetu.ops.choice import where
from hetu.ops.common.build import broadcast, build, output, result_type, tensor
from hetu.ops.common.elementwise import Operand, Pointwise, check_fits
from hetu.ops.common.gradients import single, unbroadcast, zeros_like
from hetu.ops.common.samples import eighths, not_zero, whole_numbers
from hetu.ops.compare import ge, gt, le, lt
from hetu.ops.sources import placeholder

__all__ = ["abs", "clamp", "floor", "round"]

Samples = tuple[Sequence[GoodSample], Sequence[BadSample]]


@register
class Abs(OpDef):
    """``x`` without its sign."""

    name = "abs"
    inputs = ("x",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        if x.dtype == bool_:
            call.fail(DTypeError, "can't take magnitudes of bools", "cast them to an int dtype")
        return [output(call, x.dtype, x.symbolic_shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (x,) = single(grads), node.tensors
        return [lambda: where(gt(x, 0), grad, where(lt(x, 0), grad * -1.0, 0.0))]

    def samples(self) -> Samples:
        signed = not_zero(3, 5) * np.where(np.arange(15).reshape(3, 5) % 2, -1, 1).astype("float32")
        good = [
            GoodSample(abs, [signed], np.abs, [(0, 0)]),
            GoodSample(abs, [np.array([0.0, -0.0, -np.inf, np.nan])], np.abs, smooth=False),
            GoodSample(abs, [whole_numbers(7)], np.abs),
            GoodSample(abs, [whole_numbers(3, dtype="uint8", low=0)], np.abs),
            GoodSample(abs, [eighths(0, 3, dtype="float16")], np.abs),
        ]
        bad = [
            BadSample(lambda: abs(placeholder(bool_, [3])), DTypeError, "can't take magnitudes of bools"),
            BadSample(lambda: abs(1.0), DTypeError, "x to be a tensor, got 1.0"),  # type: ignore[arg-type]
        ]
        return good, bad


class _Rounding(Pointwise):
    """The base of functions to whole numbers. Their slope is 0 wherever they have one."""

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: zeros_like(node.tensors[0])]


def _rounding_samples(function: Callable[..., Tensor], reference: Callable[..., np.ndarray]) -> Samples:
    good = [
        GoodSample(function, [eighths(3, 5) + np.float32(1 / 16)], reference, [(0, 0)]),  # beside all steps
        GoodSample(function, [np.array([0.5, -0.5, 1.5, 2.5, -2.0, np.inf, np.nan])], reference, smooth=False),
        GoodSample(function, [eighths(0, 3, dtype="float16")], reference),
    ]
    return good, [BadSample(lambda: function(placeholder(int64, [3])), DTypeError, "expected x to be floating")]


@register
class Floor(_Rounding):
    """The greatest whole number that is at most ``x``."""

    name = "floor"

    def samples(self) -> Samples:
        return _rounding_samples(floor, np.floor)


@register
class Round(_Rounding):
    """The nearest whole number; of two the even one."""

    name = "round"

    def samples(self) -> Samples:
        return _rounding_samples(round, np.round)


@register
class Clamp(OpDef):
    """``x`` between two bounds, of which one may be missing."""

    name = "clamp"
    inputs = ("x", "min", "max")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        given = [item for item in call.inputs if item is not None]
        if len(given) == 1:
            call.fail(DTypeError, "expected min or max to be a tensor or a number, got None for both", "give a bound")
        dtype, shape = result_type(given), x.shape
        if dtype == bool_:
            call.fail(DTypeError, "can't clamp bools", "cast them to an int dtype")
        for what, item in zip(self.inputs, call.inputs, strict=True):
            check_fits(call, item, dtype, what)
            if isinstance(item, Tensor):
                shape = broadcast(call, shape, item.shape)
        return [output(call, dtype, shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (x, low, high) = single(grads), node.inputs
        assert isinstance(x, Tensor)

        def of_x() -> Tensor:
            inner = grad
            if low is not None:
                inner = where(ge(x, low), inner, 0.0)  # 0 for a NaN, too, as torch has it
            if high is not None:
                inner = where(le(x, high), inner, 0.0)
            return unbroadcast(inner, x)

        def of_low() -> Tensor:
            chosen = where(lt(x, _bound(low)), grad, 0.0)  # unless the other bound, which has the last word, is lower
            return unbroadcast(chosen if high is None else where(_holds(low, high), chosen, 0.0), low)

        def of_high() -> Tensor:
            chosen = where(gt(x, _bound(high)), grad, 0.0)
            return unbroadcast(chosen if low is None else where(_holds(low, high), chosen, grad), high)

        return [of_x, of_low, of_high]

    def samples(self) -> Samples:
        wide = eighths(3, 5) + np.float32(1 / 16)  # beside the bounds
        low, high = eighths(5, seed=1), eighths(3, 1, seed=2)
        good = [
            GoodSample(lambda x: clamp(x, -1, 1.5), [wide], lambda x: np.clip(x, -1, 1.5), [(0, 0)]),
            GoodSample(lambda x: clamp(x, min=0), [wide], lambda x: np.maximum(x, 0), [(0, 1)]),
            GoodSample(lambda x: clamp(x, max=0.5), [wide], lambda x: np.minimum(x, 0.5)),
            GoodSample(clamp, [wide, low, high], _clip, [(0, 0), (2, 0)]),  # some in the wrong order
            GoodSample(lambda x, high: clamp(x, 0.25, high), [wide, high], lambda x, h: _clip(x, 0.25, h)),
            GoodSample(lambda x, low: clamp(x, low, 0.25), [wide, low], lambda x, low: _clip(x, low, 0.25)),
            GoodSample(lambda x: clamp(x, x.symbolic_shape[0] - 3), [whole_numbers(5)], _from_below, [(0, 0)]),
            GoodSample(lambda x: clamp(x, 0.5), [whole_numbers(5)], lambda x: np.maximum(x, 0.5)),
            GoodSample(
                lambda x: clamp(x, 0, 1), [np.array([np.nan, np.inf])], lambda x: np.clip(x, 0, 1), smooth=False
            ),
            GoodSample(lambda x: clamp(x, 0, 1), [eighths(0, 3, dtype="float16")], lambda x: x),
        ]
        bad = [
            BadSample(lambda: clamp(_float(2)), DTypeError, "got None for both"),
            BadSample(lambda: clamp(_float(2), _float(3)), ShapeError, "2 and 3 differ"),
            BadSample(lambda: clamp(placeholder("int8", [2]), 0, 300), DTypeError, "max of 300 does not fit hetu.int8"),
            BadSample(lambda: clamp(placeholder(bool_, [2]), max=True), DTypeError, "can't clamp bools"),
        ]
        return good, bad


def _clip(x: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    clipped: np.ndarray = np.minimum(np.maximum(x, low), high)
    return clipped


def _from_below(x: np.ndarray) -> Any:
    return np.maximum(x, len(x) - 3)


def _bound(item: Operand | None) -> Operand:
    assert item is not None, "a bound with a gradient is a tensor"
    return item


def _holds(low: Operand | None, high: Operand | None) -> Tensor:
    """Where the bounds are in order; one of them is a tensor."""
    return le(_bound(low), _bound(high))


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def abs(x: Tensor, name: str | None = None) -> Tensor:
    """Takes the magnitude of each element. Its gradient at 0 is 0.

    Args:
        x: Any dtype but bool, any shape.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        DTypeError: If x is bool, or no tensor.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.abs(x)
        >>> g.run(y, feed_dict={x: [-1.5, 2.0]})
        tensor([1.5000, 2.0000])
    """
    return build("abs", (x,), name=name)


def floor(x: Tensor, name: str | None = None) -> Tensor:
    """Rounds down to whole numbers. Its gradient is 0.

    Args:
        x: Floating, any shape.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        DTypeError: If x is not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.floor(x)
        >>> g.run(y, feed_dict={x: [-1.5, 2.75]})
        tensor([-2.,  2.])
    """
    return build("floor", (x,), name=name)


def round(x: Tensor, name: str | None = None) -> Tensor:
    """Rounds to the nearest whole numbers, halves to even ones, as ``torch.round``. Its gradient is 0.

    Args:
        x: Floating, any shape.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        DTypeError: If x is not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3], name="x")
        ...     y = hetu.round(x)
        >>> g.run(y, feed_dict={x: [0.5, 1.5, 2.75]})
        tensor([0., 2., 3.])
    """
    return build("round", (x,), name=name)


def clamp(x: Tensor, min: Operand | None = None, max: Operand | None = None, name: str | None = None) -> Tensor:
    """Bounds each element from below, from above or both, as ``torch.clamp``. Broadcasts as :func:`hetu.add` does.

    Where ``min`` is above ``max`` the result is ``max``. An element on a bound keeps its gradient; what is bounded
    passes its own to the bound if that is a tensor.

    Args:
        x: Any dtype but bool, any shape.
        min: The least value: a tensor, a number or an IntSymbol; None for no bound.
        max: The greatest value, as min. One of the two must be given.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of the common shape; its dtype is that of ``torch.result_type`` of all. NaN stays NaN.

    Raises:
        ShapeError: If the shapes don't broadcast.
        DTypeError: If there is no bound, all are bools, or an int does not fit the dtype.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3], name="x")
        ...     y = hetu.clamp(x, -1, 1)
        >>> g.run(y, feed_dict={x: [-2.0, 0.5, 2.0]})
        tensor([-1.0000,  0.5000,  1.0000])
    """
    return build("clamp", (x, min, max), name=name)
