"""The backward kernel of keys and values for Hopper: a block of 128 keys, and the query rows that see them.

Each of two consumers has 64 of the keys and their gradients in registers. Scores and their gradients are computed with
keys as rows, and so are operands in registers of the products that add up dk and dv. The producer copies q and dout in
blocks of 64 rows (tokens of PACK heads), one head of a key head's group after the other. Programs take their tiles from
a counter, the heaviest first; each tile's gradients depend on nothing else, so who computes them changes no bit.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hetu.backends.gluon import variants
from hetu.backends.gluon.backward import (
    capped,
    cleaned,
    column_layout,
    exponents,
    scales,
    score_gradients,
    tile_layout,
)
from hetu.backends.gluon.schedule import (
    advanced,
    async_load,
    barriers,
    item_of,
    next_tile,
    record_at,
    tell_tile,
    told_tile,
)
from hetu.backends.gluon.softmax import eighths, opaque, whole
from hetu.backends.triton.large_scores import ASKED

ROWS = gl.constexpr(variants.ROWS)


@gluon.jit
def span_of(record, C: gl.constexpr):
    """A segment that names a block of keys: its query rows, and of which keys they see which.

    Returns:
        The first row of q; how many there are; the first of them that may see a key of the block, rounded down to
        blocks of rows; the place of the block's first key in the segment; the last one of the segment; the diagonals.
    """
    start, length = gl.load(record + 2), gl.load(record + 3)
    first, last_key, diagonal, lower = (
        gl.load(record + 9),
        gl.load(record + 10),
        gl.load(record + 11),
        gl.load(record + 12),
    )
    TOKENS: gl.constexpr = C.BLOCK_M // C.PACK
    begin = gl.maximum(gl.maximum(first, 0) - diagonal, 0) // TOKENS * TOKENS
    return start, length, begin, first, last_key, diagonal, lower


@gluon.jit
def load_rows(descs, buffers, bars, pointers, stage, phase, row, head, left, C: gl.constexpr):
    """Loads a block of rows as soon as its buffers are free: of q and of dout, and what is known of each row.

    ``pointers`` are to the log-sum-exp and to the delta of the first row; ``left`` rows are the span's, and the others
    have 0 of both. These numbers go through registers of the producer's warp.
    """
    BYTES: gl.constexpr = C.BLOCK_M * C.HEAD_DIM * 2
    LANES: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [1, 1], [1, 0])
    q_desc, dout_desc = descs
    q_s, dout_s, lse_s, delta_s = buffers
    q_full, dout_full, known, rows_empty = bars
    lse, stride_lh, delta = pointers
    eight = gl.arange(0, C.BLOCK_M // 8, layout=gl.SliceLayout(1, LANES))
    place = eight[:, None] * 8 + gl.arange(0, 8, layout=gl.SliceLayout(0, LANES))[None, :]
    token, member = place // C.PACK, place % C.PACK
    row_lse = gl.load(lse + member.to(gl.int64) * stride_lh + token, mask=token < left, other=0.0)
    row_delta = gl.load(delta + (token * C.HEADS + member), mask=token < left, other=0.0)
    mbarrier.wait(rows_empty.index(stage), phase)
    mbarrier.expect(q_full.index(stage), BYTES)
    async_load(q_desc, [row, head, 0], q_full.index(stage), q_s.index(stage))
    mbarrier.expect(dout_full.index(stage), BYTES)
    async_load(dout_desc, [row, head, 0], dout_full.index(stage), dout_s.index(stage))
    lse_s.index(stage).store(row_lse * ASKED)
    delta_s.index(stage).store(row_delta)
    mbarrier.arrive(known.index(stage), count=1)


@gluon.jit
def produce(descs, buffers, bars, pointers, items, numbers, C: gl.constexpr):
    """Loads what the consumers read, in their order."""
    q_desc, k_desc, v_desc, dout_desc = descs
    q_s, k_s, v_s, dout_s, lse_s, delta_s, tile_s = buffers
    tile_bars, kv_full, kv_empty, q_full, dout_full, known, rows_empty = bars
    records, lse, delta, _dk, _dv, counter = pointers
    _scale, _softcap, stride_lb, stride_lh = numbers
    TOKENS: gl.constexpr = C.BLOCK_M // C.PACK
    KEY_BYTES: gl.constexpr = 2 * C.CONSUMERS * ROWS * C.HEAD_DIM * 2
    stage, phase = 0, 1
    turn, tile, tiles = 0, next_tile(counter), items * C.SETS
    while tile < tiles:
        tell_tile(tile_s, tile_bars, turn, tile)
        item, packed = item_of(tile, items, C)
        kv_head = packed // C.PACK
        record = record_at(records, item)
        key, more, more_end = gl.load(record), gl.load(record + 13), gl.load(record + 14)
        mbarrier.wait(kv_empty.index(0), (turn & 1) ^ 1)
        mbarrier.expect(kv_full.index(0), KEY_BYTES)
        async_load(k_desc, [key, kv_head, 0], kv_full.index(0), k_s.index(0))
        async_load(v_desc, [key, kv_head, 0], kv_full.index(0), v_s.index(0))
        for further in range(opaque(more) - 1, opaque(more_end)):  # the record's own segment first
            start, length, begin, _first, _last_key, _diagonal, _lower = span_of(record, C)
            slot, slot_row = gl.load(record + 7), gl.load(record + 8)
            for packs in range(C.GROUP // C.PACK):
                head = kv_head * C.GROUP + packs * C.PACK
                lse_rows = lse + slot.to(gl.int64) * stride_lb + head.to(gl.int64) * stride_lh + slot_row
                deltas = delta + start.to(gl.int64) * C.HEADS + head
                for i in range(opaque(begin), opaque(length), TOKENS):
                    load_rows(
                        (q_desc, dout_desc), (q_s, dout_s, lse_s, delta_s),
                        (q_full, dout_full, known, rows_empty),
                        (lse_rows + i, stride_lh, deltas + i * C.HEADS), stage, phase, start + i, head, length - i, C,
                    )  # fmt: skip
                    stage, phase = advanced(stage, phase, C.STAGES)
            if C.MORE:
                record = record_at(records, further + 1)
        turn, tile = turn + 1, next_tile(counter)
    tell_tile(tile_s, tile_bars, turn, tile)


@gluon.jit
def is_seen(p, place, last_key, row, diagonal, lower, LOWER: gl.constexpr):
    """Which keys from ``place`` of a segment on, the rows of a tile like p, the query rows of its columns see.

    Row i sees those up to ``i + diagonal``, and with LOWER from ``i + lower`` on.
    """
    LAYOUT: gl.constexpr = p.type.layout
    key = opaque(place) + gl.arange(0, p.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    seen = ((key >= 0) & (key <= last_key))[:, None] & (key[:, None] <= (row + diagonal)[None, :])
    if LOWER:
        seen = seen & (key[:, None] >= (row + lower)[None, :])
    return seen


@gluon.jit
def here(buffers, C: gl.constexpr):
    """The tile's keys or values. Their place is computed anew: kept in registers it takes more than there are."""
    return buffers.index(opaque(0)).reshape([C.CONSUMERS * ROWS, C.HEAD_DIM])


