"""``swiglu``: the gated activation of Llama's feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from hetu.dtypes import bfloat16, float32, int64
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Tensor, TensorSpec, register
from hetu.ops.common.build import build, floating, output, rank, same_dtype, show, tensor
from hetu.ops.common.layers import GradientOp, same_shape
from hetu.ops.common.samples import eighths
from hetu.ops.nn import cast
from hetu.ops.sources import placeholder
from hetu.symbols import as_symbol, equal

__all__ = ["swiglu"]


@register
class Swiglu(OpDef):
    """``silu(gate) * up``. It keeps nothing for its gradient but what it was given."""

    name = "swiglu"
    inputs = ("gate", "up")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        gate = tensor(call, 0, "gate")
        floating(call, gate, "gate")
        if call.inputs[1] is not None:
            up = tensor(call, 1, "up")
            same_dtype(call, gate, "gate", up, "up")
            same_shape(call, gate.symbolic_shape, up.symbolic_shape, "gate and up to have one shape")
            return [output(call, gate.dtype, gate.symbolic_shape)]
        rank(call, gate, "gate", 1)
        *rows, width = gate.symbolic_shape
        what = f"expected gate to have an even last dimension, half for gate and half for up, got {show(gate.shape)}"
        call.check(equal(as_symbol(width % 2), as_symbol(0)), what)
        return [output(call, gate.dtype, (*rows, width // 2))]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        @cache
        def backward() -> tuple[Tensor, ...]:
            return node.graph.apply("swiglu_grad", (grads[0], *node.inputs))

        return [lambda: backward()[0], lambda: backward()[1]]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def reference(gate: np.ndarray, up: np.ndarray) -> Any:
            return gate / (1 + np.exp(-gate)) * up

        def packed(x: np.ndarray) -> Any:
            return reference(*np.split(x, 2, -1))

        good = [
            GoodSample(swiglu, [eighths(3, 5), eighths(3, 5, seed=1)], reference, [(0, 0), (1, 0)]),
            GoodSample(swiglu, [eighths(3, 6)], packed, [(0, 0), (0, 1)]),
            GoodSample(swiglu, [eighths(1, 2, 2, dtype="float16")], packed),
            GoodSample(swiglu, [eighths(), eighths(seed=1)], reference),
            GoodSample(swiglu, [eighths(0, 4)], packed),
            GoodSample(swiglu, [eighths(3, 0)], packed),
            GoodSample(lambda x: swiglu(cast(x, bfloat16)), [eighths(8)], packed, smooth=False),
        ]
        bad = [
            BadSample(
                lambda: swiglu(_float(2, 3)),
                ShapeError,
                "an even last dimension, half for gate and half for up, got [2, 3]",
            ),
            BadSample(lambda: swiglu(_float()), ShapeError, "gate to have at least 1 dimension(s)"),
            BadSample(lambda: swiglu(_float(2, 3), _float(2, 1)), ShapeError, "one shape, got [2, 3] and [2, 1]"),
            BadSample(lambda: swiglu(_float(3), _float(2, 3)), ShapeError, "one shape, got [3] and [2, 3]"),
            BadSample(lambda: swiglu(_float(2), placeholder(bfloat16, [2])), DTypeError, "gate and up to have one"),
            BadSample(lambda: swiglu(placeholder(int64, [2])), DTypeError, "expected gate to be floating"),
        ]
        return good, bad


@register
class SwigluGrad(GradientOp):
    """The gradients of ``swiglu`` with respect to gate and up; one tensor where they are one."""

    name = "swiglu_grad"
    inputs = ("grad", "gate", "up")
    outputs = ("d_gate", "d_up")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        return [output(call, item.dtype, item.symbolic_shape) for item in call.inputs[1:] if item is not None]


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def swiglu(gate: Tensor, up: Tensor | None = None, name: str | None = None) -> Tensor:
    """Applies ``silu(gate) * up``, where ``silu(x) = x * sigmoid(x)``.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 6, without its products of matrices.

    Args:
        gate: Floating, any shape. If up is None it holds both, ``(..., 2 * width)``: first gate, then up.
        up: A tensor of gate's dtype and shape, or None.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of gate's dtype and shape, or ``(..., width)`` if up is None.

    Raises:
        ShapeError: If gate and up differ in shape, or up is None and gate has no even last dimension.
        DTypeError: If the dtypes differ or are not floating.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [4], name="x")
        ...     y = hetu.swiglu(x)
        >>> g.run(y, feed_dict={x: [0.0, 1.0, 5.0, 10.0]})
        tensor([0.0000, 7.3106])
    """
    return build("swiglu", (gate, up), name=name)
