"""Descriptors of tensors for TMA, and which tensors can have one."""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hetu.backends.gluon.variants import layout
from hetu.backends.triton.variants import row_strides

_BYTES = 16


class Box(TensorDescriptor):  # type: ignore[misc]
    """Boxes of a ``(T, heads, D)`` tensor, of which TMA copies one at a time.

    Triton's own checks take longer than the launch: :func:`is_describable` is asked once a call instead.
    """

    def __init__(self, x: torch.Tensor, box: list[int], layout: Any) -> None:
        self.base = x
        self.shape = x.shape
        self.strides = (*row_strides(x), 1)
        self.block_shape = box
        self.layout = layout
        self.padding = "zero"

    def data_ptr(self) -> int:
        """The address of the first element, as a tensor has it."""
        address: int = self.base.data_ptr()
        return address


def is_describable(x: torch.Tensor) -> bool:
    """Whether TMA takes a ``(T, heads, D)`` tensor: 16-byte addresses and strides, and neither broadcast nor empty.

    Source: ``cuTensorMapEncodeTiled`` in NVIDIA's CUDA driver API.
    """
    size = x.element_size()
    strides = row_strides(x)
    return (
        x.numel() > 0
        and x.data_ptr() % _BYTES == 0
        and all(stride > 0 and stride * size % _BYTES == 0 and stride * size < 2**40 for stride in strides)
    )


Boxes = tuple[list[int], list[int]]
"""The box of queries and of what else has their rows, and that of keys and values."""

DESCRIBED = 4
"""How many tensors each kernel reads in boxes; they are its first parameters."""


Read = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Those tensors: the queries, the keys, the values, and what else has the queries' rows."""


def described(read: Read, boxes: Boxes | None) -> tuple[Any, ...]:
    """The tensors' descriptors, for Triton; themselves without boxes, for a launch that knows them."""
    if boxes is None:
        return read
    queries, keys = ((box, layout(tuple(box))) for box in boxes)
    return tuple(Box(x, *how) for x, how in zip(read, (queries, keys, keys, queries), strict=True))
