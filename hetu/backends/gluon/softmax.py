"""The running softmax of a consumer's rows, and which of their scores a mask hides."""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3.4028234663852886e38)
"""The maximum of no scores: finite, so that differences of two of them are 0 and no NaN."""


@gluon.jit
def softmax(s, row_max, scale):
    """Scores as weights, the maximum with them in base 2, and the factor for what was summed up before."""
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale)
    return gl.exp2(s * scale - new_max[:, None]), new_max, gl.exp2(row_max - new_max)


@gluon.jit
def tanh(x):
    """The hardware's tangent, which is off by 2**-11 of the result at most."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def opaque(x):
    """A scalar that compilers know nothing about, and that they compute where it stands.

    What depends on it in a branch is not computed before the branch, to choose afterwards.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def masked(s, first, token, k_len, reach, low, LOWER: gl.constexpr):
    """Scores of the keys from ``first`` on, -inf where a row does not see them.

    The row of a token sees keys up to ``reach + token`` of ``k_len``, with LOWER only those from ``low + token`` on.
    """
    key = opaque(first) + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    seen = key[None, :] <= gl.minimum(token + reach, k_len - 1)[:, None]
    if LOWER:
        seen = seen & (key[None, :] >= (token + low)[:, None])
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def clean_rows(buffer, left):
    """Zeroes the rows of a buffer from ``left`` on, which belong to others: their weights are 0, but 0 * NaN is NaN.

    Both consumers do it and neither waits for the other, because both write the same.
    """
    LENGTH: gl.constexpr = buffer.shape[0]
    WIDTH: gl.constexpr = buffer.shape[1]
    STEP: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    for row in gl.static_range(0, LENGTH, STEP):
        part = buffer.slice(row, STEP)
        if row + STEP > left:
            here = row + gl.arange(0, STEP, layout=gl.SliceLayout(1, layout))
            part.store(gl.where((here < left)[:, None], part.load(layout), 0.0))
    fence_async_shared()
