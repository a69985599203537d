"""The programs of attention's backward for a block of keys: they walk the query rows that see it."""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

import triton.language as tl

from hetu.backends.triton.exact import exact_probabilities, finite_size
from hetu.backends.triton.interpreter import jit
from hetu.backends.triton.running_max import LARGE
from hetu.backends.triton.tiles import (
    KEYS_ONLY,
    LOG2E,
    RECORD_WIDTH,
    VALUES_ONLY,
    add_dot,
    dot,
    dropout_keeps,
    first_columns,
    load_again,
    load_rows,
    loop,
    store_rows,
    tile_offsets,
    unknown_zero,
)


@jit
def is_seen(place, last_key, reach):
    """Which keys at ``place`` of a segment, before and past which there are others, rows with a last key see."""
    return ((place >= 0) & (place <= last_key))[:, None] & (place[:, None] <= reach[None, :])


@jit
def first_row(first, diagonal, TOKENS: tl.constexpr):
    """The first row of a span that sees a block of keys, rounded down to TOKENS. Row i sees key ``i + diagonal``."""
    return tl.maximum(tl.maximum(first, 0) - diagonal, 0) // TOKENS * TOKENS


@jit
def fold_queries(
    dk, dv, largest, k_tile, v_tile, q, dout, lse, delta, begin, length, whole, first, last_key, diagonal, token, head,
    scale, position, step, key_positions, document, head_start, key_low, key_high, threshold, keep_scale,
    STRIDE_QT: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_DH: tl.constexpr,
    stride_lh, HEADS: tl.constexpr, PACK: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROLE: tl.constexpr, STAGES: tl.constexpr, MASKS_ALL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Adds what rows ``begin .. length`` of a query span do to the gradients of a block of keys.

    ``largest`` takes up the sizes of the log-sum-exps, one per thread: EXACT is for those that are large.

    q, dout, lse and delta start at row ``begin``, of the first head. Row i sees key j of the block where ``first + j``
    is in ``0 .. last_key`` and at most ``i + diagonal``; from row ``whole`` on all of them.

    A thread has eight columns of the scores, and so needs the log-sum-exps and dot products of eight rows. Loaded as
    two rows, each thread would copy all of its own, by four bytes, each with an address and a mask. They are the first
    two of PLANES columns of a tile instead that has an element for each thread, of which the others load nothing: a
    copy per thread, through shared memory.
    """
    TOKENS: tl.constexpr = BLOCK_M // PACK
    COLUMNS: tl.constexpr = 1 if ROLE == VALUES_ONLY else 2
    j = tl.arange(0, BLOCK_N)
    q_offsets = tile_offsets(token, head, STRIDE_QT, STRIDE_QH, BLOCK_D, HEADS)
    d_offsets = tile_offsets(token, head, STRIDE_DT, STRIDE_DH, BLOCK_D, HEADS)
    column = tl.arange(0, PLANES)[None, :]
    lse += head.to(tl.int64) * stride_lh + token
    delta += token * HEADS + head
    rows = tl.where(column == 0, lse[:, None], delta[:, None])
    next_rows = tl.where(column == 0, TOKENS, TOKENS * HEADS)
    DEPTH: tl.constexpr = 1 if EXACT else STAGES
    for i in loop(begin, length, TOKENS, num_stages=DEPTH):
        live = token < length - i
        q_tile = load_rows(q, q_offsets, live, HEAD_DIM, BLOCK_D)
        dout_tile = load_rows(dout, d_offsets, live, HEAD_DIM, BLOCK_D)
        # Rows past the end have scores, log-sum-exps and gradients of 0, and so add nothing.
        loaded = tl.load(rows, mask=live[:, None] & (column < COLUMNS), other=0.0)
        if not EXACT:
            largest = tl.maximum(largest, finite_size(loaded))
        lse_row, delta_row = first_columns(loaded)
        if not EXACT:
            lse_row *= LOG2E
        s = dot(k_tile, tl.trans(q_tile), None, PRECISION)
        if ROLE != VALUES_ONLY:
            dp = dot(v_tile, tl.trans(dout_tile), None, PRECISION)
        if EXACT:
            p = exact_probabilities(s, scale, lse_row[None, :])
            p = tl.where(is_seen(first + j, last_key, i + token + diagonal), p, 0.0)
        elif ROLE == VALUES_ONLY:  # before the exponential: nothing else needs the scores, and it saves registers
            lse_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row)  # of rows that see nothing
            if i < whole:
                s = tl.where(is_seen(first + j, last_key, i + token + diagonal), s, float("-inf"))
            p = tl.math.exp2(s * (scale * LOG2E) - lse_row[None, :])
        else:
            p = tl.math.exp2(s * (scale * LOG2E) - lse_row[None, :])
            if MASKS_ALL or i < whole:
                p = tl.where(is_seen(first + j, last_key, i + token + diagonal), p, 0.0)
        kept = p
        if DROPOUT:
            queries = position + (i + token) * step
            keeps = dropout_keeps(
                key_low, key_high, threshold, document, (head_start + head)[None, :], queries[None, :],
                key_positions[:, None],
            )  # fmt: skip
            kept = tl.where(keeps, p * keep_scale, 0.0)
            if ROLE != VALUES_ONLY:
                dp = tl.where(keeps, dp * keep_scale, 0.0)
        if ROLE != KEYS_ONLY:
            dv = add_dot(kept, dout_tile, dv, PRECISION)
        if ROLE != VALUES_ONLY:
            dk = add_dot(p * (dp - delta_row[None, :]), q_tile, dk, PRECISION)
        q += TOKENS * STRIDE_QT
        dout += TOKENS * STRIDE_DT
        rows += next_rows
    return dk, dv, largest


@jit
def sum_over_queries(
    k_tile, v_tile, q, dout, lse, delta, records, record, kv_head, rows, key_positions, stride_lb, stride_lh,
    scale, key_low, key_high, threshold, keep_scale, head_start,
    STRIDE_QT: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_DH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    PLANES: tl.constexpr, ROLE: tl.constexpr, MASKS_ALL: tl.constexpr, MORE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys from all rows that see it, and whether a row's log-sum-exp is large."""
    TOKENS: tl.constexpr = BLOCK_M // PACK
    token = tl.arange(0, BLOCK_M) // PACK
    member = tl.arange(0, BLOCK_M) % PACK
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    largest = tl.zeros([BLOCK_M, PLANES], tl.float32)
    more_begin = 0
    more_end = 0
    if MORE:
        more_begin = tl.load(record + 13)
        more_end = tl.load(record + 14)
    first_set = 0
    if BLOCK_D == 128 and STAGES > 1:
        first_set = unknown_zero(rows)
    for further in loop(more_begin - 1, more_end):  # the record's own segment first
        start = tl.load(record + 2).to(tl.int64)
        length = tl.load(record + 3)
        document = tl.load(record + 4)
        position = tl.load(record + 5)
        step = tl.load(record + 6)
        slot = tl.load(record + 7).to(tl.int64)
        slot_row = tl.load(record + 8)
        first = tl.load(record + 9)  # of the block, counted in the segment's keys; negative where it begins before
        last_key = tl.load(record + 10)
        diagonal = tl.load(record + 11)
        # Row i sees key j from i = j - diagonal on: before `begin` nobody sees any, from `whole` on all see all.
        begin = first_row(first, diagonal, TOKENS)
        is_inside = (first >= 0) & (first + BLOCK_N - 1 <= last_key) & (rows == BLOCK_N)
        whole = tl.where(is_inside, tl.maximum(first + BLOCK_N - 1 - diagonal, 0), length)
        far_begin = start + begin
        dout_begin = load_again(record + 2).to(tl.int64)
        dout_begin += first_row(load_again(record + 9), load_again(record + 11), TOKENS)
        for set in loop(first_set, GROUP // PACK):
            dk_tile, dv_tile, largest = fold_queries(
                dk=dk_tile, dv=dv_tile, largest=largest, k_tile=k_tile, v_tile=v_tile, q=q + far_begin * STRIDE_QT,
                dout=dout + dout_begin * STRIDE_DT, lse=lse + slot * stride_lb + slot_row + begin,
                delta=delta + far_begin * HEADS, begin=begin, length=length, whole=whole, first=first,
                last_key=last_key, diagonal=diagonal, token=token, head=kv_head * GROUP + set * PACK + member,
                scale=scale, position=position, step=step, key_positions=key_positions, document=document,
                head_start=head_start, key_low=key_low, key_high=key_high, threshold=threshold, keep_scale=keep_scale,
                STRIDE_QT=STRIDE_QT, STRIDE_QH=STRIDE_QH, STRIDE_DT=STRIDE_DT, STRIDE_DH=STRIDE_DH, stride_lh=stride_lh,
                HEADS=HEADS, PACK=PACK, PLANES=PLANES, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D, ROLE=ROLE, STAGES=STAGES, MASKS_ALL=MASKS_ALL, DROPOUT=DROPOUT, PRECISION=PRECISION,
                EXACT=EXACT,
            )  # fmt: skip
        if MORE:
            record = records + (further + 1) * RECORD_WIDTH
    is_large = tl.max(tl.where(tl.arange(0, PLANES)[None, :] == 0, largest, 0.0)) * LOG2E >= LARGE
    return dk_tile, dv_tile, is_large


@jit
def key_gradients(
    q, k, v, dout, lse, delta, dk, dv, key_position, records, record, kv_head,
    stride_lb, stride_lh, scale, key_low, key_high, threshold, keep_scale, head_start,
    STRIDE_QT: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_DH: tl.constexpr,
    STRIDE_DKT: tl.constexpr, STRIDE_DKH: tl.constexpr, STRIDE_DVT: tl.constexpr, STRIDE_DVH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    PLANES: tl.constexpr, ROLE: tl.constexpr, MASKS_ALL: tl.constexpr, MORE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys, of its values, or of both, of one key head; arguments as of the kernel."""
    far_head = kv_head.to(tl.int64)
    k_row = tl.load(record).to(tl.int64)
    rows = tl.load(record + 1)
    j = tl.arange(0, BLOCK_N)
    zero = tl.zeros([BLOCK_N], tl.int32)
    live = j < rows
    k_offsets = tile_offsets(j, zero, STRIDE_KT, 0, BLOCK_D)
    k_tile = load_rows(k + k_row * STRIDE_KT + far_head * STRIDE_KH, k_offsets, live, HEAD_DIM, BLOCK_D)
    v_tile = k_tile
    if ROLE != VALUES_ONLY:
        v_offsets = tile_offsets(j, zero, STRIDE_VT, 0, BLOCK_D)
        v_tile = load_rows(v + k_row * STRIDE_VT + far_head * STRIDE_VH, v_offsets, live, HEAD_DIM, BLOCK_D)
    key_positions = j
    if DROPOUT:
        key_positions = tl.load(key_position + k_row + j, mask=live, other=0)
    dk_tile, dv_tile, is_large = sum_over_queries(
        k_tile=k_tile, v_tile=v_tile, q=q, dout=dout, lse=lse, delta=delta, records=records, record=record,
        kv_head=kv_head, rows=rows, key_positions=key_positions, stride_lb=stride_lb, stride_lh=stride_lh, scale=scale,
        key_low=key_low, key_high=key_high, threshold=threshold, keep_scale=keep_scale, head_start=head_start,
        STRIDE_QT=STRIDE_QT, STRIDE_QH=STRIDE_QH, STRIDE_DT=STRIDE_DT, STRIDE_DH=STRIDE_DH, HEADS=HEADS, GROUP=GROUP,
        PACK=PACK, HEAD_DIM=HEAD_DIM, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, STAGES=STAGES, PLANES=PLANES,
        ROLE=ROLE, MASKS_ALL=MASKS_ALL, MORE=MORE, DROPOUT=DROPOUT, PRECISION=PRECISION, EXACT=False,
    )  # fmt: skip
    if is_large:
        dk_tile, dv_tile, is_large = sum_over_queries(
            k_tile=k_tile, v_tile=v_tile, q=q, dout=dout, lse=lse, delta=delta, records=records, record=record,
            kv_head=kv_head, rows=rows, key_positions=key_positions, stride_lb=stride_lb, stride_lh=stride_lh,
            scale=scale, key_low=key_low, key_high=key_high, threshold=threshold, keep_scale=keep_scale,
            head_start=head_start, STRIDE_QT=STRIDE_QT, STRIDE_QH=STRIDE_QH, STRIDE_DT=STRIDE_DT, STRIDE_DH=STRIDE_DH,
            HEADS=HEADS, GROUP=GROUP, PACK=PACK, HEAD_DIM=HEAD_DIM, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
            STAGES=STAGES, PLANES=PLANES, ROLE=ROLE, MASKS_ALL=MASKS_ALL, MORE=MORE, DROPOUT=DROPOUT,
            PRECISION=PRECISION, EXACT=True,
        )  # fmt: skip
    if ROLE != VALUES_ONLY:
        offsets = tile_offsets(j, zero, STRIDE_DKT, 0, BLOCK_D)
        store_rows(dk + k_row * STRIDE_DKT + far_head * STRIDE_DKH, offsets, dk_tile * scale, live, HEAD_DIM, BLOCK_D)
    if ROLE != KEYS_ONLY:
        offsets = tile_offsets(j, zero, STRIDE_DVT, 0, BLOCK_D)
        store_rows(dv + k_row * STRIDE_DVT + far_head * STRIDE_DVH, offsets, dv_tile, live, HEAD_DIM, BLOCK_D)
