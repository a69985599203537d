"""Memory for what kernels write, which a call with lengths seen before waits for most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def _inductors_way() -> Any:
    """How torch.compile's generated code allocates on the current CUDA device; None if this torch has no such way."""
    return getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None)


_empty_strided_cuda = _inductors_way()


def empty(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous tensor of three dimensions on the device of another one, with anything in it.

    On a GPU the dispatcher takes 6 µs for it on the host, and what torch.compile's generated code calls 2. That is used
    on the current device, and where no mode watches what is made.

    Example:
        >>> empty(torch.zeros(2, dtype=torch.float16), (2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """
    if (
        _empty_strided_cuda is None
        or not like.is_cuda
        or like.get_device() != torch.cuda.current_device()
        or 0 in shape
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return like.new_empty(shape, dtype=dtype)
    first, middle, last = shape
    sizes, strides = (first, middle, last), (middle * last, last, 1)  # plain tuples: it refuses a torch.Size
    made: torch.Tensor = _empty_strided_cuda(sizes, strides, dtype or like.dtype)
    return made
