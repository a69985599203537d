"""Arrays of numpy and torch alike, on the host. Knows torch tensors without importing torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetu.arguments import is_torch


def is_on_host(value: Any) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return not is_torch(value) or value.is_cpu


def host_array(value: Any) -> NDArray[Any]:
    """The values on the host; copies from a device if they lie on one."""
    if not is_torch(value):
        return np.asarray(value)
    if value.requires_grad or not value.is_cpu:
        value = value.detach().cpu()
    array: NDArray[Any] = value.numpy()
    return array
