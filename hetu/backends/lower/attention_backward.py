"""The gradients of both attention ops at run time, by calls of a kernel family's ``attend_backward``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from hetu.backends.attention.contract import BackwardState, attention_delta
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.options import Options, as_heads
from hetu.backends.comm import World, run_lock_step
from hetu.backends.families import family
from hetu.backends.lower.attention import options_of
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.pipelines import BackwardCall, Rows
from hetu.parallel import AttnPlan
from hetu.parallel.plan.varlen import VarlenPlan

# attn_varlen


def hetu_attn_varlen_grad(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rng_state: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    plan: VarlenPlan,
    options: Options,
) -> list[torch.Tensor]:
    """The gradients of one pipeline's q, k and v."""
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    dq, dk, dv = (as_heads(x, options.head_dim) for x in grads)
    dropout = options.dropout(_random(rng_state), 0)
    call = AttendCall(
        as_heads(q, options.head_dim),
        as_heads(k, options.head_dim),
        as_heads(v, options.head_dim),
        plan.spans,
        plan.table,
        options.softmax_scale,
        None,
        dropout,
        plan.key_position if dropout else None,
    )
    chosen, dout = family(options.family), as_heads(dout, options.head_dim)
    delta = attention_delta(as_heads(out, options.head_dim), dout, dlse, plan.spans, chosen.row_dot)
    chosen.attend_backward(call, BackwardState(dout, lse, delta, dq), dk, dv)
    return grads


def _random(rng_state: torch.Tensor) -> tuple[int, int]:
    """Seed and offset of the forward; they lie on the CPU."""
    seed, offset = rng_state.tolist()
    return seed, offset


def _lower_varlen(cx: NodeLowering, *operands: Any) -> tuple[fx.Node, ...]:
    *tensors, _, _ = operands  # the cumulative lengths are in the plan
    grads = cx.call(hetu_attn_varlen_grad, *tensors, cx.plan(), options_of(cx))
    return tuple(cx.item(grads, i) for i in range(3))


# parallel_attn


def hetu_parallel_attn_grad(
    qkv: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    lse: Sequence[torch.Tensor],
    rng_state: Sequence[torch.Tensor],
    dout: Sequence[torch.Tensor],
    dlse: Sequence[torch.Tensor] | None,
    plan: AttnPlan,
    options: Options,
    world: World,
) -> list[torch.Tensor | None]:
    """The gradients of qkv on all pipelines that run here, in lock step.

    Args:
        qkv: The shard of each of them.
        out: Its output of the forward.
        lse: Its log-sum-exps.
        rng_state: The forward's seed and offset.
        dout: The gradient of each output.
        dlse: The gradient of each lse, or None.
        plan: What each pipeline does: the backward of the forward's plan.
        options: What of the op's arguments it depends on.
        world: Which pipelines run here, and the way to the others.
    """
    comm, random = world.communicator(len(plan.pipelines)), _random(rng_state[0])
    calls = []
    for i, r in enumerate(world.pipelines(len(plan.pipelines))):
        own, own_dlse = Rows.packed(qkv[i], options), None if dlse is None else dlse[i]
        new_grads = partial(_packed_like, qkv[i], options)
        calls.append(BackwardCall(own, new_grads, out[i], lse[i], dout[i], own_dlse, plan, r, random, options))
    run_lock_step([call.follow(comm) for call in calls], comm.stuck)
    return [call.finish().qkv for call in calls]


def _packed_like(qkv: torch.Tensor, options: Options) -> Rows:
    return Rows.packed(qkv.new_empty(qkv.shape), options)


def _lower_parallel(cx: NodeLowering, *operands: Any) -> list[tuple[fx.Node, ...]]:
    *tensors, _, _ = operands
    grads = cx.call(hetu_parallel_attn_grad, *tensors, cx.plan(), options_of(cx), cx.world())
    return [(cx.item(grads, i),) for i in range(len(cx.pipelines))]


lowering("attn_varlen_grad", backend="torch")(_lower_varlen)
lowering("parallel_attn_grad", backend="torch")(_lower_parallel)
