"""Context parallelism as a PyTorch function: attention whose tokens lie on several ranks."""

from __future__ import annotations

from typing import Any

import torch

from hetu.arguments import refuse
from hetu.backends.torch_private import apply_of, is_any_autocast_enabled
from hetu.functional import parallel_ops as ops
from hetu.functional.checks import check_storage, check_tensor
from hetu.functional.context_parallel import ContextParallel
from hetu.functional.derivatives import for_backward
from hetu.functional.dispatch import cast_as_autocast, checked_options, is_plain, may_pass_by, rng_state_of
from hetu.functional.masking import NO_CAP, USUAL, Masking, checked_masking
from hetu.functional.sharding import PlannedCall
from hetu.parallel import Mask
from hetu.parallel.mask.mask import NO_WINDOW

_OP = ops.OP


def parallel_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cp: ContextParallel,
    *,
    is_causal: bool = True,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = NO_CAP,
    sinks: torch.Tensor | None = None,
    mask: Mask | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over documents that lie on several ranks: each gives its own rows, and gets their output.

    A query sees the keys of its own document, wherever they lie; keys that a mask hides from all queries of a rank
    don't travel to it. All ranks of the group call it, in the same order. The first call of a kind makes the plan of
    the lengths, and the ranks compare what they were asked for; the other layers of a model share that plan, and
    neither compare nor wait for anything but each other's rows.

    Works under ``torch.compile(fullgraph=True, dynamic=True)``, where other lengths, windows and masks recompile
    nothing (make masks outside of what is compiled), under ``torch.autocast``, under activation checkpointing of all
    kinds, and in models that FSDP2, DDP or tensor parallelism over heads shard. Can be differentiated once.

    Source: that of :func:`attn_varlen`. Partial results merge as in Milakov and Gimelshein, "Online normalizer
    calculation for softmax", 2018, section 3. Methods: ``"ring"`` of Liu et al., "Ring Attention", 2023;
    ``"ulysses"`` of Jacobs et al., "DeepSpeed Ulysses", 2023; ``"all_gather"`` of "The Llama 3 Herd of Models",
    2024, section 3.3.2. Splits: ``"sym"`` of the same section; ``"stripe"`` of Brandon et al., "Striped Attention",
    2023.

    Args:
        q: ``(rows, H_q, head_dim)``, this rank's rows; float16, bfloat16, float32, or float64 (by plain torch). Any
            strides.
        k: ``(rows, H_kv, head_dim)``; H_q must be a multiple of H_kv (grouped queries). head_dim is a multiple of 8, at
            most 256.
        v: Like k.
        cp: How the tokens lie on the ranks.
        is_causal: A query sees the keys up to its own position.
        window_size: ``(left, right)``: a query at position i of its document sees keys ``i - left .. i + right``; -1 is
            no bound. ``is_causal`` makes the right bound 0.
        softcap: Where it is positive, scores become ``softcap * tanh(score / softcap)`` before the softmax.
        sinks: ``(H_q,)``, any floating-point type: one more logit per head, which takes weight and gives no value. Its
            gradient, in its type, is what this rank's rows do to it, like that of any weight.
        mask: Which keys a query sees: a ``hetu.Mask`` without symbols. It replaces ``is_causal``, and is not given
            beside a window.
        dropout_p: Probability in [0, 1) with which each attention weight is dropped, whatever the mode of the model.
            What is dropped doesn't depend on how the tokens lie on the ranks.
        softmax_scale: Factor of the scores; None means ``1 / sqrt(head_dim)``.
        seed: Of the dropout: the same seed drops the same weights. None draws one from torch's default CPU generator;
            all ranks of a group must draw the same.
        return_lse: Whether to return the log-sum-exps too.

    Returns:
        The output, like q. With ``return_lse`` also lse ``(H_q, rows)``, natural logarithms of the softmax's
        denominators, float32 (float64 for float64), through which gradients flow as well; they include the sinks.
        A row that sees no key has output 0, and as lse its head's sink, ``-inf`` without sinks.

    Raises:
        ShapeError: If head counts or numbers of rows don't fit.
        DTypeError: If an element type is not one of the above, or an argument is no tensor.
        BindingError: If the mask doesn't fit the documents.
        CommunicationError: If the ranks call it with different arguments, or a rank is gone.
        HetuError: If devices differ, or an option is out of its range.

    Example:
        >>> import torch, hetu
        >>> cp = hetu.functional.ContextParallel(torch.tensor([0, 5, 8]))  # of one process, where there are no others
        >>> q, kv = torch.ones(8, 4, 16), torch.ones(8, 2, 16)
        >>> hetu.functional.parallel_attn(q, kv, kv, cp).shape
        torch.Size([8, 4, 16])
    """
    tensor = torch.Tensor
    if not (isinstance(q, tensor) and isinstance(k, tensor) and isinstance(v, tensor)):
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_tensor(x, name, _OP)
    if not isinstance(cp, ContextParallel):
        refuse(cp, "cp", "a ContextParallel", op=_OP, fix="make one: hetu.functional.ContextParallel(cu_seqlens)")
    is_compiling, masking = torch.compiler.is_compiling(), USUAL
    # The defaults are known by identity, which is what takes the least and what torch.compile doesn't follow.
    if is_compiling or not (mask is None and sinks is None and window_size is NO_WINDOW and softcap is NO_CAP):
        masking = checked_masking(_OP, window_size, softcap, sinks, mask)
    if not (
        type(is_causal) is bool
        and type(return_lse) is bool
        and type(dropout_p) is float
        and (softmax_scale is None or type(softmax_scale) is float)
        and (seed is None or type(seed) is int)
    ):
        is_causal, return_lse, dropout_p, softmax_scale, seed = checked_options(
            _OP, is_causal, return_lse, dropout_p, softmax_scale, seed
        )
    if is_compiling or is_any_autocast_enabled():  # asked first, because it takes the least
        q, k, v = cast_as_autocast(q, k, v)
    rng_state = rng_state_of(seed) if dropout_p else None
    options = (cp.method, is_causal, dropout_p, softmax_scale)
    if is_compiling or q.is_meta or not is_plain(q, k, v, sinks):
        if not is_compiling:
            check_storage(_OP, q=q, k=k, v=v)
        call = cp.table, rng_state, cp.split, cp.group_name, *options, *masking
        out, lse = torch.ops.hetu.parallel_attn(q, k, v, *call)
        return (out, lse) if return_lse else out
    if q.is_nested or k.is_nested or v.is_nested:
        check_storage(_OP, q=q, k=k, v=v)
    planned = ops.prepare(q, k, v, cp.table, cp.sharding, rng_state, *options, masking)
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    ):
        arguments = cp.table, rng_state, cp.split, cp.group_name, *options
        out, lse = _apply(q, k, v, sinks, planned, arguments, masking)
    else:
        out, lse = ops.forward(planned, q, k, v, rng_state, sinks)
    return (out, lse) if return_lse else out


class _ParallelAttention(torch.autograd.Function):
    """What the op's autograd does, without the dispatcher: that adds 50 µs to the forward, this 6."""

    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, sinks: Any, call: PlannedCall, arguments: tuple[Any, ...], masking: Masking
    ) -> Any:
        out, lse = ops.forward(call, q, k, v, arguments[1], sinks)
        ctx.save_for_backward(q, k, v, out, lse, for_backward(arguments[0]), arguments[1], sinks)
        ctx.call, ctx.options, ctx.masking = call, arguments[2:], masking.without_sinks
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
        *saved, sinks = ctx.saved_tensors
        if may_pass_by(dout, dlse):
            q, k, v, out, lse, _, rng_state = saved
            grads, dsinks = ops.backward(ctx.call, dout, dlse, q, k, v, out, lse, rng_state, sinks)
            return grads.q, grads.k, grads.v, dsinks, None, None, None
        # The op knows what to do, also if these gradients are to be differentiated.
        arguments = *saved, *ctx.options, *ctx.masking[:4], sinks
        dq, dkv, dsinks = torch.ops.hetu.parallel_attn_backward(dout, dlse, *arguments)
        return dq, *dkv.unbind(1), None if sinks is None else dsinks, None, None, None


_apply = apply_of(_ParallelAttention)
