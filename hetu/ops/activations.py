"""Activations: functions of each element that make a network non-linear, each beside the op of its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetu.arguments import choice
from hetu.dtypes import bfloat16, int64
from hetu.errors import DTypeError, HetuError
from hetu.graph import BadSample, Call, GoodSample, Node, Tensor, TensorSpec, register
from hetu.ops.common.build import build, output, tensor
from hetu.ops.common.elementwise import Pointwise
from hetu.ops.common.gradients import single, zeros_like
from hetu.ops.common.layers import GradientOp
from hetu.ops.common.samples import eighths, not_zero
from hetu.ops.nn import cast
from hetu.ops.sources import placeholder

__all__ = ["gelu", "relu", "sigmoid", "silu", "tanh"]


class _ActivationGrad(GradientOp):
    """``grad * f'(x)``, from x or from ``out = f(x)``. Linear in ``grad``, so it is its own rule for that one."""

    inputs = ("grad", "x")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 1, "x")
        return [output(call, x.dtype, x.symbolic_shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        outer, (grad, x) = single(grads), node.tensors
        return [lambda: build(self.name, (outer, x), node.attrs), lambda: self.curvature(outer * grad, x, node)]

    def curvature(self, grad: Tensor, x: Tensor, node: Node) -> Tensor:
        """``grad`` times the derivative of what this op multiplies by."""
        raise NotImplementedError


@register
class Relu(Pointwise):
    """``max(x, 0)``."""

    name = "relu"

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("relu_grad", (grads[0], node.outputs[0]))]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def reference(x: np.ndarray) -> Any:
            return np.maximum(x, 0)

        signed = not_zero(3, 5) * np.where(np.arange(15).reshape(3, 5) % 2, -1, 1).astype("float32")
        good = [
            GoodSample(relu, [signed], reference, [(0, 0)]),
            GoodSample(relu, [np.array([-0.5, 0.0, np.inf, -np.inf, np.nan])], reference, smooth=False),
            GoodSample(relu, [eighths(0, 3)], reference),
            GoodSample(lambda x: relu(cast(x, bfloat16)), [eighths(7)], reference, smooth=False),
        ]
        return good, [BadSample(lambda: relu(placeholder(int64, [3])), DTypeError, "expected x to be floating")]


@register
class ReluGrad(_ActivationGrad):
    """``grad`` where ``out`` is not 0."""

    name = "relu_grad"
    inputs = ("grad", "out")

    def curvature(self, grad: Tensor, x: Tensor, node: Node) -> Tensor:
        return zeros_like(x)


@register
class Sigmoid(Pointwise):
    """``1 / (1 + exp(-x))``."""

    name = "sigmoid"

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("sigmoid_grad", (grads[0], node.outputs[0]))]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def reference(x: np.ndarray) -> Any:
            return 1 / (1 + np.exp(-x))

        good = [
            GoodSample(sigmoid, [eighths(3, 5)], reference, [(0, 0)]),
            GoodSample(sigmoid, [np.array([-1000.0, 1000.0])], reference),  # so far out that exp alone overflows
            GoodSample(sigmoid, [eighths(1, dtype="float16")], reference),
            GoodSample(sigmoid, [eighths(0, 3)], reference),
        ]
        return good, [BadSample(lambda: sigmoid(placeholder(int64, [3])), DTypeError, "expected x to be floating")]


@register
class SigmoidGrad(_ActivationGrad):
    """``grad * out * (1 - out)``."""

    name = "sigmoid_grad"
    inputs = ("grad", "out")

    def curvature(self, grad: Tensor, x: Tensor, node: Node) -> Tensor:
        return grad * (1 - 2 * x)


@register
class Tanh(Pointwise):
    """The hyperbolic tangent."""

    name = "tanh"

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("tanh_grad", (grads[0], node.outputs[0]))]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(tanh, [eighths(3, 5)], np.tanh, [(0, 0), (0, 1)]),
            GoodSample(tanh, [eighths(1, dtype="float16")], np.tanh),
            GoodSample(tanh, [eighths(0, 3)], np.tanh),
        ]
        return good, [BadSample(lambda: tanh(placeholder(int64, [3])), DTypeError, "expected x to be floating")]


@register
class TanhGrad(_ActivationGrad):
    """``grad * (1 - out ** 2)``."""

    name = "tanh_grad"
    inputs = ("grad", "out")

    def curvature(self, grad: Tensor, x: Tensor, node: Node) -> Tensor:
        return grad * x * -2


@register
class Silu(Pointwise):
    """``x * sigmoid(x)``."""

    name = "silu"

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("silu_grad", (grads[0], *node.inputs))]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def reference(x: np.ndarray) -> Any:
            return x / (1 + np.exp(-x))

        good = [
            GoodSample(silu, [eighths(3, 5)], reference, [(0, 0)]),
            GoodSample(silu, [eighths(1, dtype="float16")], reference),
            GoodSample(silu, [eighths(0, 3)], reference),
            GoodSample(lambda x: silu(cast(x, bfloat16)), [eighths(7)], reference, smooth=False),
        ]
        return good, [BadSample(lambda: silu(placeholder(int64, [3])), DTypeError, "expected x to be floating")]


