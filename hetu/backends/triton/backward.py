"""The Triton kernels of attention's backward over segment tables.

One launch has two kinds of programs, each of which owns what it writes, so that nothing is added up in an order that
depends on timing: those of a block of keys walk the query rows that see it, those of a block of query rows the keys
that they see. Both compute the probabilities anew from the log-sum-exps of the whole softmax, in base 2. They share a
launch because programs of one document then run side by side and find each other's rows in the cache.

Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023, algorithm 2.
"""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

import triton.language as tl

from hetu.backends.triton.interpreter import jit
from hetu.backends.triton.large_scores import ASKED, asked, exponents
from hetu.backends.triton.masking import is_cut, is_partly_seen, is_seen, is_visible
from hetu.backends.triton.tiles import (
    CONTINUES,
    KEYS,
    KEYS_ONLY,
    MERGES,
    QUERIES,
    RECORD_WIDTH,
    VALUES_ONLY,
    add_dot,
    dot,
    dropout_keeps,
    first_columns,
    item_and_set,
    load_again,
    load_rows,
    loop,
    store_rows,
    tanh,
    tile_offsets,
    unknown_zero,
)


@jit
def first_row(first, diagonal, TOKENS: tl.constexpr):
    """The first row of a span that sees a block of keys, rounded down to TOKENS. Row i sees key ``i + diagonal``."""
    return tl.maximum(tl.maximum(first, 0) - diagonal, 0) // TOKENS * TOKENS


@jit
def fold_queries(
    dk, dv, k_tile, v_tile, q, dout, lse, delta, begin, length, whole, first, last_key, diagonal, lower, token, head,
    scale, softcap, position, step, key_positions, document, head_start, key_low, key_high, threshold, keep_scale,
    STRIDE_QT: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_DH: tl.constexpr,
    stride_lh, HEADS: tl.constexpr, PACK: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROLE: tl.constexpr, STAGES: tl.constexpr, MASKS_ALL: tl.constexpr, LOWER: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Adds what rows ``begin .. length`` of a query span do to the gradients of a block of keys.

    q, dout, lse and delta start at row ``begin``, of the first head. Row i sees key j of the block where ``first + j``
    is in ``0 .. last_key`` and at most ``i + diagonal``, and with LOWER at least ``i + lower``. It sees all of them
    from row ``whole`` on, with LOWER up to row ``first - lower``, the last one that sees the block's first key.

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
    units = tl.where(column == 0, ASKED if OWN else 1.0, 1.0)
    since = first - lower - (TOKENS - 1)
    inner = scale
    if SOFTCAP:  # as in the forward
        inner = scale / softcap
        scale = softcap
    for i in loop(begin, length, TOKENS, num_stages=STAGES):
        live = token < length - i
        q_tile = load_rows(q, q_offsets, live, HEAD_DIM, BLOCK_D)
        dout_tile = load_rows(dout, d_offsets, live, HEAD_DIM, BLOCK_D)
        # Rows past the end have scores, log-sum-exps and gradients of 0, and so add nothing.
        row = tl.load(rows, mask=live[:, None] & (column < COLUMNS), other=0.0)
        if OWN:
            row *= units
        lse_row, delta_row = first_columns(row)
        s = dot(k_tile, tl.trans(q_tile), None, PRECISION)
        if SOFTCAP:
            s = tanh(s * inner, PRECISION)
        if ROLE != VALUES_ONLY:
            dp = dot(v_tile, tl.trans(dout_tile), None, PRECISION)
        if ROLE == VALUES_ONLY:  # before the exponential: nothing else needs the scores, and it saves registers
            lse_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row)  # of rows that see nothing
            if is_partly_seen(i, whole, since, LOWER):
                s = tl.where(is_seen(first + j, last_key, i + token, diagonal, lower, LOWER), s, float("-inf"))
            p = tl.math.exp2(exponents(s, scale, lse_row, True, OWN))
        else:
            p = tl.math.exp2(exponents(s, scale, lse_row, True, OWN))
            if MASKS_ALL or is_partly_seen(i, whole, since, LOWER):
                p = tl.where(is_seen(first + j, last_key, i + token, diagonal, lower, LOWER), p, 0.0)
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
            ds = p * (dp - delta_row[None, :])
            if SOFTCAP:
                ds *= 1.0 - s * s
            dk = add_dot(ds, q_tile, dk, PRECISION)
        q += TOKENS * STRIDE_QT
        dout += TOKENS * STRIDE_DT
        rows += next_rows
    return dk, dv


