"""Memory on a device: what kernels write is allocated here, and host arrays are copied without anybody waiting."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

SMALL = 16 * 1024
"""Bytes that the driver takes into memory of its own, about 4 MB, before it copies them: so little it takes at once,
unless some 250 such copies are under way. Measured on an H100; 24 KB, 200 times, already waited for the stream."""


def _inductors_way() -> Any:
    """How torch.compile's generated code allocates on the current CUDA device; None if this torch has no such way."""
    return getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None)


_empty_strided_cuda = _inductors_way()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor with anything in it: ``torch.empty``, in a third of its time on a GPU's host.

    There the dispatcher takes 6 µs for it, and what torch.compile's generated code calls 2. That is used on the current
    device, and where no mode watches what is made.

    Example:
        >>> empty((2, 3, 4), torch.float16, torch.device("cpu")).shape
        torch.Size([2, 3, 4])
    """
    if (
        _empty_strided_cuda is None
        or device.type != "cuda"
        or device.index != torch.cuda.current_device()
        or not shape
        or 0 in shape
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return torch.empty(shape, dtype=dtype, device=device)
    sizes = tuple(shape)  # it refuses a torch.Size
    made: torch.Tensor = _empty_strided_cuda(sizes, _strides(sizes[1:]), dtype)
    return made


@lru_cache(maxsize=256)  # lengths change from run to run, what lies behind them doesn't
def _strides(inner: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of contiguous tensors of ``(any, *inner)``.

    Example:
        >>> _strides((3, 4))
        (12, 4, 1)
    """
    strides = [1]
    for size in reversed(inner):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """A host array as a tensor: its own memory where torch takes that, else a copy.

    torch takes no read-only, unaligned, reversed or foreign-endian memory.

    Example:
        >>> as_tensor(np.arange(3)[::-1])
        tensor([2, 1, 0])
    """
    flags = array.flags
    if flags.writeable and flags.aligned and array.dtype.isnative and min(array.strides, default=0) >= 0:
        return torch.from_numpy(array)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


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
