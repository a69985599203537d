"""Element types, known without torch so that graphs are built on any machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hetu.arguments import shown
from hetu.errors import DTypeError, caller


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes:
        name: The name that torch and numpy use too.
        itemsize: Bytes an element.
        kind: ``"float"``, ``"int"`` or ``"bool"``.

    Example:
        >>> import hetu
        >>> hetu.bfloat16.name, hetu.bfloat16.itemsize, hetu.bfloat16.is_floating
        ('bfloat16', 2, True)
    """

    name: str
    itemsize: int
    kind: str

    @property
    def is_floating(self) -> bool:
        return self.kind == "float"

    def __repr__(self) -> str:
        return f"hetu.{self.name}"

    __str__ = __repr__


float16 = DType("float16", 2, "float")
bfloat16 = DType("bfloat16", 2, "float")
float32 = DType("float32", 4, "float")
float64 = DType("float64", 8, "float")
uint8 = DType("uint8", 1, "int")
int8 = DType("int8", 1, "int")
int16 = DType("int16", 2, "int")
int32 = DType("int32", 4, "int")
int64 = DType("int64", 8, "int")
bool_ = DType("bool", 1, "bool")

ALL = (float16, bfloat16, float32, float64, uint8, int8, int16, int32, int64, bool_)
_BY_NAME = {dtype.name: dtype for dtype in ALL}


def as_dtype(value: Any) -> DType:
    """The element type that ``value`` names: a hetu, numpy or torch dtype, or a name.

    Args:
        value: What names it.

    Returns:
        The element type.

    Raises:
        DTypeError: If there is no such type in hetu.

    Example:
        >>> as_dtype("bfloat16")
        hetu.bfloat16
    """
    if isinstance(value, DType):
        return value
    found = _BY_NAME.get(_name_of(value))
    if found is None:
        names = ", ".join(_BY_NAME)
        what = f"there is no element type {shown(value)} for dtype"
        raise DTypeError(what, where=caller(), fix=f"use one of {names}")
    return found


def _name_of(value: Any) -> str:
    """The name of what may be an element type: of a class such as ``numpy.float32``, a dtype, or a name itself."""
    if isinstance(value, str):
        return value.removeprefix("torch.")
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, np.dtype):
        return value.name
    return str(value).removeprefix("torch.") if type(value).__module__.partition(".")[0] == "torch" else ""


def int_range(dtype: DType) -> tuple[int, int]:
    """The least and the greatest value of an int dtype.

    Example:
        >>> int_range(int8)
        (-128, 127)
    """
    bits = 8 * dtype.itemsize
    return (0, 2**bits - 1) if dtype.name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def promote(a: DType, b: DType) -> DType:
    """The type of an arithmetic result of two tensors, by torch's rules for tensors."""
    if a == b:
        return a
    rank = {"bool": 0, "int": 1, "float": 2}
    if rank[a.kind] != rank[b.kind]:
        return a if rank[a.kind] > rank[b.kind] else b
    if {a.name, b.name} == {"float16", "bfloat16"}:
        return float32
    if a.itemsize == b.itemsize:  # uint8 with int8
        return int16
    return a if a.itemsize > b.itemsize else b