@jit
def key_gradients(
    q, k, v, dout, lse, delta, dk, dv, key_position, records, record, kv_head,
    stride_lb, stride_lh, scale, key_low, key_high, threshold, keep_scale, head_start, softcap,
    STRIDE_QT: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_DH: tl.constexpr,
    STRIDE_DKT: tl.constexpr, STRIDE_DKH: tl.constexpr, STRIDE_DVT: tl.constexpr, STRIDE_DVH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    PLANES: tl.constexpr, ROLE: tl.constexpr, MASKS_ALL: tl.constexpr, LOWER: tl.constexpr, SOFTCAP: tl.constexpr,
    MORE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys, of its values, or of both, of one key head; arguments as of the kernel."""
    TOKENS: tl.constexpr = BLOCK_M // PACK
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
    token = tl.arange(0, BLOCK_M) // PACK
    member = tl.arange(0, BLOCK_M) % PACK
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
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
        lower = 0
        if LOWER:
            lower = tl.load(record + 12)
        # Row i sees key j from i = j - diagonal on: before `begin` nobody sees any, from `whole` on all see all.
        begin = first_row(first, diagonal, TOKENS)
        is_inside = (first >= 0) & (first + BLOCK_N - 1 <= last_key) & (rows == BLOCK_N)
        whole = tl.where(is_inside, tl.maximum(first + BLOCK_N - 1 - diagonal, 0), length)
        far_begin = start + begin
        dout_begin = load_again(record + 2).to(tl.int64)
        dout_begin += first_row(load_again(record + 9), load_again(record + 11), TOKENS)
        for set in loop(first_set, GROUP // PACK):
            dk_tile, dv_tile = fold_queries(
                dk=dk_tile, dv=dv_tile, k_tile=k_tile, v_tile=v_tile, q=q + far_begin * STRIDE_QT,
                dout=dout + dout_begin * STRIDE_DT, lse=lse + slot * stride_lb + slot_row + begin,
                delta=delta + far_begin * HEADS, begin=begin, length=length, whole=whole, first=first,
                last_key=last_key, diagonal=diagonal, lower=lower, token=token,
                head=kv_head * GROUP + set * PACK + member, scale=scale, softcap=softcap, position=position, step=step,
                key_positions=key_positions, document=document, head_start=head_start, key_low=key_low,
                key_high=key_high, threshold=threshold, keep_scale=keep_scale, STRIDE_QT=STRIDE_QT, STRIDE_QH=STRIDE_QH,
                STRIDE_DT=STRIDE_DT, STRIDE_DH=STRIDE_DH, stride_lh=stride_lh, HEADS=HEADS, PACK=PACK, PLANES=PLANES,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, ROLE=ROLE, STAGES=STAGES,
                MASKS_ALL=MASKS_ALL, LOWER=LOWER, SOFTCAP=SOFTCAP, DROPOUT=DROPOUT, PRECISION=PRECISION, OWN=OWN,
            )  # fmt: skip
        if MORE:
            record = records + (further + 1) * RECORD_WIDTH
    if ROLE != VALUES_ONLY:
        offsets = tile_offsets(j, zero, STRIDE_DKT, 0, BLOCK_D)
        store_rows(dk + k_row * STRIDE_DKT + far_head * STRIDE_DKH, offsets, dk_tile * scale, live, HEAD_DIM, BLOCK_D)
    if ROLE != KEYS_ONLY:
        offsets = tile_offsets(j, zero, STRIDE_DVT, 0, BLOCK_D)
        store_rows(dv + k_row * STRIDE_DVT + far_head * STRIDE_DVH, offsets, dv_tile, live, HEAD_DIM, BLOCK_D)


@jit
def fold_keys(
    dq, q, dout, k, v, kv_head, lse, delta, k_len, reach, low, token, rows, scale, softcap,
    key_position, queries, document, head, key_low, key_high, threshold, keep_scale,
    STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr,
    KV_HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, MASKS_ALL: tl.constexpr, LOWER: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Adds what the keys of a segment do to the gradients of a block of query rows.

    The row of token i sees keys ``0 .. reach + i``, with LOWER only those from ``low + i`` on; k and v start at key 0
    of ``k_len``, of the first head.
    """
    j = tl.arange(0, BLOCK_N)
    member = tl.zeros([BLOCK_N], tl.int32) + kv_head
    k_offsets = tile_offsets(j, member, STRIDE_KT, STRIDE_KH, BLOCK_D, KV_HEADS)
    v_offsets = tile_offsets(j, member, STRIDE_VT, STRIDE_VH, BLOCK_D, KV_HEADS)
    whole = tl.maximum(tl.minimum(k_len, reach + 1), 0) // BLOCK_N * BLOCK_N  # before here nothing is masked
    hidden = low + rows - 1  # from here on no row is past a key
    end = tl.minimum(k_len, reach + rows)
    inner = scale
    if SOFTCAP:  # as in the forward
        inner = scale / softcap
        scale = softcap
    for n in loop(0, end, BLOCK_N, num_stages=STAGES):
        left = end - n
        k_tile = load_rows(k, k_offsets, j < left, HEAD_DIM, BLOCK_D)
        v_tile = load_rows(v, v_offsets, j < left, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(k_tile), None, PRECISION)
        dp = dot(dout, tl.trans(v_tile), None, PRECISION)
        if SOFTCAP:
            s = tanh(s * inner, PRECISION)
        p = tl.math.exp2(exponents(s, scale, lse, False, OWN))
        if MASKS_ALL or is_cut(n, whole, hidden, LOWER):
            p = tl.where(is_visible(j, token, reach - n, left, low - n, LOWER), p, 0.0)
        if DROPOUT:
            keys = tl.load(key_position + n + j, mask=j < left, other=0)
            keeps = dropout_keeps(
                key_low, key_high, threshold, document, head[:, None], queries[:, None], keys[None, :]
            )
            dp = tl.where(keeps, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds *= 1.0 - s * s
        dq = add_dot(ds, k_tile, dq, PRECISION)
        k += BLOCK_N * STRIDE_KT
        v += BLOCK_N * STRIDE_VT
    return dq


@jit
def query_gradients(
    q, k, v, dout, lse, delta, dq, dq_state, key_position, records, record, set, role,
    stride_lb, stride_lh, scale, key_low, key_high, threshold, keep_scale, head_start, softcap,
    STRIDE_QT: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_DH: tl.constexpr,
    STRIDE_DQT: tl.constexpr, STRIDE_DQH: tl.constexpr, STRIDE_DST: tl.constexpr, STRIDE_DSH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    MASKS_ALL: tl.constexpr, LOWER: tl.constexpr, SOFTCAP: tl.constexpr,
    RUNS_ON: tl.constexpr, MORE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of query rows; arguments as of the kernel."""
    first_head = set * PACK
    far_head = first_head.to(tl.int64)
    row = tl.load(record).to(tl.int64)
    rows = tl.load(record + 1)
    document = tl.load(record + 2)
    slot = tl.load(record + 5)
    k_start = tl.load(record + 8).to(tl.int64)
    v_start = load_again(record + 8).to(tl.int64)
    k_len = tl.load(record + 9)
    reach = tl.load(record + 10)
    low = 0
    if LOWER:
        low = tl.load(record + 11)
    token = tl.arange(0, BLOCK_M) // PACK
    member = tl.arange(0, BLOCK_M) % PACK
    head = first_head + member
    live = token < rows
    queries = tl.load(record + 3) + token * tl.load(record + 4)
    lse_rows = lse + slot.to(tl.int64) * stride_lb + tl.load(record + 6) + head.to(tl.int64) * stride_lh + token
    has_lse = token < tl.where(slot >= 0, rows, 0)
    lse_row = asked(tl.load(lse_rows, mask=has_lse, other=0.0), OWN)  # rows past the end aren't stored
    delta_row = tl.load(delta + row * HEADS + token * HEADS + head, mask=live, other=0.0)
    q_offsets = tile_offsets(token, member, STRIDE_QT, STRIDE_QH, BLOCK_D)
    q_tile = load_rows(q + row * STRIDE_QT + far_head * STRIDE_QH, q_offsets, live, HEAD_DIM, BLOCK_D)
    d_offsets = tile_offsets(token, member, STRIDE_DT, STRIDE_DH, BLOCK_D)
    dout_tile = load_rows(dout + row * STRIDE_DT + far_head * STRIDE_DH, d_offsets, live, HEAD_DIM, BLOCK_D)
    if RUNS_ON:
        dq_state += row * STRIDE_DST + far_head * STRIDE_DSH
        state_offsets = tile_offsets(token, member, STRIDE_DST, STRIDE_DSH, BLOCK_D)
        merged = tl.where((role & MERGES) != 0, rows, 0)
        dq_tile = load_rows(dq_state, state_offsets, token < merged, HEAD_DIM, BLOCK_D)
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
            kv_head=first_head // GROUP, lse=lse_row, delta=delta_row, k_len=k_len, reach=reach, low=low, token=token,
            rows=rows, scale=scale, softcap=softcap, key_position=positions, queries=queries, document=document,
            head=head_start + head,
            key_low=key_low, key_high=key_high, threshold=threshold, keep_scale=keep_scale, STRIDE_KT=STRIDE_KT,
            STRIDE_KH=STRIDE_KH, STRIDE_VT=STRIDE_VT, STRIDE_VH=STRIDE_VH, KV_HEADS=HEADS // GROUP, BLOCK_N=BLOCK_N,
            HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, STAGES=STAGES, MASKS_ALL=MASKS_ALL, LOWER=LOWER, SOFTCAP=SOFTCAP,
            DROPOUT=DROPOUT, PRECISION=PRECISION, OWN=OWN,
        )  # fmt: skip
        if MORE:
            record = records + (further + 1) * RECORD_WIDTH
            k_start = tl.load(record + 8).to(tl.int64)
            v_start = load_again(record + 8).to(tl.int64)
            k_len = tl.load(record + 9)
            reach = tl.load(record + 10)
            if LOWER:
                low = tl.load(record + 11)
    dq += row * STRIDE_DQT + far_head * STRIDE_DQH
    dq_offsets = tile_offsets(token, member, STRIDE_DQT, STRIDE_DQH, BLOCK_D)
    ends = live
    if RUNS_ON:
        state_offsets = tile_offsets(token, member, STRIDE_DST, STRIDE_DSH, BLOCK_D)
        ending = tl.where((role & CONTINUES) != 0, 0, rows)
        store_rows(dq_state, state_offsets, dq_tile, token < rows - ending, HEAD_DIM, BLOCK_D)
        ends = token < ending
    store_rows(dq, dq_offsets, dq_tile * scale, ends, HEAD_DIM, BLOCK_D)


@jit(do_not_specialize=["stride_lb", "stride_lh", "key_low", "key_high", "threshold", "head_start"])
def backward_kernel(
    q, k, v, dout, lse, delta, dq, dq_state, dk, dv, key_position, records,
    stride_lb, stride_lh, scale, key_low, key_high, threshold, keep_scale, head_start, softcap,
    STRIDE_QT: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_DH: tl.constexpr,
    STRIDE_DQT: tl.constexpr, STRIDE_DQH: tl.constexpr, STRIDE_DST: tl.constexpr, STRIDE_DSH: tl.constexpr,
    STRIDE_DKT: tl.constexpr, STRIDE_DKH: tl.constexpr, STRIDE_DVT: tl.constexpr, STRIDE_DVH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PACK: tl.constexpr, CHUNK: tl.constexpr, THREADS: tl.constexpr,
    KEY_M: tl.constexpr, KEY_N: tl.constexpr, KEY_STAGES: tl.constexpr,
    VALUE_M: tl.constexpr, VALUE_N: tl.constexpr, VALUE_STAGES: tl.constexpr,
    QUERY_M: tl.constexpr, QUERY_N: tl.constexpr, QUERY_STAGES: tl.constexpr,
    SPLIT: tl.constexpr, MASKS_ALL: tl.constexpr, LOWER: tl.constexpr, SOFTCAP: tl.constexpr,
    RUNS_ON: tl.constexpr, MORE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    KEY_OWN: tl.constexpr, VALUE_OWN: tl.constexpr, QUERY_OWN: tl.constexpr,
):  # fmt: skip
    """The backward of one step of attention. The grid is ``(records * HEADS // PACK,)``.

    A record of keys needs a program for each key head only; the others of it end at once.

    Args:
        q, k, v, dout: ``(T, heads, HEAD_DIM)`` by their strides over rows and heads.
        lse: float32 ``(slots, HEADS, S)``, rows contiguous.
        delta: float32 ``(T_q, HEADS)``, contiguous.
        dq: As q, by its strides.
        dq_state: float32, likewise: running results, not yet scaled, of rows whose records merge or continue. None
            without RUNS_ON.
        dk, dv: ``(T_k, HEADS // GROUP, HEAD_DIM)`` by their strides; rows that records name are written.
        key_position: int32 ``(T_k,)``, or None without DROPOUT.
        records: int32 rows of RECORD fields, as of records.py.
        scale, key_low, key_high, threshold, keep_scale, head_start, softcap: As of the forward.
        CHUNK: As of the forward.
        THREADS: Of a program, and at least twice the query rows of an iteration of programs for keys.
        MASKS_ALL, LOWER: As of the forward.
        SPLIT: Whether keys and values are roles of their own, of which each holds half the accumulators and computes
            the scores anew: what wide heads need. VALUE_M, VALUE_N and VALUE_STAGES are of values' programs then.
        KEY_OWN, VALUE_OWN, QUERY_OWN: As of ``large_scores.exponents``.
    """
    SETS: tl.constexpr = HEADS // PACK
    item, set = item_and_set(CHUNK, SETS)
    record = records + item * RECORD_WIDTH
    role = tl.load(record + 15)
    KEY_ROLE: tl.constexpr = KEYS_ONLY if SPLIT else KEYS
    if (role & 3) == QUERIES:
        query_gradients(
            q=q, k=k, v=v, dout=dout, lse=lse, delta=delta, dq=dq, dq_state=dq_state, key_position=key_position,
            records=records, record=record, set=set, role=role, stride_lb=stride_lb, stride_lh=stride_lh, scale=scale,
            key_low=key_low, key_high=key_high, threshold=threshold, keep_scale=keep_scale, head_start=head_start,
            softcap=softcap, STRIDE_QT=STRIDE_QT, STRIDE_QH=STRIDE_QH, STRIDE_KT=STRIDE_KT, STRIDE_KH=STRIDE_KH,
            STRIDE_VT=STRIDE_VT, STRIDE_VH=STRIDE_VH, STRIDE_DT=STRIDE_DT, STRIDE_DH=STRIDE_DH, STRIDE_DQT=STRIDE_DQT,
            STRIDE_DQH=STRIDE_DQH, STRIDE_DST=STRIDE_DST, STRIDE_DSH=STRIDE_DSH, HEADS=HEADS, GROUP=GROUP, PACK=PACK,
            HEAD_DIM=HEAD_DIM, BLOCK_M=QUERY_M, BLOCK_N=QUERY_N, BLOCK_D=BLOCK_D, STAGES=QUERY_STAGES,
            MASKS_ALL=MASKS_ALL, LOWER=LOWER, SOFTCAP=SOFTCAP, RUNS_ON=RUNS_ON, MORE=MORE, DROPOUT=DROPOUT,
            PRECISION=PRECISION, OWN=QUERY_OWN,
        )  # fmt: skip
    elif set < HEADS // GROUP:
        if role == VALUES_ONLY:
            if SPLIT:
                key_gradients(
                    q=q, k=k, v=v, dout=dout, lse=lse, delta=delta, dk=dk, dv=dv, key_position=key_position,
                    records=records, record=record, kv_head=set, stride_lb=stride_lb, stride_lh=stride_lh, scale=scale,
                    key_low=key_low, key_high=key_high, threshold=threshold, keep_scale=keep_scale,
                    head_start=head_start, softcap=softcap, STRIDE_QT=STRIDE_QT, STRIDE_QH=STRIDE_QH,
                    STRIDE_KT=STRIDE_KT, STRIDE_KH=STRIDE_KH, STRIDE_VT=STRIDE_VT, STRIDE_VH=STRIDE_VH,
                    STRIDE_DT=STRIDE_DT, STRIDE_DH=STRIDE_DH, STRIDE_DKT=STRIDE_DKT, STRIDE_DKH=STRIDE_DKH,
                    STRIDE_DVT=STRIDE_DVT, STRIDE_DVH=STRIDE_DVH, HEADS=HEADS, GROUP=GROUP, PACK=PACK,
                    HEAD_DIM=HEAD_DIM, BLOCK_M=VALUE_M, BLOCK_N=VALUE_N, BLOCK_D=BLOCK_D, STAGES=VALUE_STAGES,
                    PLANES=THREADS // VALUE_M, ROLE=VALUES_ONLY, MASKS_ALL=MASKS_ALL, LOWER=LOWER, SOFTCAP=SOFTCAP,
                    MORE=MORE, DROPOUT=DROPOUT, PRECISION=PRECISION, OWN=VALUE_OWN,
                )  # fmt: skip
        else:
            key_gradients(
                q=q, k=k, v=v, dout=dout, lse=lse, delta=delta, dk=dk, dv=dv, key_position=key_position,
                records=records, record=record, kv_head=set, stride_lb=stride_lb, stride_lh=stride_lh, scale=scale,
                key_low=key_low, key_high=key_high, threshold=threshold, keep_scale=keep_scale, head_start=head_start,
                softcap=softcap, STRIDE_QT=STRIDE_QT, STRIDE_QH=STRIDE_QH, STRIDE_KT=STRIDE_KT, STRIDE_KH=STRIDE_KH,
                STRIDE_VT=STRIDE_VT, STRIDE_VH=STRIDE_VH, STRIDE_DT=STRIDE_DT, STRIDE_DH=STRIDE_DH,
                STRIDE_DKT=STRIDE_DKT, STRIDE_DKH=STRIDE_DKH, STRIDE_DVT=STRIDE_DVT, STRIDE_DVH=STRIDE_DVH, HEADS=HEADS,
                GROUP=GROUP, PACK=PACK, HEAD_DIM=HEAD_DIM, BLOCK_M=KEY_M, BLOCK_N=KEY_N, BLOCK_D=BLOCK_D,
                STAGES=KEY_STAGES, PLANES=THREADS // KEY_M, ROLE=KEY_ROLE, MASKS_ALL=MASKS_ALL, LOWER=LOWER,
                SOFTCAP=SOFTCAP, MORE=MORE, DROPOUT=DROPOUT, PRECISION=PRECISION, OWN=KEY_OWN,
            )  # fmt: skip
