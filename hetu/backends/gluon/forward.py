"""The forward kernel for Hopper: groups of warps that compute, and one that loads for them.

Persistent programs take tiles of 128 or 192 rows (tokens of PACK heads that share a key head), one after the other. A
*producer* warp copies queries, keys and values into shared memory by TMA; two or three *consumers* of four warps, each
with 64 of the rows, multiply on tensor cores (wgmma) out of it. A consumer issues the scores of the next block of keys
together with the weighted sum of the present one, and the first scores of its next tile before it scales and stores
the present one, so that tensor cores work while it computes exponentials. Consumers need no order between them: one's
products run during the other's softmax.

Records, the running softmax in base 2 and merging are those of ``hetu/backends/triton/kernels.py``. Of each segment the
last block of keys comes first: it is the one that ends and diagonals cut.

Source: the roles of warps are those of Shah and others, "FlashAttention-3", 2024.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hetu.backends.gluon import variants
from hetu.backends.gluon.schedule import (
    advanced,
    async_load,
    async_store,
    barriers,
    item_at,
    last_block,
    record_at,
    segment_of,
    turns,
)
from hetu.backends.gluon.softmax import (
    clean_rows,
    first_eighth,
    is_blind,
    kept,
    masked,
    opaque,
    out_layout,
    rescaled,
    row_layout,
    scores_layout,
    softmax,
    tanh,
)
from hetu.backends.triton.running_max import LOWEST
from hetu.backends.triton.tiles import CONTINUES, LN2, LOG2E, MERGES

ROWS = gl.constexpr(variants.ROWS)


@gluon.jit
def load_queries(desc, buffers, full, empty, i, row, head, C: gl.constexpr):
    """Loads the i-th tile's queries, each consumer's into a buffer of its own as soon as that is free."""
    CONSUMERS: gl.constexpr = C.CONSUMERS
    for group in gl.static_range(CONSUMERS):
        at = C.Q_BUFFERS * group + i % C.Q_BUFFERS
        mbarrier.wait(empty.index(at), ((i // C.Q_BUFFERS) & 1) ^ 1)
        mbarrier.expect(full.index(at), ROWS * C.HEAD_DIM * 2)
        async_load(desc, [row + group * (ROWS // C.PACK), head, 0], full.index(at), buffers.index(at))


@gluon.jit
def load_block(desc, buffers, full, empty, stage, phase, row, head, BYTES: gl.constexpr):
    """Loads a block of keys or values as soon as its buffer is free."""
    mbarrier.wait(empty.index(stage), phase)
    mbarrier.expect(full.index(stage), BYTES)
    async_load(desc, [row, head, 0], full.index(stage), buffers.index(stage))


@gluon.jit
def produce(descs, buffers, bars, records, items, C: gl.constexpr):
    """Loads what the consumers read, in their order."""
    q_desc, k_desc, v_desc, _o_desc = descs
    q_s, k_s, v_s = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    BLOCK_BYTES: gl.constexpr = C.BLOCK_N * C.HEAD_DIM * 2
    stage, phase, total = 0, 1, turns(items * C.SETS)
    for i in range(total):
        item, first_head = item_at(i, items, C)
        record = record_at(records, item)
        row, rows = gl.load(record), gl.load(record + 1)
        k_start, k_len, reach = segment_of(record)
        blocks, more = gl.load(record + 12), gl.load(record + 13)
        kv_head = first_head // C.GROUP
        n = last_block(k_len, reach, rows, C)
        for j in range(blocks):
            if C.MORE:
                if n < 0:
                    k_start, k_len, reach = segment_of(record_at(records, more))
                    n = last_block(k_len, reach, rows, C)
                    more += 1
            at = k_start + n * C.BLOCK_N
            load_block(k_desc, k_s, k_full, k_empty, stage, phase, at, kv_head, BLOCK_BYTES)
            if j == 0:
                load_queries(q_desc, q_s, q_full, q_empty, i, row, first_head, C)
            load_block(v_desc, v_s, v_full, v_empty, stage, phase, at, kv_head, BLOCK_BYTES)
            n -= 1
            stage, phase = advanced(stage, phase, C.STAGES)
    if C.PREFETCHES:  # scores past the last tile, which nothing uses
        load_block(k_desc, k_s, k_full, k_empty, stage, phase, 0, 0, BLOCK_BYTES)
        load_queries(q_desc, q_s, q_full, q_empty, total, 0, 0, C)


@gluon.jit
def load_item(records, turn, items, C: gl.constexpr):
    """What a consumer knows of its tile in a turn, a tuple; nothing of a turn past the last one."""
    item, head = item_at(turn, items, C)
    record = record_at(records, gl.minimum(item, items - 1))
    low, more, role = gl.load(record + 11), gl.load(record + 13), gl.load(record + 15)
    row, rows, slot, slot_row = gl.load(record), gl.load(record + 1), gl.load(record + 5), gl.load(record + 6)
    _k_start, k_len, reach = segment_of(record)
    return row, rows, slot, slot_row, k_len, reach, low, more, role, gl.load(record + 12), head


@gluon.jit
def seen_scores(s, tile, n, token, first_token, inner, C: gl.constexpr):
    """The scores of block ``n`` as the softmax takes them: capped, and -inf where they are hidden."""
    rows, k_len, reach, low = tile
    if C.SOFTCAP:
        s = tanh(s * inner)
    first = n * C.BLOCK_N
    is_cut = first + C.BLOCK_N > gl.minimum(k_len, reach + first_token + 1)
    if C.LOWER:
        is_cut = is_cut | (first < low + rows - 1)
    if is_cut:
        s = masked(s, first, token, k_len, reach, low, C.LOWER)
    return s


@gluon.jit
def weigh(s, tile, n, token, first_token, inner, factor, base, shift, row_sums, DTYPE: gl.constexpr, C: gl.constexpr):
    """Folds the scores of block ``n`` into the softmax; their weights come as an operand of the next product."""
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, out_layout(C), 2)
    s = seen_scores(s, tile, n, token, first_token, inner, C)
    p, base, shift, row_sums, fade = softmax(s, base, shift, row_sums, factor)
    return gl.convert_layout(p.to(DTYPE), WEIGHTS), base, shift, row_sums, fade


@gluon.jit
def clean_values(values, full, phase, tile, n, C: gl.constexpr):
    """Cleans a block of values, once it is there, of rows past the last key that a row of the tile sees."""
    rows, k_len, reach, _low = tile
    left = gl.minimum(k_len, reach + rows) - n * C.BLOCK_N
    if left < C.BLOCK_N:
        mbarrier.wait(full, phase)
        clean_rows(values.reshape([C.BLOCK_N, C.HEAD_DIM]), left)


@gluon.jit
def begun(tile, lse_rows, has_lse, token, member, sinks, unit, C: gl.constexpr):
    """Sums, base and shift of rows before their first key, and the log-sum-exps with which earlier steps left them."""
    _row, rows, role, first_head = tile
    BY_ROW: gl.constexpr = gl.SliceLayout(1, scores_layout(C))
    before = gl.full([ROWS], float("-inf"), gl.float32, BY_ROW)
    if C.RUNS_ON or C.SINKS:
        start = before
        if C.SINKS:
            start = gl.load(sinks + first_head + member)
        if C.RUNS_ON:
            merged = gl.where((role & MERGES) != 0, rows, 0)
            before = gl.load(lse_rows, mask=has_lse & (token < merged), other=float("-inf"))
            start = gl.where(token < merged, before, start)
        # A maximum passes over NaN, so the sums have to keep that of a sink.
        weight = gl.where(start == float("-inf"), 0.0, gl.where(start == start, 1.0, float("nan")))
        row_sums = first_eighth(weight, C.BLOCK_N)
        base, shift = kept(start, unit, C.BLOCK_N)
    else:
        base = gl.full([ROWS, 8], LOWEST, gl.float32, row_layout(C.BLOCK_N))
        shift = base
        row_sums = gl.full([ROWS, 8], 0.0, gl.float32, row_layout(C.BLOCK_N))
    return row_sums, base, shift, before


@gluon.jit
def load_running(tile, before, first_token, acc_state, C: gl.constexpr):
    """The accumulator that earlier steps left; 0 where they saw nothing, or scores of -inf, which weigh nothing."""
    row, rows, _role, first_head = tile
    heard = gl.convert_layout((before != float("-inf")).to(gl.int32), gl.SliceLayout(1, out_layout(C)))
    places, live = places_of(acc_state, row, first_head, first_token, rows, C)
    return gl.load(places, mask=live & (heard == 1)[:, None], other=0.0)


@gluon.jit
def ended(tile, row_sums, base, shift, blind, unit, token, member, acc_state, C: gl.constexpr):
    """The denominators and the log-sum-exps of rows, ``(rows,)``.

    A row that saw nothing has 1 and -inf; one whose scores are all -inf has 0, of which the output becomes NaN.
    """
    row, rows, role, first_head = tile
    BY_ROW: gl.constexpr = gl.SliceLayout(1, scores_layout(C))
    row_sum = gl.convert_layout(gl.sum(row_sums, 1), BY_ROW)
    is_empty = row_sum == 0.0
    if C.RUNS_ON:  # an earlier step may have seen scores of -inf: what it left is NaN
        merged = gl.where((role & MERGES) != 0, rows, 0)
        first = acc_state + (row.to(gl.int64) * C.HEADS + first_head) * C.HEAD_DIM
        places = first + (token * C.HEADS + member) * C.HEAD_DIM
        was = gl.load(places, mask=is_empty & (token < merged), other=0.0)
        blind = blind & (was == was)
    above = gl.convert_layout(gl.max(shift, 1), BY_ROW) + gl.log2(gl.where(is_empty, 1.0, row_sum))
    top = gl.convert_layout(gl.max(base, 1), BY_ROW)
    total = gl.fma(top, gl.full_like(top, 0.0) + unit, above * LN2)
    return gl.where(is_empty & blind, 1.0, row_sum), gl.where(is_empty, float("-inf"), total)


@gluon.jit
def places_of(acc_state, row, first_head, first_token, rows, C: gl.constexpr):
    """Pointers to a consumer's accumulator in the running results, and which of its rows are before ``rows``."""
    OUT: gl.constexpr = out_layout(C)
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    column = gl.arange(0, C.HEAD_DIM, layout=gl.SliceLayout(0, OUT))
    token = first_token + r // C.PACK
    offsets = (token * C.HEADS + r % C.PACK) * C.HEAD_DIM
    base = acc_state + (row.to(gl.int64) * C.HEADS + first_head) * C.HEAD_DIM
    return base + offsets[:, None] + column[None, :], (token < rows)[:, None]


