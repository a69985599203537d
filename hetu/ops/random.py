"""``dropout``: elements set to 0 at random, the same ones under every parallel strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hetu.dtypes import bfloat16, float32, int32, int64
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Tensor, TensorSpec, register
from hetu.ops.common.build import build, floating, output, probability, rank, tensor
from hetu.ops.common.layers import GradientOp
from hetu.ops.common.samples import eighths, whole_numbers
from hetu.ops.nn import cast
from hetu.ops.sources import placeholder
from hetu.symbols import as_symbol

__all__ = ["dropout"]


@register
class Dropout(OpDef):
    """Elements set to 0 at random; the others are scaled up. No mask is kept: the gradient draws the same one again."""

    name = "dropout"
    inputs = ("x", "tokens")
    outputs = ("out", "rng_state")
    is_random = True
    is_view = True  # without anything to drop it is x itself

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        floating(call, x, "x")
        call.attrs["p"] = probability(call, "p")
        if call.inputs[1] is not None:
            self._check_tokens(call, x)
        return [output(call, x.dtype, x.symbolic_shape), TensorSpec(int64, (2,), on_cpu=True)]

    @staticmethod
    def _check_tokens(call: Call, x: Tensor) -> None:
        tokens = tensor(call, 1, "tokens")
        if tokens.dtype != int64:
            call.fail(
                DTypeError, f"expected tokens to be int64, got {tokens.dtype}", f"hetu.cast({tokens.name}, hetu.int64)"
            )
        rank(call, tokens, "tokens", 1, 1)
        rows = x.shape[0] if x.ndim else 1
        what = f"expected one token per row of x, got {tokens.shape[0]} for {rows} row(s)"
        call.same(tokens.symbolic_shape[0], as_symbol(rows), what)

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        inputs = (grads[0], node.inputs[1], node.outputs[1])
        return [lambda: build("dropout_grad", inputs, node.attrs), None]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def none(x: Tensor, tokens: Tensor | None = None) -> Tensor:
            return dropout(x, 0, tokens)

        # What is dropped is random; samples have an answer only where it makes no difference.
        good = [
            GoodSample(none, [eighths(3, 5)], lambda x: x, [(0, 0), (0, 1)]),
            GoodSample(none, [eighths(3, 5, 2), whole_numbers(3)], lambda x, _: x, [(0, 0), (1, 0)]),
            GoodSample(lambda x: dropout(cast(x, bfloat16), 0.0), [eighths()], lambda x: x, smooth=False),
            GoodSample(lambda x: dropout(x, 0.5), [np.zeros((3, 5), "float32")], lambda x: x, [(0, 0)], smooth=False),
            GoodSample(lambda x: dropout(x, 0.5), [np.zeros((), "float16")], lambda x: x, smooth=False),
            GoodSample(lambda x: dropout(x, 0.5), [eighths(0, 3)], lambda x: x),
            GoodSample(lambda x, t: dropout(x, 0.5, t), [eighths(3, 0), whole_numbers(3)], lambda x, t: x),
        ]
        bad = [
            BadSample(lambda: dropout(_float(2), 1), HetuError, "a probability in [0, 1), got 1"),
            BadSample(lambda: dropout(_float(2), -0.1), HetuError, "a probability in [0, 1), got -0.1"),
            BadSample(lambda: dropout(_float(2), "a"), HetuError, "got 'a'"),  # type: ignore[arg-type]
            BadSample(lambda: dropout(placeholder(int64, [2]), 0.5), DTypeError, "expected x to be floating"),
            BadSample(lambda: dropout(_float(2), 0.5, placeholder(int32, [2])), DTypeError, "tokens to be int64"),
            BadSample(lambda: dropout(_float(2), 0.5, placeholder(int64, [3])), ShapeError, "got 3 for 2 row(s)"),
            BadSample(lambda: dropout(_float(), 0.5, placeholder(int64, [3])), ShapeError, "got 3 for 1 row(s)"),
            BadSample(lambda: dropout(_float(2), 0.5, placeholder(int64, [2, 1])), ShapeError, "1 dimension(s)"),
        ]
        return good, bad


@register
class DropoutGrad(GradientOp):
    """The gradient of ``dropout``: the same elements set to 0, the others scaled alike."""

    name = "dropout_grad"
    inputs = ("grad", "tokens", "rng_state")
    is_view = True

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        grad = tensor(call, 0, "grad")
        return [TensorSpec(grad.dtype, grad.symbolic_shape, grad.on_cpu)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("dropout_grad", (grads[0], *node.inputs[1:]), node.attrs), None, None]


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def dropout(x: Tensor, p: float, tokens: Tensor | None = None, name: str | None = None) -> Tensor:
    """Sets elements to 0 with probability p, and scales the others by ``1 / (1 - p)``.

    Which ones depends on four numbers alone: the seed, how many masks were drawn before, the number of the row's token,
    and the column. So with ``tokens`` the mask is the same under every parallel strategy, in every order of the rows
    and on every device. ``hetu.manual_seed(n)`` fixes the seed; each run draws a new mask.

    Source: Srivastava et al., "Dropout", 2014, scaled as ``torch.nn.functional.dropout`` does. The random numbers
    are those of Philox4x32-7: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.

    Args:
        x: Floating, any shape. Its rows lie along the first dimension; all others together are the columns.
        p: A number in [0, 1); 0 leaves x as it is.
        tokens: int64, ``(rows,)``, the number of each row's token in the whole batch, as the ``token`` that
            :func:`layout_tokens` gives. None numbers the rows from 0, and lets pipelines draw from different streams.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        HetuError: If p is no number in [0, 1).
        DTypeError: If x is not floating, or tokens are not int64.
        ShapeError: If there is not one token per row.

    Example:
        >>> import hetu
        >>> hetu.manual_seed(0)
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [8], name="x")
        ...     y = hetu.dropout(x, 0.5)
        >>> g.run(y, feed_dict={x: [1.0] * 8})
        tensor([0., 2., 2., 0., 2., 0., 0., 0.])
    """
    return build("dropout", (x, tokens), {"p": p}, name)
