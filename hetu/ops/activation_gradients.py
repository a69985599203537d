"""What the gradients of the activations are made of: for each its derivative times a gradient, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hetu.graph import Call, Node, Tensor, TensorSpec, register
from hetu.ops.common.build import build, output, tensor
from hetu.ops.common.gradients import single, zeros_like
from hetu.ops.common.layers import GradientOp


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
class ReluGrad(_ActivationGrad):
    """``grad`` where ``out`` is not 0."""

    name = "relu_grad"
    inputs = ("grad", "out")

    def curvature(self, grad: Tensor, x: Tensor, node: Node) -> Tensor:
        return zeros_like(x)


@register
class SigmoidGrad(_ActivationGrad):
    """``grad * out * (1 - out)``."""

    name = "sigmoid_grad"
    inputs = ("grad", "out")

    def curvature(self, grad: Tensor, x: Tensor, node: Node) -> Tensor:
        return grad * (1 - 2 * x)


@register
class TanhGrad(_ActivationGrad):
    """``grad * (1 - out ** 2)``."""

    name = "tanh_grad"
    inputs = ("grad", "out")

    def curvature(self, grad: Tensor, x: Tensor, node: Node) -> Tensor:
        return grad * x * -2


@register
class SiluGrad(_ActivationGrad):
    """``grad * s * (1 + x * (1 - s))`` with ``s = sigmoid(x)``."""

    name = "silu_grad"

    def curvature(self, grad: Tensor, x: Tensor, node: Node) -> Tensor:
        s = build("sigmoid", (x,))
        return grad * s * (1 - s) * (2 + x * (1 - 2 * s))


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
