"""Ops over all pipelines of a strategy: all_reduce, reduce_scatter; and over all micro-batches too: step_sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetu.arguments import choice, integer
from hetu.dtypes import bool_, float32, int32, int64, int_range
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, RunView, Tensor, TensorSpec, register
from hetu.graph.passes import live_nodes
from hetu.ops.common.build import build, floating, output, tensor
from hetu.ops.common.layers import GradientOp
from hetu.ops.common.samples import eighths, whole_numbers
from hetu.ops.sources import placeholder

__all__ = ["all_reduce", "step_sum"]


@register
class AllReduce(OpDef):
    """The sum or the mean over the strategy's pipelines, the same on all of them."""

    name = "all_reduce"
    inputs = ("x",)
    spans_pipelines = True
    is_view = True  # with one pipeline it is x itself
    has_plan = True
    overlaps = True

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x, op = tensor(call, 0, "x"), choice(call.attrs["op"], "op", ("sum", "mean"), op=call.op)
        if op == "mean":
            floating(call, x, "x, for a mean,")
        if x.dtype == bool_:
            call.fail(DTypeError, "can't sum bools", f"cast them: hetu.cast({x.name}, hetu.int64)")
        return [output(call, x.dtype, x.symbolic_shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        # What is differentiated is the sum of all pipelines' ys. All that every pipeline's y tells of the reduced value
        # comes back to each pipeline's x, so gradients are reduced just as values are.
        return [lambda: build("all_reduce", grads, node.attrs)]

    def plan_keys(self, node: Node, view: RunView) -> Sequence[Any]:
        dims = node.outputs[0].symbolic_shape
        shapes = [tuple(pipeline.value(dim) for dim in dims) for pipeline in view.pipelines]
        other = next((r for r, shape in enumerate(shapes) if shape != shapes[0]), None)
        if other is not None:
            raise ShapeError(
                f"expected x to have one shape on all pipelines, got {list(shapes[0])} on pipeline 0 "
                f"and {list(shapes[other])} on pipeline {other}",
                op=self.name,
                where=node.where,
                bound=view.pipelines[other].describe(*dims),
                fix="reduce what does not depend on each pipeline's tokens: a sum over them, or a parameter's gradient",
            )
        return [shapes[0]]

    def plan(self, key: Any) -> Any:
        return key  # what pipelines must agree on is all that there is to plan

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(all_reduce, [eighths(3, 5)], lambda x: x, [(0, 0)]),
            GoodSample(lambda x: all_reduce(x, "mean"), [eighths(3, 5, dtype="float16")], lambda x: x),
            GoodSample(all_reduce, [whole_numbers(dtype="int32")], lambda x: x),
            GoodSample(all_reduce, [eighths(0, 3)], lambda x: x),
        ]
        bad = [
            BadSample(lambda: all_reduce(_float(2), "max"), HetuError, '"sum" or "mean", got \'max\''),
            BadSample(lambda: all_reduce(placeholder(int64, [2]), "mean"), DTypeError, "for a mean, to be floating"),
            BadSample(lambda: all_reduce(placeholder(bool_, [2])), DTypeError, "can't sum bools"),
            BadSample(lambda: all_reduce(1.0), DTypeError, "x to be a tensor, got 1.0"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class ReduceScatter(GradientOp):
    """The sum of a parameter's gradient over the strategy's pipelines, of which each rank gets what it is to keep.

    Which boxes that are is the parameter's placement's to say, when the graph runs. The output has the shape of the
    gradient; what a run gives for it lies flat, one box after the other, and only an update takes that.
    """

    name = "reduce_scatter"
    inputs = ("x",)
    spans_pipelines = True
    overlaps = True
    stops_gradient = True

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        return [output(call, x.dtype, x.symbolic_shape)]


@register
class StepSum(OpDef):
    """The sum of all elements on all pipelines and in all micro-batches of a run."""

    name = "step_sum"
    inputs = ("x",)
    is_step_wide = True

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        if x.dtype.is_floating:
            # A sum of floats would depend on how they lie on pipelines; this one is the same under every strategy.
            call.fail(
                DTypeError,
                f"expected x to be of an int dtype or bool, got {x.dtype}",
                "count what is summed: step_sum adds up whole numbers",
            )
        for node in live_nodes([x]):
            if node.definition.is_step_wide:
                call.fail(
                    HetuError,
                    f"x depends on {node.name} (made at {node.where.short}), which is a sum over the whole step too",
                    "compute what is summed from each pipeline's own feeds",
                )
        least = call.attrs["least"]
        low, high = int_range(int64)
        call.attrs["least"] = (
            low if least is None else integer(least, "least", least=low, most=high, op=call.op, error=ShapeError)
        )
        return [output(call, int64, ())]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(step_sum, [whole_numbers(3, 5, dtype="int32")], np.sum, [(0, 0)]),
            GoodSample(step_sum, [whole_numbers(7) > 0], np.sum),
            GoodSample(step_sum, [whole_numbers(9, dtype="uint8", low=200, high=256)], lambda x: np.sum(x, dtype=int)),
            GoodSample(lambda x: step_sum(x, least=1), [whole_numbers(0, 3)], lambda x: np.int64(1)),
            GoodSample(lambda x: step_sum(x, least=-7), [whole_numbers(5) - 9], lambda x: np.int64(-7)),
            GoodSample(step_sum, [whole_numbers(low=-5, high=0)], np.sum),
        ]
        bad = [
            BadSample(lambda: step_sum(_float(2)), DTypeError, "an int dtype or bool, got hetu.float32"),
            BadSample(lambda: step_sum(placeholder(int32, [2]), least=0.5), ShapeError, "least to be an int"),  # type: ignore[arg-type]
        ]
        return good, bad


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def all_reduce(x: Tensor, op: str = "sum", name: str | None = None) -> Tensor:
    """Adds up, or averages, a tensor over the pipelines of the strategy that a run chooses.

    Values are added in the order of the pipelines, half precision in float32. With one pipeline the result is x itself,
    at no cost.

    Args:
        x: Any dtype but bool, floating for a mean. Its shape must be the same on all pipelines.
        op: ``"sum"`` or ``"mean"``.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype and shape, with the same value on all pipelines.

    Raises:
        HetuError: If op is none of these.
        DTypeError: If x has a dtype that can't be summed, or averaged.
        ShapeError: If x has another shape on another pipeline, which a run checks.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.all_reduce(x)
        >>> for shard in g.run(y, feed_dict={x: hetu.Shards([[1.0, 2.0], [10.0, 20.0]])}):
        ...     print(shard)
        tensor([11., 22.])
        tensor([11., 22.])
    """
    return build("all_reduce", (x,), {"op": op}, name)


def step_sum(x: Tensor, least: int | None = None, name: str | None = None) -> Tensor:
    """Sums a tensor's elements over all pipelines and micro-batches of a run.

    The sum is computed before the rest of the run, from the part of the graph that x needs, and is the same in all
    micro-batches. It is made to count the labelled tokens of a step.

    Args:
        x: An int dtype or bool, any shape. The shape may differ between pipelines and micro-batches. x must not depend
            on another ``step_sum``.
        least: The smallest value that the op gives, whatever the sum is; say 1 if something will be divided by it.
            None sets no bound.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        An int64 tensor without dimensions.

    Raises:
        DTypeError: If x is floating.
        ShapeError: If least is not an int.
        HetuError: If x depends on another ``step_sum``.

    Example:
        >>> import hetu
        >>> n = hetu.IntSymbol("n")
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.int64, [n], name="x")
        ...     y = hetu.step_sum(x)
        >>> g.run(y, feed_dict={x: [[1, 2], [3]]}, num_micro_batches=2)
        [tensor(6), tensor(6)]
    """
    return build("step_sum", (x,), {"least": least}, name)
