"""Normalisation over the last dimension: rms_norm and layer_norm. Half precision is computed in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from hetu.dtypes import bfloat16, float32, float64, int64
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Tensor, TensorSpec, register
from hetu.ops.common.build import build, floating, output, rank, same_dtype, show, tensor
from hetu.ops.common.layers import GradientOp, check_eps
from hetu.ops.common.samples import eighths
from hetu.ops.nn import cast
from hetu.ops.sources import placeholder

__all__ = ["layer_norm", "rms_norm"]


class _Norm(OpDef):
    """The base of both norms. They keep one number per row for their gradients, as outputs of the node."""

    precision = "high"

    def check(self, call: Call) -> Tensor:
        """Checks all arguments; gives x."""
        x = tensor(call, 0, "x")
        floating(call, x, "x")
        rank(call, x, "x", 1)
        check_eps(call)
        for place, what in enumerate(self.inputs[1:], 1):
            if call.inputs[place] is not None:
                item = tensor(call, place, what)
                same_dtype(call, x, "x", item, what)
                rank(call, item, what, 1, 1)
                text = f"expected {what} to have x's last dimension, got {show(item.shape)} and {show(x.shape)}"
                call.same(item.symbolic_shape[0], x.symbolic_shape[-1], text)
        return x

    @staticmethod
    def statistic(call: Call, x: Tensor) -> TensorSpec:
        """One number per row, as the gradient reads it: float32, or float64 for float64."""
        return output(call, float64 if x.dtype == float64 else float32, (*x.symbolic_shape[:-1], 1))


@register
class RmsNorm(_Norm):
    """Division by the root of the mean square over the last dimension."""

    name = "rms_norm"
    inputs = ("x", "weight")
    outputs = ("out", "rstd")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = self.check(call)
        return [output(call, x.dtype, x.symbolic_shape), self.statistic(call, x)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        x, weight = node.inputs

        @cache
        def backward() -> tuple[Tensor, ...]:
            return node.graph.apply("rms_norm_grad", (grads[0], x, weight, node.outputs[1]))

        return [lambda: backward()[0], lambda: backward()[1]]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def plain(x: np.ndarray) -> Any:
            return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6)

        def scaled(x: np.ndarray, weight: np.ndarray) -> Any:
            return plain(x) * weight

        half = [eighths(3, 300, dtype="float16") * np.float16(64), eighths(300, dtype="float16")]
        good = [
            GoodSample(rms_norm, [eighths(3, 5)], plain, [(0, 0), (0, 1)]),
            GoodSample(rms_norm, [eighths(3, 5), eighths(5, seed=1)], scaled, [(0, 0)]),
            GoodSample(rms_norm, [eighths(2, 3, 1), eighths(1, seed=1)], scaled, [(0, 1)]),
            GoodSample(rms_norm, [eighths(0, 5), eighths(5)], scaled),
            GoodSample(rms_norm, half, scaled),  # the sum of squares is too large for float16
            GoodSample(lambda x: rms_norm(x, eps=0.5), [eighths(7)], lambda x: x / np.sqrt(np.mean(x * x) + 0.5)),
            GoodSample(lambda x: rms_norm(cast(x, bfloat16)), [eighths(3, 5)], plain, [(0, 0)], smooth=False),
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
class RmsNormGrad(GradientOp):
    """The gradients of ``rms_norm`` with respect to x and, if there is one, the weight."""

    name = "rms_norm_grad"
    inputs = ("grad", "x", "weight", "rstd")
    outputs = ("d_x", "d_weight")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        return [output(call, item.dtype, item.symbolic_shape) for item in call.inputs[1:3] if item is not None]


@register
class LayerNorm(_Norm):
    """Subtraction of the mean and division by the standard deviation over the last dimension."""

    name = "layer_norm"
    inputs = ("x", "weight", "bias")
    outputs = ("out", "mean", "rstd")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = self.check(call)
        return [output(call, x.dtype, x.symbolic_shape), *[self.statistic(call, x)] * 2]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        x, weight, bias = node.inputs
        _, mean, rstd = node.outputs

        @cache
        def backward() -> tuple[Tensor, ...]:
            return node.graph.apply("layer_norm_grad", (grads[0], x, weight, bias, mean, rstd))

        return [lambda: backward()[0], lambda: backward()[1], lambda: backward()[-1]]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def plain(x: np.ndarray, eps: float = 1e-5) -> Any:
            return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)

        def affine(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> Any:
            return plain(x) * weight + bias

        weights = [eighths(300, dtype="float16", seed=seed) for seed in (1, 2)]
        half = [eighths(3, 300, dtype="float16") * np.float16(64), *weights]
        good = [
            GoodSample(layer_norm, [eighths(3, 5)], plain, [(0, 0), (0, 1)]),
            GoodSample(layer_norm, [eighths(3, 5), eighths(5, seed=1), eighths(5, seed=2)], affine, [(0, 0)]),
            GoodSample(layer_norm, [eighths(2, 3, 1), eighths(1, seed=1), eighths(1, seed=2)], affine, [(0, 1)]),
            GoodSample(layer_norm, [eighths(0, 5), eighths(5), eighths(5)], affine),
            GoodSample(layer_norm, half, affine),  # the sum of squares is too large for float16
            GoodSample(lambda x, w: layer_norm(x, w), [eighths(3, 5), eighths(5)], lambda x, w: plain(x) * w),
            GoodSample(lambda x, b: layer_norm(x, bias=b), [eighths(3, 5), eighths(5)], lambda x, b: plain(x) + b),
            GoodSample(lambda x: layer_norm(x, eps=0.5), [eighths(7)], lambda x: plain(x, 0.5)),
            GoodSample(lambda x: layer_norm(cast(x, bfloat16)), [eighths(3, 5)], plain, [(0, 0)], smooth=False),
        ]
        bad = [
            BadSample(lambda: layer_norm(_float(2, 3), _float(2)), ShapeError, "weight to have x's last dimension"),
            BadSample(lambda: layer_norm(_float(2, 3), None, _float(2)), ShapeError, "bias to have x's last dimension"),
            BadSample(lambda: layer_norm(_float(3), bias=_float(1, 3)), ShapeError, "bias to have 1 dimension(s)"),
            BadSample(lambda: layer_norm(_float()), ShapeError, "x to have at least 1 dimension(s)"),
            BadSample(
                lambda: layer_norm(_float(3), placeholder(bfloat16, [3])), DTypeError, "x and weight to have one dtype"
            ),
            BadSample(lambda: layer_norm(placeholder(int64, [3])), DTypeError, "expected x to be floating"),
            BadSample(lambda: layer_norm(_float(3), eps=True), HetuError, "eps to be a number of at least 0, got True"),
        ]
        return good, bad


@register
class LayerNormGrad(GradientOp):
    """The gradients of ``layer_norm`` with respect to x and, as far as there are any, weight and bias."""

    name = "layer_norm_grad"
    inputs = ("grad", "x", "weight", "bias", "mean", "rstd")
    outputs = ("d_x", "d_weight", "d_bias")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        return [output(call, item.dtype, item.symbolic_shape) for item in call.inputs[1:4] if item is not None]


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, name: str | None = None) -> Tensor:
    """Normalises over the last dimension: ``x / sqrt(mean(x ** 2) + eps) * weight``.

    Half precision is computed in float32. Source: Zhang and Sennrich, "Root Mean Square Layer
    Normalization", 2019, equation 4.

    Args:
        x: Floating, ``(..., width)``.
        weight: ``(width,)``, of x's dtype. None stands for ones.
        eps: A number of at least 0; it keeps the divisor from 0.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        ShapeError: If weight does not have the last dimension's length, or x has no dimension.
        DTypeError: If the dtypes differ or are not floating.
        HetuError: If eps is negative or no number.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.rms_norm(x)
        >>> g.run(y, feed_dict={x: [1.0, 7.0]})
        tensor([0.2000, 1.4000])
    """
    return build("rms_norm", (x, weight), {"eps": eps}, name)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, name: str | None = None
) -> Tensor:
    """Normalises over the last dimension: ``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``.

    The variance is the biased one, as in ``torch.nn.functional.layer_norm``. Half precision is computed
    in float32. Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, equation 4.

    Args:
        x: Floating, ``(..., width)``.
        weight: ``(width,)``, of x's dtype. None stands for ones.
        bias: ``(width,)``, of x's dtype. None stands for zeros.
        eps: A number of at least 0; it keeps the divisor from 0.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        ShapeError: If weight or bias does not have the last dimension's length, or x has no dimension.
        DTypeError: If the dtypes differ or are not floating.
        HetuError: If eps is negative or no number.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [4], name="x")
        ...     y = hetu.layer_norm(x)
        >>> g.run(y, feed_dict={x: [1.0, 1.0, 3.0, 3.0]})
        tensor([-1.0000, -1.0000,  1.0000,  1.0000])
    """
    return build("layer_norm", (x, weight, bias), {"eps": eps}, name)
