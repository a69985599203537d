"""Computing in the element types that were declared, whatever ``torch.autocast`` a user's code is in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_AS_IT_IS = nullcontext()


def own_precision() -> AbstractContextManager[Any]:
    """Keeps autocast from what is computed inside.

    Example:
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), own_precision():
        ...     (x @ x).dtype
        torch.float32
    """
    return torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else _AS_IT_IS


def in_own_precision(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that computes in its own precision."""

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with own_precision():
            return function(*args, **kwargs)

    return call
