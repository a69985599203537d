"""What a call of ``attn_varlen`` does: the kernels that a graph runs, without the graph.

A call has two parts. :func:`prepare` checks the arguments and finds the plan of the lengths, which are read on the
host; :func:`forward` and :func:`backward` then only allocate and call the kernel. They know nothing of autograd, which
``hetu/functional/ops.py`` adds. :func:`hetu.functional.attn_varlen` calls the parts without the ops where it can,
because torch's dispatcher may cost more than both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from hetu.backends.attention.contract import (
    AttentionState,
    BackwardState,
    Dropout,
    compute_dtype,
    dropout_key,
    sink_gradient,
)
from hetu.backends.attention.family import AttendCall, AttendSignature, KernelFamily
from hetu.backends.attention.options import wide_sinks, with_rows
from hetu.backends.families import choose, default_backend
from hetu.backends.memory import empty
from hetu.cache import LRU
from hetu.config import settings
from hetu.errors import BindingError
from hetu.functional.checks import LENGTH_DTYPES, VARLEN, check, check_longest, refuse
from hetu.functional.masking import USUAL, Masking, check_masking
from hetu.ops.attention.common import cu_seqlens_fault, longest_of
from hetu.parallel import Mask
from hetu.parallel.plan.varlen import VarlenPlan
from hetu.planning.arrays import host_array

HostArray = np.ndarray[Any, Any]

_SCALES = {type(None), float, int}


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """What the lengths of a call make: its plan, with lse as ``(1, H_q, T_q)``, and the longest sequences."""

    plan: VarlenPlan
    longest_q: int
    longest_k: int


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """A call that is checked and planned.

    Attributes:
        lengths: What its lengths make.
        family: Whose kernels compute the forward.
        backward_family: Whose kernels compute the backward: in a thread of autograd's, which knows no ``hetu.config``.
        softmax_scale: Of the scores.
        softcap: Of the scores.
        dropout: Of the weights.
        key_position: What dropout needs of the keys.
    """

    lengths: Lengths
    family: KernelFamily
    backward_family: KernelFamily
    softmax_scale: float
    softcap: float
    dropout: Dropout | None = None
    key_position: HostArray | None = None


lengths_seen: LRU[Lengths] = LRU(256)
"""Lengths by the bytes of cu_seqlens."""

calls_seen: LRU[Attention] = LRU(256)
"""Calls without dropout, by all that they are checked for: seen again, they need no check."""


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    rng_state: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    is_causal: bool,
    dropout_p: float,
    softmax_scale: float | None,
    masking: Masking,
) -> Attention:
    """Checks a call and finds its plan, by the values of cu_seqlens.

    Raises:
        HetuError: Whatever :func:`hetu.functional.attn_varlen` refuses.
    """
    is_usual = not dropout_p and type(softmax_scale) in _SCALES
    if not (is_usual and cu_seqlens_q.dtype in LENGTH_DTYPES and cu_seqlens_k.dtype in LENGTH_DTYPES):
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, rng_state, dropout_p, softmax_scale, masking)
    cu_q = host_array(cu_seqlens_q)
    cu_k = cu_q if cu_seqlens_k is cu_seqlens_q else host_array(cu_seqlens_k)

    if is_usual:

        def checked() -> Attention:
            _check(q, k, v, cu_seqlens_q, cu_seqlens_k, rng_state, dropout_p, softmax_scale, masking)
            return _make(q, k, cu_q, cu_k, is_causal, softmax_scale, masking)

        sizes = (q.shape, k.shape, v.shape, cu_q.shape, cu_k.shape, cu_seqlens_q.dtype, cu_seqlens_k.dtype)
        types = (q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, settings().backend)
        key = (
            cu_q.tobytes(),
            cu_k.tobytes(),
            sizes,
            types,
            is_causal,
            softmax_scale,
            None if masking is USUAL else masking.key,
        )
        call = calls_seen.get(key, checked)
    else:
        dropout = None
        if dropout_p and rng_state is not None:
            seed, offset = rng_state.tolist()
            dropout = Dropout(dropout_p, dropout_key(seed, offset, 0))
        call = _make(q, k, cu_q, cu_k, is_causal, softmax_scale, masking, dropout)
    if max_seqlen_q is not None:
        check_longest("q", max_seqlen_q, call.lengths.longest_q, cu_seqlens_q)
    if max_seqlen_k is not None:
        check_longest("k", max_seqlen_k, call.lengths.longest_k, cu_seqlens_k)
    return call


def _check(q: torch.Tensor, *call: Any) -> None:
    """Refuses a call by what its shapes and options tell."""
    *arguments, masking = call
    check(q, *arguments)
    check_masking(masking, q, VARLEN)


def _make(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_q: HostArray,
    cu_k: HostArray,
    is_causal: bool,
    softmax_scale: float | None,
    masking: Masking,
    dropout: Dropout | None = None,
) -> Attention:
    """Plans a call that is checked, or finds the plan of its lengths."""
    (rows_q, num_q, head_dim), (rows_k, num_kv, _) = q.shape, k.shape
    key = (
        cu_q.tobytes(),
        cu_q.itemsize,
        cu_k.tobytes(),
        cu_k.itemsize,
        rows_q,
        rows_k,
        is_causal,
        None if masking is USUAL else masking.key,
    )
    lengths = lengths_seen.get(key, lambda: _plan(cu_q, cu_k, rows_q, rows_k, masking.mask_of(is_causal)))
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    kind = q.dtype, q.device, head_dim, num_q, num_kv, dropout is not None
    forward_of, backward_of = families(default_backend(q.device), *kind)
    key_position = lengths.plan.key_position if dropout else None
    return Attention(lengths, forward_of, backward_of, scale, masking.softcap, dropout, key_position)


def forward(
    call: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    needs_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, like q, and lse ``(H_q, T_q)``, both contiguous; ``(1, H_q, T_q)`` where nobody needs it."""
    rows, heads, _ = shape = q.shape
    dtype, device = q.dtype, q.device
    out = empty(shape, dtype, device)
    lse = empty((1, heads, rows), compute_dtype(dtype), device)  # the kernel writes every row, the tail's too
    state = AttentionState(out, lse, None, None)
    wide = None if sinks is None else wide_sinks(sinks, dtype)
    call.family.attend(_attend_call(call, q, k, v, wide), state)
    return out, lse[0] if needs_lse else lse


