"""The forward Triton kernel of attention over segment tables.

A program computes one record of the work list: a block of query rows of PACK heads that share a key head, with all
segments that the rows see. Heads are packed because keys are loaded once for all of them, and because a block of as
many rows then spans fewer tokens: less of it is cut off by diagonals and by the ends of short documents.

One loop walks the keys of a segment, and masks where a diagonal or an end cuts through the block. Two loops, one of
them without masks, are slower: the registers of both are taken at once, and each fills its pipeline anew.

The running softmax is kept in base 2, where the hardware's exponential lives: ``base`` and ``shift`` are the largest
score of a row, or a little less (running_max.py), ``row_sum`` the sum of 2 to the power of what scores are above it,
``acc`` the matching sum of value rows. A partial result of earlier steps enters as a score of its lse, ``row_sum = 1``,
``acc = out``, so that merging costs no pass of its own. A sink enters in a row's first step as one of which
``acc`` is 0.
"""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

import triton.language as tl

from hetu.backends.triton.interpreter import jit
from hetu.backends.triton.masking import is_blind, is_cut, is_visible
from hetu.backends.triton.running_max import by_row, kept, raised, rescaled, spread, taken, zeros_and
from hetu.backends.triton.tiles import (
    CONTINUES,
    LN2,
    LOG2E,
    MERGES,
    RECORD_WIDTH,
    add_dot,
    dot,
    dropout_keeps,
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
def fold_segment(
    acc, row_sums, base, shift, q, k, v, kv_head, k_len, reach, low, token, rows, scale, softcap,
    scores, key_position, queries, document, head, key_low, key_high, threshold, keep_scale,
    STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr,
    KV_HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKS_ALL: tl.constexpr, LOWER: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SCORES: tl.constexpr,
    PRECISION: tl.constexpr, ELEMENTS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Folds the keys of a segment into the running softmax of a block of rows.

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
    if SOFTCAP:  # the softmax is then one of `tanh(s * inner)`, by the scale `softcap`
        inner = scale / softcap
        scale = softcap
    zero = unknown_zero(rows)
    for n in loop(0, end, BLOCK_N):
        left = end - n
        if BLOCK_D != 128:  # where registers are scarce; it takes a few instructions more
            far = (n ^ zero).to(tl.int64)
            k_rows = k + far * STRIDE_KT
            v_rows = v + far * STRIDE_VT
        else:
            k_rows = k
            v_rows = v
        k_tile = load_rows(k_rows, k_offsets, j < left, HEAD_DIM, BLOCK_D)
        if BLOCK_D <= 128:  # waited for together; wide tiles are rather waited for when they are needed
            v_tile = load_rows(v_rows, v_offsets, j < left, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(k_tile), None, PRECISION)
        if SOFTCAP:
            s = tanh(s * inner, PRECISION)
        if MASKS_ALL or is_cut(n, whole, hidden, LOWER):
            s = tl.where(is_visible(j, token, reach - n, left, low - n, LOWER), s, float("-inf"))
        if DROPOUT or SCORES:
            keys = tl.load(key_position + n + j, mask=j < left, other=0)
        if SCORES:
            places = scores[:, None] + keys[None, :]
            tl.store(places, s * scale, mask=(token < rows)[:, None] & (s != float("-inf")))
        base, shift, fade = raised(base, shift, s, scale * LOG2E, OWN)
        p = tl.math.exp2(taken(s, base, OWN) * (scale * LOG2E) - spread(shift, BLOCK_N))
        # A thread adds up its own columns of p, each eighth pair: threads are asked for theirs once, after the loop.
        row_sums = row_sums * spread(fade, 8) + tl.sum(tl.reshape(p, [q.shape[0], BLOCK_N // 8, 8]), 1)
        if DROPOUT:
            keeps = dropout_keeps(
                key_low, key_high, threshold, document, head[:, None], queries[:, None], keys[None, :]
            )
            p = tl.where(keeps, p * keep_scale, 0.0)
        if BLOCK_D > 128:
            v_tile = load_rows(v_rows, v_offsets, j < left, HEAD_DIM, BLOCK_D)
        acc = add_dot(p, v_tile, rescaled(acc, fade, ELEMENTS), PRECISION)
        if BLOCK_D == 128:
            k += BLOCK_N * STRIDE_KT
            v += BLOCK_N * STRIDE_VT
    return acc, row_sums, base, shift


@jit
def begun(start, SINKS: tl.constexpr):
    """The sums of rows that begin with a weight of 1 at ``start``; with nothing where that is -inf."""
    weight = 1.0
    if SINKS:  # a maximum passes over NaN, so the sums have to keep that of a sink
        weight = tl.where(start == start, 1.0, float("nan"))[:, None]
    return tl.where((start[:, None] != float("-inf")) & (tl.arange(0, 8)[None, :] == 0), weight, 0.0)


@jit(do_not_specialize=["stride_lb", "stride_lh", "stride_sb", "stride_sh", "stride_sm",
                        "key_low", "key_high", "threshold", "head_start"])  # fmt: skip
def forward_kernel(
    q, k, v, out, lse, acc_state, scores, sinks, key_position, records,
    stride_lb, stride_lh, stride_sb, stride_sh, stride_sm,
    scale, key_low, key_high, threshold, keep_scale, head_start, softcap,
    STRIDE_QT: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr, STRIDE_OT: tl.constexpr, STRIDE_OH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    MASKS_ALL: tl.constexpr, LOWER: tl.constexpr, RUNS_ON: tl.constexpr, MORE: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr, SCORES: tl.constexpr,
    PRECISION: tl.constexpr, ELEMENTS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """One step of attention, merged into the running (acc, lse). The grid is ``(items * HEADS // PACK,)``.

    Items of one document are neighbours in the work list, and in the grid as ``item_and_set`` says, so that those that
    share keys find them in the cache.

    Args:
        q, k, v: ``(T, heads, HEAD_DIM)`` by their strides over rows and heads.
        out: ``(T_q, HEADS, HEAD_DIM)``.
        acc_state: float32 and contiguous, of its shape: running results of rows whose records merge or continue. None
            without RUNS_ON.
        lse: float32 ``(slots, HEADS, S)``, rows contiguous.
        scores: float32 ``(slots, HEADS, rows, columns)``, or None without SCORES.
        sinks: float32 ``(HEADS,)``, or None without SINKS.
        key_position: int32 ``(T_k,)``, or None without DROPOUT and SCORES.
        records: int32 rows, the fields of which records.py gives.
        scale: Of the scores; positive.
        key_low, key_high, threshold: Bits of dropout's key and threshold as int32, so that no value of them
            makes another variant of the kernel.
        keep_scale: ``1 / (1 - p)``.
        head_start: What dropout counts the heads from.
        softcap: What scores are capped by, with SOFTCAP.
        LOWER: Whether segments have a lower diagonal.
        ELEMENTS, OWN: As of ``running_max.rescaled`` and ``running_max.taken``.
        CHUNK: Items that programs take for one set of PACK heads before they take them for the next one.
        MASKS_ALL: Whether scores that nothing hides are masked too: a branch around it keeps Triton from seeing, for
            tensor cores before sm_90, that one dot follows the other, and probabilities then change threads.
    """
    SETS: tl.constexpr = HEADS // PACK
    item, set = item_and_set(CHUNK, SETS)
    record = records + item * RECORD_WIDTH
    first_head = set * PACK
    far_head = first_head.to(tl.int64)  # for offsets that may pass 2**31
    row = tl.load(record).to(tl.int64)
    rows = tl.load(record + 1)
    document = tl.load(record + 2)
    slot = tl.load(record + 5)  # -1 where the rows have no lse
    slot_row = tl.load(record + 6)
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

    lse_rows = lse + slot.to(tl.int64) * stride_lb + slot_row + head.to(tl.int64) * stride_lh + token
    has_lse = token < tl.where(slot >= 0, rows, 0)
    acc_base = acc_state
    acc_offsets = tile_offsets(token, member, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    ends = live
    continues = live
    unit = softcap if SOFTCAP else scale
    merged = 0
    start = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SINKS:
        start = tl.load(sinks + head)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if RUNS_ON:
        role = tl.load(record + 15)
        merged = tl.where((role & MERGES) != 0, rows, 0)
        ending = tl.where((role & CONTINUES) != 0, 0, rows)
        ends = token < ending
        continues = token < rows - ending
        acc_base += (row * HEADS + far_head) * HEAD_DIM
        before = tl.load(lse_rows, mask=has_lse & (token < merged), other=float("-inf"))
        start = tl.where(token < merged, before, start)
        # The acc of what saw scores of -inf alone is NaN, and weighs nothing.
        acc = load_rows(acc_base, acc_offsets, before != float("-inf"), HEAD_DIM, BLOCK_D)
    row_sums = begun(start, SINKS)
    base, shift = kept(start, unit, PRECISION)
    score_rows = head
    if SCORES:
        score_rows = scores + slot.to(tl.int64) * stride_sb + tl.load(record + 7) + head.to(tl.int64) * stride_sh
        score_rows += (slot_row + token).to(tl.int64) * stride_sm

    q_offsets = tile_offsets(token, member, STRIDE_QT, STRIDE_QH, BLOCK_D)
    q_tile = load_rows(q + row * STRIDE_QT + far_head * STRIDE_QH, q_offsets, live, HEAD_DIM, BLOCK_D)
    more_begin = 0
    more_end = 0
    if MORE:
        more_begin = tl.load(record + 13)
        more_end = tl.load(record + 14)
    for further in loop(more_begin - 1, more_end):  # the record's own segment first
        positions = key_position
        if DROPOUT or SCORES:
            positions += k_start
        acc, row_sums, base, shift = fold_segment(
            acc=acc, row_sums=row_sums, base=base, shift=shift, q=q_tile, k=k + k_start * STRIDE_KT,
            v=v + v_start * STRIDE_VT, kv_head=first_head // GROUP, k_len=k_len, reach=reach, low=low, token=token,
            rows=rows, scale=scale, softcap=softcap, scores=score_rows, key_position=positions, queries=queries,
            document=document, head=head_start + head, key_low=key_low, key_high=key_high, threshold=threshold,
            keep_scale=keep_scale, STRIDE_KT=STRIDE_KT, STRIDE_KH=STRIDE_KH, STRIDE_VT=STRIDE_VT, STRIDE_VH=STRIDE_VH,
            KV_HEADS=HEADS // GROUP, BLOCK_N=BLOCK_N, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, MASKS_ALL=MASKS_ALL,
            LOWER=LOWER, SOFTCAP=SOFTCAP, DROPOUT=DROPOUT, SCORES=SCORES, PRECISION=PRECISION, ELEMENTS=ELEMENTS,
            OWN=OWN,
        )  # fmt: skip
        if MORE:
            record = records + (further + 1) * RECORD_WIDTH
            k_start = tl.load(record + 8).to(tl.int64)
            v_start = load_again(record + 8).to(tl.int64)
            k_len = tl.load(record + 9)
            reach = tl.load(record + 10)
            if LOWER:
                low = tl.load(record + 11)

    row_sum = tl.sum(row_sums, 1)
    empty = row_sum == 0.0
    blind = live
    if not MORE:  # loaded again: of the loop's own bounds LLVM makes code in which each product waits for another
        low = load_again(record + 11) if LOWER else 0
        blind = is_blind(token, rows, load_again(record + 10), load_again(record + 9), low, LOWER)
    else:
        if tl.max((empty & live).to(tl.int32), 0) == 1:
            record = records + item * RECORD_WIDTH
            for further in loop(more_begin - 1, more_end):
                if LOWER:
                    low = tl.load(record + 11)
                blind = blind & is_blind(token, rows, tl.load(record + 10), tl.load(record + 9), low, LOWER)
                record = records + (further + 1) * RECORD_WIDTH
    if RUNS_ON:  # an earlier step may have seen scores of -inf
        was = tl.load(acc_base + (token * HEADS + member) * HEAD_DIM, mask=empty & (token < merged), other=0.0)
        blind = blind & (was == was)
    row_sum = tl.where(empty & blind, 1.0, row_sum)
    acc = acc / row_sum[:, None]  # NaN where all scores are -inf
    above = by_row(shift) + tl.math.log2(tl.where(empty, 1.0, row_sum))
    total = tl.fma(by_row(base), zeros_and(unit, row_sum), above * LN2)
    tl.store(lse_rows, tl.where(empty, float("-inf"), total), mask=has_lse)
    o_offsets = tile_offsets(token, member, STRIDE_OT, STRIDE_OH, BLOCK_D)
    store_rows(out + row * STRIDE_OT + far_head * STRIDE_OH, o_offsets, acc, ends, HEAD_DIM, BLOCK_D)
    if RUNS_ON:
        store_rows(acc_base, acc_offsets, acc, continues, HEAD_DIM, BLOCK_D)
