"""Context parallelism as a PyTorch function: attention whose tokens lie on several ranks."""

from __future__ import annotations

from typing import Any

import torch

from hetu.arguments import integers, real, refuse
from hetu.backends.torch_private import apply_of, is_any_autocast_enabled
from hetu.functional import parallel_ops as ops
from hetu.functional.checks import check_storage, check_tensor
from hetu.functional.context_parallel import ContextParallel
from hetu.functional.derivatives import for_backward
from hetu.functional.dispatch import cast_as_autocast, checked_options, is_plain, may_pass_by, rng_state_of
from hetu.functional.sharding import PlannedCall

_OP = ops.OP
_NO_WINDOW, _NO_CAP = (-1, -1), 0.0


def parallel_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cp: ContextParallel,
    *,
    is_causal: bool = True,
    window_size: tuple[int, int] = _NO_WINDOW,
    softcap: float = _NO_CAP,
    sinks: torch.Tensor | None = None,
    mask: Any = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over documents that lie on several ranks: each gives its own rows, and gets their output.

    A query sees the keys of its own document, wherever they lie. All ranks of the group call it, in the same order.
    The first call of a kind makes the plan of the lengths, and the ranks compare what they were asked for; the other
    layers of a model share that plan, and neither compare nor wait for anything but each other's rows.

    Works under ``torch.compile(fullgraph=True, dynamic=True)``, where other lengths recompile nothing, under
    ``torch.autocast``, under activation checkpointing of all kinds, and in models that FSDP2, DDP or tensor parallelism
    over heads shard. Can be differentiated once.

    Args:
        q: ``(rows, H_q, head_dim)``, this rank's rows; float16, bfloat16, float32, or float64 (by plain torch). Any
            strides.
        k: ``(rows, H_kv, head_dim)``; H_q must be a multiple of H_kv (grouped queries). head_dim is a multiple of 8, at
            most 256.
        v: Like k.
        cp: How the tokens lie on the ranks.
        is_causal: A query sees the keys up to its own position.
        window_size: Only ``(-1, -1)``, no window.
        softcap: Only 0, no cap.
        sinks: Only None.
        mask: Only None.
        dropout_p: Probability in [0, 1) with which each attention weight is dropped, whatever the mode of the model.
            What is dropped doesn't depend on how the tokens lie on the ranks.
        softmax_scale: Factor of the scores; None means ``1 / sqrt(head_dim)``.
        seed: Of the dropout: the same seed drops the same weights. None draws one from torch's default CPU generator;
            all ranks of a group must draw the same.
        return_lse: Whether to return the log-sum-exps too.

    Returns:
        The output, like q. With ``return_lse`` also lse ``(H_q, rows)``, natural logarithms of the softmax's
        denominators, float32 (float64 for float64), through which gradients flow as well.

    Raises:
        ShapeError: If head counts or numbers of rows don't fit.
        DTypeError: If an element type is not one of the above, or an argument is no tensor.
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
    is_usual = (
        type(window_size) is tuple and window_size == _NO_WINDOW and type(softcap) is float and softcap == _NO_CAP
    )
    if not (is_usual and sinks is None and mask is None):
        _check_masks(window_size, softcap, sinks, mask)
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
    is_compiling = torch.compiler.is_compiling()
    if is_compiling or is_any_autocast_enabled():  # asked first, because it takes the least
        q, k, v = cast_as_autocast(q, k, v)
    rng_state = rng_state_of(seed) if dropout_p else None
    options = (cp.method, is_causal, dropout_p, softmax_scale)
    if is_compiling or q.is_meta or not is_plain(q, k, v):
        if not is_compiling:
            check_storage(_OP, q=q, k=k, v=v)
        out, lse = torch.ops.hetu.parallel_attn(q, k, v, cp.table, rng_state, cp.split, cp.group_name, *options)
        return (out, lse) if return_lse else out
    if q.is_nested or k.is_nested or v.is_nested:
        check_storage(_OP, q=q, k=k, v=v)
    call = ops.prepare(q, k, v, cp.table, cp.sharding, rng_state, *options)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _apply(q, k, v, call, (cp.table, rng_state, cp.split, cp.group_name, *options))
    else:
        out, lse = ops.forward(call, q, k, v, rng_state)
    return (out, lse) if return_lse else out


class _ParallelAttention(torch.autograd.Function):
    """What the op's autograd does, without the dispatcher: that adds 50 µs to the forward, this 6."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, call: PlannedCall, arguments: tuple[Any, ...]) -> Any:
        out, lse = ops.forward(call, q, k, v, arguments[1])
        ctx.save_for_backward(q, k, v, out, lse, for_backward(arguments[0]), arguments[1])
        ctx.call, ctx.options = call, arguments[2:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
        saved = ctx.saved_tensors
        if may_pass_by(dout, dlse):
            q, k, v, out, lse, _, rng_state = saved
            dq, dkv = ops.backward(ctx.call, dout, dlse, q, k, v, out, lse, rng_state)
        else:  # the op knows what to do, also if these gradients are to be differentiated
            dq, dkv = torch.ops.hetu.parallel_attn_backward(dout, dlse, *saved, *ctx.options)
        return dq, *dkv.unbind(1), None, None


_apply = apply_of(_ParallelAttention)


def _check_masks(window_size: Any, softcap: Any, sinks: Any, mask: Any) -> None:
    """Refuses what no kernel computes yet, by its name."""
    no_window = integers(window_size, "window_size", op=_OP) == _NO_WINDOW
    no_cap = real(softcap, "softcap", op=_OP, fix="leave it out") == _NO_CAP
    for name, value, is_none in (
        ("window_size", window_size, no_window),
        ("softcap", softcap, no_cap),
        ("sinks", sinks, sinks is None),
        ("mask", mask, mask is None),
    ):
        if not is_none:
            fix = f"leave {name} out{'; sinks can be added by the log-sum-exps' if name == 'sinks' else ''}"
            refuse(value, name, "its default: parallel_attn has no other yet", op=_OP, fix=fix)
