"""From segment tables to the launch of the backward's kernel, and the rows' dot products before it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial

import numpy as np
import torch

from hetu.backends.attention.contract import BackwardState, with_positive_scale
from hetu.backends.attention.dropout import Dropout
from hetu.backends.attention.records import KEYS_ONLY, VALUES_ONLY, WorkList
from hetu.backends.attention.work import key_work, query_work
from hetu.backends.memory import empty
from hetu.backends.triton import autotune
from hetu.backends.triton.backward import backward_kernel
from hetu.backends.triton.launch import (
    Kind,
    Launch,
    capability,
    dropout_arguments,
    key_position_on,
    keys_per_row,
    searched,
)
from hetu.backends.triton.launcher import Constants, Launcher
from hetu.backends.triton.row_dot import row_dot_kernel
from hetu.backends.triton.variants import (
    INTERPRETER,
    Heads,
    block_columns,
    named_strides,
    rounded_keys,
    row_strides,
)
from hetu.backends.triton.variants_backward import BackwardTiles, BackwardVariant, backward_options, backward_tile
from hetu.parallel.mask.segments import QuerySpans, SegmentTable, Turn


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
    turn: Turn | None = None,
    dropout: Dropout | None = None,
    key_position: np.ndarray | None = None,
    keeps: bool = False,
) -> None:
    """Gradients of one step in Triton; see :class:`hetu.backends.attention.contract.AttendBackward`.

    float16, bfloat16 and float32; head_dim 8 to 256, a multiple of 8.
    """
    if softmax_scale <= 0:
        _with_other_scale(
            q, k, v, spans, table, state, dk, dv, softmax_scale, turn=turn, dropout=dropout, key_position=key_position,
            keeps=keeps,
        )  # fmt: skip
        return
    grads = (state.dq.dtype, dk.dtype, dv.dtype)
    call = ("backward", q.device, q.dtype, *q.shape[1:], k.shape[1], dropout is not None, grads)

    def run(launch: Launch[BackwardVariant, BackwardTiles]) -> None:
        _run(launch, q, k, v, table, state, dk, dv, softmax_scale, dropout, key_position)

    memo = table.memo if turn is None else turn.memo
    launch = memo.get(call)
    if launch is None:
        launch = memo[call] = _prepared(run, spans, table, turn, *call[1:])
    if not keeps and named_rows(table) < len(k):  # the other rows get no gradient
        dk.zero_()
        dv.zero_()
    run(launch)


_backward = Launcher(backward_kernel)
_row_dot = Launcher(row_dot_kernel)


def _run(
    launch: Launch[BackwardVariant, BackwardTiles],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: SegmentTable,
    state: BackwardState,
    dk: torch.Tensor,
    dv: torch.Tensor,
    softmax_scale: float,
    dropout: Dropout | None,
    key_position: np.ndarray | None,
) -> None:
    if launch.programs == 0:
        return
    acc = state.acc if launch.variant.runs_on else None
    strided = (q, k, v, state.dout, state.dq, state.dq if acc is None else acc, dk, dv)
    _backward(
        q.device,
        (launch.key, q.shape[0] == 1, k.shape[0] == 1, *[x.stride() for x in strided]),
        launch.programs,
        (
            q,
            k,
            v,
            state.dout,
            state.lse,
            state.delta,
            state.dq,
            acc,
            dk,
            dv,
            key_position_on(key_position, table, q.device) if dropout else None,
            launch.records,
        ),
        (*state.lse.stride()[:2], softmax_scale, *dropout_arguments(dropout)),
        partial(_constants, launch, strided),
    )


def _prepared(
    run: Callable[[Launch[BackwardVariant, BackwardTiles]], None],
    spans: QuerySpans,
    table: SegmentTable,
    turn: Turn | None,
    device: torch.device,
    dtype: torch.dtype,
    num_q: int,
    head_dim: int,
    num_kv: int,
    dropout: bool,
    grads: tuple[torch.dtype, ...],
) -> Launch[BackwardVariant, BackwardTiles]:
    """Chooses the tiles, and puts the work list on the device."""
    runs_on = turn is not None and turn.runs_on
    keys = keys_per_row(spans, table)
    call = (num_q, num_kv, head_dim, dtype, runs_on, dropout, (device, grads))
    kind = _kind(*call, capability(device), rounded_keys(keys))

    def made(kind: Kind[BackwardVariant, BackwardTiles]) -> Launch[BackwardVariant, BackwardTiles]:
        return Launch.of(kind, backward_work(spans, table, kind.shape, kind.heads, turn), device)

    if autotune.is_wanted(device):
        kind = searched(kind, keys, autotune.backward_candidates(kind.shape), made, run, device)
    return made(kind)


@cache
def _kind(
    num_q: int,
    num_kv: int,
    head_dim: int,
    dtype: torch.dtype,
    runs_on: bool,
    dropout: bool,
    others: Hashable,
    capability: int,
    keys: int,
) -> Kind[BackwardVariant, BackwardTiles]:
    variant = BackwardVariant(head_dim, dtype, runs_on, False, dropout)
    heads = Heads(num_q, num_kv)
    tiles = backward_tile(variant, capability, keys)
    return Kind(heads, tiles, (variant.of_work(False), variant.of_work(True)), others)


def _constants(launch: Launch[BackwardVariant, BackwardTiles], tensors: Sequence[torch.Tensor]) -> Constants:
    named = named_strides(("Q", "K", "V", "D", "DQ", "DS", "DK", "DV"), map(row_strides, tensors))
    heads, tiles = launch.kind.heads, launch.kind.shape
    return launch.variant.constants(heads, tiles, named), backward_options(tiles)


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
    turn: Turn | None,
    dropout: Dropout | None,
    key_position: np.ndarray | None,
    keeps: bool,
) -> None:
    """A scale that is not positive moves into q, and its sign back out of q's gradient."""
    moved, positive = with_positive_scale(q, softmax_scale)
    own = BackwardState(state.dout, state.lse, state.delta, torch.empty_like(q, dtype=torch.float32))
    attend_backward(
        moved, k, v, spans, table, own, dk, dv,
        softmax_scale=positive, dropout=dropout, key_position=key_position, keeps=keeps,
    )  # fmt: skip
    own.dq *= -1.0 if softmax_scale < 0 else 0.0
    state.add_queries(own.dq, spans, turn)


