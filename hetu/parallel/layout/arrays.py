"""Checks of the arrays that a layout cuts and joins: numpy's, torch's, or others that can be indexed like them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hetu.arguments import is_dense, is_torch, refuse
from hetu.errors import ShapeError, caller


def arrays_of(given: Any, name: str) -> list[Any]:
    """A list of arrays; an array is the list of its rows.

    Raises:
        ShapeError: If it is no sequence.
    """
    is_list = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    if not is_list and not (_is_array(given) and given.ndim > 1):
        refuse(given, name, "a list of arrays", op="layout", error=ShapeError, fix="give numpy arrays or torch tensors")
    return list(given)


def check_array(given: Any, name: str) -> None:
    """Demands an array of rows.

    Raises:
        ShapeError: If it is none, or has elements that are masked or not there.
    """
    if isinstance(given, np.ma.MaskedArray) or (is_torch(given) and not is_dense(given)):
        fix = "fill what is masked, or call .to_dense()"
        refuse(given, name, "a dense array without a mask", op="layout", error=ShapeError, fix=fix)
    if not _is_array(given):
        fix = "convert it with numpy.asarray(...) or torch.as_tensor(...)"
        refuse(given, name, "a numpy array or a torch tensor", op="layout", error=ShapeError, fix=fix)
    if not given.ndim:
        refuse(given, name, "an array of rows", op="layout", error=ShapeError, fix="give it a dimension of tokens")


def check_alike(shards: Sequence[Any], members: Sequence[int]) -> None:
    """Demands that the shards of one group differ in nothing but their number of rows.

    Raises:
        ShapeError: If they do: a shard would be cast or stretched to fit the others.
    """
    kinds = {r: kind_of(shards[r]) for r in members}
    first = members[0]
    for r, kind in kinds.items():
        if kind != kinds[first]:
            raise ShapeError(
                f"shards {first} and {r} of one group have rows of {kinds[first]} and {kind}, expected the same",
                op="layout",
                where=caller(),
                fix="give all shards of a group one dtype and width, all numpy's or all torch's",
            )


def kind_of(array: Any) -> str:
    """The dtype and the shape of a row."""
    return f"{getattr(array.dtype, 'name', array.dtype)}{list(array.shape[1:])}"  # torch's dtypes say whose they are


def _is_array(given: Any) -> bool:
    if is_torch(given):  # a nested one has no shape
        return is_dense(given)
    return all(hasattr(given, name) for name in ("shape", "dtype", "ndim", "__len__", "__getitem__"))
