"""Computing in the element types that were declared, whatever ``torch.autocast`` a user's code is in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from hetu.backends.torch_private import disable_autocast, is_any_autocast_enabled

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def in_own_precision(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that autocast is kept from.

    Example:
        >>> import torch
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     in_own_precision(torch.mm)(x, x).dtype
        torch.float32
    """

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if not is_any_autocast_enabled():
            return function(*args, **kwargs)
        with disable_autocast():
            return function(*args, **kwargs)

    return call
