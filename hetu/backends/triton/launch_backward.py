"""From segment tables to the launch of the backward's kernel, and the rows' dot products before it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from hetu.backends.attention.contract import BackwardState
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.records import KEYS_ONLY, VALUES_ONLY, WorkList
from hetu.backends.attention.work import key_work, query_work
from hetu.backends.memory import device_copies
from hetu.backends.triton import autotune, running_max
from hetu.backends.triton.backward import backward_kernel
from hetu.backends.triton.launch import (
    NO_DROPOUT,
    Bound,
    DeviceWork,
    DropoutNumbers,
    LaunchKind,
    bind,
    capability,
    keep_bound,
    key_position_on,
    keys_per_row,
    searched,
)
from hetu.backends.triton.launcher import Arguments, Constants, Launcher
from hetu.backends.triton.variants import (
    PackedHeads,
    named_strides,
    rounded_keys,
    row_strides,
)
from hetu.backends.triton.variants_backward import BackwardTiles, BackwardVariant, backward_options, backward_tile
from hetu.parallel.mask.segments import QuerySpans, SegmentTable, Turn

BackwardKind = LaunchKind[BackwardVariant, BackwardTiles]
BackwardWork = DeviceWork[BackwardVariant, BackwardTiles]


def attend_backward(
    call: AttendCall, state: BackwardState, dk: torch.Tensor, dv: torch.Tensor, keeps: bool = False
) -> None:
    """Gradients of one step in Triton; see :meth:`hetu.backends.attention.family.KernelFamily.attend_backward`.

    float16, bfloat16 and float32; head_dim 8 to 256, a multiple of 8.
    """
    if call.softmax_scale <= 0:
        _with_other_scale(call, state, dk, dv, keeps)
        return
    if not keeps and named_rows(call.table) < len(call.k):  # the other rows get no gradient
        dk.zero_()
        dv.zero_()
    owner = call.table if call.turn is None else call.turn
    like = ("triton", *backward_key(call, state, dk, dv))
    bound: Bound[BackwardWork] | None = owner.copies.get(like)
    if bound is not None and bound(_arguments(bound.work, call, state, dk, dv)):
        return
    q, k = call.q, call.k
    grads = (state.dq.dtype, dk.dtype, dv.dtype)
    key = ("backward", q.device, q.dtype, *q.shape[1:], k.shape[1], grads, call.dropout is not None, call.softcap > 0)
    work = owner.copies.get(key)
    if work is None:
        work = _prepared(call, state, dk, dv, *key[1:])
        device_copies.keep(owner, key, work, work.records.nbytes)
    keep_bound(owner, like, bind(work, _backward, _run(work, call, state, dk, dv), q.device, work.programs))


def backward_key(call: AttendCall, state: BackwardState, dk: torch.Tensor, dv: torch.Tensor) -> tuple[Hashable, ...]:
    """As :func:`hetu.backends.triton.launch.forward_key`, of a positive scale."""
    q, k, dq, acc = call.q, call.k, state.dq, state.acc
    return (
        *("backward", q.device, q.dtype, q.shape, k.shape, q.stride(), k.stride(), call.v.stride()),
        *(state.dout.stride(), dq.stride(), None if acc is None else acc.stride(), dk.stride(), dv.stride()),
        *(dq.dtype, dk.dtype, dv.dtype, call.dropout is None, call.softcap > 0),
    )


_backward = Launcher(backward_kernel, "stride_lb", running_max.check)


def _run(work: BackwardWork, call: AttendCall, state: BackwardState, dk: torch.Tensor, dv: torch.Tensor) -> Hashable:
    """Launches a step, unless it has nothing to do; gives the launch's key."""
    if work.programs == 0:
        return None
    q, k, v, dq = call.q, call.k, call.v, state.dq
    acc = state.acc if work.variant.runs_on else None
    strided = (q, k, v, state.dout, dq, dq if acc is None else acc, dk, dv)
    key = (work.key, q.shape[0] > 1, k.shape[0] > 1, *[x.stride() for x in strided])
    _backward(q.device, key, work.programs, _arguments(work, call, state, dk, dv), _constants, work, strided)
    return key


