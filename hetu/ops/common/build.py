"""Adds nodes to graphs, and has the checks that the ops' shape rules are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hetu.arguments import int_of, integer, is_torch, items, real, shown
from hetu.dtypes import DType, bool_, float32, int64, int_range, promote
from hetu.errors import DTypeError, HetuError, ShapeError
from hetu.graph import Call, Tensor, TensorSpec, current_graph
from hetu.symbols import IntSymbol, as_size, as_symbol
from hetu.symbols.expr import add

Dim = int | IntSymbol


def build(op: str, inputs: Sequence[Any], attrs: Mapping[str, Any] | None = None, name: str | None = None) -> Tensor:
    """Adds a node to the graph of its inputs, else to the current one, and gives its single output."""
    return current_graph(inputs, op).apply(op, inputs, attrs, name)[0]


def output(call: Call, dtype: DType, shape: Sequence[Dim]) -> TensorSpec:
    """An output that lies where the inputs lie.

    Raises:
        HetuError: If one input stays on the CPU whatever the graph's device is, and another one does not.
    """
    places = {item.on_cpu for item in call.inputs if isinstance(item, Tensor)}
    if len(places) > 1:
        call.fail(HetuError, "an input that stays on the CPU (rng_state) meets one that lies on the graph's device")
    return TensorSpec(dtype, shape, on_cpu=places == {True})


def tensor(call: Call, index: int, what: str) -> Tensor:
    """The operand ``index``, which must be a tensor."""
    item = call.inputs[index]
    if not isinstance(item, Tensor):
        call.fail(
            DTypeError, f"expected {what} to be a tensor, got {shown(item)}", "make it a tensor with hetu.constant(...)"
        )
    return item


def floating(call: Call, item: Tensor, what: str) -> None:
    """Demands a floating dtype."""
    if not item.dtype.is_floating:
        call.fail(
            DTypeError,
            f"expected {what} to be floating, got {item.dtype}",
            f"cast it first: hetu.cast({item.name}, hetu.float32)",
        )


def same_dtype(call: Call, first: Tensor, first_what: str, other: Tensor, other_what: str) -> None:
    """Demands that two operands have one dtype."""
    if first.dtype != other.dtype:
        call.fail(
            DTypeError,
            f"expected {first_what} and {other_what} to have one dtype, got {first.dtype} and {other.dtype}",
            f"cast one of them: hetu.cast({other.name}, {first.dtype})",
        )


def rank(call: Call, item: Tensor, what: str, least: int, most: int | None = None) -> None:
    """Demands a number of dimensions, ``least`` to ``most`` (None: any from ``least`` on)."""
    if item.ndim < least or (most is not None and item.ndim > most):
        wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        call.fail(ShapeError, f"expected {what} to have {wanted} dimension(s), got {show(item.shape)}")


def plain(size: Dim) -> Dim:
    """A size as an int where it is the same in every run."""
    return size if isinstance(size, int) or size.constant is None else size.constant


def total(sizes: Sequence[Dim]) -> Dim:
    """The sum of many sizes, made at once: sums of sums take time that is quadratic in their number."""
    return plain(IntSymbol.from_expr(add(*(as_symbol(item).expr for item in sizes))))


def show(shape: Sequence[Dim]) -> str:
    """A shape for messages: ``[s, 4]``."""
    return f"[{', '.join(str(plain(size)) for size in shape)}]"


def size(call: Call, value: Any, what: str) -> Dim:
    """An argument that must be an int or an IntSymbol; its sign is not looked at."""
    return plain(as_size(value, what, op=call.op, error=ShapeError))


def sizes(call: Call, value: Any, what: str) -> tuple[Dim, ...]:
    """An argument that must be a list of ints and IntSymbols."""
    fix = "write [n] for one dimension"
    given = items(value, what, "a list of sizes", op=call.op, error=ShapeError, fix=fix)
    return tuple(size(call, item, f"{what}[{place}]") for place, item in enumerate(given))


def shape_of(call: Call) -> tuple[Dim, ...]:
    """The attribute ``shape``, in its normal form: sizes of at least 0."""
    shape = call.attrs["shape"] = sizes(call, call.attrs["shape"], "shape")
    for item in shape:
        call.check(item >= 0, f"expected sizes of at least 0, got {show(shape)}")
    return shape


def probability(call: Call, what: str) -> float:
    """The attribute ``what``: how likely it is that an entry is dropped."""
    wanted, fix = "a probability in [0, 1)", "give 0 for no dropout"
    return real(call.attrs[what], what, wanted, lambda p: 0 <= p < 1, op=call.op, fix=fix)


def representable(call: Call, values: Any, dtype: DType, what: str) -> None:
    """Refuses numbers that would wrap, be cut or lose a NaN in an int dtype or bool.

    Args:
        call: The call to check.
        values: A numpy array or a torch tensor.
        dtype: What the numbers are converted to. Floats may round.
        what: The argument's name.
    """
    if dtype.is_floating:
        return
    if is_torch(values):
        values = (values.double() if values.is_floating_point() else values).cpu().numpy()
    low, high = int_range(dtype) if dtype.kind == "int" else (0, 1)
    if values.dtype.kind not in "biu":
        wide = values.astype(np.longdouble if values.dtype.itemsize > 8 else np.float64)
        fits = (wide >= low) & (wide < high + 1) & (wide == np.floor(wide))  # a NaN is none of these
    else:
        fits = (values >= low) & (values <= high)
    wrong = np.atleast_1d(np.logical_not(fits))
    if wrong.any():
        first = np.atleast_1d(values)[wrong][0]
        fix = "choose another dtype, or round and clip the values first"
        call.fail(DTypeError, f"expected {what} to fit {dtype}, got {first}", fix)


def axis(call: Call, dim: Any, ndim: int, what: str = "dim") -> int:
    """A dimension's index, counted from the front."""
    index = integer(dim, what, op=call.op, error=ShapeError)
    if not -ndim <= index < ndim:
        fix = f"use -{ndim} to {ndim - 1}" if ndim else "a tensor without dimensions has none to name"
        call.fail(
            ShapeError, f"there is no dimension {shown(index)} in a tensor of {ndim} dimension(s), as {what} says", fix
        )
    return index % ndim


