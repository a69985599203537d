"""Functions of each element of a floating tensor: silu and gelu."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hetu.dtypes import bfloat16, int64
from hetu.errors import DTypeError, HetuError
from hetu.graph import BadSample, Call, GoodSample, OpDef, Tensor, TensorSpec, register
from hetu.ops._build import build, floating, output, tensor
from hetu.ops._samples import eighths
from hetu.ops.nn import cast
from hetu.ops.sources import placeholder


class _Activation(OpDef):
    """A function of each element of a floating tensor."""

    inputs = ("x",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        floating(call, x, "x")
        return [output(call, x.dtype, x.symbolic_shape)]


@register
class Silu(_Activation):
    """``x * sigmoid(x)``."""

    name = "silu"

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def reference(x: np.ndarray) -> np.ndarray:
            return x / (1 + np.exp(-x))

        good = [
            GoodSample(silu, [eighths(3, 5)], reference, [(0, 0)]),
            GoodSample(silu, [eighths(1, dtype="float16")], reference),
            GoodSample(silu, [eighths(0, 3)], reference),
            GoodSample(lambda x: silu(cast(x, bfloat16)), [eighths(7)], reference),
        ]
        return good, [BadSample(lambda: silu(placeholder(int64, [3])), DTypeError, "expected x to be floating")]


@register
class Gelu(_Activation):
    """``x`` times the normal distribution function of ``x``."""

    name = "gelu"

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        kind = call.attrs["approximate"]
        if kind not in ("none", "tanh"):
            call.fail(HetuError, f'expected approximate to be "none" or "tanh", got {kind!r}')
        return super().infer(call)

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def exact(x: np.ndarray) -> np.ndarray:
            erf = np.array([math.erf(item / math.sqrt(2)) for item in x.reshape(-1)]).reshape(x.shape)
            return x * (1 + erf) / 2

        def by_tanh(x: np.ndarray) -> np.ndarray:
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


def silu(x: Tensor, name: str | None = None) -> Tensor:
    """Applies ``x * sigmoid(x)`` (also named swish).

    Args:
        x: Floating, any shape.
        name: Unique in the graph; made up if None.

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
        name: Unique in the graph; made up if None.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        DTypeError: If x is not floating.
        HetuError: If there is no such approximation.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.gelu(x)
        >>> g.run(y, feed_dict={x: [0.0, 1.0]})
        tensor([0.0000, 0.8413])
    """
    return build("gelu", (x,), {"approximate": approximate}, name)