@gluon.jit
def finish(tile, acc, buffer, o_desc, out, acc_state, first_token, C: gl.constexpr):
    """Stores the rows of a tile, where they go on as running results and else in ``out``; ``buffer`` is free for it."""
    row, rows, role, first_head = tile
    TOKENS: gl.constexpr = ROWS // C.PACK
    goes_on = False
    if C.RUNS_ON:
        goes_on = (role & CONTINUES) != 0
        if goes_on:
            places, live = places_of(acc_state, row, first_head, first_token, rows, C)
            gl.store(places, acc, mask=live)
    if not goes_on:
        flat = buffer.reshape([ROWS, C.HEAD_DIM])
        flat.store(acc.to(buffer.dtype))
        fence_async_shared()  # before TMA reads the buffer, or overwrites it with later queries
        if rows >= first_token + TOKENS:
            async_store(o_desc, [row + first_token, first_head, 0], buffer)
        else:
            start = out + row.to(gl.int64) * C.OUT_STRIDE_T + first_head.to(gl.int64) * C.OUT_STRIDE_H
            store_live(flat, start, first_token, rows, C)


@gluon.jit
def store_live(buffer, out, first_token, rows, C: gl.constexpr):
    """Stores the live rows of a buffer: those after them belong to others."""
    WIDTH: gl.constexpr = C.HEAD_DIM
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    STEP: gl.constexpr = 16
    for at in gl.static_range(0, ROWS, STEP):
        part = buffer.slice(at, STEP).load(LAYOUT)
        r = at + gl.arange(0, STEP, layout=gl.SliceLayout(1, LAYOUT))
        token, member = first_token + r // C.PACK, r % C.PACK
        column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
        places = (token.to(gl.int64) * C.OUT_STRIDE_T + member * C.OUT_STRIDE_H)[:, None] + column[None, :]
        gl.store(out + places, part, mask=(token < rows)[:, None])


