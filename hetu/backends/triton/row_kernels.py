"""Triton kernels of rows: their dot products, which attention's backward starts from, and packing some of them."""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

import triton.language as tl

from hetu.backends.triton.interpreter import jit


@jit(do_not_specialize=["rows"])
def row_dot_kernel(
    a, b, result, rows,
    STRIDE_AT: tl.constexpr, STRIDE_AH: tl.constexpr, STRIDE_BT: tl.constexpr, STRIDE_BH: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Dot products of the rows of two ``(T, HEADS, HEAD_DIM)`` arrays in float32, into a contiguous ``(T, HEADS)``.

    ``rows`` is ``T * HEADS``. The grid is ``(ceil(rows / BLOCK_R),)``.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < rows
    d = tl.arange(0, BLOCK_D)[None, :]
    a += (row // HEADS * STRIDE_AT + row % HEADS * STRIDE_AH)[:, None]
    b += (row // HEADS * STRIDE_BT + row % HEADS * STRIDE_BH)[:, None]
    mask = live[:, None] & (d < HEAD_DIM)
    left = tl.load(a + d, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(b + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(result + row, tl.sum(left * right, 1), mask=live)


@jit(do_not_specialize=["rows"])
def gather_kernel(
    a, b, index, packed, rows,
    STRIDE_AT: tl.constexpr, STRIDE_AH: tl.constexpr, STRIDE_BT: tl.constexpr, STRIDE_BH: tl.constexpr,
    HEADS_A: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Copies rows of ``(T, HEADS_A, WIDTH)`` and ``(T, HEADS - HEADS_A, WIDTH)``, which lie beside each other then.

    ``index`` is int32 ``(n,)``, which rows; ``packed`` is a contiguous ``(n, HEADS, WIDTH)``, and ``rows`` is
    ``n * HEADS``. The grid is ``(ceil(rows / BLOCK_R),)``.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < rows
    head = row % HEADS
    token = tl.load(index + row // HEADS, mask=live, other=0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = live[:, None] & (d < WIDTH)
    is_a = (head < HEADS_A)[:, None]
    x = tl.load(a + (token * STRIDE_AT + head * STRIDE_AH)[:, None] + d, mask=mask & is_a, other=0)
    if HEADS > HEADS_A:
        of_b = token * STRIDE_BT + (head - HEADS_A) * STRIDE_BH
        y = tl.load(b + of_b[:, None] + d, mask=mask & (head >= HEADS_A)[:, None], other=0)
        x = tl.where(is_a, x, y)
    tl.store(packed + row[:, None] * WIDTH + d, x, mask=mask)
