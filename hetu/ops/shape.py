"""Views of the same elements: reshape, transpose, broadcast_to; and stop_gradient, a view of its own kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from hetu.dtypes import float32
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Tensor, TensorSpec, register
from hetu.ops.common.build import Dim, axis, build, output, plain, shape_of, show, sizes, stretched_to, tensor
from hetu.ops.common.gradients import single, sum_to, to_shape
from hetu.ops.common.samples import eighths, whole_numbers
from hetu.ops.sources import placeholder
from hetu.symbols import IntSymbol, as_symbol, equal

__all__ = ["broadcast_to", "reshape", "stop_gradient", "transpose"]


@register
class Reshape(OpDef):
    """The same elements in the same order under another shape."""

    name = "reshape"
    is_view = True
    inputs = ("x",)

    def keeps_values(self, node: Node) -> bool:
        return True

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x, wanted = tensor(call, 0, "x"), list(sizes(call, call.attrs["shape"], "shape"))
        holes = [place for place, item in enumerate(wanted) if item == -1]
        given = [item for item in wanted if item != -1]
        text = f"{show(x.shape)} to {show(wanted)}"
        for item in given:
            call.check(item >= 0, f"expected sizes of at least 0, or one -1, got {show(wanted)}")
        left, right = _cancel(x.symbolic_shape, given)
        if len(holes) > 1:
            call.fail(ShapeError, f"-1 is ambiguous in a reshape from {text}", "give the size instead of -1")
        if holes:
            wanted[holes[0]] = self._hole(call, left, right, text)
        else:
            call.same(left, right, f"expected shape to have as many elements as x, got a reshape from {text}")
        call.attrs["shape"] = tuple(wanted)
        return [output(call, x.dtype, wanted)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: to_shape(single(grads), node.tensors[0].shape)]

    @staticmethod
    def _hole(call: Call, left: Dim, right: Dim, text: str) -> Dim:
        """The size that -1 stands for."""
        if right == 1:
            return left
        call.check(
            right >= 1, f"-1 is ambiguous in a reshape from {text} with a size of 0", "give the size instead of -1"
        )
        rest = left % right
        what = f"expected a whole number in the place of -1 in a reshape from {text}"
        call.check(rest == 0 if isinstance(rest, int) else equal(rest, as_symbol(0)), what)
        return left // right

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        s = IntSymbol("s")
        good = [
            GoodSample(lambda x: reshape(x, [2, 6]), [eighths(3, 4)], lambda x: x.reshape(2, 6)),
            GoodSample(lambda x: reshape(x, [-1, 3]), [eighths(4, 6)], lambda x: x.reshape(-1, 3), [(0, 0)]),
            GoodSample(
                lambda x: reshape(x, [x.symbolic_shape[0], 3, -1]),
                [eighths(5, 12)],
                lambda x: x.reshape(len(x), 3, 4),
                [(0, 0)],
            ),
            GoodSample(
                lambda x: reshape(x, [x.symbolic_shape[0] * x.symbolic_shape[1]]),
                [eighths(3, 5)],
                lambda x: x.reshape(-1),
                [(0, 0), (0, 1)],
            ),
            GoodSample(
                lambda x: reshape(x, [-1, x.symbolic_shape[1]]), [eighths(4, 3, 2)], _to_second, [(0, 0), (0, 1)]
            ),
            GoodSample(lambda x: reshape(x, [7, 0, 2]), [eighths(0, 3)], lambda x: x.reshape(7, 0, 2)),
            GoodSample(lambda x: reshape(x, []), [whole_numbers(1, 1)], lambda x: x.reshape(())),
            GoodSample(
                lambda x: reshape(transpose(x, 0, 1), [-1]), [eighths(3, 5)], lambda x: x.T.reshape(-1), [(0, 0)]
            ),
        ]
        bad = [
            BadSample(lambda: reshape(_float(2, 3), [4]), ShapeError, "as many elements as x"),
            BadSample(lambda: reshape(_float(2, 3), [-1, 4]), ShapeError, "a whole number in the place of -1"),
            BadSample(lambda: reshape(_float(2, 3), [-1, -1]), ShapeError, "-1 is ambiguous"),
            BadSample(lambda: reshape(_float(0, 3), [-1, 0]), ShapeError, "-1 is ambiguous"),
            BadSample(lambda: reshape(_float(2, 3), [-2, -3]), ShapeError, "sizes of at least 0"),
            BadSample(lambda: reshape(_float(2, 3), 6), ShapeError, "a list of sizes, got 6"),  # type: ignore[arg-type]
            BadSample(lambda: reshape(_float(s, 3), [s, 4]), ShapeError, "from [s, 3] to [s, 4]"),
            BadSample(lambda: reshape(2, [1]), DTypeError, "x to be a tensor, got 2"),  # type: ignore[arg-type]
        ]
        return good, bad


def _to_second(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[1])


def _cancel(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, Dim]:
    """The products of two lists of sizes without the symbolic sizes that stand in both.

    They are struck out although they might be 0: a graph that holds only for empty tensors is a mistake. What is
    left is often two ints, so that no constraint and no division remains.
    """
    rest_a, rest_b = [plain(item) for item in a], [plain(item) for item in b]
    for item in [item for item in rest_a if isinstance(item, IntSymbol) and item in rest_b]:
        if item in rest_b:  # not yet struck out by an equal one
            rest_a.remove(item)
            rest_b.remove(item)
    return math.prod(rest_a), math.prod(rest_b)


@register
class Transpose(OpDef):
    """Two dimensions swapped."""

    name = "transpose"
    is_view = True
    inputs = ("x",)

    def keeps_values(self, node: Node) -> bool:
        return True

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        one, other = (axis(call, call.attrs[key], x.ndim, key) for key in ("dim0", "dim1"))
        call.attrs.update(dim0=one, dim1=other)
        shape = list(x.symbolic_shape)
        shape[one], shape[other] = shape[other], shape[one]
        return [output(call, x.dtype, shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: build("transpose", grads, node.attrs)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(lambda x: transpose(x, 0, 1), [eighths(3, 5)], lambda x: x.T, [(0, 0)]),
            GoodSample(lambda x: transpose(x, -1, 0), [eighths(2, 1, 7)], lambda x: x.swapaxes(0, 2), [(0, 0), (0, 2)]),
            GoodSample(lambda x: transpose(x, 1, 1), [whole_numbers(0, 3)], lambda x: x),
        ]
        bad = [
            BadSample(lambda: transpose(_float(2, 3), 0, 2), ShapeError, "there is no dimension 2"),
            BadSample(lambda: transpose(_float(2, 3), 0, 1.0), ShapeError, "an int, got 1.0"),  # type: ignore[arg-type]
        ]
        return good, bad


@register
class BroadcastTo(OpDef):
    """Sizes of 1 stretched, at no cost in memory."""

    name = "broadcast_to"
    is_view = True
    repeats = True
    inputs = ("x",)

    def keeps_values(self, node: Node) -> bool:
        return True

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x, wanted = tensor(call, 0, "x"), shape_of(call)
        stretched_to(call, x, wanted)
        return [output(call, x.dtype, wanted)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        return [lambda: sum_to(single(grads), node.tensors[0].shape)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def stretch(*shape: int) -> Callable[[np.ndarray], np.ndarray]:
            return lambda x: np.broadcast_to(x, shape)

        s = IntSymbol("s")
        good = [
            GoodSample(lambda x: broadcast_to(x, [3, 5]), [eighths(3, 1)], stretch(3, 5)),
            GoodSample(
                lambda x: broadcast_to(x, [2, *x.shape]), [eighths(3, 5)], lambda x: np.stack([x, x]), [(0, 0), (0, 1)]
            ),
            GoodSample(lambda x: broadcast_to(x, [4, 1, 3]), [whole_numbers()], stretch(4, 1, 3)),
            GoodSample(lambda x: broadcast_to(x, [0, 3]), [eighths(1, 3)], stretch(0, 3)),
            GoodSample(lambda x: broadcast_to(x, [3]), [eighths(3)], stretch(3)),
            GoodSample(
                lambda x, y: [broadcast_to(x, y.symbolic_shape), y],
                [eighths(1, 5), eighths(3, 5)],
                lambda x, y: [np.broadcast_to(x, y.shape), y],
                [(1, 0)],
            ),
        ]
        bad = [
            BadSample(lambda: broadcast_to(_float(2), [3]), ShapeError, "[2] can be stretched to, got [3]"),
            BadSample(lambda: broadcast_to(_float(2), [1]), ShapeError, "[2] can be stretched to, got [1]"),
            BadSample(lambda: broadcast_to(_float(1, 2), [2]), ShapeError, "[1, 2] can be stretched to, got [2]"),
            BadSample(lambda: broadcast_to(_float(1), [-1]), ShapeError, "sizes of at least 0, got [-1]"),
            BadSample(lambda: broadcast_to(_float(1), 3), ShapeError, "a list of sizes, got 3"),  # type: ignore[arg-type]
            BadSample(lambda: broadcast_to(_float(s + 2), [1]), ShapeError, "can be stretched to, got [1]"),
        ]
        return good, bad


@register
class StopGradient(OpDef):
    """The same value, which counts as a constant where gradients are taken."""

    name = "stop_gradient"
    is_view = True
    stops_gradient = True
    inputs = ("x",)

    def keeps_values(self, node: Node) -> bool:
        return True

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        return [output(call, x.dtype, x.symbolic_shape)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(stop_gradient, [eighths(3, 5)], lambda x: x, [(0, 0)], smooth=False),
            GoodSample(stop_gradient, [whole_numbers(0, 3)], lambda x: x),
        ]
        return good, [BadSample(lambda: stop_gradient(2.0), DTypeError, "x to be a tensor, got 2.0")]  # type: ignore[arg-type]


def _float(*shape: int | IntSymbol) -> Tensor:
    return placeholder(float32, shape)


def reshape(x: Tensor, shape: Sequence[int | IntSymbol], name: str | None = None) -> Tensor:
    """Gives the same elements, in the same order, another shape.

    Args:
        x: Any dtype and shape.
        shape: One int or IntSymbol per dimension. One of them may be -1, which stands for the elements that are left.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of that shape and x's dtype.

    Raises:
        ShapeError: If the number of elements changes, or -1 is ambiguous or no whole number. Every run checks what
            only the symbols' values decide.
        DTypeError: If x is no tensor.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run"):
        ...     x = hetu.placeholder(hetu.float32, [s, 12], name="x")
        ...     hetu.reshape(x, [s, 3, -1], name="y")
        hetu.Tensor(y: float32[s, 3, 4])
    """
    return build("reshape", (x,), {"shape": shape}, name)


def transpose(x: Tensor, dim0: int, dim1: int, name: str | None = None) -> Tensor:
    """Swaps two dimensions, as ``torch.transpose``.

    Args:
        x: Any dtype and shape.
        dim0: One dimension; negative ones count from the end.
        dim1: The other dimension.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype with the two sizes swapped.

    Raises:
        ShapeError: If there is no such dimension.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [1, 2], name="x")
        ...     y = hetu.transpose(x, 0, 1)
        >>> g.run(y, feed_dict={x: [[1.0, 2.0]]})
        tensor([[1.],
                [2.]])
    """
    return build("transpose", (x,), {"dim0": dim0, "dim1": dim1}, name)


def broadcast_to(x: Tensor, shape: Sequence[int | IntSymbol], name: str | None = None) -> Tensor:
    """Stretches dimensions of size 1, and adds dimensions in front, as ``torch.broadcast_to``. Nothing is copied.

    Args:
        x: Any dtype and shape.
        shape: One int or IntSymbol per dimension. Counted from the last, each equals x's size where that is not 1.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of that shape and x's dtype.

    Raises:
        ShapeError: If x can't be stretched to that shape. Only a size known to be 1 when the graph is built is
            stretched; others must be equal, which every run checks where symbols leave it open.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     y = hetu.broadcast_to(x, [s, 2])
        >>> g.run(y, feed_dict={x: [1.0, 2.0]}, int_symbol_dict={s: 2})
        tensor([[1., 2.],
                [1., 2.]])
    """
    return build("broadcast_to", (x,), {"shape": shape}, name)


def stop_gradient(x: Tensor, name: str | None = None) -> Tensor:
    """Gives x itself, which counts as a constant when a graph is differentiated, as ``torch.Tensor.detach``.

    Args:
        x: Any dtype and shape.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of x's dtype and shape.

    Raises:
        DTypeError: If x is no tensor.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [2], name="x")
        ...     dx = hetu.gradients(x * hetu.stop_gradient(x), x)
        >>> g.run(dx, feed_dict={x: [2.0, 3.0]})
        tensor([2., 3.])
    """
    return build("stop_gradient", (x,), name=name)