@gluon.jit
def consume(GROUP: gl.constexpr, descs, buffers, bars, pointers, items, numbers, C: gl.constexpr):
    """Adds up the gradients of 64 of the keys of each tile, those of consumer GROUP."""
    q_s, k_s, v_s, dout_s, lse_s, delta_s, tile_s = buffers
    tile_bars, kv_full, kv_empty, q_full, dout_full, known, rows_empty = bars
    records, _lse, _delta, dk, dv, _counter = pointers
    scale, softcap, _stride_lb, _stride_lh = numbers
    TOKENS: gl.constexpr = C.BLOCK_M // C.PACK
    DTYPE: gl.constexpr = descs[0].dtype
    SCORES: gl.constexpr = tile_layout(C.BLOCK_M)
    GRADS: gl.constexpr = tile_layout(C.HEAD_DIM)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    EIGHTHS: gl.constexpr = column_layout(C.BLOCK_M)
    inner, outer = scales(scale, softcap, C.SOFTCAP)
    zero = gl.full([ROWS, C.BLOCK_M], 0.0, gl.float32, SCORES)
    token = gl.arange(0, C.BLOCK_M, layout=gl.SliceLayout(0, SCORES)) // C.PACK
    stage, phase = 0, 0
    turn, tile, tiles = 0, told_tile(tile_s, tile_bars, 0), items * C.SETS
    while tile < tiles:
        item, packed = item_of(tile, items, C)
        kv_head = packed // C.PACK
        record = record_at(records, item)
        key, keys = gl.load(record), gl.load(record + 1)
        more, more_end = gl.load(record + 13), gl.load(record + 14)
        dk_tile = gl.full([ROWS, C.HEAD_DIM], 0.0, gl.float32, GRADS)
        dv_tile = gl.full([ROWS, C.HEAD_DIM], 0.0, gl.float32, GRADS)
        mbarrier.wait(kv_full.index(0), turn & 1)
        for further in range(opaque(more) - 1, opaque(more_end)):
            _start, length, begin, first, last_key, diagonal, lower = span_of(record, C)
            first += GROUP * ROWS
            # Of rows from `all_see` to `since` on all see all keys of this consumer.
            is_inside = (first >= 0) & (first + ROWS - 1 <= last_key)
            all_see = gl.where(is_inside, gl.maximum(first + ROWS - 1 - diagonal, 0), length)
            since = first - lower - (TOKENS - 1)
            for _packs in range(C.GROUP // C.PACK):
                for i in range(opaque(begin), opaque(length), TOKENS):
                    left = length - i
                    mbarrier.wait(q_full.index(stage), phase)
                    q = cleaned(q_s.index(stage), left * C.PACK)
                    k = here(k_s, C).slice(GROUP * ROWS, ROWS)
                    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                    mbarrier.wait(dout_full.index(stage), phase)
                    dout = cleaned(dout_s.index(stage), left * C.PACK)
                    v = here(v_s, C).slice(GROUP * ROWS, ROWS)
                    dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
                    # Rows past the end have scores, log-sum-exps and gradients of 0, and so add nothing.
                    mbarrier.wait(known.index(stage), phase)
                    s = warpgroup_mma_wait(1, [s])
                    s = capped(s, inner, C.SOFTCAP)
                    p = gl.exp2(exponents(s, outer, lse_s.index(stage).load(EIGHTHS), True))
                    is_cut = i < all_see
                    if C.LOWER:
                        is_cut = is_cut | (i > since)
                    if is_cut:
                        p = gl.where(is_seen(p, first, last_key, i + token, diagonal, lower, C.LOWER), p, 0.0)
                    dp = warpgroup_mma_wait(0, [dp])
                    row_delta = gl.expand_dims(delta_s.index(stage).load(EIGHTHS), 0)
                    ds = whole(score_gradients(eighths(p), eighths(s), eighths(dp), row_delta, C.SOFTCAP), SCORES)
                    weights = gl.convert_layout(p.to(DTYPE), OPERAND)
                    dv_tile = warpgroup_mma(weights, dout, dv_tile, is_async=True)
                    grads = gl.convert_layout(ds.to(DTYPE), OPERAND)
                    dk_tile = warpgroup_mma(grads, q, dk_tile, is_async=True)
                    dv_tile, dk_tile = warpgroup_mma_wait(0, [dv_tile, dk_tile])
                    mbarrier.arrive(rows_empty.index(stage), count=1)
                    stage, phase = advanced(stage, phase, C.STAGES)
            if C.MORE:
                record = record_at(records, further + 1)
        mbarrier.arrive(kv_empty.index(0), count=1)
        own = GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, GRADS))
        channel = gl.arange(0, C.HEAD_DIM, layout=gl.SliceLayout(0, GRADS))
        live = (own < keys)[:, None]
        far_key, far_head = key.to(gl.int64), kv_head.to(gl.int64)
        dk_rows = dk + far_key * C.DK_STRIDE_T + far_head * C.DK_STRIDE_H
        gl.store(dk_rows + (own * C.DK_STRIDE_T)[:, None] + channel[None, :], dk_tile * scale, mask=live)
        dv_rows = dv + far_key * C.DV_STRIDE_T + far_head * C.DV_STRIDE_H
        gl.store(dv_rows + (own * C.DV_STRIDE_T)[:, None] + channel[None, :], dv_tile, mask=live)
        turn += 1
        tile = told_tile(tile_s, tile_bars, turn)


