"""Launches of the kernels of rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from hetu.backends.attention import contract
from hetu.backends.memory import empty
from hetu.backends.triton.bound import BoundLaunch
from hetu.backends.triton.launch import capability
from hetu.backends.triton.launcher import Arguments, Launcher
from hetu.backends.triton.row_kernels import gather_kernel, row_dot_kernel
from hetu.backends.triton.variants import INTERPRETER, block_columns, named_strides, row_strides

_row_dot = Launcher(row_dot_kernel, "rows")
_gather = Launcher(gather_kernel, "rows")

_WIDEST = 256
"""Numbers of a head of rows that a kernel packs: heads have no more."""

_MOST = 256
_bound: dict[Hashable, tuple[int, BoundLaunch]] = {}
"""Rows of a program, and a launch that was made once, by what decides it."""


def row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Dot products of the rows of two ``(T, H, D)`` tensors: float32 ``(T, H)``. The last dims are contiguous."""
    rows, heads, head_dim = a.shape
    result = empty((rows, heads), torch.float32, a.device)
    if rows and heads:
        like = ("row_dot", a.device, a.dtype, b.dtype, heads, head_dim, a.stride(), b.stride(), rows > 1)
        arguments = _row_dot.arguments(a=a, b=b, result=result, rows=rows * heads)
        if not _again(like, rows * heads, arguments):
            constants = named_strides("AB", _strides(a, b)) | {"HEADS": heads, "HEAD_DIM": head_dim}
            _launch(_row_dot, like, rows * heads, arguments, head_dim, constants)
    return result


def gather(parts: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """Rows of tensors, packed; see :func:`hetu.backends.attention.contract.gather`.

    One or two tensors of half or single precision take one launch; others are torch's, and wide rows, such as those of
    probabilities.
    """
    a, b = parts[0], parts[-1]
    _, of_a, width = a.shape
    if len(parts) > 2 or a.itemsize > 4 or width > _WIDEST or a.stride(2) != 1 or b.stride(2) != 1:
        return contract.gather(parts, index)
    rows, heads = index.shape[0], of_a + (b.shape[1] if len(parts) == 2 else 0)
    packed = empty((rows, heads, width), a.dtype, a.device)
    if rows and heads:
        has_rows = a.shape[0] > 1
        like = ("gather", a.device, a.dtype, of_a, heads, width, a.stride(), b.stride(), has_rows)
        arguments = _gather.arguments(a=a, b=b, index=index, packed=packed, rows=rows * heads)
        if not _again(like, rows * heads, arguments):
            constants = named_strides("AB", _strides(a, b)) | {"HEADS_A": of_a, "HEADS": heads, "WIDTH": width}
            _launch(_gather, like, rows * heads, arguments, width, constants)
    return packed


def _strides(*tensors: torch.Tensor) -> list[tuple[int, int]]:
    return [row_strides(x) for x in tensors]


def _again(like: Hashable, rows: int, arguments: Arguments) -> bool:
    """Launches what was launched once; whether it could be."""
    bound = _bound.get(like)
    if bound is None:
        return False
    block_r, launch = bound
    return launch(-(-rows // block_r), *arguments)


def _launch(
    launcher: Launcher, like: Hashable, rows: int, arguments: Arguments, width: int, constants: dict[str, Any]
) -> None:
    """Launches a kernel with programs of some rows each, as the first of its kind is, and keeps how.

    Args:
        launcher: Of the kernel.
        like: What decides how it is compiled.
        rows: How many.
        arguments: The kernel's.
        width: Numbers of a row.
        constants: The kernel's, but the sizes of blocks.
    """
    device, block_d = arguments[0][0].device, block_columns(width)  # type: ignore[union-attr]
    block_r = 8192 // block_d if capability(device) != INTERPRETER else 1024
    blocks = {"BLOCK_D": block_d, "BLOCK_R": block_r}
    launcher(device, like, -(-rows // block_r), arguments, lambda: (constants | blocks, {}))
    if (found := launcher.kept(like)) is not None:
        if len(_bound) == _MOST:
            _bound.clear()
        _bound[like] = block_r, BoundLaunch(found[0], device, found[1])
