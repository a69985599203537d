"""Triton kernels of attention's backward over segment tables.

Two kernels, each of which owns what it writes, so that nothing is added up in an order that depends on timing: one
walks, for a block of keys, the query rows that see it; the other, for a block of query rows, the keys that they see.
Both compute the probabilities anew from the log-sum-exps of the whole softmax, in base 2.

Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023, algorithm 2.
"""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

import triton
import triton.language as tl

from hetu.backends.triton.kernels import (
    _ITEM_WIDTH,
    _LOG2E,
    _SEGMENT_WIDTH,
    _SPAN_WIDTH,
    dot,
    dropout_keeps,
    load_rows,
    loop,
    store_rows,
)

# Fields of one row of the integer arrays; launch_backward.py packs them in this order.
KEY_ITEM_FIELDS = ("k_row", "rows", "visit_begin", "visit_end")
VISIT_FIELDS = ("query", "k_start", "k_len", "diagonal")

_KEY_ITEM_WIDTH = tl.constexpr(len(KEY_ITEM_FIELDS))
_VISIT_WIDTH = tl.constexpr(len(VISIT_FIELDS))


@triton.jit
def add_dot(a, b, acc, ones, PRECISION: tl.constexpr):
    """``a @ b + acc``; float32 sums each product by itself first, for a long chain of additions would lose digits."""
    if PRECISION == "ieee":
        # By an fma, because the compiler would turn an addition into the dot's accumulator, and so a chain.
        result = tl.fma(acc, ones, dot(a, b, None, PRECISION))
    else:
        result = dot(a.to(b.dtype), b, acc, PRECISION)
    return result


