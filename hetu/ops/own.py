"""A user's own op: a function of PyTorch with the shapes that it promises; torch's autograd gives its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from hetu.arguments import items, refuse, shown
from hetu.dtypes import DType, as_dtype, float32
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Tensor, TensorSpec, current_graph, register
from hetu.ops.common.build import Dim, output, result_type, sizes, tensor
from hetu.ops.common.gradients import zeros_like
from hetu.ops.common.layers import GradientOp
from hetu.ops.common.samples import eighths, not_zero, whole_numbers
from hetu.ops.sources import placeholder

__all__ = ["op"]

_SHAPES = "a list of sizes, a list of such lists, or a function of the operands that gives one"


@register
class Own(OpDef):
    """A function of PyTorch. What it gives is checked against the promise by every run."""

    name = "op"
    inputs = ("*operands",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        tensors = [item for item in call.inputs if isinstance(item, Tensor)]
        if not tensors:
            call.fail(
                DTypeError, "expected operands to hold a graph tensor, got none", "make constants in the function"
            )
        shapes = self._shapes(call)
        wanted = call.attrs["dtype"]
        dtypes = list(wanted) if isinstance(wanted, tuple) else [wanted or result_type(tensors)] * len(shapes)
        if len(dtypes) != len(shapes):
            call.fail(DTypeError, f"expected one dtype per output, got {len(dtypes)} for {len(shapes)} shapes")
        return [output(call, dtype, shape) for dtype, shape in zip(dtypes, shapes, strict=True)]

    @staticmethod
    def _shapes(call: Call) -> list[tuple[Dim, ...]]:
        """What the outputs' shapes are promised to be."""
        promised = call.attrs["shape"]
        if callable(promised):
            try:
                promised = promised(*call.inputs)
            except HetuError:
                raise
            except Exception as error:  # it is the user's
                call.fail(
                    ShapeError, f"shape, a function, raised {type(error).__name__}: {error}", "see what it is given"
                )
        given = items(promised, "shape", _SHAPES, op=call.op, error=ShapeError)
        several = given if given and all(isinstance(item, (list, tuple)) for item in given) else [given]
        shapes = [sizes(call, item, "shape") for item in several]
        for item in (size for shape in shapes for size in shape):
            call.check(item >= 0, f"expected sizes of at least 0 in shape, got {item}")
        return shapes

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        wanted = tuple(i for i, x in enumerate(node.inputs) if isinstance(x, Tensor) and x.dtype.is_floating)

        @cache
        def found() -> tuple[Tensor, ...]:
            """One node for all, for autograd goes through the function once."""
            known = [
                zeros_like(out) if grad is None else grad
                for out, grad in zip(node.outputs, grads, strict=True)
                if out.dtype.is_floating
            ]
            attrs = {"function": node.attrs["function"], "wanted": wanted, "count": len(node.inputs)}
            return node.graph.apply("op_grad", (*node.inputs, *known), attrs)

        return [
            partial(lambda i: found()[wanted.index(i)], i) if i in wanted else None for i in range(len(node.inputs))
        ]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def same(*operands: Any) -> Any:
            return operands[0].shape

        good = [
            GoodSample(op(lambda x: x * x.sin(), same), [eighths(3, 5)], lambda x: x * np.sin(x), [(0, 0)]),
            GoodSample(
                op(lambda x, y, n: (x @ y) / n, lambda x, y, n: [x.shape[0], y.shape[1]]),
                [eighths(3, 5), eighths(5, 2), not_zero()],
                lambda x, y, n: x @ y / n,
                [(0, 0)],
            ),
            GoodSample(
                lambda x: op(lambda x, n: [x.t(), x[0] * n], [[5, x.shape[0]], [5]])(x, x.symbolic_shape[0]),
                [eighths(3, 5)],
                lambda x: [x.T, x[0] * len(x)],
                [(0, 0)],
            ),
            GoodSample(op(lambda x: x.reshape(-1), lambda x: [x.numel()]), [eighths(0, 3, dtype="float16")], np.ravel),
            GoodSample(op(lambda x: x.expand(4, 3), [4, 3]), [eighths(3)], lambda x: np.broadcast_to(x, (4, 3))),
            GoodSample(op(lambda x: x.sort(), [[3], [3]], ["int64"] * 2), [np.array([2, 0, 1])], _sorted),
            GoodSample(op(lambda x, i: x, same), [eighths(3), whole_numbers(2)], lambda x, i: x),
        ]
        bad = [
            BadSample(lambda: op("relu", same), HetuError, "expected function to be a function"),  # type: ignore[arg-type]
            BadSample(lambda: op(abs, 3)(_float(2)), ShapeError, "shape to be a list of sizes"),  # type: ignore[arg-type]
            BadSample(lambda: op(abs, [0.5])(_float(2)), ShapeError, "shape[0] to be an int"),
            BadSample(lambda: op(abs, [-1])(_float(2)), ShapeError, "sizes of at least 0 in shape, got -1"),
            BadSample(lambda: op(abs, lambda x: x.nothing)(_float(2)), ShapeError, "a function, raised AttributeError"),
            BadSample(lambda: op(abs, [2])(2), DTypeError, "operands to hold a graph tensor"),
            BadSample(lambda: op(abs, [2], ["int8"] * 2)(_float(2)), DTypeError, "one dtype per output, got 2 for 1"),
            BadSample(lambda: op(abs, [2], "float8")(_float(2)), DTypeError, "no element type 'float8'"),
        ]
        return good, bad


