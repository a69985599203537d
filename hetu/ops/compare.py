"""Comparisons of elements: eq, ne, lt, le, gt, ge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hetu.dtypes import DType, bool_, float32
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, GoodSample, Tensor, register
from hetu.ops.common.build import build
from hetu.ops.common.elementwise import Elementwise, Operand
from hetu.ops.common.samples import eighths, whole_numbers
from hetu.ops.sources import placeholder

__all__ = ["eq", "ge", "gt", "le", "lt", "ne"]


class _Comparison(Elementwise):
    """A comparison, made in the common dtype of the operands. ``reference`` is the same in numpy."""

    reference: Callable[..., np.ndarray]

    def output_dtype(self, dtype: DType) -> DType:
        return bool_

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def compare(a: Operand, b: Operand) -> Tensor:
            return build(self.name, (a, b))

        reference, n = type(self).reference, np.array([np.nan, np.inf, 1.0, 0.0])
        ints = whole_numbers(5, low=0, high=3)
        good = [
            GoodSample(compare, [eighths(3, 5), eighths(5, seed=1)], reference, [(0, 0)]),
            GoodSample(compare, [eighths(3, 5), eighths(3, 5)], reference, [(0, 0), (1, 0), (0, 1), (1, 1)]),
            GoodSample(compare, [ints, whole_numbers(4, 1, low=0, high=3, dtype="int8")], reference),
            GoodSample(compare, [ints, eighths(5, dtype="float16")], reference),
            GoodSample(compare, [n, n[::-1].copy()], reference),
            GoodSample(compare, [ints > 0, ints > 1], reference),
            GoodSample(lambda x: compare(x, 1), [ints], lambda x: reference(x, 1)),
            GoodSample(lambda x: compare(1.5, x), [eighths(0, 3)], lambda x: reference(1.5, x)),
            GoodSample(lambda x: compare(2, x), [ints], lambda x: reference(2, x)),
            GoodSample(
                lambda x: compare(x.symbolic_shape[0], x), [eighths(3)], lambda x: reference(len(x), x), [(0, 0)]
            ),
        ]
        bad = [
            BadSample(lambda: compare(_float(2), _float(3)), ShapeError, "2 and 3 differ"),
            BadSample(lambda: compare(placeholder("int8", [2]), 300), DTypeError, "300 does not fit hetu.int8"),
            BadSample(lambda: compare(1, 2), DTypeError, "a or b to be a tensor, got two numbers"),
            BadSample(lambda: compare(_float(2), None), DTypeError, "expected b"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class Eq(_Comparison):
    """``a == b``."""

    name = "eq"
    reference = np.equal


@register
class Ne(_Comparison):
    """``a != b``."""

    name = "ne"
    reference = np.not_equal


@register
class Lt(_Comparison):
    """``a < b``."""

    name = "lt"
    reference = np.less


@register
class Le(_Comparison):
    """``a <= b``."""

    name = "le"
    reference = np.less_equal


@register
class Gt(_Comparison):
    """``a > b``."""

    name = "gt"
    reference = np.greater


@register
class Ge(_Comparison):
    """``a >= b``."""

    name = "ge"
    reference = np.greater_equal


def _float(*shape: int) -> Tensor:
    return placeholder(float32, shape)


def eq(a: Operand, b: Operand, name: str | None = None) -> Tensor:
    """Tells for each element whether ``a`` is equal to ``b``. Broadcasts as :func:`hetu.add` does.

    The comparison is made in the dtype of ``torch.result_type``. The
    operator ``==`` does not build it: it compares tensors as keys of dicts.

    Args:
        a: A tensor of any dtype and shape, a number, or an IntSymbol.
        b: As a; one of the two must be a tensor.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A bool tensor of the common shape. NaN gives False.

    Raises:
        ShapeError: If the shapes don't broadcast.
        DTypeError: If :func:`hetu.add` would raise it.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3], name="x")
        ...     y = hetu.eq(x, 2)
        >>> g.run(y, feed_dict={x: [1.0, 2.0, 3.0]})
        tensor([False,  True, False])
    """
    return build("eq", (a, b), name=name)


def ne(a: Operand, b: Operand, name: str | None = None) -> Tensor:
    """Tells for each element whether ``a`` differs from ``b``. Broadcasts as :func:`hetu.add` does.

    The comparison is made in the dtype of ``torch.result_type``. The
    operator ``!=`` does not build it: it compares tensors as keys of dicts.

    Args:
        a: A tensor of any dtype and shape, a number, or an IntSymbol.
        b: As a; one of the two must be a tensor.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A bool tensor of the common shape. NaN differs from everything.

    Raises:
        ShapeError: If the shapes don't broadcast.
        DTypeError: If :func:`hetu.add` would raise it.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3], name="x")
        ...     y = hetu.ne(x, 2)
        >>> g.run(y, feed_dict={x: [1.0, 2.0, 3.0]})
        tensor([ True, False,  True])
    """
    return build("ne", (a, b), name=name)


def lt(a: Operand, b: Operand, name: str | None = None) -> Tensor:
    """Tells for each element whether ``a`` is less than ``b``. Broadcasts as :func:`hetu.add` does.

    The comparison is made in the dtype of ``torch.result_type``. The operator ``<`` builds it too.

    Args:
        a: A tensor of any dtype and shape, a number, or an IntSymbol.
        b: As a; one of the two must be a tensor.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A bool tensor of the common shape. NaN gives False.

    Raises:
        ShapeError: If the shapes don't broadcast.
        DTypeError: If :func:`hetu.add` would raise it.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3], name="x")
        ...     y = hetu.lt(x, 2)
        >>> g.run(y, feed_dict={x: [1.0, 2.0, 3.0]})
        tensor([ True, False, False])
    """
    return build("lt", (a, b), name=name)


def le(a: Operand, b: Operand, name: str | None = None) -> Tensor:
    """Tells for each element whether ``a`` is at most ``b``. Broadcasts as :func:`hetu.add` does.

    The comparison is made in the dtype of ``torch.result_type``. The operator ``<=`` builds it too.

    Args:
        a: A tensor of any dtype and shape, a number, or an IntSymbol.
        b: As a; one of the two must be a tensor.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A bool tensor of the common shape. NaN gives False.

    Raises:
        ShapeError: If the shapes don't broadcast.
        DTypeError: If :func:`hetu.add` would raise it.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3], name="x")
        ...     y = hetu.le(x, 2)
        >>> g.run(y, feed_dict={x: [1.0, 2.0, 3.0]})
        tensor([ True,  True, False])
    """
    return build("le", (a, b), name=name)


def gt(a: Operand, b: Operand, name: str | None = None) -> Tensor:
    """Tells for each element whether ``a`` is greater than ``b``. Broadcasts as :func:`hetu.add` does.

    The comparison is made in the dtype of ``torch.result_type``. The operator ``>`` builds it too.

    Args:
        a: A tensor of any dtype and shape, a number, or an IntSymbol.
        b: As a; one of the two must be a tensor.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A bool tensor of the common shape. NaN gives False.

    Raises:
        ShapeError: If the shapes don't broadcast.
        DTypeError: If :func:`hetu.add` would raise it.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3], name="x")
        ...     y = hetu.gt(x, 2)
        >>> g.run(y, feed_dict={x: [1.0, 2.0, 3.0]})
        tensor([False, False,  True])
    """
    return build("gt", (a, b), name=name)


def ge(a: Operand, b: Operand, name: str | None = None) -> Tensor:
    """Tells for each element whether ``a`` is at least ``b``. Broadcasts as :func:`hetu.add` does.

    The comparison is made in the dtype of ``torch.result_type``. The operator ``>=`` builds it too.

    Args:
        a: A tensor of any dtype and shape, a number, or an IntSymbol.
        b: As a; one of the two must be a tensor.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A bool tensor of the common shape. NaN gives False.

    Raises:
        ShapeError: If the shapes don't broadcast.
        DTypeError: If :func:`hetu.add` would raise it.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [3], name="x")
        ...     y = hetu.ge(x, 2)
        >>> g.run(y, feed_dict={x: [1.0, 2.0, 3.0]})
        tensor([False,  True,  True])
    """
    return build("ge", (a, b), name=name)
