"""Tensors joined and cut along a dimension: concat and split, each the other's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from hetu.arguments import MAX_COUNT, int_of, items
from hetu.dtypes import float32
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Tensor, TensorSpec, current_graph, register
from hetu.ops.common.build import Dim, axis, build, output, plain, rank, result_type, show, size, tensor, total
from hetu.ops.common.gradients import single, to_dtype, zeros_like
from hetu.ops.common.samples import eighths, whole_numbers
from hetu.ops.sources import placeholder
from hetu.symbols import IntSymbol, ceil_div

__all__ = ["concat", "split"]


@register
class Concat(OpDef):
    """Tensors one after the other along a dimension."""

    name = "concat"
    inputs = ("*tensors",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        if not call.inputs:
            call.fail(ShapeError, "expected tensors to hold at least one, got none")
        parts = [tensor(call, index, f"tensors[{index}]") for index in range(len(call.inputs))]
        first = parts[0]
        dim = axis(call, call.attrs["dim"], first.ndim)
        shape = [plain(item) for item in first.symbolic_shape]
        for index, part in enumerate(parts[1:], 1):
            rank(call, part, f"tensors[{index}]", first.ndim, first.ndim)
            what = f"expected shapes equal apart from dimension {dim}, got {show(first.shape)} and {show(part.shape)}"
            for place, item in enumerate(part.shape):
                if place != dim:
                    call.same(shape[place], item, what)
                    shape[place] = item if isinstance(item, int) else shape[place]
        call.attrs["dim"] = dim
        shape[dim] = total([part.symbolic_shape[dim] for part in parts])
        return [output(call, result_type(parts), shape)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        grad, dim = single(grads), node.attrs["dim"]

        @cache
        def pieces() -> tuple[Tensor, ...]:
            attrs = {"sizes": [item.shape[dim] for item in node.tensors], "dim": dim}
            return node.graph.apply("split", (grad,), attrs)

        def part(index: int) -> Tensor:
            return to_dtype(pieces()[index], node.tensors[index].dtype)

        return [partial(part, index) for index in range(len(node.inputs))]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(lambda *x: concat(x, 0), [eighths(3, 2), eighths(1, 2, seed=1)], _join, [(0, 0), (1, 0)]),
            GoodSample(
                lambda *x: concat(x, -1),
                [eighths(3, 2), eighths(3, 0), eighths(3, 5)],
                _join_last,
                [(0, 0), (1, 0), (2, 0)],
            ),
            GoodSample(lambda *x: concat(x, 0), [whole_numbers(3), eighths(2, dtype="float16")], _join),
            GoodSample(lambda x: concat([x], 0), [whole_numbers(0, 2)], lambda x: x),
        ]
        bad = [
            BadSample(lambda: concat([], 0), ShapeError, "tensors to hold at least one"),
            BadSample(lambda: concat([_float(2, 3), _float(2, 4)], 0), ShapeError, "equal apart from dimension 0"),
            BadSample(lambda: concat([_float(2, 3), _float(2)], 0), ShapeError, "tensors[1] to have 2 dimension(s)"),
            BadSample(lambda: concat([_float(2), 3], 0), DTypeError, "tensors[1] to be a tensor"),  # type: ignore[list-item]
            BadSample(lambda: concat([_float()], 0), ShapeError, "no dimension 0 in a tensor of 0 dimension(s)"),
        ]
        return good, bad


def _join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts)


def _join_last(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis=-1)


@register
class Split(OpDef):
    """Pieces one after the other along a dimension: one output each."""

    name = "split"
    is_view = True
    inputs = ("x",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x, wanted = tensor(call, 0, "x"), call.attrs["sizes"]
        dim = axis(call, call.attrs["dim"], x.ndim)
        whole = x.shape[dim]
        is_one = isinstance(wanted, IntSymbol) or int_of(wanted) is not None
        sizes = self._equal(call, wanted, whole) if is_one else self._several(call, wanted)
        what = f"expected sizes that add up to {whole}, that of dim {dim}, got {show(sizes)}"
        call.same(total(sizes), whole, what)
        call.attrs.update(sizes=tuple(sizes), dim=dim)
        shapes = [(*x.symbolic_shape[:dim], item, *x.symbolic_shape[dim + 1 :]) for item in sizes]
        return [output(call, x.dtype, shape) for shape in shapes]

    @staticmethod
    def _several(call: Call, wanted: Sequence[Any]) -> list[Dim]:
        what = "an int, an IntSymbol or a list of them"
        given = items(wanted, "sizes", what, op=call.op, error=ShapeError)
        sizes = [size(call, item, f"sizes[{place}]") for place, item in enumerate(given)]
        if not sizes:
            call.fail(ShapeError, "expected sizes to hold at least one, got none")
        for item in sizes:
            call.check(item >= 0, f"expected sizes of at least 0, got {show(sizes)}")
        return sizes

    @staticmethod
    def _equal(call: Call, wanted: Any, total: Dim) -> list[Dim]:
        """Pieces of one size; the last one has what is left."""
        each = size(call, wanted, "sizes")
        call.check(each >= 1, f"expected sizes of at least 1, got {each}")
        count = plain(ceil_div(total, each))
        if isinstance(count, IntSymbol):
            what = f"can't tell how many pieces of {each} there are in {total}, and each is an output"
            call.fail(ShapeError, what, "give the sizes as a list, which may hold symbols")
        if count > MAX_COUNT:
            call.fail(ShapeError, f"expected at most {MAX_COUNT} pieces, got {count} of {each}", "give larger sizes")
        count = max(count, 1)
        return [*[each] * (count - 1), plain(total - (count - 1) * each)]

    def gradient(self, node: Node, grads: Sequence[Tensor | None]) -> Sequence[Callable[[], Tensor] | None]:
        def joined() -> Tensor:
            parts = [zeros_like(out) if grad is None else grad for out, grad in zip(node.outputs, grads, strict=True)]
            return build("concat", parts, {"dim": node.attrs["dim"]})

        return [joined]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        def cut(dim: int, *places: int) -> Callable[[np.ndarray], list[np.ndarray]]:
            return lambda x: np.split(x, places, dim)

        def halves(x: Tensor) -> list[Tensor]:
            n = x.symbolic_shape[0]
            return split(x, [n // 2, n - n // 2])

        s = IntSymbol("s")
        good = [
            GoodSample(lambda x: split(x, [2, 0, 3], 1), [eighths(3, 5)], cut(1, 2, 2), [(0, 0)]),
            GoodSample(halves, [eighths(5, 2)], lambda x: np.split(x, [len(x) // 2]), [(0, 0)]),
            GoodSample(lambda x: split(x, 2), [eighths(5, 2)], cut(0, 2, 4), [(0, 1)]),
            GoodSample(lambda x: split(x, 2, -1), [whole_numbers(3, 4)], cut(-1, 2)),
            GoodSample(lambda x: split(x, x.symbolic_shape[0]), [eighths(3)], lambda x: [x]),
            GoodSample(lambda x: split(x, 7), [eighths(0, 3, dtype="float16")], lambda x: [x]),
        ]
        bad = [
            BadSample(lambda: split(_float(5), [2, 2]), ShapeError, "add up to 5, that of dim 0, got [2, 2]"),
            BadSample(lambda: split(_float(5), [6, -1]), ShapeError, "sizes of at least 0, got [6, -1]"),
            BadSample(lambda: split(_float(5), []), ShapeError, "sizes to hold at least one"),
            BadSample(lambda: split(_float(5), 0), ShapeError, "sizes of at least 1, got 0"),
            BadSample(lambda: split(_float(s), 2), ShapeError, "how many pieces of 2 there are in s"),
            BadSample(lambda: split(_float(5), [2, 3], 1), ShapeError, "there is no dimension 1"),
            BadSample(lambda: split(_float(5), 2.5), ShapeError, "an IntSymbol or a list of them, got 2.5"),  # type: ignore[arg-type]
        ]
        return good, bad


def _float(*shape: int | IntSymbol) -> Tensor:
    return placeholder(float32, shape)


def concat(tensors: Sequence[Tensor], dim: int = 0, name: str | None = None) -> Tensor:
    """Joins tensors along a dimension, as ``torch.cat``.

    Args:
        tensors: At least one tensor. They have the same number of dimensions, and the same sizes in all but ``dim``.
        dim: The dimension; negative ones count from the end.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor whose size in ``dim`` is the sum of theirs. Its dtype is that of ``torch.result_type``.

    Raises:
        ShapeError: If there is no tensor, no such dimension, or other sizes differ.
        DTypeError: If one of them is no tensor.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [s], name="x")
        ...     y = hetu.concat([x, x])
        >>> y
        hetu.Tensor(concat_0: float32[2*s])
        >>> g.run(y, feed_dict={x: [1.0, 2.0]})
        tensor([1., 2., 1., 2.])
    """
    fix = "write [x] for a list of one"
    given = items(tensors, "tensors", "a list of tensors", op="concat", error=DTypeError, fix=fix)
    return build("concat", given, {"dim": dim}, name)


def split(
    x: Tensor, sizes: int | IntSymbol | Sequence[int | IntSymbol], dim: int = 0, name: str | None = None
) -> list[Tensor]:
    """Cuts a tensor into pieces along a dimension, as ``torch.split``. Nothing is copied.

    Args:
        x: Any dtype, at least one dimension.
        sizes: A list with the size of each piece; or one size for all pieces, of which the last may be smaller. Sizes
            are ints or IntSymbols.
        dim: The dimension; negative ones count from the end.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        The pieces, tensors of x's dtype.

    Raises:
        ShapeError: If the sizes don't add up or don't say how many pieces there are, or there is no such dimension.
            Every run checks what only the symbols' values decide.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [s], name="x")
        ...     front, back = hetu.split(x, [s // 2, s - s // 2])
        >>> g.run([front, back], feed_dict={x: [1.0, 2.0, 3.0]})
        [tensor([1.]), tensor([2., 3.])]
    """
    return list(current_graph((x,), "split").apply("split", (x,), {"sizes": sizes, "dim": dim}, name))