def _arguments(
    work: BackwardWork, call: AttendCall, state: BackwardState, dk: torch.Tensor, dv: torch.Tensor
) -> Arguments:
    over_slots, over_heads, _ = state.lse.stride()
    drop = NO_DROPOUT if call.dropout is None else DropoutNumbers.of(call.dropout)
    return _backward.arguments(
        q=call.q,
        k=call.k,
        v=call.v,
        dout=state.dout,
        lse=state.lse,
        delta=state.delta,
        dq=state.dq,
        dq_state=state.acc if work.variant.runs_on else None,
        dk=dk,
        dv=dv,
        key_position=key_position_on(call, call.q.device) if call.dropout else None,
        records=work.records,
        stride_lb=over_slots,
        stride_lh=over_heads,
        scale=call.softmax_scale,
        key_low=drop.key_low,
        key_high=drop.key_high,
        threshold=drop.threshold,
        keep_scale=drop.keep_scale,
        head_start=drop.head_start,
        softcap=call.softcap,
    )


def _prepared(
    call: AttendCall,
    state: BackwardState,
    dk: torch.Tensor,
    dv: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    num_q: int,
    head_dim: int,
    num_kv: int,
    grads: tuple[torch.dtype, ...],
    *extras: bool,
) -> BackwardWork:
    """Chooses the tiles, and puts the work list on the device; ``extras``: dropout and a softcap."""
    spans, table, turn = call.spans, call.table, call.turn
    runs_on = turn is not None and turn.runs_on
    keys = keys_per_row(spans, table)
    others = (device, grads)
    flags = (runs_on, table.lower is not None, *extras)
    kind = _kind(num_q, num_kv, head_dim, dtype, flags, others, capability(device), rounded_keys(keys))

    def made(kind: BackwardKind) -> BackwardWork:
        return DeviceWork.of(kind, backward_work(spans, table, kind.shape, kind.heads, turn), device)

    if autotune.is_wanted(device):
        candidates = autotune.backward_candidates(kind.shape)
        kind = searched(kind, keys, candidates, made, lambda work: _run(work, call, state, dk, dv), device)
    return made(kind)


@cache
def _kind(
    num_q: int,
    num_kv: int,
    head_dim: int,
    dtype: torch.dtype,
    flags: tuple[bool, ...],
    others: Hashable,
    capability: int,
    keys: int,
) -> BackwardKind:
    runs_on, lower, dropout, softcap = flags
    variant = BackwardVariant(head_dim, dtype, runs_on, False, dropout, lower, softcap)
    heads = PackedHeads(num_q, num_kv)
    tiles = backward_tile(variant, capability, keys)
    return LaunchKind(heads, tiles, (variant.of_work(False), variant.of_work(True)), others)


def _constants(work: BackwardWork, tensors: Sequence[torch.Tensor]) -> Constants:
    named = named_strides(("Q", "K", "V", "D", "DQ", "DS", "DK", "DV"), map(row_strides, tensors))
    heads, tiles = work.kind.heads, work.kind.shape
    return work.variant.constants(heads, tiles, named), backward_options(tiles)


def _with_other_scale(call: AttendCall, state: BackwardState, dk: torch.Tensor, dv: torch.Tensor, keeps: bool) -> None:
    """A scale that is not positive moves into q, and its sign back out of q's gradient."""
    own = BackwardState(state.dout, state.lse, state.delta, torch.empty_like(call.q, dtype=torch.float32))
    attend_backward(replace(call.with_positive_scale(), turn=None), own, dk, dv, keeps)
    own.dq *= -1.0 if call.softmax_scale < 0 else 0.0
    state.add_queries(own.dq, call.spans, call.turn)


def backward_work(
    spans: QuerySpans, table: SegmentTable, tiles: BackwardTiles, heads: PackedHeads, turn: Turn | None
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
    if table.named_rows is None:
        if table.is_plain:  # no two segments share keys
            table.named_rows = int(np.add.reduce(table.k_len))
        else:
            begins, ends = table.stretches()
            table.named_rows = int((ends - begins).sum())
    return table.named_rows