@gluon.jit
def consume(GROUP: gl.constexpr, descs, buffers, bars, pointers, items, numbers, C: gl.constexpr):
    """Computes 64 of the rows of each tile, those of consumer GROUP."""
    _q_desc, _k_desc, _v_desc, o_desc = descs
    q_s, k_s, v_s = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    records, lse, out, acc_state, sinks = pointers
    scale, softcap, stride_lb, stride_lh = numbers
    SCORES: gl.constexpr = scores_layout(C)
    DTYPE: gl.constexpr = o_desc.dtype
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    BY_OUT: gl.constexpr = gl.SliceLayout(1, out_layout(C))
    KEYS: gl.constexpr = [C.BLOCK_N, C.HEAD_DIM]
    QUERIES: gl.constexpr = [ROWS, C.HEAD_DIM]
    TURNS: gl.constexpr = C.Q_BUFFERS
    inner = scale
    if C.SOFTCAP:  # the softmax is then one of `tanh(s * inner)`, by the scale `softcap`
        inner = scale / softcap
        scale = softcap
    factor = scale * LOG2E
    zero = gl.full([ROWS, C.BLOCK_N], 0.0, gl.float32, SCORES)
    first_token = GROUP * (ROWS // C.PACK)
    r = gl.arange(0, ROWS, layout=BY_ROW)
    token, member = first_token + r // C.PACK, r % C.PACK

    stage, phase, total = 0, 0, turns(items * C.SETS)
    tile = load_item(records, 0, items, C)
    s = zero
    if C.PREFETCHES:
        s = first_scores(q_s.index(TURNS * GROUP), q_full.index(TURNS * GROUP), 0, k_s, k_full, 0, 0, zero, C)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(0), count=1)
    for i in range(total):
        row, rows, slot, slot_row, k_len, reach, low, more, role, blocks, first_head = tile
        at = TURNS * GROUP + i % TURNS
        q = q_s.index(at).reshape(QUERIES)
        lse_rows = (
            lse + slot.to(gl.int64) * stride_lb + slot_row + (first_head + member).to(gl.int64) * stride_lh + token
        )
        has_lse = token < gl.where(slot >= 0, rows, 0)
        n = last_block(k_len, reach, rows, C)
        if not C.PREFETCHES:
            s = first_scores(q_s.index(at), q_full.index(at), i & 1, k_s, k_full, stage, phase, zero, C)
            s = warpgroup_mma_wait(0, [s])
            mbarrier.arrive(k_empty.index(stage), count=1)
        own = (row, rows, role, first_head)
        row_sums, base, shift, before = begun(own, lse_rows, has_lse, token, member, sinks, scale, C)
        blind = is_blind(token, rows, k_len, reach, low, C.LOWER)
        weights, base, shift, row_sums, fade = weigh(
            s, (rows, k_len, reach, low), n, token, first_token, inner, factor, base, shift, row_sums, DTYPE, C
        )
        if C.PREFETCHES:  # the tile before is out: its buffer can take the queries of the tile after this one
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(TURNS * GROUP + ((i & 1) ^ 1)), count=1, pred=i > 0)
        acc = gl.full([ROWS, C.HEAD_DIM], 0.0, gl.float32, out_layout(C))
        if C.RUNS_ON:  # after the softmax, which needs the registers
            acc = rescaled(load_running(own, before, first_token, acc_state, C), fade)
        clean_values(v_s.index(stage), v_full.index(stage), phase, (rows, k_len, reach, low), n, C)
        # Triton 3.6 takes a value that is nothing but the bound of an inner loop for one that nobody needs, and keeps
        # that of the first turn for all turns.
        for _j in range(1, opaque(blocks)):
            n -= 1
            if C.MORE:
                if n < 0:
                    record = record_at(records, more)
                    _k_start, k_len, reach = segment_of(record)
                    if C.LOWER:
                        low = gl.load(record + 11)
                    n = last_block(k_len, reach, rows, C)
                    more += 1
                    blind = blind & is_blind(token, rows, k_len, reach, low, C.LOWER)
            k_stage, k_phase = advanced(stage, phase, C.STAGES)
            mbarrier.wait(k_full.index(k_stage), k_phase)
            s = warpgroup_mma(q, k_s.index(k_stage).reshape(KEYS).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage), phase)
            acc = warpgroup_mma(weights, v_s.index(stage).reshape(KEYS), acc, is_async=True)
            s = warpgroup_mma_wait(1, [s])
            mbarrier.arrive(k_empty.index(k_stage), count=1)
            fresh, base, shift, row_sums, fade = weigh(
                s, (rows, k_len, reach, low), n, token, first_token, inner, factor, base, shift, row_sums, DTYPE, C
            )
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(v_empty.index(stage), count=1)
            acc = rescaled(acc, fade)
            weights = fresh
            if C.MORE:
                clean_values(v_s.index(k_stage), v_full.index(k_stage), k_phase, (rows, k_len, reach, low), n, C)
            stage, phase = k_stage, k_phase
        tile = load_item(records, i + 1, items, C)
        k_stage, k_phase = advanced(stage, phase, C.STAGES)
        mbarrier.wait(v_full.index(stage), phase)
        last = warpgroup_mma(weights, v_s.index(stage).reshape(KEYS), acc, is_async=True)
        if C.PREFETCHES:
            there = TURNS * GROUP + ((i + 1) & 1)
            s = first_scores(
                q_s.index(there), q_full.index(there), ((i + 1) >> 1) & 1, k_s, k_full, k_stage, k_phase, zero, C
            )
        row_sum, own_lse = ended(own, row_sums, base, shift, blind, scale, token, member, acc_state, C)
        gl.store(lse_rows, own_lse, mask=has_lse)
        last = warpgroup_mma_wait(1 if C.PREFETCHES else 0, [last])
        mbarrier.arrive(v_empty.index(stage), count=1)
        acc = last * gl.convert_layout(1.0 / row_sum, BY_OUT)[:, None]
        finish(own, acc, q_s.index(at), o_desc, out, acc_state, first_token, C)
        if C.PREFETCHES:
            s = warpgroup_mma_wait(0, [s])
            mbarrier.arrive(k_empty.index(k_stage), count=1)
        else:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(at), count=1)
        stage, phase = k_stage, k_phase
    tma.store_wait(0)


