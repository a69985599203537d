"""From segment tables to launches of the backward's kernels for Hopper."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch

from hetu.backends.attention.contract import BackwardState
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.records import KEY_FIELDS, Int32Array, WorkList
from hetu.backends.attention.work import key_work, query_work
from hetu.backends.gluon import variants_backward
from hetu.backends.gluon.backward_keys import key_kernel
from hetu.backends.gluon.backward_queries import query_kernel
from hetu.backends.gluon.descriptors import Box, is_describable
from hetu.backends.gluon.launch import arranged, heaviest_first, item_weights, multiprocessors
from hetu.backends.gluon.variants import ROWS, layout, options
from hetu.backends.gluon.variants_backward import (
    BLOCK_KEYS,
    CONSUMERS,
    BackwardTile,
    KeyConstants,
    QueryConstants,
    key_constants,
    query_constants,
)
from hetu.backends.memory import copied_to, device_copies
from hetu.backends.triton import launch_backward as portable
from hetu.backends.triton.launch import keys_per_row
from hetu.backends.triton.launch_backward import named_rows
from hetu.backends.triton.launcher import Constants, Launcher
from hetu.backends.triton.variants import PackedHeads, row_strides
from hetu.backends.triton.variants_backward import BackwardVariant

_LENGTH, _FIRST, _DIAGONAL = (KEY_FIELDS.index(name) for name in ("length", "first", "diagonal"))

_keys = Launcher(key_kernel, "items")
_queries = Launcher(query_kernel, "items")


@dataclass(slots=True)
class _Part:
    """The work of one of the kernels on a device.

    Attributes:
        records: int32; see ``hetu/backends/attention/records.py``.
        items: How many of them are items.
        has_more: Whether an item has several segments.
    """

    records: torch.Tensor
    items: int
    has_more: bool

    @classmethod
    def of(cls, work: WorkList, device: torch.device) -> _Part:
        """Copies a work list to a device."""
        return cls(copied_to(work.records(), device), len(work.items), work.has_more)


def attend_backward(
    call: AttendCall, state: BackwardState, dk: torch.Tensor, dv: torch.Tensor, keeps: bool = False
) -> None:
    """Gradients of one step in Gluon; see :meth:`hetu.backends.attention.family.KernelFamily.attend_backward`.

    The portable kernels take short documents, a scale that isn't positive, and a tensor that is none for TMA.
    """
    q, turn = call.q, call.turn
    is_taken = call.softmax_scale > 0 and keys_per_row(call.spans, call.table) >= variants_backward.LONG
    if not is_taken or not all(map(is_describable, (q, call.k, call.v, state.dout))):
        portable.attend_backward(call, state, dk, dv, keeps)
        return
    runs_on, lower = turn is not None and turn.runs_on, call.table.lower is not None
    variant = BackwardVariant(q.shape[2], q.dtype, runs_on, lower=lower, softcap=call.softcap > 0)
    heads, tile = PackedHeads(q.shape[1], call.k.shape[1]), variants_backward.tile(variant)
    owner = call.table if turn is None else turn
    key = ("gluon backward", q.device, heads, tile)
    parts = owner.copies.get(key)
    if parts is None:
        parts = _prepared(call, heads, tile)
        device_copies.keep(owner, key, parts, sum(part.records.nbytes for part in parts))
    if not keeps and named_rows(call.table) < len(call.k):  # the other rows get no gradient
        dk.zero_()
        dv.zero_()
    of_keys, of_queries = parts
    kept = (variant, heads, tile)
    keys = key_constants(*kept, of_keys.has_more, row_strides(dk), row_strides(dv))
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _run(_keys, of_keys, keys, call, state, dk=dk, dv=dv, counter=counter)
    acc = state.acc if runs_on else None
    strides = row_strides(state.dq), row_strides(state.dq if acc is None else acc)
    queries = query_constants(*kept, of_queries.has_more, *strides)
    _run(_queries, of_queries, queries, call, state, dq=state.dq, dq_state=acc)


def _prepared(call: AttendCall, heads: PackedHeads, tile: BackwardTile) -> tuple[_Part, _Part]:
    """Puts the work lists on the device."""
    spans, table, device = call.spans, call.table, call.q.device
    rows = query_work(spans, table, CONSUMERS * ROWS // heads.pack, call.turn)
    keys = key_work(spans, table, BLOCK_KEYS)
    keys = heaviest_first(keys, item_weights(keys, _rows) // BLOCK_KEYS)  # so that items that share rows stay together
    return _Part.of(keys, device), _Part.of(arranged(rows, tile.block_n), device)


def _rows(records: Int32Array, _items: Int32Array) -> Int32Array:
    """Query rows of a record's segment from the first one on that may see its keys: what a block of keys weighs."""
    first = np.maximum(np.maximum(records[:, _FIRST], 0) - records[:, _DIAGONAL], 0)
    return np.maximum(records[:, _LENGTH] - first, 0)


def _run(
    launcher: Launcher,
    part: _Part,
    of: KeyConstants | QueryConstants,
    call: AttendCall,
    state: BackwardState,
    **grads: torch.Tensor | None,
) -> None:
    if part.items == 0:
        return
    q, k = call.q, call.k
    queries, keys = of.boxes()
    over_slots, over_heads, _ = state.lse.stride()
    key: Hashable = (q.device, q.dtype, of, *(None if x is None else x.dtype for x in grads.values()))
    launcher(
        q.device,
        key,
        min(part.items * of.SETS, multiprocessors(q.device)),
        launcher.arguments(
            q_desc=Box(q, queries, layout(tuple(queries))),
            k_desc=Box(k, keys, layout(tuple(keys))),
            v_desc=Box(call.v, keys, layout(tuple(keys))),
            dout_desc=Box(state.dout, queries, layout(tuple(queries))),
            lse=state.lse,
            delta=state.delta,
            **grads,
            records=part.records,
            items=part.items,
            stride_lb=over_slots,
            stride_lh=over_heads,
            scale=call.softmax_scale,
            softcap=call.softcap,
        ),
        _constants,
        of,
    )


def _constants(of: KeyConstants | QueryConstants) -> Constants:
    return {"C": of}, options(CONSUMERS)
