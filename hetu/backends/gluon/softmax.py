"""The running softmax of a consumer's rows, and which of their scores a mask hides.

It is that of ``hetu/backends/triton/running_max.py``, which says what base and shift of a maximum are, and whose
instructions these are: the maximum lags behind, and while no row of a warp has a score more than 8 (in base 2) above
it, nothing is asked of other threads and nothing is rescaled. Both are kept as rows of eight equal columns, of which a
thread has two, and so are the sums, of which each has its own part.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from hetu.backends.triton.running_max import LARGE, LOWEST, in_place, raise_ptx, rescale_ptx, take_ptx
from hetu.backends.triton.tiles import LOG2E


@gluon.constexpr_function
def scores_layout(C):
    """How a consumer's threads hold its scores: four warps of 16 rows."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BLOCK_N, 16])


@gluon.constexpr_function
def out_layout(C):
    """How they hold its accumulator."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.HEAD_DIM, 16])


@gluon.constexpr_function
def eighths_layout(columns):
    """How they hold ``(rows, columns / 8, 8)``: as they hold the tile of which it is another view."""
    registers = [[0, 0, 1], [8, 0, 0], *([0, 1 << i, 0] for i in range((columns // 8).bit_length() - 1))]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, columns // 8, 8])


@gluon.constexpr_function
def row_layout(columns):
    """How they hold ``(rows, 8)``, what is known of rows: each thread has two columns of the rows of its scores."""
    return gl.SliceLayout(1, eighths_layout(columns))


@gluon.jit
def eighths(x):
    """A tile ``(rows, columns)`` as ``(rows, columns / 8, 8)``, without a move between threads."""
    SHAPE: gl.constexpr = [x.shape[0], x.shape[1] // 8, 8]
    LAYOUT: gl.constexpr = eighths_layout(x.shape[1])
    return gl.convert_layout(x.reshape(SHAPE), LAYOUT, assert_trivial=True)


@gluon.jit
def whole(x, LAYOUT: gl.constexpr):
    """The tile that :func:`eighths` made another view of."""
    SHAPE: gl.constexpr = [x.shape[0], x.shape[1] * 8]
    return gl.convert_layout(x.reshape(SHAPE), LAYOUT, assert_trivial=True)


@gluon.jit
def tops(s):
    """The largest of each eighth column: ``(rows, 8)`` of ``(rows, columns)``. A tree: a chain waits for itself."""
    LAYOUT: gl.constexpr = row_layout(s.shape[1])
    for _ in gl.static_range(5):
        if s.shape[1] > 8:
            left, right = s.reshape([s.shape[0], 2, s.shape[1] // 2]).permute((0, 2, 1)).split()
            s = gl.maximum(left, right)
    return gl.convert_layout(s, LAYOUT, assert_trivial=True)


@gluon.jit
def changed(ptx: gl.constexpr, x, rows):
    """A tile as eighths, changed by instructions that take what is known of its rows, ``(rows, 8)``."""
    ELEMENTS: gl.constexpr = x.shape[1] // 2
    factors = gl.convert_layout(rows, row_layout(x.shape[1]), assert_trivial=True)
    return gl.inline_asm_elementwise(
        ptx,
        in_place(ELEMENTS),
        [eighths(x), gl.expand_dims(factors, 1)],
        dtype=gl.float32,
        is_pure=True,
        pack=ELEMENTS,
    )


@gluon.jit
def softmax(s, base, shift, row_sums, factor):
    """Folds scores into the running softmax.

    Args:
        s: ``(rows, keys)``; -inf where a row sees nothing.
        base: ``(rows, 8)``, with ``shift`` the maximum before, or up to 8 less in base 2.
        shift: ``(rows, 8)``.
        row_sums: ``(rows, 8)``, the sum of weights before, of which each column has a part.
        factor: Of the scores in base 2; positive.

    Returns:
        The weights, base, shift, the sums, and the factor for what was summed up before, ``(rows, 8)``.
    """
    LAYOUT: gl.constexpr = s.type.layout
    base, shift, fade = gl.inline_asm_elementwise(
        raise_ptx(),
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f",
        [tops(s), base, shift, gl.full_like(base, 0.0) + factor],
        dtype=(gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=4,
    )
    parts = changed(take_ptx(s.shape[1] // 2), s, base)
    p = gl.exp2(parts * factor - gl.expand_dims(shift, 1))
    return whole(p, LAYOUT), base, shift, row_sums * fade + gl.sum(p, 1), fade


@gluon.jit
def kept(start, unit, COLUMNS: gl.constexpr):
    """Base and shift of rows that begin with the log-sum-exps ``start``, ``(rows,)``; see ``running_max.kept``."""
    shift = start * LOG2E
    is_large = gl.abs(shift) >= LARGE
    base = gl.where(is_large, gl.minimum(gl.maximum(start / unit, LOWEST), -LOWEST), 0.0)
    shift = gl.where(is_large, gl.fma(-base, gl.full_like(base, 0.0) + unit, start) * LOG2E, shift)
    shift = gl.minimum(gl.maximum(shift, LOWEST), -LOWEST)
    return by_eighth(base, COLUMNS), by_eighth(shift, COLUMNS)


@gluon.jit
def rescaled(acc, fade):
    """An accumulator ``(rows, columns)`` times the factors of :func:`softmax`; warps all of whose are 1 leave it out.

    Source: the conditional rescaling of FlashAttention-4.
    """
    LAYOUT: gl.constexpr = acc.type.layout
    parts = changed(rescale_ptx(acc.shape[1] // 2), acc, fade)
    return whole(parts, LAYOUT)


@gluon.jit
def by_eighth(x, COLUMNS: gl.constexpr):
    """What is known of rows, ``(rows,)``, as eight equal columns, ``(rows, 8)``, beside a tile of so many columns."""
    LAYOUT: gl.constexpr = row_layout(COLUMNS)
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, LAYOUT)), 1) + gl.full(
        [x.shape[0], 8], 0.0, x.dtype, LAYOUT
    )


@gluon.jit
def first_eighth(x, COLUMNS: gl.constexpr):
    """``(rows, 8)`` of parts that add up to ``(rows,)``."""
    LAYOUT: gl.constexpr = row_layout(COLUMNS)
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT))
    return gl.where(column[None, :] == 0, by_eighth(x, COLUMNS), 0.0)


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
def is_seen(s, first, token, k_len, reach, low, LOWER: gl.constexpr):
    """Which of the keys from ``first`` on a row sees, of a tile like ``s``.

    The row of a token sees keys up to ``reach + token`` of ``k_len``, with LOWER only those from ``low + token`` on.
    """
    key = opaque(first) + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    seen = key[None, :] <= gl.minimum(token + reach, k_len - 1)[:, None]
    if LOWER:
        seen = seen & (key[None, :] >= (token + low)[:, None])
    return seen


@gluon.jit
def masked(s, first, token, k_len, reach, low, LOWER: gl.constexpr):
    """Scores of the keys from ``first`` on, -inf where a row does not see them; see :func:`is_seen`."""
    return gl.where(is_seen(s, first, token, k_len, reach, low, LOWER), s, float("-inf"))


@gluon.jit
def is_blind(token, rows, k_len, reach, low, LOWER: gl.constexpr):
    """Which rows see no key of a segment."""
    last = gl.minimum(token + reach, gl.minimum(k_len, reach + rows) - 1)
    blind = last < 0
    if LOWER:
        blind = blind | (last < token + low)
    return blind


@gluon.jit
def clean_rows(buffer, left):
    """Zeroes the rows of a buffer from ``left`` on, which belong to others: their weights are 0, but 0 * NaN is NaN.

    Both consumers do it and neither waits for the other, because both write the same.
    """
    LENGTH: gl.constexpr = buffer.shape[0]
    WIDTH: gl.constexpr = buffer.shape[1]
    STEP: gl.constexpr = 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    for row in gl.static_range(0, LENGTH, STEP):
        part = buffer.slice(row, STEP)
        if row + STEP > left:
            here = row + gl.arange(0, STEP, layout=gl.SliceLayout(1, LAYOUT))
            part.store(gl.where((here < left)[:, None], part.load(LAYOUT), 0.0))
    fence_async_shared()
