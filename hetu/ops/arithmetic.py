"""Element by element: add, sub, mul, div, with numpy's broadcasting and torch's promotion of dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hetu.dtypes import DType, bool_, float32
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, Tensor, register
from hetu.ops.common.build import build
from hetu.ops.common.elementwise import Elementwise, Operand
from hetu.ops.common.gradients import single, unbroadcast
from hetu.ops.common.samples import eighths, not_zero, whole_numbers
from hetu.ops.nn import cast
from hetu.ops.sources import placeholder
from hetu.symbols import IntSymbol

__all__ = ["add", "div", "mul", "sub"]


@register
class Add(Elementwise):
    """``a + b``."""

    name = "add"

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (a, b) = single(grads), node.inputs
        return [lambda: unbroadcast(grad, a), lambda: unbroadcast(grad, b)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(add, [eighths(3, 5), eighths(5, seed=1)], lambda a, b: a + b, [(0, 0)]),
            GoodSample(
                add, [eighths(3, 4), eighths(3, 4, seed=1)], lambda a, b: a + b, [(0, 0), (1, 0), (0, 1), (1, 1)]
            ),
            GoodSample(add, [eighths(7, 1), eighths(1, 3, seed=1)], lambda a, b: a + b, [(0, 0), (1, 1)]),
            GoodSample(add, [eighths(0, 3), eighths(1, 3)], lambda a, b: a + b),
            GoodSample(add, [eighths(2, 3, dtype="float16"), eighths(seed=1, dtype="float64")], lambda a, b: a + b),
            GoodSample(
                add, [whole_numbers(4, dtype="uint8", low=0), whole_numbers(4, dtype="int8")], lambda a, b: a + 1 * b
            ),
            GoodSample(lambda a: add(a, a.symbolic_shape[0]), [eighths(5)], lambda a: a + a.shape[0], [(0, 0)]),
            GoodSample(lambda a: add(2.5, a), [whole_numbers(3)], lambda a: 2.5 + a),
            GoodSample(lambda a: add(cast(a, "bfloat16"), 1), [eighths(3)], lambda a: a + 1, smooth=False),
        ]
        bad = [
            BadSample(lambda: add(_float(3), _float(4)), ShapeError, "shapes that broadcast, got [3] and [4]"),
            BadSample(lambda: add(_float(2, 3), _float(2, 1, 4)), ShapeError, "3 and 4 differ"),
            BadSample(lambda: add(_float(IntSymbol("s", min=5)), _float(4)), ShapeError, "s and 4 differ"),
            BadSample(lambda: add(placeholder("int8", [1]), 300), DTypeError, "300 does not fit hetu.int8"),
            BadSample(lambda: add(1, 2), DTypeError, "a or b to be a tensor, got two numbers"),
            BadSample(lambda: add(_float(1), None), DTypeError, "expected b"),  # type: ignore[arg-type]
            BadSample(lambda: add(_float(1), [1.0]), DTypeError, "got list"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class Sub(Elementwise):
    """``a - b``."""

    name = "sub"

    def dtype(self, call: Call) -> DType:
        for what, item in zip(self.inputs, call.inputs, strict=True):
            if isinstance(item, bool) or (isinstance(item, Tensor) and item.dtype == bool_):
                call.fail(DTypeError, f"can't subtract with bools, as {what} is", "cast them to an int dtype")
        return super().dtype(call)

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (a, b) = single(grads), node.inputs
        return [lambda: unbroadcast(grad, a), lambda: -unbroadcast(grad, b)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(sub, [eighths(3, 5), eighths(3, 1, seed=1)], lambda a, b: a - b, [(0, 0), (1, 0)]),
            GoodSample(sub, [eighths(), eighths(1, seed=1)], lambda a, b: a - b),
            GoodSample(sub, [whole_numbers(3, dtype="int32"), eighths(0, 1)], lambda a, b: a - b),
            GoodSample(lambda a: sub(1, a), [whole_numbers(3, dtype="int16")], lambda a: 1 - a),
            GoodSample(lambda a: sub(0.5, a), [whole_numbers(dtype="int64")], lambda a: 0.5 - a),
            GoodSample(lambda a: sub(a.symbolic_shape[0] * 2, a), [eighths(5)], lambda a: 2 * len(a) - a, [(0, 0)]),
        ]
        bad = [
            BadSample(lambda: sub(placeholder("bool", [2]), 1), DTypeError, "can't subtract with bools"),
            BadSample(lambda: sub(_float(2), _float(3)), ShapeError, "2 and 3 differ"),
        ]
        return good, bad


@register
class Mul(Elementwise):
    """``a * b``."""

    name = "mul"

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (a, b) = single(grads), node.inputs
        return [lambda: unbroadcast(grad * b, a), lambda: unbroadcast(grad * a, b)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(mul, [eighths(3, 5), eighths(3, 5, seed=1)], lambda a, b: a * b, [(0, 0), (1, 0)]),
            GoodSample(mul, [eighths(2, 3, dtype="float16"), eighths(3, seed=1)], lambda a, b: a * b),
            GoodSample(mul, [whole_numbers(3), whole_numbers(3) > 0], lambda a, b: a * b),
            GoodSample(lambda a: mul(3, a), [eighths(0)], lambda a: 3 * a),
            GoodSample(lambda a: mul(a, -1), [eighths(5, 1)], lambda a: -a, [(0, 0)]),
        ]
        bad = [
            BadSample(lambda: mul(_float(2), _float(3)), ShapeError, "2 and 3 differ"),
            BadSample(lambda: mul(placeholder("uint8", [2]), -1), DTypeError, "-1 does not fit hetu.uint8 (0 to 255)"),
        ]
        return good, bad


@register
class Div(Elementwise):
    """``a / b``: true division."""

    name = "div"

    def dtype(self, call: Call) -> DType:
        dtype = super().dtype(call)
        return dtype if dtype.is_floating else float32

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, (a, b) = single(grads), node.inputs
        return [lambda: unbroadcast(grad / b, a), lambda: -unbroadcast(grad * (node.outputs[0] / b), b)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(div, [eighths(3, 5), not_zero(5, seed=1)], lambda a, b: a / b, [(0, 0), (0, 1), (1, 0)]),
            GoodSample(div, [whole_numbers(5), whole_numbers(5, low=1)], lambda a, b: a / b),
            GoodSample(div, [eighths(3, dtype="float16"), not_zero(1, dtype="float16")], lambda a, b: a / b),
            GoodSample(lambda a: div(a, 3), [whole_numbers(3, dtype="uint8", low=0)], lambda a: a / 3),
            GoodSample(lambda a: div(3, a), [not_zero(5)], lambda a: 3 / a),
            GoodSample(lambda a: div(70000.0, a), [not_zero(5, dtype="float16") + 4], lambda a: 70000 / a),
            GoodSample(
                lambda a: div(a.symbolic_shape[0], a), [whole_numbers(5, low=1)], lambda a: len(a) / a, [(0, 0)]
            ),
            GoodSample(lambda a: div(1, a), [not_zero(0)], lambda a: 1 / a),
        ]
        bad = [
            BadSample(lambda: div(_float(2), _float(3)), ShapeError, "2 and 3 differ"),
            BadSample(lambda: div(_float(2), None), DTypeError, "b to be a tensor or a number"),  # type: ignore[arg-type]
        ]
        return good, bad


def _float(*shape: int | IntSymbol) -> Tensor:
    return placeholder(float32, shape)


def add(a: Operand, b: Operand, name: str | None = None) -> Tensor:
    """Adds element by element: ``a + b``.

    Shapes broadcast as in numpy, with one limit: only a size known to be 1 when the graph is built is
    stretched. Two symbolic sizes must be equal, which every run checks.

    Args:
        a: A tensor of any dtype and shape, a number, or an IntSymbol.
        b: As a; one of the two must be a tensor.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of the common shape; its dtype is that of ``torch.result_type``.

    Raises:
        ShapeError: If the shapes don't broadcast.
        DTypeError: If both are numbers, one is neither tensor nor number, or an int does not fit the dtype.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.add(x, 1)
        >>> g.run(y, feed_dict={x: [1.0, 2.0]})
        tensor([2., 3.])
    """
    return build("add", (a, b), name=name)


def sub(a: Operand, b: Operand, name: str | None = None) -> Tensor:
    """Subtracts element by element: ``a - b``. Broadcasts as :func:`add` does.

    Args:
        a: A tensor of any dtype but bool and any shape, a number, or an IntSymbol.
        b: As a; one of the two must be a tensor.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of the common shape; its dtype is that of ``torch.result_type``.

    Raises:
        ShapeError: If the shapes don't broadcast.
        DTypeError: If an operand is bool, or :func:`add` would raise it.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.sub(1, x)
        >>> g.run(y, feed_dict={x: [1.0, 2.0]})
        tensor([ 0., -1.])
    """
    return build("sub", (a, b), name=name)


def mul(a: Operand, b: Operand, name: str | None = None) -> Tensor:
    """Multiplies element by element: ``a * b``. Broadcasts as :func:`add` does.

    Args:
        a: A tensor of any dtype and shape, a number, or an IntSymbol.
        b: As a; one of the two must be a tensor.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of the common shape; its dtype is that of ``torch.result_type``.

    Raises:
        ShapeError: If the shapes don't broadcast.
        DTypeError: If :func:`add` would raise it.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.mul(x, x)
        >>> g.run(y, feed_dict={x: [1.0, 3.0]})
        tensor([1., 9.])
    """
    return build("mul", (a, b), name=name)


def div(a: Operand, b: Operand, name: str | None = None) -> Tensor:
    """Divides element by element: ``a / b``, also of ints. Broadcasts as :func:`add` does.

    Args:
        a: A tensor of any dtype and shape, a number, or an IntSymbol.
        b: As a; one of the two must be a tensor.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of the common shape; its dtype is that of ``torch.result_type``, and float32 where that is an
        int dtype or bool. Division by zero gives infinities and NaN.

    Raises:
        ShapeError: If the shapes don't broadcast.
        DTypeError: If both are numbers, or one is neither tensor nor number.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.int64, [2], name="x")
        ...     y = hetu.div(x, 2)
        >>> g.run(y, feed_dict={x: [1, 4]})
        tensor([0.5000, 2.0000])
    """
    return build("div", (a, b), name=name)
