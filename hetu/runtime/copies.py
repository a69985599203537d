"""Copies of what a state holds, so that no two of its holders share anything."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy, deepcopy
from typing import Any, NoReturn

import numpy as np
import torch

from hetu.arguments import number_of
from hetu.errors import HetuError, caller


def copied(value: Any, with_tensors: bool = True) -> Any:
    """A copy of nested dicts, lists, tuples and sets, of the same types.

    Numbers of numpy become Python's.

    Args:
        value: What to copy.
        with_tensors: False to keep the tensors themselves.

    Example:
        >>> copied({"betas": (np.float64(0.5), 1)})
        {'betas': (0.5, 1)}
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if with_tensors else value
    if isinstance(value, (np.generic, np.ndarray)):
        number = number_of(value)
        return deepcopy(value) if number is None else number
    if isinstance(value, dict):
        made = copy(value)  # a Counter stays one
        for key, item in value.items():
            made[key] = copied(item, with_tensors)
        return made
    if isinstance(value, Mapping):
        return {key: copied(item, with_tensors) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(copied(item, with_tensors) for item in value)
    try:
        return deepcopy(value)
    except Exception:  # it is of the user's making, and may fail in any way
        return value


def dense(value: torch.Tensor, what: str, op: str = "load") -> torch.Tensor:
    """A tensor of a given state as an ordinary one, which may share its memory: copy it before it is kept.

    Args:
        value: The tensor.
        what: What it is, for the error.
        op: Who asks, for the error.

    Raises:
        HetuError: If it has no values here: on the meta device, say, or in pieces on several processes.
    """
    kind = type(value)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        refuse(f"{what} is a {kind.__module__}.{kind.__name__}", "give an ordinary tensor", op)
    if value.is_meta:
        refuse(f"{what} lies on the meta device, and has no values", "give a tensor with values", op)
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        refuse(
            f"{what} is no dense tensor, but {_kind_of(value)}", "give a dense one: x.to_dense(), x.dequantize()", op
        )
    return value.detach()


def _kind_of(value: torch.Tensor) -> str:
    return "nested" if value.is_nested else "quantized" if value.is_quantized else str(value.layout)


def refuse(what: str, fix: str | None = None, op: str = "load") -> NoReturn:
    """Raises the error of a state or a file that can't be taken."""
    raise HetuError(what, op=op, where=caller(), fix=fix)
