"""From segment tables to launches of the backward's kernels."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch

from hetu.backends.attention import BackwardState, with_positive_scale
from hetu.backends.dropout import Dropout
from hetu.backends.triton.backward import KEY_ITEM_FIELDS, VISIT_FIELDS, key_gradient_kernel, query_gradient_kernel
from hetu.backends.triton.launch import (
    Int32Array,
    capability,
    int32_bits,
    items_on,
    key_position_on,
    packed,
    segments_on,
    spans_on,
)
from hetu.backends.triton.variants_backward import BackwardVariant, backward_tile
from hetu.parallel.segments import IntArray, QuerySpans, SegmentTable


def attend_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: QuerySpans,
    table: SegmentTable,
    state: BackwardState,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    softmax_scale: float,
    first: bool,
    dropout: Dropout | None = None,
    key_position: np.ndarray | None = None,
) -> None:
    """Gradients of one step in Triton; see :class:`hetu.backends.attention.AttendBackward`.

    float16, bfloat16 and float32; head_dim 8 to 256, a multiple of 8.
    """
    num_q, head_dim = q.shape[1:]
    num_kv, device = k.shape[1], q.device
    if softmax_scale <= 0:
        _with_other_scale(
            q, k, v, spans, table, state, dk, dv, softmax_scale, first=first, dropout=dropout, key_position=key_position
        )
        return
    variant = BackwardVariant(head_dim, q.dtype, first, dropout is not None)
    tiles = backward_tile(variant, capability(device))
    key_low, key_high = dropout.key_words if dropout else (0, 0)
    positions = key_position_on(key_position, table, device) if dropout else None
    threshold, keep_scale = (dropout.threshold, dropout.scale) if dropout else (0, 1.0)
    shared = (softmax_scale, int32_bits(key_low), int32_bits(key_high), int32_bits(threshold), keep_scale)
    operands = (q, k, v, state.dout, state.lse, state.delta)
    strides = [stride for x in (q, k, v, state.dout) for stride in x.stride()[:2]]
    key_items, visits, named = key_work(table, spans, tiles.keys.block_n, device)
    if named < len(k):  # the other rows get no gradient
        dk.zero_()
        dv.zero_()
    items = items_on(spans, table, tiles.queries.block_m, first, device)
    with torch.cuda.device(device) if q.is_cuda else nullcontext():
        if len(key_items):
            key_gradient_kernel[(len(key_items) * num_kv,)](
                *operands, dk, dv, positions, key_items, visits, spans_on(spans, device),
                *strides, *dk.stride()[:2], *dv.stride()[:2], *state.lse.stride()[:2], *shared,
                **variant.key_constants(num_q, num_kv, tiles.keys), **variant.options(tiles.keys),
            )  # fmt: skip
        if len(items):
            query_gradient_kernel[(len(items) * num_q,)](
                *operands, state.dq, positions, items, spans_on(spans, device), segments_on(table, device),
                *strides, *state.dq.stride()[:2], *state.lse.stride()[:2], *shared,
                **variant.query_constants(num_q, num_kv, tiles.queries), **variant.options(tiles.queries),
            )  # fmt: skip


def _with_other_scale(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: QuerySpans,
    table: SegmentTable,
    state: BackwardState,
    dk: torch.Tensor,
    dv: torch.Tensor,
    softmax_scale: float,
    *,
    first: bool,
    dropout: Dropout | None,
    key_position: np.ndarray | None,
) -> None:
    """A scale that is not positive moves into q, and its sign back out of q's gradient."""
    moved, positive = with_positive_scale(q, softmax_scale)
    own = BackwardState(state.dout, state.lse, state.delta, torch.empty_like(q, dtype=torch.float32))
    attend_backward(
        moved, k, v, spans, table, own, dk, dv,
        softmax_scale=positive, first=True, dropout=dropout, key_position=key_position,
    )  # fmt: skip
    own.dq *= -1.0 if softmax_scale < 0 else 0.0
    state.dq.copy_(own.dq if first else state.dq + own.dq)