def backward_work(
    spans: QuerySpans, table: SegmentTable, tiles: BackwardTiles, heads: Heads, turn: Turn | None
) -> WorkList:
    """The programs of a backward: of each document those for keys, which are longer, then those for queries."""
    keys = key_work(spans, table, tiles.keys.block_n)
    if tiles.is_split and tiles.values.block_n == tiles.keys.block_n:
        keys = keys.with_roles(KEYS_ONLY, VALUES_ONLY)
    elif tiles.is_split:
        values = key_work(spans, table, tiles.values.block_n)
        keys = keys.with_roles(KEYS_ONLY).joined(values.with_roles(VALUES_ONLY))
    return keys.joined(query_work(spans, table, tiles.queries.block_m // heads.pack, turn))


def named_rows(table: SegmentTable) -> int:
    """How many rows of the buffer segments name."""
    if "named_rows" not in table.memo:
        if table.is_plain:  # no two segments share keys
            table.memo["named_rows"] = int(np.add.reduce(table.k_len))
        else:
            begins, ends = table.stretches()
            table.memo["named_rows"] = int((ends - begins).sum())
    rows: int = table.memo["named_rows"]
    return rows


def row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Dot products of the rows of two ``(T, H, D)`` tensors: float32 ``(T, H)``. The last dims are contiguous."""
    rows, heads, head_dim = a.shape
    result = empty((rows, heads), torch.float32, a.device)
    if result.numel() == 0:
        return result
    block_d = block_columns(head_dim)
    block_r = 8192 // block_d if capability(a.device) != INTERPRETER else 1024
    strides = (row_strides(a), row_strides(b))

    def constants() -> Constants:
        sizes = {"HEADS": heads, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_R": block_r}
        return named_strides("AB", strides) | sizes, {}

    programs = -(-rows * heads // block_r)
    key = (a.device, a.dtype, b.dtype, heads, head_dim, strides)
    _row_dot(a.device, key, programs, (a, b, result), (rows * heads,), constants)
    return result
