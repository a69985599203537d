"""The programs of attention's backward for a block of query rows: they walk the keys that the rows see."""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

import triton.language as tl

from hetu.backends.triton.exact import exact_probabilities, finite_size
from hetu.backends.triton.interpreter import jit
from hetu.backends.triton.running_max import LARGE
from hetu.backends.triton.tiles import (
    CONTINUES,
    LOG2E,
    MERGES,
    RECORD_WIDTH,
    add_dot,
    dot,
    dropout_keeps,
    is_visible,
    load_again,
    load_rows,
    loop,
    store_rows,
    tile_offsets,
    unknown_zero,
)


@jit
def fold_keys(
    dq, q, dout, k, v, kv_head, lse, delta, k_len, reach, token, rows, scale,
    key_position, queries, document, head, key_low, key_high, threshold, keep_scale,
    STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr,
    KV_HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, MASKS_ALL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Adds what the keys of a segment do to the gradients of a block of query rows.

    The row of token i sees keys ``0 .. reach + i``; k and v start at key 0 of ``k_len``, of the first head. ``lse`` is
    in base 2, or, with EXACT, in base e.
    """
    j = tl.arange(0, BLOCK_N)
    member = tl.zeros([BLOCK_N], tl.int32) + kv_head
    k_offsets = tile_offsets(j, member, STRIDE_KT, STRIDE_KH, BLOCK_D, KV_HEADS)
    v_offsets = tile_offsets(j, member, STRIDE_VT, STRIDE_VH, BLOCK_D, KV_HEADS)
    whole = tl.maximum(tl.minimum(k_len, reach + 1), 0) // BLOCK_N * BLOCK_N  # before here nothing is masked
    end = tl.minimum(k_len, reach + rows)
    DEPTH: tl.constexpr = 1 if EXACT else STAGES
    for n in loop(0, end, BLOCK_N, num_stages=DEPTH):
        left = end - n
        k_tile = load_rows(k, k_offsets, j < left, HEAD_DIM, BLOCK_D)
        v_tile = load_rows(v, v_offsets, j < left, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(k_tile), None, PRECISION)
        dp = dot(dout, tl.trans(v_tile), None, PRECISION)
        if EXACT:
            p = exact_probabilities(s, scale, lse[:, None])
        else:
            p = tl.math.exp2(s * (scale * LOG2E) - lse[:, None])
        if MASKS_ALL or n >= whole:
            p = tl.where(is_visible(j, token, reach - n, left), p, 0.0)
        if DROPOUT:
            keys = tl.load(key_position + n + j, mask=j < left, other=0)
            keeps = dropout_keeps(
                key_low, key_high, threshold, document, head[:, None], queries[:, None], keys[None, :]
            )
            dp = tl.where(keeps, dp * keep_scale, 0.0)
        dq = add_dot(p * (dp - delta[:, None]), k_tile, dq, PRECISION)
        k += BLOCK_N * STRIDE_KT
        v += BLOCK_N * STRIDE_VT
    return dq


@jit
def sum_over_keys(
    q_tile, dout_tile, k, v, lse_rows, has_lse, delta_row, dq_state, state_offsets, merged, key_position, records,
    record, kv_head, rows, token, queries, document, head, scale, key_low, key_high, threshold, keep_scale,
    STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr, MASKS_ALL: tl.constexpr, RUNS_ON: tl.constexpr, MORE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of query rows from all keys that they see, and whether a log-sum-exp of theirs is large."""
    if EXACT:  # loaded anew, so that nothing is kept for it while the other form runs
        k_start = load_again(record + 8).to(tl.int64)
        k_len = load_again(record + 9)
        reach = load_again(record + 10)
    else:
        k_start = tl.load(record + 8).to(tl.int64)
        k_len = tl.load(record + 9)
        reach = tl.load(record + 10)
    v_start = load_again(record + 8).to(tl.int64)
    lse_row = tl.load(lse_rows, mask=has_lse, other=float("inf"), volatile=EXACT)
    if not EXACT:
        lse_row *= LOG2E
    if RUNS_ON:
        dq_tile = load_rows(dq_state, state_offsets, merged, HEAD_DIM, BLOCK_D)
    else:
        dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    more_begin = 0
    more_end = 0
    if MORE:
        more_begin = tl.load(record + 13)
        more_end = tl.load(record + 14)
    elif BLOCK_D > 128 and STAGES > 1:
        more_begin = unknown_zero(rows)
    for further in loop(more_begin - 1, more_end):  # the record's own segment first
        positions = key_position
        if DROPOUT:
            positions += k_start
        dq_tile = fold_keys(
            dq=dq_tile, q=q_tile, dout=dout_tile, k=k + k_start * STRIDE_KT, v=v + v_start * STRIDE_VT,
            kv_head=kv_head, lse=lse_row, delta=delta_row, k_len=k_len, reach=reach, token=token, rows=rows,
            scale=scale, key_position=positions, queries=queries, document=document, head=head, key_low=key_low,
            key_high=key_high, threshold=threshold, keep_scale=keep_scale, STRIDE_KT=STRIDE_KT, STRIDE_KH=STRIDE_KH,
            STRIDE_VT=STRIDE_VT, STRIDE_VH=STRIDE_VH, KV_HEADS=KV_HEADS, BLOCK_N=BLOCK_N, HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D, STAGES=STAGES, MASKS_ALL=MASKS_ALL, DROPOUT=DROPOUT, PRECISION=PRECISION, EXACT=EXACT,
        )  # fmt: skip
        if MORE:
            record = records + (further + 1) * RECORD_WIDTH
            k_start = tl.load(record + 8).to(tl.int64)
            v_start = load_again(record + 8).to(tl.int64)
            k_len = tl.load(record + 9)
            reach = tl.load(record + 10)
    return dq_tile, tl.max(finite_size(lse_row), 0) >= LARGE


@jit
def query_gradients(
    q, k, v, dout, lse, delta, dq, dq_state, key_position, records, record, set, role,
    stride_lb, stride_lh, scale, key_low, key_high, threshold, keep_scale, head_start,
    STRIDE_QT: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_DH: tl.constexpr,
    STRIDE_DQT: tl.constexpr, STRIDE_DQH: tl.constexpr, STRIDE_DST: tl.constexpr, STRIDE_DSH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    MASKS_ALL: tl.constexpr,
    RUNS_ON: tl.constexpr, MORE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of query rows; arguments as of the kernel."""
    first_head = set * PACK
    far_head = first_head.to(tl.int64)
    row = tl.load(record).to(tl.int64)
    rows = tl.load(record + 1)
    document = tl.load(record + 2)
    slot = tl.load(record + 5)
    token = tl.arange(0, BLOCK_M) // PACK
    member = tl.arange(0, BLOCK_M) % PACK
    head = first_head + member
    live = token < rows
    queries = tl.load(record + 3) + token * tl.load(record + 4)
    lse_rows = lse + slot.to(tl.int64) * stride_lb + tl.load(record + 6) + head.to(tl.int64) * stride_lh + token
    has_lse = token < tl.where(slot >= 0, rows, 0)
    delta_row = tl.load(delta + row * HEADS + token * HEADS + head, mask=live, other=0.0)
    q_offsets = tile_offsets(token, member, STRIDE_QT, STRIDE_QH, BLOCK_D)
    q_tile = load_rows(q + row * STRIDE_QT + far_head * STRIDE_QH, q_offsets, live, HEAD_DIM, BLOCK_D)
    d_offsets = tile_offsets(token, member, STRIDE_DT, STRIDE_DH, BLOCK_D)
    dout_tile = load_rows(dout + row * STRIDE_DT + far_head * STRIDE_DH, d_offsets, live, HEAD_DIM, BLOCK_D)
    merged = 0
    state_offsets = q_offsets
    if RUNS_ON:
        dq_state += row * STRIDE_DST + far_head * STRIDE_DSH
        state_offsets = tile_offsets(token, member, STRIDE_DST, STRIDE_DSH, BLOCK_D)
        merged = tl.where((role & MERGES) != 0, rows, 0)
    dq_tile, is_large = sum_over_keys(
        q_tile=q_tile, dout_tile=dout_tile, k=k, v=v, lse_rows=lse_rows, has_lse=has_lse, delta_row=delta_row,
        dq_state=dq_state, state_offsets=state_offsets, merged=token < merged, key_position=key_position,
        records=records, record=record, kv_head=first_head // GROUP, rows=rows, token=token, queries=queries,
        document=document, head=head_start + head, scale=scale, key_low=key_low, key_high=key_high, threshold=threshold,
        keep_scale=keep_scale, STRIDE_KT=STRIDE_KT, STRIDE_KH=STRIDE_KH, STRIDE_VT=STRIDE_VT, STRIDE_VH=STRIDE_VH,
        KV_HEADS=HEADS // GROUP, HEAD_DIM=HEAD_DIM, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
        STAGES=STAGES, MASKS_ALL=MASKS_ALL, RUNS_ON=RUNS_ON, MORE=MORE, DROPOUT=DROPOUT,
        PRECISION=PRECISION, EXACT=False,
    )  # fmt: skip
    if is_large:
        dq_tile, is_large = sum_over_keys(
            q_tile=q_tile, dout_tile=dout_tile, k=k, v=v, lse_rows=lse_rows, has_lse=has_lse, delta_row=delta_row,
            dq_state=dq_state, state_offsets=state_offsets, merged=token < merged, key_position=key_position,
            records=records, record=record, kv_head=first_head // GROUP, rows=rows, token=token, queries=queries,
            document=document, head=head_start + head, scale=scale, key_low=key_low, key_high=key_high,
            threshold=threshold, keep_scale=keep_scale, STRIDE_KT=STRIDE_KT, STRIDE_KH=STRIDE_KH, STRIDE_VT=STRIDE_VT,
            STRIDE_VH=STRIDE_VH, KV_HEADS=HEADS // GROUP, HEAD_DIM=HEAD_DIM, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D, STAGES=STAGES, MASKS_ALL=MASKS_ALL, RUNS_ON=RUNS_ON, MORE=MORE, DROPOUT=DROPOUT,
            PRECISION=PRECISION, EXACT=True,
        )  # fmt: skip
    dq += row * STRIDE_DQT + far_head * STRIDE_DQH
    dq_offsets = tile_offsets(token, member, STRIDE_DQT, STRIDE_DQH, BLOCK_D)
    ends = live
    if RUNS_ON:
        state_offsets = tile_offsets(token, member, STRIDE_DST, STRIDE_DSH, BLOCK_D)
        ending = tl.where((role & CONTINUES) != 0, 0, rows)
        store_rows(dq_state, state_offsets, dq_tile, token < rows - ending, HEAD_DIM, BLOCK_D)
        ends = token < ending
    store_rows(dq, dq_offsets, dq_tile * scale, ends, HEAD_DIM, BLOCK_D)
