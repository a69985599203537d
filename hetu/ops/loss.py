"""Losses: cross_entropy, and its mean over all tokens of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetu.arguments import choice, integer
from hetu.dtypes import bfloat16, float32, float64, int32, int64, int_range
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, IndexRange, Node, OpDef, Tensor, TensorSpec, register
from hetu.ops.collective import step_sum
from hetu.ops.common.build import build, floating, output, rank, tensor
from hetu.ops.common.layers import GradientOp, check_indices, same_shape
from hetu.ops.common.samples import eighths, whole_numbers
from hetu.ops.nn import cast
from hetu.ops.sources import placeholder

__all__ = ["cross_entropy", "token_mean_loss"]


@register
class CrossEntropy(OpDef):
    """``log(sum(exp(logits))) - logits[label]``, reduced over the rows that are not ignored."""

    name = "cross_entropy"
    inputs = ("logits", "labels")  # not cast by autocast: computed in float32 in any case, without a copy of logits

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        logits, labels = tensor(call, 0, "logits"), tensor(call, 1, "labels")
        floating(call, logits, "logits")
        rank(call, logits, "logits", 1)
        check_indices(call, labels, "labels")
        *rows, _ = logits.symbolic_shape
        same_shape(call, labels.symbolic_shape, rows, "labels to have the shape of logits but for its last dimension")
        low, high = int_range(int64)
        ignored = integer(
            call.attrs["ignore_index"], "ignore_index", least=low, most=high, op=call.op, error=ShapeError
        )
        reduction = choice(call.attrs["reduction"], "reduction", ("mean", "sum", "none"), op=call.op)
        call.attrs["ignore_index"] = ignored
        dtype = float64 if logits.dtype == float64 else float32
        return [output(call, dtype, labels.symbolic_shape if reduction == "none" else ())]

    def index_ranges(self, node: Node) -> Sequence[IndexRange]:
        return [_label_range(node)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("cross_entropy_grad", (grads[0], *node.inputs), node.attrs), None]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def rows(logits: np.ndarray, labels: np.ndarray, ignored: int = -100) -> np.ndarray:
            top = logits.max(-1, keepdims=True)
            lse = (np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top)[..., 0]
            of_label = np.take_along_axis(logits, np.where(labels == ignored, 0, labels)[..., None], -1)[..., 0]
            return np.where(labels == ignored, 0, lse - of_label)

        def summed(logits: np.ndarray, labels: np.ndarray) -> Any:
            return rows(logits, labels).sum()

        def mean(logits: np.ndarray, labels: np.ndarray) -> Any:
            return rows(logits, labels).sum() / (labels != -100).sum()

        def loss(reduction: str, ignore_index: int = -100) -> Callable[..., Tensor]:
            return lambda logits, labels: cross_entropy(logits, labels, ignore_index, reduction)

        def labels(*shape: int, dtype: str = "int64", classes: int = 5) -> np.ndarray:
            return whole_numbers(*shape, dtype=dtype, low=0, high=classes)

        some = labels(6)
        some[[1, 4]] = -100
        good = [
            GoodSample(cross_entropy, [eighths(3, 5), labels(3)], mean, [(0, 0), (1, 0)]),
            GoodSample(cross_entropy, [eighths(6, 5), some], mean),
            GoodSample(loss("sum"), [eighths(6, 5), some.astype("int32")], summed),
            GoodSample(loss("none"), [eighths(2, 3, 5), labels(2, 3)], rows, [(0, 1), (1, 1)]),
            GoodSample(loss("none", 2), [eighths(3, 5), np.array([1, 2, 4])], lambda x, y: rows(x, y, 2)),
            GoodSample(cross_entropy, [eighths(5), labels()], mean),
            GoodSample(loss("sum"), [eighths(0, 5), labels(0)], summed),
            GoodSample(loss("none"), [eighths(3, 1), labels(3, classes=1)], rows),
            GoodSample(loss("none"), [1000 * eighths(3, 5), labels(3)], rows),  # so large that exp alone overflows
            GoodSample(cross_entropy, [eighths(3, 5, dtype="float64"), labels(3)], mean),
            GoodSample(
                lambda x, y: cross_entropy(cast(x, bfloat16), y), [eighths(3, 5), labels(3)], mean, smooth=False
            ),
        ]
        ids = placeholder
        bad = [
            BadSample(lambda: cross_entropy(_float(2, 3), _float(2)), DTypeError, "labels to be int32 or int64"),
            BadSample(lambda: cross_entropy(ids(int64, [2, 3]), ids(int64, [2])), DTypeError, "logits to be floating"),
            BadSample(lambda: cross_entropy(_float(2, 3), ids(int64, [3])), ShapeError, "got [3] and [2]"),
            BadSample(lambda: cross_entropy(_float(2, 3), ids(int32, [2, 3])), ShapeError, "got [2, 3] and [2]"),
            BadSample(lambda: cross_entropy(_float(), ids(int32, [])), ShapeError, "logits to have at least 1"),
            BadSample(
                lambda: cross_entropy(_float(2, 3), ids(int32, [2]), reduction="max"),
                HetuError,
                '"mean", "sum" or "none", got \'max\'',
            ),
            BadSample(
                lambda: cross_entropy(_float(2, 3), ids(int32, [2]), 0.5),  # type: ignore[arg-type]
                ShapeError,
                "expected ignore_index to be an int from",
            ),
        ]
        return good, bad


@register
class CrossEntropyGrad(GradientOp):
    """The gradient of the logits: ``softmax - onehot``, times that of each row's loss."""

    name = "cross_entropy_grad"
    inputs = ("grad", "logits", "labels")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        logits = tensor(call, 1, "logits")
        return [output(call, logits.dtype, logits.symbolic_shape)]

    def index_ranges(self, node: Node) -> Sequence[IndexRange]:
        return [_label_range(node)]


