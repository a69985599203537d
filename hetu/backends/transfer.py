"""Copies from the host to a device that nobody waits for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def copied_to(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of a host array on a device; on the CPU the array's own memory.

    It goes through memory that the device may read by itself, because a copy from ordinary memory would wait for the
    stream. torch keeps such memory, and gives it out again only when the copy is done.

    Example:
        >>> copied_to(np.arange(3), torch.device("cpu"))
        tensor([0, 1, 2])
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