@register
class SiluGrad(_ActivationGrad):
    """``grad * s * (1 + x * (1 - s))`` with ``s = sigmoid(x)``."""

    name = "silu_grad"

    def curvature(self, grad: Tensor, x: Tensor, node: Node) -> Tensor:
        s = build("sigmoid", (x,))
        return grad * s * (1 - s) * (2 + x * (1 - 2 * s))


@register
class Gelu(Pointwise):
    """``x`` times the normal distribution function of ``x``."""

    name = "gelu"

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        choice(call.attrs["approximate"], "approximate", ("none", "tanh"), op=call.op)
        return super().infer(call)

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("gelu_grad", (grads[0], *node.inputs), node.attrs)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def exact(x: np.ndarray) -> Any:
            erf = np.array([math.erf(item / math.sqrt(2)) for item in x.reshape(-1)]).reshape(x.shape)
            return x * (1 + erf) / 2

        def by_tanh(x: np.ndarray) -> Any:
            return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

        good = [
            GoodSample(gelu, [eighths(3, 5)], exact, [(0, 0)]),
            GoodSample(lambda x: gelu(x, approximate="tanh"), [eighths(3, 5, dtype="float64")], by_tanh, [(0, 1)]),
            GoodSample(gelu, [eighths(7, dtype="float16")], exact),
            GoodSample(gelu, [eighths(0, 1)], exact),
        ]
        bad = [
            BadSample(
                lambda: gelu(placeholder("float32", [2]), approximate="fast"),
                HetuError,
                '"none" or "tanh", got \'fast\'',
            ),
            BadSample(lambda: gelu(placeholder(int64, [3])), DTypeError, "expected x to be floating"),
        ]
        return good, bad


@register
class GeluGrad(_ActivationGrad):
    """``grad`` times the derivative of gelu, exact or of its approximation."""

    name = "gelu_grad"

    def curvature(self, grad: Tensor, x: Tensor, node: Node) -> Tensor:
        square = x * x
        if node.attrs["approximate"] == "none":
            return grad * build("exp", (square * -0.5,)) * (2 - square) / math.sqrt(2 * math.pi)
        # gelu(x) = x * (1 + t) / 2 with t = tanh(u), u = c * (x + k * x ** 3)
        c, k = math.sqrt(2 / math.pi), 0.044715
        t = build("tanh", (c * x * (1 + k * square),))
        first, second = c * (1 + 3 * k * square), 6 * c * k * x
        return grad * (1 - t * t) * (first + 0.5 * x * (second - 2 * t * first * first))


def relu(x: Tensor, name: str | None = None) -> Tensor:
    """Applies ``max(x, 0)``; NaN stays NaN.

    Its gradient at 0 is 0, as torch has it.

    Source: ``torch.nn.functional.relu``.

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
        ...     y = hetu.relu(x)
        >>> g.run(y, feed_dict={x: [-1.0, 2.0]})
        tensor([0., 2.])
    """
    return build("relu", (x,), name=name)


def sigmoid(x: Tensor, name: str | None = None) -> Tensor:
    """Applies the logistic function ``1 / (1 + exp(-x))``.

    Source: ``torch.sigmoid``.

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
        ...     y = hetu.sigmoid(x)
        >>> g.run(y, feed_dict={x: [0.0, 1.0]})
        tensor([0.5000, 0.7311])
    """
    return build("sigmoid", (x,), name=name)


def tanh(x: Tensor, name: str | None = None) -> Tensor:
    """Applies the hyperbolic tangent.

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
        ...     y = hetu.tanh(x)
        >>> g.run(y, feed_dict={x: [0.0, 1.0]})
        tensor([0.0000, 0.7616])
    """
    return build("tanh", (x,), name=name)


def silu(x: Tensor, name: str | None = None) -> Tensor:
    """Applies ``x * sigmoid(x)`` (also named swish).

    Source: Elfwing, Uchibe and Doya, "Sigmoid-Weighted Linear Units", 2017, equation 4;
    ``torch.nn.functional.silu``.

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
        ...     y = hetu.silu(x)
        >>> g.run(y, feed_dict={x: [0.0, 1.0]})
        tensor([0.0000, 0.7311])
    """
    return build("silu", (x,), name=name)


def gelu(x: Tensor, approximate: str = "none", name: str | None = None) -> Tensor:
    """Applies ``x * Phi(x)``, Phi being the standard normal distribution function.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; the approximation is
    ``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))``.

    Args:
        x: Floating, any shape.
        approximate: ``"none"``, or ``"tanh"`` for the approximation.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        DTypeError: If x is not floating.
        HetuError: If approximate is none of these.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.gelu(x)
        >>> g.run(y, feed_dict={x: [0.0, 1.0]})
        tensor([0.0000, 0.8413])
    """
    return build("gelu", (x,), {"approximate": approximate}, name)