def axes(call: Call, dim: Any, ndim: int) -> tuple[int, ...]:
    """Indices of one dimension, of several, or (None) of all, in order."""
    if dim is None:
        return tuple(range(ndim))
    is_one = int_of(dim) is not None
    given = [dim] if is_one else items(dim, "dim", "an int or a list of ints", op=call.op, error=ShapeError)
    wanted = tuple(axis(call, item, ndim) for item in given)
    if len(set(wanted)) < len(wanted):
        call.fail(ShapeError, f"dim names a dimension twice: {dim}")
    if not wanted and ndim:
        call.fail(ShapeError, "dim names no dimension", "name some, or leave dim out to reduce over all")
    return tuple(sorted(wanted))


def broadcast(call: Call, a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
    """The common shape of two shapes, by numpy's rule.

    Only a size known to be 1 is stretched. Two sizes of which neither is known to be 1 must be equal: refused
    now if they can't be, else demanded of every run.
    """
    longest = max(len(a), len(b))
    full_a, full_b = [1] * (longest - len(a)) + [*a], [1] * (longest - len(b)) + [*b]
    return tuple(_broadcast_size(call, plain(x), plain(y), a, b) for x, y in zip(full_a, full_b, strict=True))


def _broadcast_size(call: Call, x: Dim, y: Dim, a: Sequence[Dim], b: Sequence[Dim]) -> Dim:
    if x == 1 or y == 1:
        return y if x == 1 else x
    call.same(
        x,
        y,
        f"expected shapes that broadcast, got {show(a)} and {show(b)}: {x} and {y} differ",
        "make them equal; only a size known to be 1 when the graph is built is stretched",
    )
    return y if isinstance(y, int) else x


def stretched_to(call: Call, x: Tensor, wanted: Sequence[Dim], what: str = "") -> None:
    """Demands that a tensor can be stretched to a shape: counted from the last, sizes are equal where x's is not 1.

    Args:
        call: The call to check.
        x: The tensor.
        wanted: The shape.
        what: The operand's name, where the error is not of the only one.
    """
    extra = len(wanted) - x.ndim
    text = f"expected {f'{what}: ' if what else ''}a shape that {show(x.shape)} can be stretched to, got {show(wanted)}"
    if extra < 0:
        call.fail(ShapeError, text, "a shape of at least as many dimensions")
    for one, other in zip(x.shape, wanted[extra:], strict=True):
        if one != 1:
            call.same(one, other, text, "only a size known to be 1 when the graph is built is stretched")


def result_type(operands: Sequence[Any]) -> DType:
    """The dtype of an arithmetic result, by torch's rule (``torch.result_type``).

    Tensors with dimensions count first. A tensor without dimensions, and after that a number, matters only if
    its kind (bool < int < float) is a higher one. Symbols are ints; a float meeting no float tensor gives float32.
    """
    with_dims: DType | None = None
    without: DType | None = None
    numbers: DType | None = None
    for item in operands:
        if not isinstance(item, Tensor):
            numbers = _join(numbers, _number_type(item))
        elif item.ndim:
            with_dims = _join(with_dims, item.dtype)
        else:
            without = _join(without, item.dtype)
    result = _outweigh(_outweigh(with_dims, without), numbers)
    assert result is not None, "an op has operands"
    return result


def _number_type(number: Any) -> DType:
    if isinstance(number, bool):
        return bool_
    return float32 if isinstance(number, float) else int64


def _join(a: DType | None, b: DType) -> DType:
    return b if a is None else promote(a, b)


def _outweigh(strong: DType | None, weak: DType | None) -> DType | None:
    if strong is None or weak is None:
        return strong or weak
    joined = promote(strong, weak)
    return strong if joined.kind == strong.kind else joined
