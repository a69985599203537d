"""The Triton kernel of the rows' dot products, which attention's backward starts from."""

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
