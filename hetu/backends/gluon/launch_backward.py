"""From segment tables to launches of the backward's kernels for Hopper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hetu.backends.attention.contract import BackwardState
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.records import KEY_FIELDS, Int32Array, WorkList
from hetu.backends.attention.work import key_work, query_work
from hetu.backends.gluon import variants_backward
from hetu.backends.gluon.backward_keys import key_kernel
from hetu.backends.gluon.backward_queries import query_kernel
from hetu.backends.gluon.descriptors import DESCRIBED, Boxes, described, is_describable
from hetu.backends.gluon.launch import PORTABLE, arranged, heaviest_first, item_weights, multiprocessors
from hetu.backends.gluon.variants import ROWS, options
from hetu.backends.gluon.variants_backward import (
    BLOCK_KEYS,
    CONSUMERS,
    BackwardTile,
    KeyConstants,
    QueryConstants,
    key_constants,
    query_constants,
)
from hetu.backends.memory import HasCopies, copied_to, device_copies, zero
from hetu.backends.triton import launch_backward as portable
from hetu.backends.triton.launch import Bound, bind, keep_bound, keys_per_row
from hetu.backends.triton.launch_backward import backward_key, named_rows
from hetu.backends.triton.launcher import Arguments, Constants, Launcher
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


@dataclass(frozen=True, slots=True)
class _Step:
    """The work of one of the kernels.

    Attributes:
        part: It.
        runs_on: Whether there are running results, of earlier steps or for later ones.
    """

    part: _Part
    runs_on: bool


def attend_backward(
    call: AttendCall, state: BackwardState, dk: torch.Tensor, dv: torch.Tensor, keeps: bool = False
) -> None:
    """Gradients of one step in Gluon; see :meth:`hetu.backends.attention.family.KernelFamily.attend_backward`.

    The portable kernels take short documents, a scale that isn't positive, and a tensor that is none for TMA.
    """
    owner = call.table if call.turn is None else call.turn
    like = ("gluon", call.softmax_scale > 0, *backward_key(call, state, dk, dv))
    bound: tuple[Bound[_Step], Bound[_Step]] | str | None = owner.copies.get(like)
    if bound is None and (call.softmax_scale <= 0 or keys_per_row(call.spans, call.table) < variants_backward.LONG):
        bound = PORTABLE
        keep_bound(owner, like, bound)
    if isinstance(bound, str):
        portable.attend_backward(call, state, dk, dv, keeps)
        return
    _clear(call, dk, dv, keeps)
    if bound is not None:
        keys, queries = bound
        of_keys, of_queries = _given_keys(keys.work, call, state, dk, dv), _given_queries(queries.work, call, state)
        if keys(of_keys) and queries(of_queries):
            return
    if all(map(is_describable, (call.q, call.k, call.v, state.dout))):
        keep_bound(owner, like, _launch(call, state, dk, dv, owner))
    else:
        portable.attend_backward(call, state, dk, dv, keeps)


def _clear(call: AttendCall, dk: torch.Tensor, dv: torch.Tensor, keeps: bool) -> None:
    """Rows that no segment names get no gradient."""
    if not keeps and named_rows(call.table) < len(call.k):
        dk.zero_()
        dv.zero_()


def _launch(
    call: AttendCall, state: BackwardState, dk: torch.Tensor, dv: torch.Tensor, owner: HasCopies
) -> tuple[Bound[_Step], Bound[_Step]] | None:
    """Launches both kernels as the first of their kind do; gives what does it again."""
    q, turn = call.q, call.turn
    runs_on, lower = turn is not None and turn.runs_on, call.table.lower is not None
    variant = BackwardVariant(q.shape[2], q.dtype, runs_on, lower=lower, softcap=call.softcap > 0)
    heads, tile = PackedHeads(q.shape[1], call.k.shape[1]), variants_backward.tile(variant)
    key = ("gluon backward", q.device, heads, tile)
    parts = owner.copies.get(key)
    if parts is None:
        parts = _prepared(call, heads, tile)
        device_copies.keep(owner, key, parts, sum(part.records.nbytes for part in parts))
    keys, queries = (_Step(part, runs_on) for part in parts)
    running = state.acc if runs_on and state.acc is not None else state.dq
    kept = (variant, heads, tile)
    of_keys = key_constants(*kept, keys.part.has_more, row_strides(dk), row_strides(dv))
    of_queries = query_constants(*kept, queries.part.has_more, row_strides(state.dq), row_strides(running))
    first = _launch_one(_keys, keys, of_keys, _given_keys(keys, call, state, dk, dv, of_keys.boxes()))
    second = _launch_one(_queries, queries, of_queries, _given_queries(queries, call, state, of_queries.boxes()))
    return None if first is None or second is None else (first, second)


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


def _launch_one(
    launcher: Launcher, step: _Step, of: KeyConstants | QueryConstants, arguments: Arguments
) -> Bound[_Step] | None:
    if step.part.items == 0:
        return None
    tensors, _ = arguments
    device = step.part.records.device
    programs = min(step.part.items * of.SETS, multiprocessors(device))
    of_queries: Any = tensors[0]
    types = [None if x is None else x.dtype for x in tensors[DESCRIBED:]]
    key = (device, of_queries.base.dtype, of, *types)
    launcher(device, key, programs, arguments, _constants, of)
    return bind(step, launcher, key, device, programs, tensors[:DESCRIBED])


def _given_keys(
    step: _Step,
    call: AttendCall,
    state: BackwardState,
    dk: torch.Tensor,
    dv: torch.Tensor,
    boxes: Boxes | None = None,
) -> Arguments:
    """The arguments of the kernel of keys; without boxes for a launch that knows them."""
    return _keys.arguments(dk=dk, dv=dv, counter=zero(dk.device), **_of_both(step, call, state, boxes))


def _given_queries(step: _Step, call: AttendCall, state: BackwardState, boxes: Boxes | None = None) -> Arguments:
    """Those of the kernel of queries, likewise."""
    acc = state.acc if step.runs_on else None
    return _queries.arguments(dq=state.dq, dq_state=acc, **_of_both(step, call, state, boxes))


def _of_both(step: _Step, call: AttendCall, state: BackwardState, boxes: Boxes | None) -> dict[str, Any]:
    """The arguments that both kernels take."""
    q_desc, k_desc, v_desc, dout_desc = described((call.q, call.k, call.v, state.dout), boxes)
    over_slots, over_heads, _ = state.lse.stride()
    return {
        "q_desc": q_desc,
        "k_desc": k_desc,
        "v_desc": v_desc,
        "dout_desc": dout_desc,
        "lse": state.lse,
        "delta": state.delta,
        "records": step.part.records,
        "items": step.part.items,
        "stride_lb": over_slots,
        "stride_lh": over_heads,
        "scale": call.softmax_scale,
        "softcap": call.softcap,
    }


def _constants(of: KeyConstants | QueryConstants) -> Constants:
    return {"C": of}, options(CONSUMERS)