def key_work(
    table: SegmentTable, spans: QuerySpans, block_n: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The key-major work list on the device, what its items visit, and how many rows of the buffer segments name."""
    key = ("triton.key_work", device, block_n)
    if key not in table.memo:
        items, visited = key_work_list(spans, table, block_n)
        fields = {name: getattr(table, name)[visited] for name in VISIT_FIELDS}
        visits = packed([fields[name] for name in VISIT_FIELDS], device)
        table.memo[key] = torch.from_numpy(items).to(device), visits, int(items[:, 1].sum())
    return table.memo[key]


def key_work_list(spans: QuerySpans, table: SegmentTable, block_n: int) -> tuple[Int32Array, IntArray]:
    """Cuts the keys that segments name into blocks, and orders them by how many query rows see them, most first.

    Args:
        spans: The query rows.
        table: What they see.
        block_n: Keys of a block.

    Returns:
        int32 ``(items, 4)``: first key row, rows, first visit, visit after the last one; and for each visit the
        number of the segment that is visited. The blocks are disjoint.

    Example:
        >>> from hetu.parallel.segments import varlen_tables
        >>> cu_seqlens = np.array([0, 5, 12])
        >>> tables = varlen_tables(cu_seqlens, cu_seqlens, 12, is_causal=True)
        >>> [part.tolist() for part in key_work_list(*tables, block_n=4)]
        [[[5, 4, 2, 3], [0, 4, 0, 1], [9, 3, 3, 4], [4, 1, 1, 2]], [0, 0, 1, 1]]
    """
    if len(table) == 0:
        return np.empty((0, len(KEY_ITEM_FIELDS)), np.int32), np.empty(0, np.int64)
    # Regions: unions of segments whose keys overlap, so that blocks begin where documents do.
    order = np.argsort(table.k_start, kind="stable")
    starts, ends = table.k_start[order], np.maximum.accumulate((table.k_start + table.k_len)[order])
    opens = np.concatenate([[True], starts[1:] >= ends[:-1]])
    region_of = np.empty(len(table), np.int64)
    region_of[order] = opens.cumsum() - 1
    begin = starts[opens]
    end = ends[np.concatenate([np.flatnonzero(opens)[1:] - 1, [len(ends) - 1]])]
    blocks = -(-(end - begin) // block_n)
    first_block = blocks.cumsum() - blocks
    region = np.repeat(np.arange(len(begin)), blocks)
    k_row = begin[region] + (np.arange(len(region)) - first_block[region]) * block_n
    rows = np.minimum(end[region] - k_row, block_n)

    # One visit a (block, segment) that intersect, ordered by block.
    low = (table.k_start - begin[region_of]) // block_n
    high = (table.k_start + table.k_len - 1 - begin[region_of]) // block_n
    count = high - low + 1
    segment = np.repeat(np.arange(len(table)), count)
    block = first_block[region_of][segment] + low[segment]
    block += np.arange(len(segment)) - np.repeat(count.cumsum() - count, count)
    by_block = np.argsort(block, kind="stable")
    segment, block = segment[by_block], block[by_block]
    bounds = np.searchsorted(block, np.arange(len(k_row) + 1))
    hidden = np.maximum(k_row[block] - table.k_start[segment], 0) - table.diagonal[segment]
    seeing = spans.length[table.query[segment]] - np.maximum(hidden, 0)
    weight = np.bincount(block, np.maximum(seeing, 0), minlength=len(k_row))
    heaviest = np.argsort(-weight, kind="stable")
    columns = {"k_row": k_row, "rows": rows, "visit_begin": bounds[:-1], "visit_end": bounds[1:]}
    items = np.stack([columns[name][heaviest] for name in KEY_ITEM_FIELDS], axis=1).astype(np.int32)
    return items, segment