def _label_range(node: Node) -> IndexRange:
    return IndexRange("labels", node.input("logits").symbolic_shape[-1], node.attrs["ignore_index"])


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "mean", name: str | None = None
) -> Tensor:
    """Gives the negative log-likelihood of labels: ``log(sum(exp(logits))) - logits[label]`` for each row.

    With several pipelines or micro-batches ``"mean"`` is the mean over the tokens of each one alone;
    :func:`token_mean_loss` is the mean over all of them.

    Source: ``torch.nn.functional.cross_entropy``.

    Args:
        logits: Floating, ``(..., classes)``.
        labels: int32 or int64, ``(...)``, values from 0 to below ``classes``, which a run checks where it can without
            waiting for a device.
        ignore_index: Rows with this label count as 0 and get no gradient.
        reduction: ``"mean"`` over the rows that are not ignored, ``"sum"``, or ``"none"`` for one value per row.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor without dimensions, or of labels' shape if reduction is ``"none"``. It is computed in float32, or in
        float64 if logits are, and has that dtype. The mean of no rows is NaN, as in torch, and has the gradient 0.

    Raises:
        ShapeError: If labels don't have the shape of logits without its last dimension.
        DTypeError: If logits are not floating, or labels not int32 or int64.
        HetuError: If reduction is none of these.
        BindingError: If a label is out of range, which a run checks.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     logits = hetu.placeholder(hetu.float32, [2, 4], name="logits")
        ...     labels = hetu.placeholder(hetu.int64, [2], name="labels")
        ...     loss = hetu.cross_entropy(logits, labels)
        >>> g.run(loss, feed_dict={logits: [[1.0, 1.0, 1.0, 1.0]] * 2, labels: [2, -100]})
        tensor(1.3863)
    """
    return build("cross_entropy", (logits, labels), {"ignore_index": ignore_index, "reduction": reduction}, name)


def token_mean_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Gives this pipeline's and micro-batch's share of the mean cross entropy over all tokens of a step.

    A step sums the graph's loss node, and its gradients, over all pipelines and micro-batches. Each share is the sum of
    its own tokens' losses, divided by the number of labelled tokens of the whole run, which :func:`step_sum` counts
    before the rest is computed. So the sum is the usual mean over tokens, however unevenly they are dealt out, and the
    step is that of one pipeline with one batch.

    Source: the ``"mean"`` of ``torch.nn.functional.cross_entropy``, over all tokens of a step.

    Args:
        logits: Floating, ``(..., classes)``.
        labels: int32 or int64, ``(...)``, as in :func:`cross_entropy`.
        ignore_index: Rows with this label don't count. The loss of a step that has no others is 0.

    Returns:
        A tensor without dimensions: float32, or float64 if logits are.

    Raises:
        ShapeError: If labels don't have the shape of logits without its last dimension.
        DTypeError: If logits are not floating, or labels not int32 or int64.
        BindingError: If a label is out of range, which a run checks.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     logits = hetu.placeholder(hetu.float32, [3, 4], name="logits")
        ...     labels = hetu.placeholder(hetu.int64, [3], name="labels")
        ...     loss = hetu.token_mean_loss(logits, labels)
        >>> batches = [[0, 1, 2], [3, -100, -100]]
        >>> shares = g.run(loss, {logits: [[[1.0] * 4] * 3] * 2, labels: batches}, num_micro_batches=2)
        >>> shares, sum(shares)
        ([tensor(1.0397), tensor(0.3466)], tensor(1.3863))
    """
    total = cross_entropy(logits, labels, ignore_index, "sum")
    ignored = total.op.attrs["ignore_index"]
    return build("div", (total, step_sum(build("ne", (labels, ignored)), least=1)))