def backward(
    call: Attention,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of q, k, v and the sinks, contiguous, from those of the output and of lse."""
    dout = torch.zeros_like(out) if dout is None else with_rows(dout)
    dq, dk, dv = (empty(x.shape, x.dtype, x.device) for x in (q, k, v))
    delta = call.backward_family.row_dot(out, dout)
    if dlse is not None:
        delta -= dlse.T  # a row of q at its own index: nothing to gather, as attention_delta does
    state = BackwardState(dout, lse[None], delta, dq)
    call.backward_family.attend_backward(_attend_call(call, q, k, v), state, dk, dv)
    if sinks is None:
        return dq, dk, dv, None
    dsinks = sink_gradient(sinks.to(delta.dtype), lse[None], delta, call.lengths.plan.spans)
    return dq, dk, dv, dsinks.to(sinks.dtype)


def _attend_call(
    call: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
) -> AttendCall:
    """What a checked call attends to."""
    plan = call.lengths.plan
    return AttendCall(
        with_rows(q),
        with_rows(k),
        with_rows(v),
        plan.spans,
        plan.table,
        call.softmax_scale,
        None,
        call.dropout,
        call.key_position,
        call.softcap,
        sinks,
    )


@cache
def families(backend: str, *kind: Any) -> tuple[KernelFamily, KernelFamily]:
    """The families of the forward and the backward, chosen as a graph chooses them; ``kind`` begins a signature."""
    forward = AttendSignature(*kind)
    return choose(backend, forward).family, choose(backend, forward._replace(is_backward=True)).family


def _plan(cu_q: HostArray, cu_k: HostArray, rows_q: int, rows_k: int, mask: Mask) -> Lengths:
    """Checks the values of cu_seqlens, and plans them."""
    own_q = np.array(cu_q, np.int64)  # a copy: the tensor's memory may change
    own_k = own_q if cu_k is cu_q else np.array(cu_k, np.int64)
    for name, values, rows in (("q", own_q, rows_q), ("k", own_k, rows_k)):
        is_new = name == "q" or values is not own_q
        if is_new and (fault := cu_seqlens_fault(f"cu_seqlens_{name}", values)):
            refuse(BindingError, *fault)
        if values[-1] > rows:
            what = f"cu_seqlens_{name} ends at {values[-1]}, but {name} has {rows} rows"
            refuse(BindingError, what, f"give {name} all its tokens")
    plan = VarlenPlan.build(own_q, own_k, rows_q, mask, packed_lse=True)
    longest_q = longest_of(own_q)
    return Lengths(plan, longest_q, longest_q if own_k is own_q else longest_of(own_k))
