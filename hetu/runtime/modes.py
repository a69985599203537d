"""Running in hetu's own modes, whatever torch modes a user's code is in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from hetu.backends.precision import in_own_precision

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def in_own_modes(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that ``torch.autocast`` and ``torch.inference_mode`` are kept from.

    The graph's own casts are ops. Tensors that are made in inference mode could never be trained: what a graph keeps
    from run to run must not depend on who was the first to ask for it.

    Example:
        >>> with torch.inference_mode():
        ...     in_own_modes(torch.ones)(2).is_inference()
        False
    """
    precise = in_own_precision(function)

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if not torch.is_inference_mode_enabled():
            return precise(*args, **kwargs)
        with torch.inference_mode(False):
            return precise(*args, **kwargs)

    return call


def on_cpu_by_default() -> AbstractContextManager[Any]:
    """A context in which torch's own code makes tensors on the CPU where it names no device.

    Some versions of torch count an optimiser's steps on the default device, which may be a user's for something else.

    Example:
        >>> with torch.device("meta"), on_cpu_by_default():
        ...     torch.ones(2).device
        device(type='cpu')
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
