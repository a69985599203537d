"""Copies from the host to a device that nobody waits for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hetu.backends.allocate import empty

SMALL = 16 * 1024
"""Bytes that the driver takes into memory of its own, about 4 MB, before it copies them: so little it takes at once,
unless some 250 such copies are under way. Measured on an H100; 24 KB, 200 times, already waited for the stream."""


def copied_to(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of a host array on a device; on the CPU the array's own memory.

    More than a little goes through memory that the device may read by itself, because a copy from ordinary memory would
    wait for the stream. torch keeps such memory, and gives it out again only when the copy is done; that takes it three
    times as long as a little copy.

    Example:
        >>> copied_to(np.arange(3), torch.device("cpu"))
        tensor([0, 1, 2])
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    if array.nbytes > SMALL:
        tensor = tensor.pin_memory()
    return empty(array.shape, tensor.dtype, device).copy_(tensor, non_blocking=True)
