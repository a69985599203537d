"""What both kernels of the backward for Hopper share: probabilities from log-sum-exps, and buffers that are cleaned.

One kernel walks, for each block of keys, the query rows that see it (``backward_keys.py``); the other one, for each
block of query rows, the keys that they see (``backward_queries.py``). Each program owns what it writes, so that nothing
is added up in an order that depends on timing. The roles of warps are those of ``forward.py``.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hetu.backends.gluon.softmax import clean_rows, eighths, eighths_layout, row_layout, tanh, whole
from hetu.backends.triton.large_scores import exponents_constraints, exponents_ptx


@gluon.constexpr_function
def tile_layout(columns):
    """How a consumer's threads hold 64 rows of what tensor cores give: four warps of 16 rows."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def column_layout(columns):
    """How they hold ``(columns / 8, 8)``, what is known of columns: as they hold them in :func:`eighths`."""
    return gl.SliceLayout(0, eighths_layout(columns))


@gluon.jit
def exponents(s, scale, lse, OVER_COLUMNS: gl.constexpr):
    """In base 2, of a tile of scores times scale less log-sum-exps; see ``hetu/backends/triton/large_scores.py``.

    Args:
        s: ``(64, columns)``.
        scale: A number.
        lse: Times ASKED: of rows ``(64,)``, or of columns ``(columns / 8, 8)``.
        OVER_COLUMNS: Which of both.
    """
    LAYOUT: gl.constexpr = s.type.layout
    COLUMNS: gl.constexpr = s.shape[1]
    OWN: gl.constexpr = COLUMNS // 2
    parts = eighths(s)
    if OVER_COLUMNS:
        wide = gl.expand_dims(lse, 0)
    else:
        ROWS_OF: gl.constexpr = row_layout(COLUMNS)
        by_row = gl.expand_dims(gl.convert_layout(lse, gl.SliceLayout(1, ROWS_OF)), 1)
        wide = gl.expand_dims(by_row + gl.full([s.shape[0], 8], 0.0, gl.float32, ROWS_OF), 1)
    result = gl.inline_asm_elementwise(
        exponents_ptx(OWN, COLUMNS, OVER_COLUMNS),
        exponents_constraints(OWN),
        [parts, wide, gl.full_like(parts, 0.0) + scale],
        dtype=gl.float32,
        is_pure=True,
        pack=OWN,
    )
    return whole(result, LAYOUT)


@gluon.jit
def capped(s, inner, SOFTCAP: gl.constexpr):
    """Scores as the softmax takes them, but for their scale."""
    if SOFTCAP:
        s = tanh(s * inner)
    return s


@gluon.jit
def score_gradients(p, s, dp, delta, SOFTCAP: gl.constexpr):
    """What probabilities, and the gradients of what they weigh, do to scores; delta broadcasts."""
    ds = p * (dp - delta)
    if SOFTCAP:
        ds *= 1.0 - s * s
    return ds


@gluon.jit
def cleaned(buffer, left):
    """Zeroes rows of a buffer from ``left`` on, if it has such rows, and gives it as a tile."""
    LENGTH: gl.constexpr = buffer.shape[0] * buffer.shape[1]
    flat = buffer.reshape([LENGTH, buffer.shape[2]])
    if left < LENGTH:
        clean_rows(flat, left)
    return flat


@gluon.jit
def scales(scale, softcap, SOFTCAP: gl.constexpr):
    """The scale of the tangent's argument, and that of what the softmax takes."""
    inner = scale
    outer = scale
    if SOFTCAP:  # the softmax is then one of `tanh(s * inner)`, by the scale `softcap`
        inner = scale / softcap
        outer = softcap
    return inner, outer
