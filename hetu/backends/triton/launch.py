"""From segment tables to kernel launches: the work list, what is kept on the device, the launch."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from hetu.backends.attention import AttentionState, with_positive_scale
from hetu.backends.dropout import Dropout
from hetu.backends.triton.kernels import ITEM_FIELDS, SEGMENT_FIELDS, SPAN_FIELDS, forward_kernel
from hetu.backends.triton.variants import INTERPRETER, Variant, tile
from hetu.parallel.segments import QuerySpans, SegmentTable

Int32Array = NDArray[np.int32]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: QuerySpans,
    table: SegmentTable,
    state: AttentionState,
    *,
    softmax_scale: float,
    first: bool,
    last: bool,
    dropout: Dropout | None = None,
    key_position: np.ndarray | None = None,
) -> None:
    """One step of attention in Triton; see :class:`hetu.backends.attention.Attend`.

    float16, bfloat16 and float32; head_dim 8 to 256, a multiple of 8.
    """
    num_q, head_dim = q.shape[1:]
    variant = Variant(head_dim, q.dtype, first, last, dropout is not None, state.scores is not None)
    shape = tile(variant, capability(q.device))
    items = items_on(spans, table, shape.block_m, first or last, q.device)
    if len(items) == 0:
        return
    q, softmax_scale = with_positive_scale(q, softmax_scale)
    needs_positions = variant.dropout or variant.scores
    scores_strides = (0, 0, 0) if state.scores is None else state.scores.stride()[:3]
    key_low, key_high = dropout.key_words if dropout else (0, 0)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        forward_kernel[(len(items) * num_q,)](
            q,
            k,
            v,
            state.out,
            state.lse,
            None if first and last else state.acc,
            state.scores,
            key_position_on(key_position, table, q.device) if needs_positions else None,
            items,
            spans_on(spans, q.device),
            segments_on(table, q.device),
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *state.out.stride()[:2],
            *state.lse.stride()[:2],
            *scores_strides,
            softmax_scale,
            int32_bits(key_low),
            int32_bits(key_high),
            int32_bits(dropout.threshold if dropout else 0),
            dropout.scale if dropout else 1.0,
            **variant.constants(num_q, k.shape[1], shape),
            **variant.options(shape),
        )


def work_list(spans: QuerySpans, table: SegmentTable, block_m: int, cover: bool) -> Int32Array:
    """Cuts query spans into blocks of rows, and orders them by how many keys they see, most first.

    A GPU starts programs in order as others finish: with the long ones first, what is left at the end is short.

    Args:
        spans: The query rows.
        table: What they see.
        block_m: Rows of a block.
        cover: Whether to list blocks that see nothing too, so that every row is written.

    Returns:
        int32 ``(items, 4)``: span, first row in the span, first segment, segment after the last one.

    Example:
        >>> from hetu.parallel.segments import varlen_tables
        >>> cu_seqlens = np.array([0, 5, 12])
        >>> work_list(*varlen_tables(cu_seqlens, cu_seqlens, 12, is_causal=True), block_m=4, cover=True).tolist()
        [[1, 4, 1, 2], [0, 4, 0, 1], [0, 0, 0, 1], [1, 0, 1, 2]]
    """
    blocks = -(-spans.length // block_m)
    span = np.repeat(np.arange(len(spans)), blocks)
    offset = (np.arange(len(span)) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * block_m
    begin = np.searchsorted(table.query, span, "left")
    end = np.searchsorted(table.query, span, "right")
    # What the last row of a block sees is what the block has to walk. One entry a (block, segment) from here on.
    last_row = np.minimum(offset + block_m, spans.length[span]) - 1
    count = end - begin
    item = np.repeat(np.arange(len(span)), count)
    segment = np.arange(len(item)) + np.repeat(begin - (np.cumsum(count) - count), count)
    keys = np.clip(last_row[item] + table.diagonal[segment] + 1, 0, table.k_len[segment])
    weight = np.bincount(item, keys, minlength=len(span))
    order = np.argsort(-weight, kind="stable")
    if not cover:
        order = order[weight[order] > 0]
    columns = {"span": span, "offset": offset, "segment_begin": begin, "segment_end": end}
    return np.stack([columns[name][order] for name in ITEM_FIELDS], axis=1).astype(np.int32)


def items_on(spans: QuerySpans, table: SegmentTable, block_m: int, cover: bool, device: torch.device) -> torch.Tensor:
    """The work list on a device, made once a table."""
    key = ("triton.items", device, block_m, cover)
    if key not in table.memo:
        table.memo[key] = torch.from_numpy(work_list(spans, table, block_m, cover)).to(device)
    return table.memo[key]


def spans_on(spans: QuerySpans, device: torch.device) -> torch.Tensor:
    """Query spans on a device, copied there once."""
    key = ("triton.spans", device)
    if key not in spans.memo:
        spans.memo[key] = packed([getattr(spans, name) for name in SPAN_FIELDS], device)
    return spans.memo[key]


def segments_on(table: SegmentTable, device: torch.device) -> torch.Tensor:
    """Segments on a device, copied there once."""
    key = ("triton.segments", device)
    if key not in table.memo:
        table.memo[key] = packed([getattr(table, name) for name in SEGMENT_FIELDS], device)
    return table.memo[key]


def key_position_on(positions: np.ndarray | None, table: SegmentTable, device: torch.device) -> torch.Tensor:
    """Positions of a buffer's keys on a device, copied there once."""
    assert positions is not None, "dropout and scores need the keys' positions"
    key = ("triton.key_position", device)
    kept = table.memo.get(key)
    if kept is None or kept[0] is not positions:
        kept = table.memo[key] = (positions, torch.from_numpy(positions.astype(np.int32)).to(device))
    return kept[1]


def packed(fields: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """One int32 row an entry, so that what a program reads of an entry lies together."""
    return torch.from_numpy(np.stack(fields, axis=1).astype(np.int32)).to(device)


def int32_bits(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


@cache
def capability(device: torch.device) -> int:
    """Compute capability of a device, 80 for sm_80."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
