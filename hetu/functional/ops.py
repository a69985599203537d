"""``attn_varlen`` as PyTorch ops, ``hetu::attn_varlen`` and its backward."""

from __future__ import annotations

from typing import Any

import torch

from hetu.backends.attention.contract import compute_dtype
from hetu.functional.attention import Attention, backward, forward, prepare
from hetu.functional.checks import VARLEN, check, check_storage
from hetu.functional.derivatives import (
    TAGS,
    Gradients,
    one_by_one,
    register_derivative,
    register_no_derivative,
    save_call,
    saved_call,
)
from hetu.functional.masking import SCHEMA, Masking, check_masking, parted

_library = torch.library.Library("hetu", "FRAGMENT")
_TENSORS = "Tensor q, Tensor k, Tensor v"
_CALL = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? rng_state, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "bool is_causal, float dropout_p, float? softmax_scale, "
    f"{SCHEMA}"
)
_library.define(f"attn_varlen({_TENSORS}, {_CALL}) -> (Tensor out, Tensor lse)", tags=TAGS)
_library.define(
    f"attn_varlen_backward(Tensor? dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor lse, {_CALL}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    tags=TAGS,
)


# What they compute. A call is what stands behind q, k and v.


def _prepared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: tuple[Any, ...]) -> tuple[Attention, Masking]:
    arguments, masking = parted(call)
    return prepare(q, k, v, *(*arguments, masking)), masking


@torch.library.impl("hetu::attn_varlen", "CompositeExplicitAutograd", lib=_library)
def _forward_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    check_storage(q=q, k=k, v=v, cu_seqlens_q=call[0], cu_seqlens_k=call[1])
    planned, masking = _prepared(q, k, v, call)
    return forward(planned, q, k, v, masking.sinks)


@torch.library.register_fake("hetu::attn_varlen", lib=_library)
def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _check_fake(q, k, v, call)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=compute_dtype(q.dtype))


@torch.library.impl("hetu::attn_varlen_backward", "CompositeExplicitAutograd", lib=_library)
def _backward_op(
    dout: torch.Tensor | None, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    out, lse, *call = rest
    planned, masking = _prepared(q, k, v, tuple(call))
    *grads, dsinks = backward(planned, dout, dlse, q, k, v, out, lse, masking.sinks)
    return *grads, q.new_empty(0) if dsinks is None else dsinks


@torch.library.register_fake("hetu::attn_varlen_backward", lib=_library)
def _backward_fake(
    dout: torch.Tensor | None, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    sinks = _check_fake(q, k, v, rest[2:])
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _check_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: tuple[Any, ...]) -> torch.Tensor | None:
    """Refuses what no values are needed for; gives the sinks."""
    arguments, masking = call[:8], Masking(*call[8:])
    cu_seqlens_q, cu_seqlens_k, rng_state, _, _, _, dropout_p, softmax_scale = arguments
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, rng_state, dropout_p, softmax_scale)
    check_masking(masking, q, VARLEN)
    return masking.sinks


# What torch's transforms need

torch.library.register_vmap("hetu::attn_varlen", one_by_one(torch.ops.hetu.attn_varlen), lib=_library)
torch.library.register_vmap("hetu::attn_varlen_backward", one_by_one(torch.ops.hetu.attn_varlen_backward), lib=_library)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, *call = inputs
    save_call(ctx, (q, k, v, *output), tuple(call))


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Gradients:
    saved, call = saved_call(ctx)
    *grads, dsinks = torch.ops.hetu.attn_varlen_backward(dout, dlse, *saved, *call)
    return *grads, *(None,) * (len(call) - 1), None if call[-1] is None else dsinks


register_derivative(_library, "attn_varlen", _save, _differentiate)
register_no_derivative(_library, "attn_varlen_backward", "attn_varlen")
