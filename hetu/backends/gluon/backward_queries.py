"""The backward kernel of queries for Hopper: a block of 128 query rows, and the keys that they see.

Each of two consumers has 64 of the rows (tokens of PACK heads) and their gradients in registers; rows and blocks of
keys are those of the forward, its work list too. The gradients of scores are an operand in registers of the product
that adds up dq.
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
from hetu.backends.gluon.backward import capped, cleaned, exponents, scales, score_gradients, tile_layout
from hetu.backends.gluon.forward import load_block, load_queries
from hetu.backends.gluon.schedule import advanced, barriers, item_at, last_block, record_at, segment_of, turns
from hetu.backends.gluon.softmax import is_seen, opaque
from hetu.backends.triton.large_scores import ASKED
from hetu.backends.triton.tiles import CONTINUES, MERGES

ROWS = gl.constexpr(variants.ROWS)


@gluon.jit
def produce(descs, buffers, bars, records, items, C: gl.constexpr):
    """Loads what the consumers read, in their order."""
    q_desc, k_desc, v_desc, dout_desc = descs
    q_s, k_s, v_s, dout_s = buffers
    q_full, q_empty, dout_full, dout_empty, k_full, k_empty, v_full, v_empty = bars
    BYTES: gl.constexpr = C.BLOCK_N * C.HEAD_DIM * 2
    stage, phase = 0, 1
    for i in range(turns(items * C.SETS)):
        item, first_head = item_at(i, items, C)
        record = record_at(records, item)
        row, rows = gl.load(record), gl.load(record + 1)
        k_start, k_len, reach = segment_of(record)
        blocks, more = gl.load(record + 12), gl.load(record + 13)
        kv_head = first_head // C.GROUP
        load_queries(q_desc, q_s, q_full, q_empty, i, row, first_head, C)
        load_queries(dout_desc, dout_s, dout_full, dout_empty, i, row, first_head, C)
        n = last_block(k_len, reach, rows, C)
        for _j in range(opaque(blocks)):
            if C.MORE:
                if n < 0:
                    k_start, k_len, reach = segment_of(record_at(records, more))
                    n = last_block(k_len, reach, rows, C)
                    more += 1
            at = k_start + n * C.BLOCK_N
            load_block(k_desc, k_s, k_full, k_empty, stage, phase, at, kv_head, BYTES)
            load_block(v_desc, v_s, v_full, v_empty, stage, phase, at, kv_head, BYTES)
            n -= 1
            stage, phase = advanced(stage, phase, C.STAGES)


@gluon.jit
def consume(GROUP: gl.constexpr, descs, buffers, bars, pointers, items, numbers, C: gl.constexpr):
    """Adds up the gradients of 64 of the rows of each tile, those of consumer GROUP."""
    q_s, k_s, v_s, dout_s = buffers
    q_full, q_empty, dout_full, dout_empty, k_full, k_empty, v_full, v_empty = bars
    records, lse, delta, dq, dq_state = pointers
    scale, softcap, stride_lb, stride_lh = numbers
    TOKENS: gl.constexpr = ROWS // C.PACK
    DTYPE: gl.constexpr = descs[0].dtype
    SCORES: gl.constexpr = tile_layout(C.BLOCK_N)
    GRADS: gl.constexpr = tile_layout(C.HEAD_DIM)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    inner, outer = scales(scale, softcap, C.SOFTCAP)
    zero = gl.full([ROWS, C.BLOCK_N], 0.0, gl.float32, SCORES)
    first_token = GROUP * TOKENS
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    token, member = first_token + r // C.PACK, r % C.PACK
    own = gl.arange(0, ROWS, layout=gl.SliceLayout(1, GRADS))
    own_token, own_member = first_token + own // C.PACK, own % C.PACK
    channel = gl.arange(0, C.HEAD_DIM, layout=gl.SliceLayout(0, GRADS))
    q = q_s.index(GROUP).reshape([ROWS, C.HEAD_DIM])
    dout = dout_s.index(GROUP).reshape([ROWS, C.HEAD_DIM])
    stage, phase = 0, 0
    for i in range(turns(items * C.SETS)):
        item, first_head = item_at(i, items, C)
        record = record_at(records, item)
        row, rows, slot, slot_row = gl.load(record), gl.load(record + 1), gl.load(record + 5), gl.load(record + 6)
        _k_start, k_len, reach = segment_of(record)
        low, blocks, more, role = (
            gl.load(record + 11),
            gl.load(record + 12),
            gl.load(record + 13),
            gl.load(record + 15),
        )
        far_row, far_head = row.to(gl.int64), first_head.to(gl.int64)
        lse_rows = lse + slot.to(gl.int64) * stride_lb + slot_row + (far_head + member) * stride_lh + token
        row_lse = gl.load(lse_rows, mask=token < gl.where(slot >= 0, rows, 0), other=0.0) * ASKED
        deltas = delta + far_row * C.HEADS + first_head
        row_delta = gl.load(deltas + (token * C.HEADS + member), mask=token < rows, other=0.0)
        live = own_token < rows
        dq_tile = gl.full([ROWS, C.HEAD_DIM], 0.0, gl.float32, GRADS)
        if C.RUNS_ON:
            state_at = (own_token * C.STATE_STRIDE_T + own_member * C.STATE_STRIDE_H)[:, None] + channel[None, :]
            state = dq_state + far_row * C.STATE_STRIDE_T + far_head * C.STATE_STRIDE_H
            merged = gl.where((role & MERGES) != 0, rows, 0)
            dq_tile = gl.load(state + state_at, mask=(own_token < merged)[:, None], other=0.0)
        mbarrier.wait(q_full.index(GROUP), i & 1)
        mbarrier.wait(dout_full.index(GROUP), i & 1)
        n = last_block(k_len, reach, rows, C)
        for _j in range(opaque(blocks)):
            if C.MORE:
                if n < 0:
                    further = record_at(records, more)
                    _k_start, k_len, reach = segment_of(further)
                    if C.LOWER:
                        low = gl.load(further + 11)
                    n = last_block(k_len, reach, rows, C)
                    more += 1
            first = n * C.BLOCK_N
            left = gl.minimum(k_len, reach + rows) - first
            mbarrier.wait(k_full.index(stage), phase)
            k = cleaned(k_s.index(stage), left)
            s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage), phase)
            v = cleaned(v_s.index(stage), left)
            dp = warpgroup_mma(dout, v.permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, [s])
            s = capped(s, inner, C.SOFTCAP)
            p = gl.exp2(exponents(s, outer, row_lse, False))
            is_cut = first + C.BLOCK_N > gl.minimum(k_len, reach + first_token + 1)
            if C.LOWER:
                is_cut = is_cut | (first < low + rows - 1)
            if is_cut:
                p = gl.where(is_seen(p, first, token, k_len, reach, low, C.LOWER), p, 0.0)
            dp = warpgroup_mma_wait(0, [dp])
            mbarrier.arrive(v_empty.index(stage), count=1)
            ds = score_gradients(p, s, dp, row_delta[:, None], C.SOFTCAP)
            grads = gl.convert_layout(ds.to(DTYPE), OPERAND)
            dq_tile = warpgroup_mma(grads, k, dq_tile, is_async=True)
            dq_tile = warpgroup_mma_wait(0, [dq_tile])
            mbarrier.arrive(k_empty.index(stage), count=1)
            n -= 1
            stage, phase = advanced(stage, phase, C.STAGES)
        mbarrier.arrive(q_empty.index(GROUP), count=1)
        mbarrier.arrive(dout_empty.index(GROUP), count=1)
        if C.RUNS_ON:
            goes_on = gl.where((role & CONTINUES) != 0, rows, 0)
            gl.store(state + state_at, dq_tile, mask=(own_token < goes_on)[:, None])
            live = own_token < rows - goes_on
        places = (own_token * C.DQ_STRIDE_T + own_member * C.DQ_STRIDE_H)[:, None] + channel[None, :]
        start = dq + far_row * C.DQ_STRIDE_T + far_head * C.DQ_STRIDE_H
        gl.store(start + places, dq_tile * scale, mask=live[:, None])


@gluon.jit(do_not_specialize=["items", "stride_lb", "stride_lh"])
def query_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse, delta, dq, dq_state, records,
    items, stride_lb, stride_lh, scale, softcap, C: gl.constexpr,
):  # fmt: skip
    """Gradients of queries of one step. The grid has at most ``items * SETS`` programs.

    Args:
        q_desc: Boxes of ``(64 // PACK, PACK, HEAD_DIM)`` in ``(T_q, HEADS, HEAD_DIM)``.
        k_desc: Boxes of ``(BLOCK_N, 1, HEAD_DIM)`` in ``(T_k, HEADS // GROUP, HEAD_DIM)``.
        v_desc: As k_desc.
        dout_desc: As q_desc.
        lse: float32 ``(slots, HEADS, S)``, rows contiguous.
        delta: float32 ``(T_q, HEADS)``, contiguous.
        dq: ``(T_q, HEADS, HEAD_DIM)`` by its strides.
        dq_state: float32, likewise: running results, not yet scaled, of rows whose records merge or continue. None
            without RUNS_ON.
        records: int32 rows, QUERY_FIELDS of ``hetu/backends/attention/records.py``, arranged as for the forward.
        items: How many of them are items.
        stride_lb: Elements of lse between slots.
        stride_lh: Elements of lse between heads.
        scale: Of the scores; positive.
        softcap: What scores are capped by, with SOFTCAP.
        C: A :class:`hetu.backends.gluon.variants_backward.QueryConstants`.
    """
    OWN: gl.constexpr = [C.CONSUMERS, ROWS // C.PACK, C.PACK, C.HEAD_DIM]
    BLOCK: gl.constexpr = [C.STAGES, C.BLOCK_N, 1, C.HEAD_DIM]
    q_s = gl.allocate_shared_memory(q_desc.dtype, OWN, q_desc.layout)
    dout_s = gl.allocate_shared_memory(q_desc.dtype, OWN, dout_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, BLOCK, k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, BLOCK, v_desc.layout)
    q_full, q_empty = barriers(C.CONSUMERS, 1), barriers(C.CONSUMERS, 1)
    dout_full, dout_empty = barriers(C.CONSUMERS, 1), barriers(C.CONSUMERS, 1)
    k_full, k_empty = barriers(C.STAGES, 1), barriers(C.STAGES, C.CONSUMERS)
    v_full, v_empty = barriers(C.STAGES, 1), barriers(C.STAGES, C.CONSUMERS)
    fence_async_shared()
    descs, buffers = (q_desc, k_desc, v_desc, dout_desc), (q_s, k_s, v_s, dout_s)
    bars = (q_full, q_empty, dout_full, dout_empty, k_full, k_empty, v_full, v_empty)
    numbers = (scale, softcap, stride_lb, stride_lh)
    pointers = (records, lse, delta, dq, dq_state)
    gl.warp_specialize([
        (consume, (0, descs, buffers, bars, pointers, items, numbers, C)),
        (consume, (1, descs, buffers, bars, pointers, items, numbers, C)),
        (produce, (descs, buffers, bars, records, items, C)),
    ], [4, 1], [240, 24])  # fmt: skip