@triton.jit
def fold_queries(
    dk, dv, k_tile, v_tile, q, dout, lse, delta, stride_qt, stride_dt, begin, end, length, first, last_key, diagonal,
    scale, position, step, key_positions, document, head, key_low, key_high, threshold, keep_scale,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what rows ``begin .. end`` of a query span do to the gradients of a block of keys.

    q, dout, lse and delta start at the span's first row. With CUT, row i sees key j of the block where ``first + j`` is
    in ``0 .. last_key`` and at most ``i + diagonal``; without, it sees all of them.
    """
    m = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    ones = tl.full([BLOCK_N, BLOCK_D], 1.0, tl.float32)
    far = begin.to(tl.int64)  # for offsets that may pass 2**31
    q += far * stride_qt
    dout += far * stride_dt
    delta += far * HEADS
    for i in loop(begin, end, BLOCK_M):
        rows = length - i
        q_tile = load_rows(q, stride_qt, rows, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        dout_tile = load_rows(dout, stride_dt, rows, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        # Rows past the end have an infinite log-sum-exp, and so probabilities of 0.
        lse_row = tl.load(lse + i + m, mask=m < rows, other=float("inf")) * _LOG2E
        delta_row = tl.load(delta + m * HEADS, mask=m < rows, other=0.0)
        s = dot(k_tile, tl.trans(q_tile), None, PRECISION)
        p = tl.math.exp2(s * (scale * _LOG2E) - lse_row[None, :])
        if CUT:
            place = first + j[:, None]
            seen = (place >= 0) & (place <= last_key) & (place <= (i + m)[None, :] + diagonal)
            p = tl.where(seen, p, 0.0)
        dp = dot(v_tile, tl.trans(dout_tile), None, PRECISION)
        kept = p
        if DROPOUT:
            queries = position + (i + m) * step
            keeps = dropout_keeps(
                key_low, key_high, threshold, document, head, queries[None, :], key_positions[:, None]
            )
            kept = tl.where(keeps, p * keep_scale, 0.0)
            dp = tl.where(keeps, dp * keep_scale, 0.0)
        dv = add_dot(kept, dout_tile, dv, ones, PRECISION)
        dk = add_dot(p * (dp - delta_row[None, :]), q_tile, dk, ones, PRECISION)
        q += BLOCK_M * stride_qt
        dout += BLOCK_M * stride_dt
        delta += BLOCK_M * HEADS
    return dk, dv


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "key_low", "key_high", "threshold"])
def key_gradient_kernel(
    q, k, v, dout, lse, delta, dk, dv, key_position, items, visits, spans,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh, stride_lb, stride_lh,
    scale, key_low, key_high, threshold, keep_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values. The grid is ``(items * HEADS // GROUP,)``: a block of keys and a key head each.

    Args:
        q, k, v, dout: ``(T, heads, HEAD_DIM)`` by their strides over rows and heads.
        lse: float32 ``(slots, HEADS, S)``, rows contiguous.
        delta: float32 ``(T_q, HEADS)``, contiguous.
        dk, dv: ``(T_k, HEADS // GROUP, HEAD_DIM)`` by their strides; the item's rows are written.
        key_position: int32 ``(T_k,)``, or None without DROPOUT.
        items, visits, spans: int32 rows of KEY_ITEM_FIELDS, VISIT_FIELDS, SPAN_FIELDS.
        scale, key_low, key_high, threshold, keep_scale: As of the forward.
    """
    item = items + (tl.program_id(0) // (HEADS // GROUP)) * _KEY_ITEM_WIDTH
    kv_head = (tl.program_id(0) % (HEADS // GROUP)).to(tl.int64)
    k_row = tl.load(item)
    far_row = k_row.to(tl.int64)
    rows = tl.load(item + 1)
    visit_begin = tl.load(item + 2)
    visit_end = tl.load(item + 3)
    j = tl.arange(0, BLOCK_N)
    k_base = k + far_row * stride_kt + kv_head * stride_kh
    k_tile = load_rows(k_base, stride_kt, rows, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v_base = v + far_row * stride_vt + kv_head * stride_vh
    v_tile = load_rows(v_base, stride_vt, rows, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    key_positions = j
    if DROPOUT:
        key_positions = tl.load(key_position + far_row + j, mask=j < rows, other=0)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for number in loop(visit_begin, visit_end):
        visit = visits + number * _VISIT_WIDTH
        span = spans + tl.load(visit) * _SPAN_WIDTH
        first = k_row - tl.load(
            visit + 1
        )  # of the block, counted in the segment's keys; negative where it begins before
        last_key = tl.load(visit + 2) - 1
        diagonal = tl.load(visit + 3)
        start = tl.load(span).to(tl.int64)
        length = tl.load(span + 1)
        document = tl.load(span + 2)
        position = tl.load(span + 3)
        step = tl.load(span + 4)
        slot = tl.load(span + 5).to(tl.int64)
        slot_row = tl.load(span + 6)
        # Row i sees key j from i = j - diagonal on: before `begin` nobody sees any, from `whole` on all see all.
        begin = tl.maximum(tl.maximum(first, 0) - diagonal, 0) // BLOCK_M * BLOCK_M
        whole = tl.maximum(first + BLOCK_N - 1 - diagonal, 0)
        whole = tl.maximum((whole + BLOCK_M - 1) // BLOCK_M * BLOCK_M, begin)
        is_inside = (first >= 0) & (first + BLOCK_N - 1 <= last_key) & (rows == BLOCK_N)
        whole = tl.where(is_inside, tl.minimum(whole, length), length)
        for member in loop(0, GROUP):
            head = kv_head * GROUP + member
            q_head = q + start * stride_qt + head * stride_qh
            dout_head = dout + start * stride_dt + head * stride_dh
            lse_head = lse + slot * stride_lb + head * stride_lh + slot_row
            delta_head = delta + start * HEADS + head
            dk_tile, dv_tile = fold_queries(
                dk_tile, dv_tile, k_tile, v_tile, q_head, dout_head, lse_head, delta_head, stride_qt, stride_dt,
                begin, whole, length, first, last_key, diagonal, scale, position, step, key_positions, document,
                head.to(tl.int32), key_low, key_high, threshold, keep_scale,
                HEADS, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, True, DROPOUT, PRECISION,
            )  # fmt: skip
            dk_tile, dv_tile = fold_queries(
                dk_tile, dv_tile, k_tile, v_tile, q_head, dout_head, lse_head, delta_head, stride_qt, stride_dt,
                whole, length, length, first, last_key, diagonal, scale, position, step, key_positions, document,
                head.to(tl.int32), key_low, key_high, threshold, keep_scale,
                HEADS, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, False, DROPOUT, PRECISION,
            )  # fmt: skip
    dk_base = dk + far_row * stride_dkt + kv_head * stride_dkh
    store_rows(dk_base, stride_dkt, dk_tile * scale, rows, BLOCK_N, HEAD_DIM, BLOCK_D)
    dv_base = dv + far_row * stride_dvt + kv_head * stride_dvh
    store_rows(dv_base, stride_dvt, dv_tile, rows, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit
def fold_key_blocks(
    dq, q, dout, k, v, lse, delta, stride_kt, stride_vt, begin, end, reach, scale,
    key_position, queries, document, head, key_low, key_high, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what keys ``begin .. end`` of a segment do to the gradients of a block of query rows.

    k and v start at ``begin``. With CUT, row i of the block sees keys ``0 .. reach + i``; without, it sees all of them
    and ``end - begin`` is a multiple of BLOCK_N.
    """
    i = tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)
    ones = tl.full([BLOCK_M, BLOCK_D], 1.0, tl.float32)
    for n in loop(begin, end, BLOCK_N):
        left = end - n
        k_tile = load_rows(k, stride_kt, left, BLOCK_N, HEAD_DIM, BLOCK_D, CUT)
        s = dot(q, tl.trans(k_tile), None, PRECISION)
        p = tl.math.exp2(s * (scale * _LOG2E) - lse[:, None])
        if CUT:
            p = tl.where(j[None, :] <= tl.minimum(i + (reach - n), left - 1), p, 0.0)
        v_tile = load_rows(v, stride_vt, left, BLOCK_N, HEAD_DIM, BLOCK_D, CUT)
        dp = dot(dout, tl.trans(v_tile), None, PRECISION)
        if DROPOUT:
            keys = tl.load(key_position + n + j, mask=j < left, other=0)
            keeps = dropout_keeps(key_low, key_high, threshold, document, head, queries[:, None], keys[None, :])
            dp = tl.where(keeps, dp * keep_scale, 0.0)
        dq = add_dot(p * (dp - delta[:, None]), k_tile, dq, ones, PRECISION)
        k += BLOCK_N * stride_kt
        v += BLOCK_N * stride_vt
    return dq


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "key_low", "key_high", "threshold"])
def query_gradient_kernel(
    q, k, v, dout, lse, delta, dq, key_position, items, spans, segments,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh, stride_dqt, stride_dqh,
    stride_lb, stride_lh,
    scale, key_low, key_high, threshold, keep_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    FIRST: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, added to ``dq`` unless FIRST. The grid is ``(items * HEADS,)``, as the forward's.

    Arguments as of ``key_gradient_kernel``; ``items`` and ``segments`` are the forward's.
    """
    item = items + (tl.program_id(0) // HEADS) * _ITEM_WIDTH
    head = tl.program_id(0) % HEADS
    far_head = head.to(tl.int64)
    offset = tl.load(item + 1)
    segment_begin = tl.load(item + 2)
    segment_end = tl.load(item + 3)
    span = spans + tl.load(item) * _SPAN_WIDTH
    row = tl.load(span).to(tl.int64) + offset
    rows = tl.minimum(tl.load(span + 1) - offset, BLOCK_M)
    slot = tl.load(span + 5)
    i = tl.arange(0, BLOCK_M)
    document = tl.load(span + 2)
    queries = tl.load(span + 3) + (offset + i) * tl.load(span + 4)
    has_lse = i < tl.where(slot >= 0, rows, 0)
    lse_base = lse + slot.to(tl.int64) * stride_lb + far_head * stride_lh + tl.load(span + 6) + offset
    lse_rows = tl.load(lse_base + i, mask=has_lse, other=float("inf")) * _LOG2E
    delta_rows = tl.load(delta + (row + i) * HEADS + far_head, mask=i < rows, other=0.0)
    q_tile = load_rows(q + row * stride_qt + far_head * stride_qh, stride_qt, rows, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dout_base = dout + row * stride_dt + far_head * stride_dh
    dout_tile = load_rows(dout_base, stride_dt, rows, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    k_head = k + (far_head // GROUP) * stride_kh
    v_head = v + (far_head // GROUP) * stride_vh
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for number in loop(segment_begin, segment_end):
        segment = segments + number * _SEGMENT_WIDTH
        k_start = tl.load(segment).to(tl.int64)
        k_len = tl.load(segment + 1)
        reach = offset + tl.load(segment + 2)  # the last key that the block's first row sees
        whole = tl.maximum(tl.minimum(k_len, reach + 1), 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(k_len, reach + rows)
        k_rows = k_head + k_start * stride_kt
        v_rows = v_head + k_start * stride_vt
        positions = key_position
        if DROPOUT:
            positions += k_start
        dq_tile = fold_key_blocks(
            dq_tile, q_tile, dout_tile, k_rows, v_rows, lse_rows, delta_rows, stride_kt, stride_vt, 0, whole, reach,
            scale, positions, queries, document, head, key_low, key_high, threshold, keep_scale,
            BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, False, DROPOUT, PRECISION,
        )  # fmt: skip
        k_rows += whole.to(tl.int64) * stride_kt
        v_rows += whole.to(tl.int64) * stride_vt
        dq_tile = fold_key_blocks(
            dq_tile, q_tile, dout_tile, k_rows, v_rows, lse_rows, delta_rows, stride_kt, stride_vt, whole, end, reach,
            scale, positions, queries, document, head, key_low, key_high, threshold, keep_scale,
            BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, True, DROPOUT, PRECISION,
        )  # fmt: skip
    dq_tile *= scale
    dq_base = dq + row * stride_dqt + far_head * stride_dqh
    if not FIRST:
        dq_tile += load_rows(dq_base, stride_dqt, rows, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    store_rows(dq_base, stride_dqt, dq_tile, rows, BLOCK_M, HEAD_DIM, BLOCK_D)
