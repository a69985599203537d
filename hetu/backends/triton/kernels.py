"""Triton kernels of attention over segment tables.

A program computes one query head of one item of the work list: a block of rows of one query span, with all
segments that the span has. It walks the keys of each segment in blocks, first those that every row of the
block sees (no masks at all), then the few that the diagonal or the segment's end cuts through.

The running softmax is kept in base 2, where the hardware's exponential lives: ``row_max`` is the largest score
of a row times log2(e), ``row_sum`` the sum of ``2**(score - row_max)``, ``acc`` the matching sum of value rows.
A partial result of earlier steps enters as ``row_max = lse``, ``row_sum = 1``, ``acc = out``, so that merging
costs no pass of its own.
"""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

# Fields of one row of the integer arrays; launch.py packs them in this order.
ITEM_FIELDS = ("span", "offset", "segment_begin", "segment_end")
SPAN_FIELDS = ("start", "length", "document", "position", "step", "slot", "slot_row", "column")
SEGMENT_FIELDS = ("k_start", "k_len", "diagonal")

_ITEM_WIDTH = tl.constexpr(len(ITEM_FIELDS))
_SPAN_WIDTH = tl.constexpr(len(SPAN_FIELDS))
_SEGMENT_WIDTH = tl.constexpr(len(SEGMENT_FIELDS))
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_PHILOX_ROUNDS = tl.constexpr(7)


def _interpreted_range(*bounds: Any) -> Iterator[int]:
    """``tl.range`` for the interpreter: that of Triton 3.6 cannot make an int of its scalars under NumPy 2.4."""
    return iter(range(*(bound.handle.data.item() if isinstance(bound, tl.tensor) else bound for bound in bounds)))


_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
loop = _interpreted_range if triton.knobs.runtime.interpret else tl.range


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc`` with float32 accumulation. The interpreter's own dot misreads bfloat16, so it gets float32."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_rows(base, stride, rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr):
    """Loads a (ROWS, BLOCK_D) tile from ``base``; columns past HEAD_DIM, and with CUT rows from ``rows`` on, are 0."""
    i = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = base + i * stride + d
    if CUT:
        if HEAD_DIM == BLOCK_D:
            tile = tl.load(pointers, mask=i < rows, other=0.0)
        else:
            tile = tl.load(pointers, mask=(i < rows) & (d < HEAD_DIM), other=0.0)
    else:
        if HEAD_DIM == BLOCK_D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=d < HEAD_DIM, other=0.0)
    return tile


