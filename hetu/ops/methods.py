"""The ops as methods of tensors, in the call forms of PyTorch, and indexing.

What is a function of hetu with the tensor first is that function; what stands here is called otherwise by PyTorch, or
is made of other ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hetu.arguments import int_of, integer, refuse, shown
from hetu.dtypes import DType, as_dtype
from hetu.errors import HetuError, ShapeError, caller
from hetu.graph import Tensor
from hetu.graph.names import all_or_nothing
from hetu.ops import (
    activations,
    along,
    arithmetic,
    choice,
    compare,
    indexing,
    joining,
    linalg,
    nn,
    pointwise,
    reduce,
    rounding,
    shape,
)
from hetu.ops.common.build import Dim, plain, show
from hetu.symbols import IntSymbol, as_size

Sizes = Dim | Sequence[Dim]


def reshape(x: Tensor, *sizes: Sizes, name: str | None = None) -> Tensor:
    """Gives another shape: ``x.reshape(2, -1)`` or ``x.reshape([2, -1])``. See :func:`hetu.reshape`."""
    return shape.reshape(x, _one_list(sizes), name)


def view(x: Tensor, *sizes: Sizes, name: str | None = None) -> Tensor:
    """The same as ``x.reshape``."""
    return shape.reshape(x, _one_list(sizes), name)


def expand(x: Tensor, *sizes: Sizes, name: str | None = None) -> Tensor:
    """Stretches sizes of 1, as ``torch.Tensor.expand``; -1 keeps a size. See :func:`hetu.broadcast_to`."""
    wanted = _one_list(sizes)
    if isinstance(wanted, (list, tuple)):
        extra = len(wanted) - x.ndim
        wanted = [
            x.shape[place - extra] if int_of(item) == -1 and place >= extra else item
            for place, item in enumerate(wanted)
        ]
    return shape.broadcast_to(x, wanted, name)


def permute(x: Tensor, *dims: int | Sequence[int]) -> Tensor:
    """Puts the dimensions into another order, as ``torch.permute``. Nothing is copied."""
    given: Any = dims if len(dims) != 1 or int_of(dims[0]) is not None else dims[0]
    if not isinstance(given, (list, tuple)):
        refuse(given, "dims", "a list of ints", op="permute", error=ShapeError)
    wanted = [_place(x, dim, "permute", "dims") for dim in given]
    if sorted(wanted) != list(range(x.ndim)):
        what = f"expected dims to name each of {x.ndim} dimension(s) once, got {shown(list(given))}"
        raise ShapeError(what, op="permute", where=caller(), fix="name all of them, as in x.permute(1, 0)")
    order = list(range(x.ndim))
    for place, dim in enumerate(wanted):
        other = order.index(dim)
        if other != place:
            x = shape.transpose(x, place, other)
            order[place], order[other] = order[other], order[place]
    return x


def flatten(x: Tensor, start_dim: int = 0, end_dim: int = -1, name: str | None = None) -> Tensor:
    """Makes one dimension of several, as ``torch.flatten``."""
    if not x.ndim:
        return shape.reshape(x, [1], name)
    first, last = _place(x, start_dim, "flatten", "start_dim"), _place(x, end_dim, "flatten", "end_dim")
    if first > last:
        what = f"expected start_dim to be at most end_dim, got {first} and {last}"
        raise ShapeError(what, op="flatten", where=caller(), fix="give them in order")
    return shape.reshape(x, [*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :]], name)


def unsqueeze(x: Tensor, dim: int, name: str | None = None) -> Tensor:
    """Adds a dimension of size 1, as ``torch.unsqueeze``."""
    place = integer(dim, "dim", least=-x.ndim - 1, most=x.ndim, op="unsqueeze", error=ShapeError) % (x.ndim + 1)
    return shape.reshape(x, [*x.shape[:place], 1, *x.shape[place:]], name)


def squeeze(x: Tensor, dim: int | None = None, name: str | None = None) -> Tensor:
    """Removes a dimension of size 1, or all whose size is known to be 1, as ``torch.squeeze``.

    Raises:
        ShapeError: If there is no such dimension, or only a run knows whether its size is 1.
    """
    if dim is None:
        return shape.reshape(x, [size for size in x.shape if size != 1], name)
    place = _place(x, dim, "squeeze", "dim")
    if isinstance(x.shape[place], IntSymbol):
        what = f"whether dimension {place} of {show(x.shape)} has size 1 is known only when the graph runs"
        raise ShapeError(what, op="squeeze", where=caller(), fix="say it by a shape: x.reshape(...)")
    kept = [size for at, size in enumerate(x.shape) if at != place or size != 1]
    return shape.reshape(x, kept, name)


def to(x: Tensor, dtype: DType | Any) -> Tensor:
    """Converts to another element type; x itself if it has that one. Where a graph lies is said when it is made."""
    wanted = as_dtype(dtype)
    return x if x.dtype == wanted else nn.cast(x, wanted)


def neg(x: Tensor) -> Tensor:
    """``-x``."""
    return -x


def square(x: Tensor) -> Tensor:
    """``x * x``."""
    return x * x


def t(x: Tensor) -> Tensor:
    """A matrix with rows and columns swapped."""
    if x.ndim != 2:
        what = f"expected two dimensions, got {show(x.shape)}"
        raise ShapeError(what, op="t", where=caller(), fix="use x.transpose(dim0, dim1) or x.permute(...)")
    return shape.transpose(x, 0, 1)


def size(x: Tensor, dim: int | None = None) -> Any:
    """The shape, or the size of one dimension: an int, or an IntSymbol where runs differ."""
    return x.shape if dim is None else x.shape[_place(x, dim, "size", "dim")]


def numel(x: Tensor) -> int | IntSymbol:
    """How many elements it has: an int, or an IntSymbol where runs differ."""
    return plain(math.prod(x.shape))


def contiguous(x: Tensor) -> Tensor:
    """X itself: how tensors lie in memory is no matter of the graph."""
    return x


def as_bool(x: Tensor) -> Tensor:
    """The same values as bool."""
    return to(x, "bool")


def as_int(x: Tensor) -> Tensor:
    """The same values as int32."""
    return to(x, "int32")


def as_long(x: Tensor) -> Tensor:
    """The same values as int64."""
    return to(x, "int64")


def as_half(x: Tensor) -> Tensor:
    """The same values as float16."""
    return to(x, "float16")


def as_bfloat16(x: Tensor) -> Tensor:
    """The same values as bfloat16."""
    return to(x, "bfloat16")


def as_float(x: Tensor) -> Tensor:
    """The same values as float32."""
    return to(x, "float32")


def as_double(x: Tensor) -> Tensor:
    """The same values as float64."""
    return to(x, "float64")


# Indexing


def getitem(x: Tensor, key: Any) -> Tensor:
    """``x[1]``, ``x[:, 2:]``, ``x[..., ::2]``, ``x[:, None]``: ints, slices, ``...`` and None.

    Bounds are ints or IntSymbols; they are not cut to fit, as :func:`hetu.slice` says.

    Raises:
        ShapeError: If there are more entries than dimensions, an entry is none of these, or a bound does not fit. Every
            run checks what only the symbols' values decide.
    """
    with all_or_nothing(x.graph):
        return _parts(x, _entries(x, key))


def _parts(x: Tensor, entries: Sequence[Any]) -> Tensor:
    """What an index takes, entry by entry."""
    sizes: list[Dim] = []
    dim = 0
    for entry in entries:
        if entry is None:
            sizes.append(1)
            continue
        if isinstance(entry, slice):
            start, stop, step = _bound(x, dim, entry.start), _bound(x, dim, entry.stop), entry.step
            if not (start is None and stop is None and step is None):
                x = indexing.slice(x, dim, 0 if start is None else start, stop, 1 if step is None else step)
            sizes.append(x.shape[dim])
        else:
            place = _from_front(x, dim, entry)
            x = indexing.slice(x, dim, place, place + 1)
        dim += 1
    return x if tuple(sizes) == x.shape else shape.reshape(x, sizes)


def _entries(x: Tensor, key: Any) -> list[Any]:
    """What is said of each dimension, with None where one is added."""
    given = list(key) if isinstance(key, tuple) else [key]
    dots = [place for place, entry in enumerate(given) if entry is Ellipsis]
    for entry in given:
        known = entry is None or entry is Ellipsis or isinstance(entry, (slice, IntSymbol)) or int_of(entry) is not None
        if not known:
            kind = shown(entry) if not isinstance(entry, Tensor) else repr(entry)
            fix = "rows by a tensor of ids: hetu.embedding; elements: hetu.gather; by a condition: hetu.where"
            what = f"expected an index to be made of ints, IntSymbols, slices, ... and None, got {kind}"
            raise ShapeError(what, op="index", where=caller(), fix=fix)
    count = sum(entry is not None and entry is not Ellipsis for entry in given)
    if len(dots) > 1 or count > x.ndim:
        what = f"expected at most one ... and at most {x.ndim} entries for {show(x.shape)}, got an index of {count}"
        raise ShapeError(what, op="index", where=caller(), fix="leave some out")
    place = dots[0] if dots else len(given)
    return [*given[:place], *[slice(None)] * (x.ndim - count), *given[place + 1 :]]


def _from_front(x: Tensor, dim: int, entry: Any) -> Dim:
    """An index counted from the front."""
    index, size = as_size(entry, "an index", op="index", error=ShapeError), x.shape[dim]
    if isinstance(index, int) and isinstance(size, int) and not -size <= index < size:
        what = f"expected an index from {-size} to {size - 1} in dim {dim} of {show(x.shape)}, got {index}"
        raise ShapeError(what, op="index", where=caller(), fix="indices are not cut to fit")
    is_from_end = index < 0 if isinstance(index, int) else index.max is not None and index.max < 0
    return size + index if is_from_end else index


def _bound(x: Tensor, dim: int, bound: Any) -> Any:
    """A bound of a slice; symbols that are below 0 whatever their values count from the end, as ints do."""
    is_from_end = isinstance(bound, IntSymbol) and bound.max is not None and bound.max < 0
    return x.shape[dim] + bound if is_from_end else bound


def length(x: Tensor) -> int:
    """``len(x)``: the size of the first dimension, where it is the same in every run."""
    if not x.ndim or isinstance(x.shape[0], IntSymbol):
        what = f"len() of {x!r} is no plain number" if x.ndim else f"{x!r} has no dimensions, and so no len()"
        raise HetuError(what, where=caller(), fix="use x.shape[0], which may be a symbol")
    return x.shape[0]


def iterate(x: Tensor) -> Iterator[Tensor]:
    """Its entries along the first dimension, of which there must be the same number in every run."""
    return (getitem(x, place) for place in range(length(x)))


# Helpers


def _one_list(sizes: Sequence[Any]) -> Any:
    """Sizes that were given one by one, or as a list."""
    is_list = len(sizes) == 1 and not isinstance(sizes[0], IntSymbol) and int_of(sizes[0]) is None
    return sizes[0] if is_list else list(sizes)


def _place(x: Tensor, dim: Any, op: str, what: str) -> int:
    """A dimension's index, counted from the front."""
    if not x.ndim:
        raise ShapeError(f"there is no {what} to name in a tensor without dimensions", op=op, where=caller())
    return integer(dim, what, least=-x.ndim, most=x.ndim - 1, op=op, error=ShapeError) % x.ndim


_SAME = (
    *(getattr(family, name) for family in (pointwise, rounding, reduce, along) for name in family.__all__),
    *(getattr(family, name) for family in (arithmetic, compare) for name in family.__all__),
    *(activations.relu, activations.sigmoid, activations.tanh, choice.masked_fill, indexing.gather, joining.split),
    *(linalg.matmul, nn.softmax, shape.broadcast_to, shape.transpose),
)
"""Functions of hetu that are methods as they are."""

_OWN = (reshape, view, expand, permute, flatten, unsqueeze, squeeze, to, neg, square, t, size, numel, contiguous)

METHODS: dict[str, Callable[..., Any]] = {
    **{item.__name__: item for item in (*_SAME, *_OWN)},
    "bool": as_bool,
    "int": as_int,
    "long": as_long,
    "half": as_half,
    "bfloat16": as_bfloat16,
    "float": as_float,
    "double": as_double,
    "detach": shape.stop_gradient,
    "__getitem__": getitem,
    "__len__": length,
    "__iter__": iterate,
    "__abs__": rounding.abs,
}
"""What a tensor's methods are, by name."""

for _name, _method in METHODS.items():
    setattr(Tensor, _name, _method)
