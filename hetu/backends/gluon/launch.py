"""From segment tables to launches of the Gluon kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from hetu.backends.attention.contract import AttentionState
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.records import BLOCKS, MORE, QUERY_FIELDS, Int32Array, WorkList
from hetu.backends.attention.work import query_work
from hetu.backends.gluon import variants
from hetu.backends.gluon.descriptors import DESCRIBED, Boxes, described, is_describable
from hetu.backends.gluon.forward import forward_kernel
from hetu.backends.gluon.variants import Tile, boxes, constants
from hetu.backends.memory import HasCopies, device_copies
from hetu.backends.triton import launch as portable
from hetu.backends.triton.launch import Bound, DeviceWork, LaunchKind, bind, forward_key, keep_bound, keys_per_row
from hetu.backends.triton.launcher import Arguments, Constants, Launcher
from hetu.backends.triton.variants import PackedHeads, Variant, row_strides

_ROWS, _K_LEN, _REACH = (QUERY_FIELDS.index(name) for name in ("rows", "k_len", "reach"))

_forward = Launcher(forward_kernel, "items")

Kind = LaunchKind[Variant, Tile]
Work = DeviceWork[Variant, Tile]


@dataclass(frozen=True, slots=True)
class _Step:
    """A step's work list on the device.

    Attributes:
        work: The list.
        items: How many items a set of heads has.
    """

    work: Work
    items: int


PORTABLE = "of the portable kernels"
"""Kept in place of launches of a step that they take."""


def attend(call: AttendCall, state: AttentionState) -> None:
    """One step of attention in Gluon; see :meth:`hetu.backends.attention.family.KernelFamily.attend`.

    Calls go to the portable kernels if those are faster, or if a tensor is none for TMA, such as a view that begins at
    an odd address.
    """
    if call.softmax_scale <= 0:
        call = call.with_positive_scale()
    owner = call.table if call.turn is None else call.turn
    like = ("gluon", *forward_key(call, state))
    bound: Bound[_Step] | str | None = owner.copies.get(like)
    if isinstance(bound, Bound) and bound(_given(bound.work, call, state)):
        return
    kind = None if bound is PORTABLE else _kind_of(call)
    if kind is None:
        keep_bound(owner, like, PORTABLE)
    if kind is None or not all(map(is_describable, (call.q, call.k, call.v, state.out))):
        portable.attend(call, state)
        return
    key = ("gluon", kind.keys)
    work = owner.copies.get(key)
    if work is None:
        work = _prepared(call, kind)
        device_copies.keep(owner, key, work, work.records.nbytes)
    _launch(work, call, state, owner, like)


def _kind_of(call: AttendCall) -> Kind | None:
    """What calls share that differ in their lengths alone; None for those that the portable kernels are faster for."""
    q, turn = call.q, call.turn
    runs_on, lower = turn is not None and turn.runs_on, call.table.lower is not None
    flags = (runs_on, lower, call.softcap > 0, call.sinks is not None)
    is_long = keys_per_row(call.spans, call.table) >= variants.LONG
    return _kind(*q.shape[1:], call.k.shape[1], q.dtype, flags, q.device, is_long)


def _launch(work: Work, call: AttendCall, state: AttentionState, owner: HasCopies, like: Hashable) -> None:
    if work.programs == 0:
        return
    device = call.q.device
    of = _constants_of(work.kind, work.variant, row_strides(state.out))
    key = (work.key, of.OUT_STRIDE_T, of.OUT_STRIDE_H)
    programs, step = min(work.programs, multiprocessors(device)), _Step(work, work.programs // of.SETS)
    arguments = _given(step, call, state, boxes(of))
    _forward(device, key, programs, arguments, _arguments, of)
    keep_bound(owner, like, bind(step, _forward, key, device, programs, arguments[0][:DESCRIBED]))


def _given(step: _Step, call: AttendCall, state: AttentionState, boxes: Boxes | None = None) -> Arguments:
    """The arguments of a launch; without boxes for one that knows them."""
    q_desc, k_desc, v_desc, o_desc = described((call.q, call.k, call.v, state.out), boxes)
    over_slots, over_heads, _ = state.lse.stride()
    return _forward.arguments(
        q_desc=q_desc,
        k_desc=k_desc,
        v_desc=v_desc,
        o_desc=o_desc,
        out=state.out,
        lse=state.lse,
        acc_state=state.acc if step.work.variant.runs_on else None,
        sinks=call.sinks,
        records=step.work.records,
        items=step.items,
        stride_lb=over_slots,
        stride_lh=over_heads,
        scale=call.softmax_scale,
        softcap=call.softcap,
    )


def _arguments(of: variants.Constants) -> Constants:
    return {"C": of}, variants.options(of.CONSUMERS)


@cache
def _constants_of(kind: Kind, variant: Variant, out_strides: tuple[int, int]) -> variants.Constants:
    return constants(variant, kind.heads, kind.shape, out_strides)


def _prepared(call: AttendCall, kind: Kind) -> Work:
    """Puts the work list on the device."""
    work = query_work(call.spans, call.table, kind.shape.block_m // kind.heads.pack, call.turn)
    return DeviceWork.of(kind, arranged(work, kind.shape.block_n), call.q.device)


@cache  # so that calls of a kind find the same object
def _kind(
    num_q: int,
    head_dim: int,
    num_kv: int,
    dtype: torch.dtype,
    flags: tuple[bool, ...],
    device: torch.device,
    is_long: bool,
) -> Kind | None:
    runs_on, lower, softcap, sinks = flags
    variant = Variant(head_dim, dtype, runs_on, lower=lower, softcap=softcap, sinks=sinks)
    shape = variants.tile(variant, is_long)
    if shape is None:
        return None
    return LaunchKind(PackedHeads(num_q, num_kv), shape, (variant, replace(variant, more=True)), ("gluon", device))


def arranged(work: WorkList, block_n: int) -> WorkList:
    """A work list for persistent programs: items know how many blocks of keys they see, and those with most come first.

    Turns then have items of about the same weight, whatever their documents, and deal them out evenly. Weights differ
    by two blocks before they count, so that items that share keys stay together.
    """

    def blocks(records: Int32Array, items: Int32Array) -> Int32Array:
        k_len, reach = records[:, _K_LEN], records[:, _REACH]
        found: Int32Array = np.maximum(-(-np.minimum(k_len, reach + items[:, _ROWS]) // block_n), 1)
        return found

    count = item_weights(work, blocks)
    work.items[:, BLOCKS] = count
    return heaviest_first(work, (count + 1) // 2)


def item_weights(work: WorkList, weigh: Callable[[Int32Array, Int32Array], Int32Array]) -> Int32Array:
    """What the items of a work list weigh, with their further records; ``weigh`` is told records and their items."""
    items = work.items
    weight = weigh(items, items)
    if work.has_more:
        begin, end = items[:, MORE].T
        own = np.arange(len(items)).repeat(end - begin)
        more = np.bincount(own, weigh(work.further, items[own]), minlength=len(items))
        weight += more.astype(weight.dtype)
    return weight


def heaviest_first(work: WorkList, weight: Int32Array) -> WorkList:
    """A work list in the order of its items' weights; those of the same weight stay as they are."""
    order = (-weight).argsort(kind="stable")
    return WorkList(work.items.take(order, axis=0), work.further, work.documents[order])


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
