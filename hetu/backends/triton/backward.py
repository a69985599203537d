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

from hetu.backends.triton.backward_keys import key_gradients
from hetu.backends.triton.backward_queries import query_gradients
from hetu.backends.triton.interpreter import jit
from hetu.backends.triton.tiles import KEYS, KEYS_ONLY, QUERIES, RECORD_WIDTH, VALUES_ONLY, item_and_set


@jit(do_not_specialize=["stride_lb", "stride_lh", "key_low", "key_high", "threshold", "head_start"])
def backward_kernel(
    q, k, v, dout, lse, delta, dq, dq_state, dk, dv, key_position, records,
    stride_lb, stride_lh, scale, key_low, key_high, threshold, keep_scale, head_start,
    STRIDE_QT: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_DH: tl.constexpr,
    STRIDE_DQT: tl.constexpr, STRIDE_DQH: tl.constexpr, STRIDE_DST: tl.constexpr, STRIDE_DSH: tl.constexpr,
    STRIDE_DKT: tl.constexpr, STRIDE_DKH: tl.constexpr, STRIDE_DVT: tl.constexpr, STRIDE_DVH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PACK: tl.constexpr, CHUNK: tl.constexpr, THREADS: tl.constexpr,
    KEY_M: tl.constexpr, KEY_N: tl.constexpr, KEY_STAGES: tl.constexpr,
    VALUE_M: tl.constexpr, VALUE_N: tl.constexpr, VALUE_STAGES: tl.constexpr,
    QUERY_M: tl.constexpr, QUERY_N: tl.constexpr, QUERY_STAGES: tl.constexpr,
    SPLIT: tl.constexpr, MASKS_ALL: tl.constexpr,
    RUNS_ON: tl.constexpr, MORE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
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
        scale, key_low, key_high, threshold, keep_scale, head_start: As of the forward.
        CHUNK: As of the forward.
        THREADS: Of a program, and at least twice the query rows of an iteration of programs for keys.
        MASKS_ALL: As of the forward.
        SPLIT: Whether keys and values are roles of their own, of which each holds half the accumulators and computes
            the scores anew: what wide heads need. VALUE_M, VALUE_N and VALUE_STAGES are of values' programs then.
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
            STRIDE_QT=STRIDE_QT, STRIDE_QH=STRIDE_QH, STRIDE_KT=STRIDE_KT, STRIDE_KH=STRIDE_KH, STRIDE_VT=STRIDE_VT,
            STRIDE_VH=STRIDE_VH, STRIDE_DT=STRIDE_DT, STRIDE_DH=STRIDE_DH, STRIDE_DQT=STRIDE_DQT, STRIDE_DQH=STRIDE_DQH,
            STRIDE_DST=STRIDE_DST, STRIDE_DSH=STRIDE_DSH, HEADS=HEADS, GROUP=GROUP, PACK=PACK, HEAD_DIM=HEAD_DIM,
            BLOCK_M=QUERY_M, BLOCK_N=QUERY_N, BLOCK_D=BLOCK_D, STAGES=QUERY_STAGES, MASKS_ALL=MASKS_ALL,
            RUNS_ON=RUNS_ON, MORE=MORE, DROPOUT=DROPOUT, PRECISION=PRECISION,
        )  # fmt: skip
    elif set < HEADS // GROUP:
        if role == VALUES_ONLY:
            if SPLIT:
                key_gradients(
                    q=q, k=k, v=v, dout=dout, lse=lse, delta=delta, dk=dk, dv=dv, key_position=key_position,
                    records=records, record=record, kv_head=set, stride_lb=stride_lb, stride_lh=stride_lh, scale=scale,
                    key_low=key_low, key_high=key_high, threshold=threshold, keep_scale=keep_scale,
                    head_start=head_start, STRIDE_QT=STRIDE_QT, STRIDE_QH=STRIDE_QH, STRIDE_KT=STRIDE_KT,
                    STRIDE_KH=STRIDE_KH, STRIDE_VT=STRIDE_VT, STRIDE_VH=STRIDE_VH, STRIDE_DT=STRIDE_DT,
                    STRIDE_DH=STRIDE_DH, STRIDE_DKT=STRIDE_DKT, STRIDE_DKH=STRIDE_DKH, STRIDE_DVT=STRIDE_DVT,
                    STRIDE_DVH=STRIDE_DVH, HEADS=HEADS, GROUP=GROUP, PACK=PACK, HEAD_DIM=HEAD_DIM, BLOCK_M=VALUE_M,
                    BLOCK_N=VALUE_N, BLOCK_D=BLOCK_D, STAGES=VALUE_STAGES, PLANES=THREADS // VALUE_M, ROLE=VALUES_ONLY,
                    MASKS_ALL=MASKS_ALL, MORE=MORE, DROPOUT=DROPOUT, PRECISION=PRECISION,
                )  # fmt: skip
        else:
            key_gradients(
                q=q, k=k, v=v, dout=dout, lse=lse, delta=delta, dk=dk, dv=dv, key_position=key_position,
                records=records, record=record, kv_head=set, stride_lb=stride_lb, stride_lh=stride_lh, scale=scale,
                key_low=key_low, key_high=key_high, threshold=threshold, keep_scale=keep_scale, head_start=head_start,
                STRIDE_QT=STRIDE_QT, STRIDE_QH=STRIDE_QH, STRIDE_KT=STRIDE_KT, STRIDE_KH=STRIDE_KH, STRIDE_VT=STRIDE_VT,
                STRIDE_VH=STRIDE_VH, STRIDE_DT=STRIDE_DT, STRIDE_DH=STRIDE_DH, STRIDE_DKT=STRIDE_DKT,
                STRIDE_DKH=STRIDE_DKH, STRIDE_DVT=STRIDE_DVT, STRIDE_DVH=STRIDE_DVH, HEADS=HEADS, GROUP=GROUP,
                PACK=PACK, HEAD_DIM=HEAD_DIM, BLOCK_M=KEY_M, BLOCK_N=KEY_N, BLOCK_D=BLOCK_D, STAGES=KEY_STAGES,
                PLANES=THREADS // KEY_M, ROLE=KEY_ROLE, MASKS_ALL=MASKS_ALL, MORE=MORE, DROPOUT=DROPOUT,
                PRECISION=PRECISION,
            )  # fmt: skip