def _sorted(x: np.ndarray) -> list[np.ndarray]:
    return [np.sort(x), np.argsort(x)]


@register
class OwnGrad(GradientOp):
    """The gradients of a user's function with respect to its floating operands. It calls the function again."""

    name = "op_grad"
    inputs = ("*operands",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        operands = [tensor(call, place, "operands") for place in call.attrs["wanted"]]
        return [output(call, item.dtype, item.symbolic_shape) for item in operands]


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def op(
    function: Callable[..., Any],
    shape: Sequence[Any] | Callable[..., Any],
    dtype: DType | Any = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Makes an op of a function of PyTorch, with the gradient that torch's autograd finds.

    The function is called on torch tensors, on each pipeline and micro-batch by itself, with what the op was called
    with. It must give the same for the same operands, for the backward calls it once more, and must not change them.
    What it gives is checked: a shape or a dtype other than promised is an error of the run. It is not compiled; its
    gradients have no gradient.

    Args:
        function: Takes torch tensors, and numbers where the op is given numbers or IntSymbols. It returns a tensor, or
            a list or a tuple of them.
        shape: What is promised of the result: a list of ints and IntSymbols; for several results a list of such
            lists; or a function that gives these, called with what the op is called with.
        dtype: The result's element type, or a list with that of each; None for that of ``torch.result_type``.
        name: The node's name, unique in the graph; None makes one up. It serves one use of the op.

    Returns:
        A function of graph tensors, numbers and IntSymbols, that adds a node and gives its tensor, or a list of them
        where a list of shapes was promised.

    Raises:
        ShapeError: If no shapes are promised, or the shape function raises.
        DTypeError: If no operand is a tensor, there is no such element type, or there are not as many as shapes.
        HetuError: If the function is none.

    Example:
        >>> import hetu, torch
        >>> mish = hetu.op(torch.nn.functional.mish, shape=lambda x: x.shape)
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run", device="cpu") as g:
        ...     x = hetu.placeholder(hetu.float32, [s], name="x")
        ...     y = mish(x)
        ...     dx = hetu.gradients(y, x)
        >>> g.run([y, dx], {x: [0.0, 1.0]})
        [tensor([0.0000, 0.8651]), tensor([0.6000, 1.0490])]
    """
    if not callable(function):
        refuse(function, "function", "a function of torch tensors", op="op", fix="pass torch.nn.functional.mish, say")
    kinds: Any = None
    if isinstance(dtype, (list, tuple)):
        kinds = tuple(map(as_dtype, dtype))
    elif dtype is not None:
        kinds = as_dtype(dtype)
    if callable(shape):
        rule: Any = partial(shape)  # what is partial has a hash, whatever it is made of
    else:
        rule = items(shape, "shape", _SHAPES, op="op", error=ShapeError)
    attrs = {"function": partial(function), "shape": rule, "dtype": kinds}

    def build_op(*operands: Any) -> Any:
        made = current_graph(operands, "op").apply("op", operands, attrs, name)
        return made[0] if len(made) == 1 else list(made)

    build_op.__doc__ = f"The op of {shown(function)}."
    return build_op
