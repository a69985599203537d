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
    """What ``x.type`` has."""

    layout: Any = None


class Value:
    """A scalar or a tensor, with Triton's operators: broadcasting only over sizes 1, division of integers as in C."""

    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("data", "dtype")
    type = Type()

    def __init__(self, data: Any, dtype: Any) -> None:
        self.data = rounded(data, dtype)
        self.dtype = dtype

    @property
    def shape(self) -> list[int]:
        return list(np.shape(self.data))

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
    raise KernelError(f"{type(x).__name__} is no value; a product in flight needs warpgroup_mma_wait first")


_rank = attrgetter("rank")


def common(*operands: Any) -> tuple[list[Any], Any]:
    """The numbers of operands that broadcast, and the dtype of what is computed of them.

    A Python number has the dtype of what it meets, but for a float that meets an integer.
    """
    values = [value(x) for x in operands]
    typed = [own for own, x in zip(values, operands, strict=True) if isinstance(x, Value)]
    dtype = max((x.dtype for x in typed or values), key=_rank)
    if len({x.dtype for x in typed if x.dtype in _HALVES}) > 1:
        raise KernelError("float16 meets bfloat16")
    if any(x.dtype is float32 for x in values) and not dtype.is_floating():
        dtype = float32
    elif dtype is int1 and any(x.dtype is int32 for x in values):
        dtype = int32
    shapes = [x.shape for x in values if x.shape]
    for one in shapes:
        if len(one) != len(shapes[0]) or any(1 not in (a, b) and a != b for a, b in zip(one, shapes[0], strict=True)):
            raise KernelError(f"shapes {shapes} do not broadcast in Gluon")
    return [x.data for x in values], dtype


def _quotient(a: Any, b: Any) -> Any:
    """Towards zero, as C divides."""
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": _quotient,
    "mod": lambda a, b: a - b * _quotient(a, b),
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}
_COMPARISONS = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}


def _define() -> None:
    """Gives values their operators."""

    def arithmetic(compute: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
        def apply(a: Any, b: Any) -> Any:
            if not isinstance(a, Value) and not isinstance(b, Value):  # a pointer, which knows how to add
                return NotImplemented
            if any(not isinstance(x, Value | int | float | np.generic) for x in (a, b)):
                return NotImplemented
            (left, right), dtype = common(a, b)
            if compute in (_ARITHMETIC["floordiv"], _ARITHMETIC["mod"]) and dtype.is_floating():
                raise KernelError("// and % are of integers")
            with np.errstate(all="ignore"):
                return Value(compute(left, right), dtype)

        return apply, lambda a, b: apply(b, a)

    def comparison(compute: Callable[[Any, Any], Any]) -> Any:
        def apply(a: Any, b: Any) -> Value:
            (left, right), _ = common(a, b)
            return Value(compute(left, right), int1)

        return apply

    for name, compute in _ARITHMETIC.items():
        forward, reverse = arithmetic(compute)
        setattr(Value, f"__{name}__", forward)
        setattr(Value, f"__r{name}__", reverse)
    for name, compute in _COMPARISONS.items():
        setattr(Value, f"__{name}__", comparison(compute))

    def divide(a: Any, b: Any) -> Value:
        (left, right), dtype = common(a, b)
        with np.errstate(all="ignore"):
            return Value(np.float32(left) / np.float32(right), dtype if dtype.is_floating() else float32)

    Value.__truediv__ = divide  # type: ignore[attr-defined]
    Value.__rtruediv__ = lambda a, b: divide(b, a)  # type: ignore[attr-defined]


_define()
