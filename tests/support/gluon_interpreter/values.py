"""Scalars and tensors in registers: numpy arrays with the dtype that they have on the device.

Floats are computed in float32 and rounded to their dtype; integers are computed in int64, and one that leaves its dtype
is an error, for on the device it would wrap around. Layouts are not kept: who has which element matters to inline
assembly alone, and that is of tiles whose layout is known (see ``ptx.py``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Dtype:
    """What a number is.

    Attributes:
        name: Of it.
        primitive_bitwidth: Its bits.
        rank: The dtype of a result is the one of its operands with the largest.
        torch: Torch's.
    """

    name: str
    primitive_bitwidth: int
    rank: int
    torch: torch.dtype

    def is_floating(self) -> bool:
        return self.rank > 2


int1 = Dtype("int1", 1, 0, torch.bool)
int32 = Dtype("int32", 32, 1, torch.int32)
int64 = Dtype("int64", 64, 2, torch.int64)
float16 = Dtype("float16", 16, 3, torch.float16)
bfloat16 = Dtype("bfloat16", 16, 3, torch.bfloat16)
float32 = Dtype("float32", 32, 4, torch.float32)
TORCH = {dtype.torch: dtype for dtype in (int32, int64, float16, bfloat16, float32)}
"""Dtypes of torch's."""
_HALVES = (float16, bfloat16)


class KernelError(AssertionError):
    """What a kernel does that a device would not do, or not reliably."""


def rounded(data: Any, dtype: Dtype) -> Any:
    """Numbers as a dtype holds them."""
    if dtype is float32:
        return np.asarray(data, np.float32)[()]
    if dtype is int1:
        return np.asarray(data, np.bool_)[()]
    if dtype in _HALVES:
        half = torch.from_numpy(np.atleast_1d(np.asarray(data, np.float32))).to(dtype.torch)
        return half.float().numpy().reshape(np.shape(data))[()]
    whole = np.asarray(data, np.int64)[()]
    if dtype is int32:
        is_tensor = isinstance(whole, np.ndarray)
        if not -(2**31) <= (whole.min() if is_tensor else whole) <= (whole.max() if is_tensor else whole) < 2**31:
            raise KernelError("an int32 leaves its range")
    return whole


class Type:
    """What ``x.type`` has: a layout, for which nothing asks here."""

    layout = None


class Value:
    """A scalar or a tensor, with Triton's operators: broadcasting only over sizes 1, division of integers as in C."""

    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("data", "dtype", "shape")
    type = Type()

    def __init__(self, data: Any, dtype: Dtype) -> None:
        self.data = rounded(data, dtype)
        self.dtype = dtype
        self.shape: tuple[int, ...] = self.data.shape

    def __bool__(self) -> bool:
        if self.shape:
            raise KernelError("a condition on a tensor")
        return bool(self.data)

    def __index__(self) -> int:
        if self.shape or self.dtype.is_floating():
            raise KernelError("a bound or an index that is no integer")
        return int(self.data)

    def __getitem__(self, key: Any) -> Value:
        if any(part is not None and part != slice(None) for part in key):
            raise KernelError("tensors take no index but : and None")
        return Value(self.data[key], self.dtype)

    def __neg__(self) -> Value:
        return Value(-self.data, self.dtype)

    def to(self, dtype: Any) -> Value:
        """Converted; floats to integers towards zero."""
        if self.dtype.is_floating() and not dtype.is_floating():
            return Value(np.trunc(self.data), dtype)
        return Value(self.data, dtype)

    def reshape(self, shape: Sequence[int]) -> Value:
        return Value(np.reshape(self.data, tuple(shape)), self.dtype)

    def permute(self, order: Sequence[int]) -> Value:
        return Value(np.transpose(self.data, tuple(order)), self.dtype)

    def split(self) -> tuple[Value, Value]:
        """The two halves of a last dim of size 2."""
        if self.shape[-1] != 2:
            raise KernelError(f"split takes a last dim of 2, not {self.shape}")
        return Value(self.data[..., 0], self.dtype), Value(self.data[..., 1], self.dtype)


def value(x: Any) -> Value:
    """A value of a Python number too."""
    if isinstance(x, Value):
        return x
    if isinstance(x, bool | np.bool_):
        return Value(x, int1)
    if isinstance(x, int | np.integer):
        return Value(x, int32 if -(2**31) <= x < 2**31 else int64)
    if isinstance(x, float | np.floating):
        return Value(x, float32)
    raise KernelError(f"{type(x).__name__} is no value; a product under way needs warpgroup_mma_wait first")


def common(*operands: Any) -> tuple[list[Any], Dtype]:
    """The numbers of operands that broadcast, and the dtype of what is computed of them.

    A Python number has the dtype of what it meets, but for a float that meets an integer.
    """
    found, dtype, number, shape = [], None, int1, None
    for x in operands:
        own = value(x)
        found.append(own.data)
        if own.shape:
            shape = _broadcast(shape, own.shape)
        if own is not x:
            number = max(number, own.dtype, key=_rank)
        elif dtype is None or own.dtype.rank > dtype.rank:
            dtype = own.dtype
        elif own.dtype.rank == dtype.rank and own.dtype is not dtype:
            raise KernelError("float16 meets bfloat16")
    if dtype is None or (number is float32 and not dtype.is_floating()) or (number is int32 and dtype is int1):
        dtype = number
    return found, dtype


_rank = attrgetter("rank")


def _broadcast(shape: tuple[int, ...] | None, other: tuple[int, ...]) -> tuple[int, ...]:
    if shape is None or shape == other:
        return other
    if len(shape) != len(other) or any(1 not in (a, b) and a != b for a, b in zip(shape, other, strict=True)):
        raise KernelError(f"shapes {shape} and {other} do not broadcast in Gluon")
    return tuple(map(max, shape, other))


def _quotient(a: Any, b: Any) -> Any:
    """Towards zero, as C divides."""
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def _remainder(a: Any, b: Any) -> Any:
    """Of the sign of a."""
    return a - b * _quotient(a, b)


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": _quotient,
    "mod": _remainder,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}


_NUMBERS = (Value, int, float, np.generic)


def _arithmetic(compute: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """An operator, and that of a number and a value."""

    def apply(a: Any, b: Any) -> Any:
        if not isinstance(a, _NUMBERS) or not isinstance(b, _NUMBERS):  # a pointer, which knows how to add
            return NotImplemented
        (left, right), dtype = common(a, b)
        if compute in (_quotient, _remainder) and dtype.is_floating():
            raise KernelError("// and % are of integers")
        return Value(compute(left, right), dtype)

    return apply, lambda a, b: apply(b, a)


def _comparison(compute: Callable[[Any, Any], Any]) -> Any:
    return lambda a, b: Value(compute(*common(a, b)[0]), int1)


def _divide(a: Any, b: Any) -> Value:
    (left, right), dtype = common(a, b)
    return Value(np.float32(left) / np.float32(right), dtype if dtype.is_floating() else float32)


for _name, _compute in _ARITHMETIC.items():
    for _prefix, _operator in zip(("", "r"), _arithmetic(_compute), strict=True):
        setattr(Value, f"__{_prefix}{_name}__", _operator)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _comparison(getattr(operator, _name)))
Value.__truediv__ = _divide  # type: ignore[attr-defined]
Value.__rtruediv__ = lambda a, b: _divide(b, a)  # type: ignore[attr-defined]
