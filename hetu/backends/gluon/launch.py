"""From segment tables to launches of the Gluon kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch

from hetu.backends.attention.contract import AttentionState
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.records import BLOCKS, WorkList
from hetu.backends.attention.work import query_work
from hetu.backends.gluon import variants
from hetu.backends.gluon.descriptors import Box, is_describable
from hetu.backends.gluon.forward import forward_kernel
from hetu.backends.gluon.variants import Tile, boxes, constants
from hetu.backends.memory import device_copies
from hetu.backends.triton import launch as portable
from hetu.backends.triton.launch import DeviceWork, LaunchKind, keys_per_row
from hetu.backends.triton.launcher import Constants, Launcher
from hetu.backends.triton.variants import PackedHeads, Variant, rounded_keys, row_strides

_forward = Launcher(forward_kernel, "items")


def attend(call: AttendCall, state: AttentionState) -> None:
    """One step of attention in Gluon; see :meth:`hetu.backends.attention.family.KernelFamily.attend`.

    Tensors that TMA doesn't take, such as views that begin at odd addresses, go to the portable kernels.
    """
    if not all(map(is_describable, (call.q, call.k, call.v, state.out))):
        portable.attend(call, state)
        return
    q, turn = call.q, call.turn
    key = ("gluon", q.device, q.dtype, *q.shape[1:], call.k.shape[1], call.softcap > 0, call.sinks is not None)
    if call.softmax_scale <= 0:
        call = call.with_positive_scale()
    owner = call.table if turn is None else turn
    work = owner.copies.get(key)
    if work is None:
        work = _prepared(call, *key[1:])
        device_copies.keep(owner, key, work, work.records.nbytes)
    _run(work, call, state)


def _run(work: DeviceWork[Variant, Tile], call: AttendCall, state: AttentionState) -> None:
    if work.programs == 0:
        return
    q, out, heads = call.q, state.out, work.kind.heads
    of = _constants_of(work.kind, work.variant, row_strides(out))
    queries, keys = boxes(of)
    over_slots, over_heads, _ = state.lse.stride()
    _forward(
        q.device,
        (work.key, of.OUT_STRIDE_T, of.OUT_STRIDE_H),
        min(work.programs, multiprocessors(q.device)),
        _forward.arguments(
            q_desc=Box(q, queries, variants.layout(tuple(queries))),
            k_desc=Box(call.k, keys, variants.layout(tuple(keys))),
            v_desc=Box(call.v, keys, variants.layout(tuple(keys))),
            o_desc=Box(out, queries, variants.layout(tuple(queries))),
            out=out,
            lse=state.lse,
            acc_state=state.acc if work.variant.runs_on else None,
            sinks=call.sinks,
            records=work.records,
            items=work.programs // of.SETS,
            stride_lb=over_slots,
            stride_lh=over_heads,
            scale=call.softmax_scale,
            softcap=call.softcap,
        ),
        _arguments,
        of,
    )


def _arguments(of: variants.Constants) -> Constants:
    return {"C": of}, variants.OPTIONS


@cache
def _constants_of(
    kind: LaunchKind[Variant, Tile], variant: Variant, out_strides: tuple[int, int]
) -> variants.Constants:
    return constants(variant, kind.heads, kind.shape, out_strides)


def _prepared(
    call: AttendCall, device: torch.device, dtype: torch.dtype, num_q: int, head_dim: int, num_kv: int, *extras: bool
) -> DeviceWork[Variant, Tile]:
    """Chooses the tile, and puts the work list on the device; ``extras``: a softcap and sinks."""
    spans, table, turn = call.spans, call.table, call.turn
    flags = (turn is not None and turn.runs_on, table.lower is not None, *extras)
    kind = _kind(num_q, num_kv, head_dim, dtype, flags, device, rounded_keys(keys_per_row(spans, table)))
    work = query_work(spans, table, kind.shape.block_m // kind.heads.pack, turn)
    count_blocks(work, kind.shape.block_n)
    return DeviceWork.of(kind, work, device)


@cache
def _kind(
    num_q: int, num_kv: int, head_dim: int, dtype: torch.dtype, flags: tuple[bool, ...], device: torch.device, keys: int
) -> LaunchKind[Variant, Tile]:
    runs_on, lower, softcap, sinks = flags
    variant = Variant(head_dim, dtype, runs_on, lower=lower, softcap=softcap, sinks=sinks)
    shape = variants.tile(variant, keys)
    return LaunchKind(PackedHeads(num_q, num_kv), shape, (variant, replace(variant, more=True)), ("gluon", device))


def count_blocks(work: WorkList, block_n: int) -> None:
    """Writes into each item how many blocks of keys its rows see, in all its segments; at least one."""
    items, further = work.items, work.further

    def blocks(records: np.ndarray, rows: np.ndarray) -> np.ndarray:
        k_len, reach = records[:, 9], records[:, 10]
        return np.maximum(-(-np.minimum(k_len, reach + rows) // block_n), 1)

    count = blocks(items, items[:, 1])
    if work.has_more:
        own = np.arange(len(items)).repeat(items[:, 14] - items[:, 13])
        count += np.bincount(own, blocks(further, items[own, 1]), minlength=len(items)).astype(np.int32)
    items[:, BLOCKS] = count


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
