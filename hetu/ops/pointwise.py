"""Exponentials, logarithms, sines, roots and powers of each element."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetu.dtypes import DType, bool_, float32, int64
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, Tensor, register
from hetu.ops.choice import where
from hetu.ops.common.build import build
from hetu.ops.common.elementwise import Elementwise, Operand, Pointwise
from hetu.ops.common.gradients import single, to_dtype, unbroadcast, zeros_like
from hetu.ops.common.samples import eighths, not_zero, whole_numbers
from hetu.ops.compare import eq, ge
from hetu.ops.nn import cast
from hetu.ops.sources import placeholder
from hetu.symbols import IntSymbol, minimum

__all__ = ["cos", "exp", "log", "pow", "rsqrt", "sin", "sqrt"]


@register
class Exp(Pointwise):
    """``e ** x``."""

    name = "exp"
    precision = "high"

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: single(grads) * node.outputs[0]]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(exp, [eighths(3, 5)], np.exp, [(0, 0)]),
            GoodSample(exp, [eighths(1, dtype="float16")], np.exp),
            GoodSample(exp, [eighths(0, 3)], np.exp),
            GoodSample(exp, [np.array([-np.inf, 800.0])], np.exp, smooth=False),
            GoodSample(lambda x: exp(cast(x, "bfloat16")), [eighths(5)], np.exp, smooth=False),
        ]
        return good, [BadSample(lambda: exp(placeholder(int64, [3])), DTypeError, "expected x to be floating")]


@register
class Log(Pointwise):
    """The natural logarithm."""

    name = "log"
    precision = "high"

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: single(grads) / node.tensors[0]]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(log, [not_zero(3, 5)], np.log, [(0, 0)]),
            GoodSample(log, [not_zero(1, dtype="float16")], np.log),
            GoodSample(log, [not_zero(0, 3)], np.log),
            GoodSample(log, [np.array([0.0, -1.0])], np.log, smooth=False),
        ]
        return good, [BadSample(lambda: log(placeholder(int64, [3])), DTypeError, "expected x to be floating")]


@register
class Sqrt(Pointwise):
    """The square root."""

    name = "sqrt"

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: single(grads) / (node.outputs[0] * 2)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(sqrt, [not_zero(3, 5)], np.sqrt, [(0, 0)]),
            GoodSample(sqrt, [not_zero(1, dtype="float16")], np.sqrt),
            GoodSample(sqrt, [not_zero(0, 3)], np.sqrt),
            GoodSample(sqrt, [np.array([0.0, -1.0])], np.sqrt, smooth=False),
        ]
        return good, [BadSample(lambda: sqrt(placeholder(int64, [3])), DTypeError, "expected x to be floating")]


@register
class Rsqrt(Pointwise):
    """One over the square root."""

    name = "rsqrt"
    precision = "high"

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: single(grads) * node.outputs[0] ** 3 * -0.5]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def reference(x: np.ndarray) -> Any:
            return 1 / np.sqrt(x)

        good = [
            GoodSample(rsqrt, [not_zero(3, 5)], reference, [(0, 0)]),
            GoodSample(rsqrt, [not_zero(1, dtype="float16")], reference),
            GoodSample(rsqrt, [not_zero(0, 3)], reference),
            GoodSample(rsqrt, [np.array([0.0, -1.0])], reference, smooth=False),
        ]
        return good, [BadSample(lambda: rsqrt(placeholder(int64, [3])), DTypeError, "expected x to be floating")]


@register
class Sin(Pointwise):
    """The sine of radians."""

    name = "sin"

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: single(grads) * cos(node.tensors[0])]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        return _wave_samples(sin, np.sin)


@register
class Cos(Pointwise):
    """The cosine of radians."""

    name = "cos"

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: single(grads) * sin(node.tensors[0]) * -1.0]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        return _wave_samples(cos, np.cos)


def _wave_samples(
    function: Callable[..., Tensor], reference: Callable[..., Any]
) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
    good = [
        GoodSample(function, [eighths(3, 5)], reference, [(0, 0)]),
        GoodSample(function, [eighths(1, dtype="float16")], reference),
        GoodSample(function, [eighths(0, 3, dtype="float64")], reference),
        GoodSample(function, [np.array([np.inf, np.nan, 1e6])], reference, smooth=False),
    ]
    return good, [BadSample(lambda: function(placeholder(int64, [3])), DTypeError, "expected x to be floating")]


@register
class Pow(Elementwise):
    """``base ** exponent``."""

    name = "pow"
    inputs = ("base", "exponent")
    precision = "high"

    def dtype(self, call: Call) -> DType:
        dtype, exponent = super().dtype(call), call.inputs[1]
        if dtype == bool_:
            call.fail(DTypeError, "can't take powers of bools", "cast them to an int dtype")
        if not dtype.is_floating and isinstance(exponent, (int, IntSymbol)):
            what = f"expected an exponent of at least 0 for a base of ints, got {exponent}"
            call.check(exponent >= 0, what, "cast the base to a floating dtype")
        return dtype

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (out,) = single(grads), node.outputs
        base: Any = node.inputs[0]
        exponent: Any = node.inputs[1]
        return [
            lambda: unbroadcast(_by_base(grad, base, exponent), base),
            lambda: unbroadcast(_by_exponent(grad, base, exponent, out), exponent),
        ]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def power(a: Any, b: Any) -> Any:
            return a**b

        small, zeros = whole_numbers(5, low=0, high=4), np.array([0.0, 0.0, 2.0, -2.0])
        good = [
            GoodSample(pow, [not_zero(3, 5), eighths(5, seed=1)], power, [(0, 0), (0, 1), (1, 0)]),
            GoodSample(lambda x: pow(x, 3), [eighths(3, 5)], lambda x: x**3, [(0, 0)]),
            GoodSample(lambda x: pow(x, 2), [eighths(7, dtype="float16")], lambda x: x**2),
            GoodSample(lambda x: pow(x, 1), [eighths(5)], lambda x: x),
            GoodSample(lambda x: pow(x, 0), [eighths(5)], lambda x: x**0),
            GoodSample(lambda x: pow(x, -1.5), [not_zero(5)], lambda x: x**-1.5),
            GoodSample(lambda x: pow(x, 0.5), [whole_numbers(5, low=0)], lambda x: x**0.5),
            GoodSample(lambda x: pow(2, x), [eighths(5)], lambda x: 2**x),
            GoodSample(lambda x: pow(0.5, x), [whole_numbers(5)], lambda x: 0.5**x),
            GoodSample(pow, [whole_numbers(5), small], power, [(0, 0), (1, 0)]),
            GoodSample(pow, [eighths(5, dtype="float16"), small], power),
            GoodSample(pow, [np.abs(zeros), np.array([0.0, 2.0, 0.0, 1.0])], power, smooth=False),
            GoodSample(lambda x: pow(x, x.symbolic_shape[0]), [eighths(3)], lambda x: x ** len(x), [(0, 0)]),
            GoodSample(lambda x: pow(x.symbolic_shape[0], x), [eighths(3)], lambda x: len(x) ** x, [(0, 0)]),
            GoodSample(lambda x: pow(x, 0.5), [not_zero(0, 3)], lambda x: x**0.5),
        ]
        bad = [
            BadSample(lambda: pow(_float(2), _float(3)), ShapeError, "2 and 3 differ"),
            BadSample(lambda: pow(placeholder(int64, [2]), -1), ShapeError, "at least 0 for a base of ints, got -1"),
            BadSample(lambda: pow(placeholder(bool_, [2]), True), DTypeError, "can't take powers of bools"),
            BadSample(lambda: pow(2, 3), DTypeError, "base or exponent to be a tensor"),
        ]
        return good, bad


def _by_base(grad: Tensor, base: Tensor, exponent: Any) -> Tensor:
    """``grad * exponent * base ** (exponent - 1)``, and 0 where the exponent is 0, whatever the base."""
    if isinstance(exponent, Tensor):
        power = to_dtype(exponent, grad.dtype)  # of uints and bools there is none that is less by 1
        return where(eq(power, 0), 0.0, grad * (base ** (power - 1) * power))
    if not isinstance(exponent, IntSymbol) and exponent == 0:
        return zeros_like(grad)
    # A symbol may be 0 in some runs: less by 1 only where it is not, so that 0 ** -1 never meets the factor 0.
    lower = exponent - (minimum(exponent * exponent, 1) if isinstance(exponent, IntSymbol) else 1)
    if not isinstance(lower, IntSymbol) and lower in (0, 1):
        return grad if lower == 0 else grad * (base * 2)
    derivative: Tensor = base**lower * exponent
    return grad * derivative


def _by_exponent(grad: Tensor, base: Any, exponent: Tensor, out: Tensor) -> Tensor:
    """``grad * out * log(base)``, and 0 where a base of 0 meets an exponent of at least 0."""
    if isinstance(base, (Tensor, IntSymbol)):
        one = grad.graph.apply("full", (), {"shape": (), "value": 1.0, "dtype": out.dtype})[0]
        values = to_dtype(base, out.dtype) if isinstance(base, Tensor) else one * base
        return where(eq(values, 0) * ge(exponent, 0), 0.0, grad * (out * log(values)))
    if base > 0:
        return grad * (out * math.log(base))
    return where(ge(exponent, 0), 0.0, grad * (out * -math.inf)) if base == 0 else grad * (out * math.nan)


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def exp(x: Tensor, name: str | None = None) -> Tensor:
    """Applies the exponential function: ``e ** x``.

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
        ...     y = hetu.exp(x)
        >>> g.run(y, feed_dict={x: [0.0, 1.0]})
        tensor([1.0000, 2.7183])
    """
    return build("exp", (x,), name=name)


def log(x: Tensor, name: str | None = None) -> Tensor:
    """Applies the natural logarithm. It gives ``-inf`` for 0 and NaN for negative numbers.

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
        ...     y = hetu.log(x)
        >>> g.run(y, feed_dict={x: [1.0, 2.0]})
        tensor([0.0000, 0.6931])
    """
    return build("log", (x,), name=name)


def sin(x: Tensor, name: str | None = None) -> Tensor:
    """Applies the sine to radians. It gives NaN for infinities.

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
        ...     y = hetu.sin(x)
        >>> g.run(y, feed_dict={x: [0.0, 1.0]})
        tensor([0.0000, 0.8415])
    """
    return build("sin", (x,), name=name)


def cos(x: Tensor, name: str | None = None) -> Tensor:
    """Applies the cosine to radians. It gives NaN for infinities.

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
        ...     y = hetu.cos(x)
        >>> g.run(y, feed_dict={x: [0.0, 1.0]})
        tensor([1.0000, 0.5403])
    """
    return build("cos", (x,), name=name)


def sqrt(x: Tensor, name: str | None = None) -> Tensor:
    """Applies the square root. It gives NaN for negative numbers.

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
        ...     y = hetu.sqrt(x)
        >>> g.run(y, feed_dict={x: [4.0, 2.0]})
        tensor([2.0000, 1.4142])
    """
    return build("sqrt", (x,), name=name)


def rsqrt(x: Tensor, name: str | None = None) -> Tensor:
    """Applies ``1 / sqrt(x)``. It gives ``inf`` for 0 and NaN for negative numbers.

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
        ...     y = hetu.rsqrt(x)
        >>> g.run(y, feed_dict={x: [4.0, 2.0]})
        tensor([0.5000, 0.7071])
    """
    return build("rsqrt", (x,), name=name)


def pow(base: Operand, exponent: Operand, name: str | None = None) -> Tensor:
    """Raises to a power element by element: ``base ** exponent``. Broadcasts as :func:`hetu.add` does.

    Args:
        base: A tensor of any dtype but bool and any shape, a number, or an IntSymbol.
        exponent: As base; one of the two must be a tensor. It must be at least 0 if both are ints.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of the common shape; its dtype is that of ``torch.result_type``. Fractional powers of negative
        numbers are NaN.

    Raises:
        ShapeError: If the shapes don't broadcast, or the exponent of ints is a number below 0.
        DTypeError: If both are bool, or :func:`hetu.add` would raise it.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.pow(x, 2)
        >>> g.run(y, feed_dict={x: [3.0, -0.5]})
        tensor([9.0000, 0.2500])
    """
    return build("pow", (base, exponent), name=name)
