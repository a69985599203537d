"""What Triton's interpreter gives, to the bit: a test compares processes with and without ``lighten``."""

from __future__ import annotations

import hashlib
from itertools import product
from typing import Any

import torch
import triton.language as tl

import hetu
from hetu.backends.triton.interpreter import jit
from hetu.functional import attn_varlen


@jit
def mixed(x, number, out, N: tl.constexpr, M: tl.constexpr):
    """Operands of all shapes and types beside each other, and beside numbers."""
    i, j = tl.arange(0, N)[:, None], tl.arange(0, M)[None, :]
    value = tl.load(x + i * M + j)
    row, column = tl.load(x + i), tl.load(x + j)
    grid = out + i * M + j
    tl.store(grid, row * column + value)
    tl.store(grid + N * M, tl.where(i < 3, row, column) + number + row / (value + 9))
    tl.store(grid + 2 * N * M, (0.0 * row - 0.0) + tl.where(i > j, i, 0.5) + (i + j) / 3 + 7 % (i + j + 1))
    tl.store(grid + 3 * N * M, 1.0 / (-0.0 * (value * value + 1)) + 1.0 / (0.0 * (value * value + 1) + 0.0))
    tl.store(
        grid + 4 * N * M, (number * 3 - i) // 2 + ((j + 5) >> 1) + (i & j) - (number.to(tl.int64) << 33) // (j - 9)
    )
    tl.store(grid + 5 * N * M, 2 * tl.maximum(row.to(tl.float32), 0.25) - tl.minimum(1, column) * 2.5e-3)
    one = tl.load(x + number)
    tl.store(out + 6 * N * M + i[:, :, None] * M + j[:, :, None], (one + row + column)[:, :, None])


def digest() -> str:
    """Of that kernel over several types, and of attention, forward and backward."""
    found = hashlib.sha256()

    def add(*tensors: Any) -> None:
        for x in tensors:
            found.update(x.contiguous().view(torch.uint8).numpy().tobytes())

    # Sums of bfloat16 are none in the interpreter, which adds up what its 16 bits are as an integer.
    for kind, into in product((torch.float32, torch.float16, torch.int32), (torch.float32, torch.float64)):
        x, out = (torch.arange(64) % 17 - 5).to(kind), torch.zeros(7, 8, 4, dtype=into)
        mixed[(1,)](x, 7, out, N=8, M=4)
        add(out)
    cu_seqlens = torch.tensor([0, 3, 3, 25])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q, k = (torch.randn(25, heads, 16, generator=torch.Generator().manual_seed(1)).to(dtype) for heads in (2, 1))
        leaves = [x.clone().requires_grad_() for x in (q, k, k, torch.linspace(-1, 1, 2))]
        with hetu.config(backend="triton"):
            options: dict[str, Any] = {"window_size": (9, 3), "softcap": 2.0, "dropout_p": 0.3, "seed": 3}
            out = attn_varlen(*leaves[:3], cu_seqlens, cu_seqlens, sinks=leaves[3], **options)
        out.backward(torch.ones_like(out).cumsum(0) / 40)
        add(out.detach(), *(leaf.grad for leaf in leaves))
    return found.hexdigest()
