"""``attn_varlen`` as PyTorch ops, ``hetu::attn_varlen`` and its backward."""

from __future__ import annotations

from typing import Any

import torch

from hetu.backends.attention.contract import compute_dtype
from hetu.functional.attention import backward, forward, prepare
from hetu.functional.checks import check, check_storage
from hetu.functional.derivatives import (
    Gradients,
    for_backward,
    one_by_one,
    register_derivative,
    register_no_derivative,
)

_library = torch.library.Library("hetu", "FRAGMENT")
_TENSORS = "Tensor q, Tensor k, Tensor v"
_CALL = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? rng_state, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "bool is_causal, float dropout_p, float? softmax_scale"
)
_library.define(f"attn_varlen({_TENSORS}, {_CALL}) -> (Tensor out, Tensor lse)", tags=torch.Tag.pt2_compliant_tag)
_library.define(
    f"attn_varlen_backward(Tensor? dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor lse, {_CALL}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    tags=torch.Tag.pt2_compliant_tag,
)


# What they compute


@torch.library.impl("hetu::attn_varlen", "CompositeExplicitAutograd", lib=_library)
def _forward_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    check_storage(q=q, k=k, v=v, cu_seqlens_q=call[0], cu_seqlens_k=call[1])
    return forward(prepare(q, k, v, *call), q, k, v)


@torch.library.register_fake("hetu::attn_varlen", lib=_library)
def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _check_fake(q, k, v, *call)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=compute_dtype(q.dtype))


@torch.library.impl("hetu::attn_varlen_backward", "CompositeExplicitAutograd", lib=_library)
def _backward_op(
    dout: torch.Tensor | None, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, lse, *call = rest
    return backward(prepare(q, k, v, *call), dout, dlse, q, k, v, out, lse)


@torch.library.register_fake("hetu::attn_varlen_backward", lib=_library)
def _backward_fake(
    dout: torch.Tensor | None, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_fake(q, k, v, *rest[2:])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _check_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> None:
    cu_seqlens_q, cu_seqlens_k, rng_state, _, _, _, dropout_p, softmax_scale = call
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, rng_state, dropout_p, softmax_scale)


# What torch's transforms need

torch.library.register_vmap("hetu::attn_varlen", one_by_one(torch.ops.hetu.attn_varlen), lib=_library)
torch.library.register_vmap("hetu::attn_varlen_backward", one_by_one(torch.ops.hetu.attn_varlen_backward), lib=_library)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, rng_state, *ctx.options = inputs
    lengths = for_backward(cu_seqlens_q), for_backward(cu_seqlens_k)
    ctx.save_for_backward(q, k, v, *output, *lengths, rng_state)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Gradients:
    grads = torch.ops.hetu.attn_varlen_backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
    return *grads, *(None,) * (len(ctx.options) + 3)


register_derivative(_library, "attn_varlen", _save, _differentiate)
register_no_derivative(_library, "attn_varlen_backward", "attn_varlen")