@gluon.jit
def first_scores(queries, q_full, q_phase, k_s, k_full, stage, phase, zero, C: gl.constexpr):
    """Begins the scores of a tile with its first block of keys, as soon as both are there."""
    mbarrier.wait(q_full, q_phase)
    mbarrier.wait(k_full.index(stage), phase)
    q = queries.reshape([ROWS, C.HEAD_DIM])
    k = k_s.index(stage).reshape([C.BLOCK_N, C.HEAD_DIM])
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit(do_not_specialize=["items", "stride_lb", "stride_lh"])
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, out, lse, acc_state, sinks, records,
    items, stride_lb, stride_lh, scale, softcap, C: gl.constexpr,
):  # fmt: skip
    """One step of attention, merged into the running (acc, lse). The grid has at most ``items * SETS`` programs.

    Args:
        q_desc: Boxes of ``(64 // PACK, PACK, HEAD_DIM)`` in ``(T_q, HEADS, HEAD_DIM)``.
        k_desc: Boxes of ``(BLOCK_N, 1, HEAD_DIM)`` in ``(T_k, heads, HEAD_DIM)``.
        v_desc: As k_desc.
        o_desc: As q_desc.
        out: What ``o_desc`` describes, for rows that a whole box would overwrite others with.
        lse: float32 ``(slots, HEADS, S)``, rows contiguous.
        acc_state: float32 and contiguous, of out's shape: running results. None without RUNS_ON.
        sinks: float32 ``(HEADS,)``, or None without SINKS.
        records: int32 rows; see ``hetu/backends/attention/records.py``.
        items: How many of them are items.
        stride_lb: Elements of lse between slots.
        stride_lh: Elements of lse between heads.
        scale: Of the scores; positive.
        softcap: What scores are capped by, with SOFTCAP.
        C: A :class:`hetu.backends.gluon.variants.Constants`.
    """
    Q_BUFFERS: gl.constexpr = C.CONSUMERS * C.Q_BUFFERS
    q_s = gl.allocate_shared_memory(q_desc.dtype, [Q_BUFFERS, ROWS // C.PACK, C.PACK, C.HEAD_DIM], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [C.STAGES, C.BLOCK_N, 1, C.HEAD_DIM], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [C.STAGES, C.BLOCK_N, 1, C.HEAD_DIM], v_desc.layout)
    q_full, q_empty = barriers(Q_BUFFERS, 1), barriers(Q_BUFFERS, 1)
    k_full, k_empty = barriers(C.STAGES, 1), barriers(C.STAGES, C.CONSUMERS)
    v_full, v_empty = barriers(C.STAGES, 1), barriers(C.STAGES, C.CONSUMERS)
    fence_async_shared()
    descs, buffers = (q_desc, k_desc, v_desc, o_desc), (q_s, k_s, v_s)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    numbers = (scale, softcap, stride_lb, stride_lh)
    pointers = (records, lse, out, acc_state, sinks)
    # Registers of the first consumer are what the others leave of the kernel's: as many as theirs, or a few more.
    if C.CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (0, descs, buffers, bars, pointers, items, numbers, C)),
            (consume, (1, descs, buffers, bars, pointers, items, numbers, C)),
            (produce, (descs, buffers, bars, records, items, C)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (0, descs, buffers, bars, pointers, items, numbers, C)),
            (consume, (1, descs, buffers, bars, pointers, items, numbers, C)),
            (consume, (2, descs, buffers, bars, pointers, items, numbers, C)),
            (produce, (descs, buffers, bars, records, items, C)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
