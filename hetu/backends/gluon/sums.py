"""What comes before and after gradients of queries that are added up in global memory: zeros, and the scale."""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hetu.backends.gluon.schedule import record_at
from hetu.backends.triton.tiles import CONTINUES, MERGES


@gluon.jit
def sums_kernel(sums, dq, records, scale, ENDS: gl.constexpr, C: gl.constexpr):
    """Begins or, with ENDS, ends the sums of a step. The grid is ``items * SETS`` programs.

    Args:
        sums: float32 ``(T_q, HEADS, HEAD_DIM)`` by its strides. Without ENDS rows that no earlier step began become 0.
        dq: ``(T_q, HEADS, HEAD_DIM)`` by its strides. With ENDS rows with which no later step goes on become their sums
            times scale. It may be ``sums``.
        records: int32 rows, QUERY_FIELDS of ``hetu/backends/attention/records.py``.
        scale: Of the scores.
        ENDS: Which of both.
        C: A :class:`hetu.backends.gluon.variants_backward.SumsConstants`.
    """
    ROWS: gl.constexpr = 32
    BLOCK_M: gl.constexpr = C.BLOCK_M
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // C.HEAD_DIM, C.HEAD_DIM // 4], [4, 1], [1, 0])
    item, head = gl.program_id(0) // C.SETS, gl.program_id(0) % C.SETS * C.PACK
    record = record_at(records, item)
    row, rows, role = gl.load(record), gl.load(record + 1), gl.load(record + 15)
    far_row, far_head = row.to(gl.int64), head.to(gl.int64)
    if ENDS:
        rows = gl.where((role & CONTINUES) == 0, rows, 0)
    else:
        rows = gl.where((role & MERGES) == 0, rows, 0)
    column = gl.arange(0, C.HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    from_sums = sums + far_row * C.SUMS_STRIDE_T + far_head * C.SUMS_STRIDE_H
    to_dq = dq + far_row * C.DQ_STRIDE_T + far_head * C.DQ_STRIDE_H
    for begin in gl.static_range(0, BLOCK_M, ROWS):
        r = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        token, member = r // C.PACK, r % C.PACK
        live = (token < rows)[:, None]
        places = (token * C.SUMS_STRIDE_T + member * C.SUMS_STRIDE_H)[:, None] + column[None, :]
        if ENDS:
            total = gl.load(from_sums + places, mask=live, other=0.0)
            own = (token * C.DQ_STRIDE_T + member * C.DQ_STRIDE_H)[:, None] + column[None, :]
            gl.store(to_dq + own, total * scale, mask=live)
        else:
            gl.store(from_sums + places, gl.full([ROWS, C.HEAD_DIM], 0.0, gl.float32, LAYOUT), mask=live)