@gluon.jit(do_not_specialize=["items", "stride_lb", "stride_lh"])
def key_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse, delta, dk, dv, counter, records,
    items, stride_lb, stride_lh, scale, softcap, C: gl.constexpr,
):  # fmt: skip
    """Gradients of keys and values of one step. The grid has at most ``items * SETS`` programs.

    Args:
        q_desc: Boxes of ``(BLOCK_M // PACK, PACK, HEAD_DIM)`` in ``(T_q, HEADS, HEAD_DIM)``.
        k_desc: Boxes of ``(128, 1, HEAD_DIM)`` in ``(T_k, HEADS // GROUP, HEAD_DIM)``.
        v_desc: As k_desc.
        dout_desc: As q_desc.
        lse: float32 ``(slots, HEADS, S)``, rows contiguous.
        delta: float32 ``(T_q, HEADS)``, contiguous.
        dk: ``(T_k, HEADS // GROUP, HEAD_DIM)`` by its strides; rows that records name are written.
        dv: As dk.
        counter: int32, 0: the tiles that programs have taken.
        records: int32 rows, KEY_FIELDS of ``hetu/backends/attention/records.py``, of blocks of 128 keys.
        items: How many of them are items.
        stride_lb: Elements of lse between slots.
        stride_lh: Elements of lse between heads.
        scale: Of the scores; positive.
        softcap: What scores are capped by, with SOFTCAP.
        C: A :class:`hetu.backends.gluon.variants_backward.KeyConstants`.
    """
    BLOCK: gl.constexpr = [C.STAGES, C.BLOCK_M // C.PACK, C.PACK, C.HEAD_DIM]
    OWN: gl.constexpr = [1, C.CONSUMERS * ROWS, 1, C.HEAD_DIM]
    q_s = gl.allocate_shared_memory(q_desc.dtype, BLOCK, q_desc.layout)
    dout_s = gl.allocate_shared_memory(q_desc.dtype, BLOCK, dout_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, OWN, k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, OWN, v_desc.layout)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    lse_s = gl.allocate_shared_memory(gl.float32, [C.STAGES, C.BLOCK_M // 8, 8], PLAIN)
    delta_s = gl.allocate_shared_memory(gl.float32, [C.STAGES, C.BLOCK_M // 8, 8], PLAIN)
    tile_s = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tile_bars = barriers(2, 1), barriers(2, C.CONSUMERS)
    kv_full, kv_empty = barriers(1, 1), barriers(1, C.CONSUMERS)
    q_full, dout_full, known = barriers(C.STAGES, 1), barriers(C.STAGES, 1), barriers(C.STAGES, 1)
    rows_empty = barriers(C.STAGES, C.CONSUMERS)
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc, dout_desc)
    buffers = (q_s, k_s, v_s, dout_s, lse_s, delta_s, tile_s)
    bars = (tile_bars, kv_full, kv_empty, q_full, dout_full, known, rows_empty)
    numbers = (scale, softcap, stride_lb, stride_lh)
    pointers = (records, lse, delta, dk, dv, counter)
    gl.warp_specialize([
        (consume, (0, descs, buffers, bars, pointers, items, numbers, C)),
        (consume, (1, descs, buffers, bars, pointers, items, numbers, C)),
        (produce, (descs, buffers, bars, pointers, items, numbers, C)),
    ], [4, 1], [240, 24])  # fmt: skip
