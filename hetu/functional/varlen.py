"""hetu's attention as a PyTorch function, for models that are written in PyTorch: the kernels without the graph."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from hetu.arguments import integer, shown
from hetu.backends.torch_private import (
    apply_of,
    is_any_autocast_enabled,
    version_of,
)
from hetu.errors import DTypeError
from hetu.functional import attention
from hetu.functional import ops as _ops  # noqa: F401 # it registers torch.ops.hetu.attn_varlen
from hetu.functional.checks import check, check_storage, refuse
from hetu.functional.derivatives import for_backward
from hetu.functional.dispatch import cast_as_autocast, checked_options, is_plain, may_pass_by, rng_state_of
from hetu.functional.masking import NO_CAP, USUAL, Masking, check_sinks, checked_masking
from hetu.parallel import Mask
from hetu.parallel.mask.mask import NO_WINDOW

__all__ = ["attn_varlen"]

_OP = "attn_varlen"


def attn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    is_causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = NO_CAP,
    sinks: torch.Tensor | None = None,
    mask: Mask | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    seed: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over sequences of different lengths that lie one after the other, without padding.

    Sequence b attends rows ``cu_seqlens_q[b] .. cu_seqlens_q[b+1]`` of q to rows ``cu_seqlens_k[b] ..
    cu_seqlens_k[b+1]`` of k and v. Rows of q past ``cu_seqlens_q[-1]`` belong to no sequence.

    Keep cu_seqlens on the CPU: they are read there, so that nothing is copied from the device and nothing waits for it.
    Those on a device are copied to the host, which waits for it, once for each tensor and version: the layers of a
    model that share them pay once per step. (Changes that torch doesn't count, through ``.data`` or by the replay of a
    CUDA graph, are not seen: pass a new tensor.) Lengths seen before are planned already.

    Works under ``torch.compile(fullgraph=True, dynamic=True)``, where other lengths, windows and masks recompile
    nothing (make masks outside of what is compiled), and under ``torch.autocast``, where q, k and v are cast as
    ``scaled_dot_product_attention`` does. Can be differentiated once, by reverse mode; under ``torch.vmap`` a batch is
    computed sample by sample.

    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 1, computed by algorithms 1 and 2 of Dao,
    "FlashAttention-2", 2023. Grouped queries: Ainslie et al., "GQA", 2023. Softcap: "Gemma 2", 2024, section 2.
    Sinks: the "gpt-oss" model card of OpenAI, 2025.

    Args:
        q: ``(T_q, H_q, head_dim)``; float16, bfloat16, float32, or float64 (by plain torch). Any strides; copied where
            the entries of a head are not neighbours.
        k: ``(T_k, H_k, head_dim)``; H_q must be a multiple of H_k (grouped queries: query head h uses key head
            ``h // (H_q // H_k)``). head_dim is a multiple of 8, at most 256.
        v: Like k.
        cu_seqlens_q: int32 or int64 ``(B + 1,)``, from 0, never decreasing; lengths of zero are fine.
        cu_seqlens_k: Like cu_seqlens_q, for the keys.
        max_seqlen_q: Not needed; if given, it must be at least the longest query sequence.
        max_seqlen_k: Likewise for the keys.
        is_causal: Row i of n sees keys 0 .. i + m - n of m: aligned to the bottom right, as in FlashAttention.
        window_size: ``(left, right)``: query i, counted as for is_causal, sees keys ``i - left .. i + right``; -1 is no
            bound. ``is_causal`` makes the right bound 0.
        softcap: Where it is positive, scores become ``softcap * tanh(score / softcap)`` before the softmax.
        sinks: ``(H_q,)``, any floating-point type: one more logit per head, which takes weight and gives no value. Its
            gradient has its type.
        mask: Which keys a query sees: a ``hetu.Mask`` without symbols. It replaces ``is_causal``, and is not given
            beside a window.
        dropout_p: Probability in [0, 1) with which each attention weight is dropped, whatever the mode of the model.
        softmax_scale: Factor of the scores; None means ``1 / sqrt(head_dim)``.
        return_lse: Whether to return the log-sum-exps too.
        seed: Of the dropout: the same seed drops the same weights. None draws one from torch's default CPU generator,
            so that ``torch.manual_seed`` fixes it.

    Returns:
        The output, like q. With ``return_lse`` also lse ``(H_q, T_q)``, natural logarithms of the softmax's
        denominators, float32 (float64 for float64), through which gradients flow as well; they include the sinks. A row
        that sees no key, or belongs to no sequence, has output 0, and as lse its head's sink, ``-inf`` without sinks.

    Raises:
        ShapeError: If ranks, head counts or numbers of rows don't fit.
        DTypeError: If an element type is not one of the above, or an argument is no tensor.
        BindingError: If the values of cu_seqlens or a max_seqlen don't fit, or the mask doesn't fit the lengths.
        HetuError: If devices differ, an option is out of its range, a tensor is nested or sparse, or has a tangent.

    Example:
        >>> import torch, hetu
        >>> q, kv = torch.ones(8, 4, 16), torch.ones(8, 2, 16)
        >>> cu_seqlens = torch.tensor([0, 5, 8], dtype=torch.int32)
        >>> out, lse = hetu.functional.attn_varlen(q, kv, kv, cu_seqlens, cu_seqlens, is_causal=True, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([8, 4, 16]), torch.Size([4, 8]))
    """
    tensor = torch.Tensor
    if not (
        isinstance(q, tensor)
        and isinstance(k, tensor)
        and isinstance(v, tensor)
        and isinstance(cu_seqlens_q, tensor)
        and isinstance(cu_seqlens_k, tensor)
    ):
        _refuse_types(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if not (
        type(is_causal) is bool
        and type(return_lse) is bool
        and type(dropout_p) is float
        and (softmax_scale is None or type(softmax_scale) is float)
        and (max_seqlen_q is None or type(max_seqlen_q) is int)
        and (max_seqlen_k is None or type(max_seqlen_k) is int)
        and (seed is None or type(seed) is int)
    ):
        is_causal, return_lse, dropout_p, softmax_scale, seed = checked_options(
            _OP, is_causal, return_lse, dropout_p, softmax_scale, seed
        )
        max_seqlen_q, max_seqlen_k = _bound("max_seqlen_q", max_seqlen_q), _bound("max_seqlen_k", max_seqlen_k)
    is_compiling, masking = torch.compiler.is_compiling(), USUAL
    # The defaults are known by identity, which is what takes the least and what torch.compile doesn't follow.
    if is_compiling or not (mask is None and sinks is None and window_size is NO_WINDOW and softcap is NO_CAP):
        masking = checked_masking(_OP, window_size, softcap, sinks, mask)
    if is_compiling or is_any_autocast_enabled():  # asked first, because it takes the least
        q, k, v = cast_as_autocast(q, k, v)
    call = (
        cu_seqlens_q if cu_seqlens_q.is_cpu else _on_host(cu_seqlens_q),
        cu_seqlens_k if cu_seqlens_k.is_cpu else _on_host(cu_seqlens_k),
        rng_state_of(seed) if dropout_p else None,
        max_seqlen_q,
        max_seqlen_k,
        is_causal,
        dropout_p,
        softmax_scale,
    )
    if is_compiling or q.is_meta or not is_plain(q, k, v, sinks):
        if not is_compiling:
            check_storage(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        out, lse = torch.ops.hetu.attn_varlen(q, k, v, *call, *masking)
        return (out, lse) if return_lse else out
    try:
        planned = attention.prepare(q, k, v, *call, masking)
        if torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
        ):
            out, lse = _apply_attention(q, k, v, sinks, planned, call, masking)
        else:
            out, lse = attention.forward(planned, q, k, v, sinks, return_lse)
    except (RuntimeError, TypeError):  # torch's, of tensors that have no strides or no values: what is checked says it
        check(q, k, v, *call[:3], dropout_p, softmax_scale)
        check_sinks(sinks, q, _OP)
        raise
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    """What the op's autograd does, without the dispatcher: that adds 50 µs to the forward, this 6."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Any,
        k: Any,
        v: Any,
        sinks: Any,
        planned: attention.Attention,
        call: tuple[Any, ...],
        masking: Masking,
    ) -> Any:
        out, lse = attention.forward(planned, q, k, v, sinks)
        ctx.save_for_backward(q, k, v, out, lse, for_backward(call[0]), for_backward(call[1]), call[2], sinks)
        ctx.planned, ctx.options, ctx.masking = planned, call[3:], masking.without_sinks
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
        *saved, sinks = ctx.saved_tensors
        if may_pass_by(dout, dlse):
            results = attention.backward(ctx.planned, dout, dlse, *(*saved[:5], sinks))
        else:  # the op knows what to do, also if these gradients are to be differentiated
            call = *saved, *ctx.options, *ctx.masking[:4], sinks
            results = torch.ops.hetu.attn_varlen_backward(dout, dlse, *call)
        dq, dk, dv, dsinks = results
        return dq, dk, dv, None if sinks is None else dsinks, None, None, None


_apply_attention = apply_of(_Attention)


def _refuse_types(**given: Any) -> NoReturn:
    name, value = next((name, value) for name, value in given.items() if not isinstance(value, torch.Tensor))
    refuse(DTypeError, f"{name} must be a tensor, got {shown(value)}", f"pass a torch tensor as {name}")


def _bound(name: str, given: Any) -> int | None:
    return None if given is None else integer(given, name, op=_OP, error=DTypeError, fix=f"leave {name} out")


_host_copies = WeakTensorKeyDictionary()


def _on_host(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, made once for each version of a tensor for as long as the tensor lives.

    What is traced copies each time it runs: a compiled graph writes into its tensors without counting versions.
    """
    if cu_seqlens.is_meta:
        return cu_seqlens
    if torch.compiler.is_compiling() or not is_plain(cu_seqlens) or cu_seqlens.is_inference():
        return cu_seqlens.cpu()
    counted = version_of(cu_seqlens)
    if counted is None:
        return cu_seqlens.cpu()
    version = (counted, cu_seqlens.data_ptr())
    kept = _host_copies.get(cu_seqlens)
    if kept is None or kept[0] != version:
        with torch.inference_mode(False):  # what is kept may be trained with later
            kept = _host_copies[cu_seqlens] = (version, cu_seqlens.cpu())
    copy: torch.Tensor = kept[1]
    return copy