@triton.jit
def store_rows(base, stride, tile, rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the first ``rows`` rows and HEAD_DIM columns of a (ROWS, BLOCK_D) tile, in the target's dtype."""
    i = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(base + i * stride + d, tile.to(base.dtype.element_ty), mask=(i < rows) & (d < HEAD_DIM))


@triton.jit
def dropout_keeps(key_low, key_high, threshold, document, head, i, j):
    """Which entries dropout keeps, of queries i and keys j that broadcast; ``hetu/backends/dropout.py`` defines it."""
    low = key_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = key_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    zero = (i + j) * 0
    word0, word1, word2, word3 = tl.philox(
        (high << 32) | low, (j >> 2) + zero, i + zero, document + zero, head + zero, _PHILOX_ROUNDS
    )
    lane = j & 3
    random = tl.where(lane < 2, tl.where(lane == 0, word0, word1), tl.where(lane == 2, word2, word3))
    return random >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def fold_keys(
    acc, row_sum, row_max, q, k, v, stride_kt, stride_vt, begin, end, reach, rows, scale,
    scores, stride_sm, key_position, queries, document, head, key_low, key_high, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CUT: tl.constexpr, DROPOUT: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Folds keys ``begin .. end`` of a segment into the running softmax of a block of rows; k and v start at ``begin``.

    With CUT, row i of the block sees keys ``0 .. reach + i``; without, it sees all of them and ``end - begin``
    is a multiple of BLOCK_N.
    """
    i = tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)
    for n in loop(begin, end, BLOCK_N):
        left = end - n
        k_tile = load_rows(k, stride_kt, left, BLOCK_N, HEAD_DIM, BLOCK_D, CUT)
        s = dot(q, tl.trans(k_tile), None, PRECISION)
        if CUT:
            s = tl.where(j[None, :] <= tl.minimum(i + (reach - n), left - 1), s, float("-inf"))
        if DROPOUT or SCORES:
            keys = tl.load(key_position + n + j, mask=j < left, other=0)
        if SCORES:
            places = scores + i.to(tl.int64) * stride_sm + keys[None, :]
            tl.store(places, s * scale, mask=(i < rows) & (s != float("-inf")))
        new_max = tl.maximum(row_max, tl.max(s, 1) * (scale * _LOG2E))
        # A row that has seen no key yet has -inf here, and -inf - -inf would be NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if CUT else new_max
        p = tl.math.exp2(s * (scale * _LOG2E) - shift[:, None])
        fade = tl.math.exp2(row_max - shift)
        row_sum = row_sum * fade + tl.sum(p, 1)
        row_max = new_max
        if DROPOUT:
            keeps = dropout_keeps(key_low, key_high, threshold, document, head, queries[:, None], keys[None, :])
            p = tl.where(keeps, p * keep_scale, 0.0)
        v_tile = load_rows(v, stride_vt, left, BLOCK_N, HEAD_DIM, BLOCK_D, CUT)
        if PRECISION == "ieee":
            # float32 sums a block by itself first: one long chain of additions over all keys would lose digits. It is
            # merged by an fma because the compiler would turn an addition into the dot's accumulator, and so a chain.
            acc = tl.fma(acc, tl.broadcast_to(fade[:, None], [BLOCK_M, BLOCK_D]), dot(p, v_tile, None, PRECISION))
        else:
            acc = dot(p.to(v_tile.dtype), v_tile, acc * fade[:, None], PRECISION)
        k += BLOCK_N * stride_kt
        v += BLOCK_N * stride_vt
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "stride_sb", "stride_sh", "stride_sm",
                               "key_low", "key_high", "threshold"])  # fmt: skip
def forward_kernel(
    q, k, v, out, lse, acc_state, scores, key_position, items, spans, segments,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_lb, stride_lh, stride_sb, stride_sh, stride_sm,
    scale, key_low, key_high, threshold, keep_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, DROPOUT: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of attention, merged into the running (acc, lse). The grid is ``(items * HEADS,)``.

    Heads of one item are neighbours in the grid, so that those that share keys find them in the cache.

    Args:
        q, k, v: ``(T, heads, HEAD_DIM)`` by their strides over rows and heads.
        out: ``(T_q, HEADS, HEAD_DIM)``; written if LAST. ``acc_state``, float32 and contiguous, has its shape.
        lse: float32 ``(slots, HEADS, S)``, rows contiguous.
        scores: float32 ``(slots, HEADS, rows, columns)``, or None without SCORES.
        key_position: int32 ``(T_k,)``, or None without DROPOUT and SCORES.
        items, spans, segments: int32 rows of ITEM_FIELDS, SPAN_FIELDS, SEGMENT_FIELDS.
        scale: Of the scores; positive.
        key_low, key_high, threshold: Bits of dropout's key and threshold as int32, so that no value of them
            makes another variant of the kernel.
        keep_scale: ``1 / (1 - p)``.
    """
    item = items + (tl.program_id(0) // HEADS) * _ITEM_WIDTH
    head = tl.program_id(0) % HEADS
    far_head = head.to(tl.int64)  # for offsets that may pass 2**31
    offset = tl.load(item + 1)
    segment_begin = tl.load(item + 2)
    segment_end = tl.load(item + 3)
    span = spans + tl.load(item) * _SPAN_WIDTH
    row = tl.load(span).to(tl.int64) + offset
    rows = tl.minimum(tl.load(span + 1) - offset, BLOCK_M)
    slot = tl.load(span + 5)  # -1 where the rows have no lse
    slot_row = tl.load(span + 6) + offset
    i = tl.arange(0, BLOCK_M)

    acc_base = acc_state
    if not (FIRST and LAST):
        acc_base += (row * HEADS + far_head) * HEAD_DIM
    lse_rows = lse + slot.to(tl.int64) * stride_lb + far_head * stride_lh + slot_row + i
    has_lse = i < tl.where(slot >= 0, rows, 0)
    if FIRST:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    else:
        acc = load_rows(acc_base, HEADS * HEAD_DIM, rows, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        row_max = tl.load(lse_rows, mask=has_lse, other=float("-inf")) * _LOG2E
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)

    document = tl.load(span + 2)
    queries = tl.load(span + 3) + (offset + i) * tl.load(span + 4)
    if SCORES:
        scores += slot.to(tl.int64) * stride_sb + far_head * stride_sh
        scores += slot_row.to(tl.int64) * stride_sm + tl.load(span + 7)

    q_tile = load_rows(q + row * stride_qt + far_head * stride_qh, stride_qt, rows, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    k_head = k + (far_head // GROUP) * stride_kh
    v_head = v + (far_head // GROUP) * stride_vh
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
        if DROPOUT or SCORES:
            positions += k_start
        acc, row_sum, row_max = fold_keys(
            acc, row_sum, row_max, q_tile, k_rows, v_rows, stride_kt, stride_vt, 0, whole, reach, rows, scale,
            scores, stride_sm, positions, queries, document, head, key_low, key_high, threshold, keep_scale,
            BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, False, DROPOUT, SCORES, PRECISION,
        )  # fmt: skip
        k_rows += whole.to(tl.int64) * stride_kt
        v_rows += whole.to(tl.int64) * stride_vt
        acc, row_sum, row_max = fold_keys(
            acc, row_sum, row_max, q_tile, k_rows, v_rows, stride_kt, stride_vt, whole, end, reach, rows, scale,
            scores, stride_sm, positions, queries, document, head, key_low, key_high, threshold, keep_scale,
            BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, True, DROPOUT, SCORES, PRECISION,
        )  # fmt: skip

    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    acc = acc / row_sum[:, None]
    tl.store(lse_rows, tl.where(empty, float("-inf"), (row_max + tl.math.log2(row_sum)) * _LN2), mask=has_lse)
    if LAST:
        store_rows(out + row * stride_ot + far_head * stride_oh, stride_ot, acc, rows, BLOCK_M, HEAD_DIM, BLOCK_D)
    else:
        store_rows(acc_base, HEADS * HEAD_DIM, acc, rows, BLOCK_M, HEAD_DIM, BLOCK_D)
