"""From segment tables to the launch of the backward's kernel, and the rows' dot products before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from hetu.backends.attention import BackwardState, with_positive_scale
from hetu.backends.dropout import Dropout
from hetu.backends.triton.backward import backward_kernel, row_dot_kernel
from hetu.backends.triton.launch import (
    capability,
    dropout_arguments,
    key_position_on,
    keys_per_row,
    on_device,
    work_on,
)
from hetu.backends.triton.variants import INTERPRETER, Heads, block_columns, row_strides
from hetu.backends.triton.variants_backward import BackwardTiles, BackwardVariant, backward_options, backward_tile
from hetu.backends.triton.work import KEYS_ONLY, VALUES_ONLY, WorkList, key_work, query_work
from hetu.parallel.segments import QuerySpans, SegmentTable


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
    if softmax_scale <= 0:
        _with_other_scale(
            q, k, v, spans, table, state, dk, dv, softmax_scale, first=first, dropout=dropout, key_position=key_position
        )
        return
    heads, device = Heads(q.shape[1], k.shape[1]), q.device
    variant = BackwardVariant(q.shape[2], q.dtype, first, False, dropout is not None)
    tiles = backward_tile(variant, capability(device), keys_per_row(spans, table))
    if named_rows(table) < len(k):  # the other rows get no gradient
        dk.zero_()
        dv.zero_()
    name = ("backward", tiles, heads.pack, first)
    work = work_on(table, name, lambda: backward_work(spans, table, tiles, heads, first), device)
    if work.items == 0:
        return
    variant = replace(variant, more=work.has_more)
    strides = row_strides(Q=q, K=k, V=v, D=state.dout, DQ=state.dq, DK=dk, DV=dv)
    with on_device(device):
        backward_kernel[(work.items * heads.num_q // heads.pack,)](
            q,
            k,
            v,
            state.dout,
            state.lse,
            state.delta,
            state.dq,
            dk,
            dv,
            key_position_on(key_position, table, device) if dropout else None,
            work.records,
            *state.lse.stride()[:2],
            softmax_scale,
            *dropout_arguments(dropout),
            **variant.constants(heads, tiles, strides),
            **backward_options(tiles),
        )


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


def backward_work(spans: QuerySpans, table: SegmentTable, tiles: BackwardTiles, heads: Heads, first: bool) -> WorkList:
    """The programs of a backward: of each document those for keys, which are longer, then those for queries."""
    keys = key_work(spans, table, tiles.keys.block_n)
    if tiles.is_split:
        keys = keys.with_roles(KEYS_ONLY, VALUES_ONLY)
    return keys.joined(query_work(spans, table, tiles.queries.block_m // heads.pack, cover=first))


def named_rows(table: SegmentTable) -> int:
    """How many rows of the buffer segments name."""
    if "named_rows" not in table.memo:
        order = np.argsort(table.k_start, kind="stable")
        starts, ends = table.k_start[order], np.maximum.accumulate((table.k_start + table.k_len)[order])
        before = np.concatenate([[0], ends[:-1]])
        table.memo["named_rows"] = int(np.maximum(ends - np.maximum(starts, before), 0).sum()) if len(table) else 0
    rows: int = table.memo["named_rows"]
    return rows


def row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Dot products of the rows of two ``(T, H, D)`` tensors: float32 ``(T, H)``. The last dims are contiguous."""
    rows, heads, head_dim = a.shape
    result = torch.empty(rows, heads, dtype=torch.float32, device=a.device)
    block_d = block_columns(head_dim)
    block_r = 8192 // block_d if capability(a.device) != INTERPRETER else 1024
    if result.numel() == 0:
        return result
    with on_device(a.device):
        row_dot_kernel[(-(-rows * heads // block_r),)](
            a, b, result, rows * heads,
            **row_strides(A=a, B=b), HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_R=block_r,
        )  # fmt: skip
    return result
