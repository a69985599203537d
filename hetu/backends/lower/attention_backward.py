"""The gradients of both attention ops at run time, by calls of a kernel family's ``attend_backward``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from hetu.backends.attention.contract import BackwardState, attention_delta, sink_gradient
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.options import Options, as_heads, wide_sinks
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
    sinks: torch.Tensor | None,
    plan: VarlenPlan,
    options: Options,
) -> list[torch.Tensor]:
    """The gradients of one pipeline's q, k and v, and of its sinks if there are some."""
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
        options.softcap,
        wide := wide_sinks(sinks, q.dtype),
    )
    chosen, dout = family(options.family), as_heads(dout, options.head_dim)
    delta = attention_delta(as_heads(out, options.head_dim), dout, dlse, plan.spans, chosen.row_dot)
    chosen.attend_backward(call, BackwardState(dout, lse, delta, dq), dk, dv)
    if sinks is None or wide is None:
        return grads
    return [*grads, sink_gradient(wide, lse, delta, plan.spans).to(sinks.dtype)]


def _random(rng_state: torch.Tensor) -> tuple[int, int]:
    """Seed and offset of the forward; they lie on the CPU."""
    seed, offset = rng_state.tolist()
    return seed, offset


def _lower_varlen(cx: NodeLowering, *operands: Any) -> tuple[fx.Node, ...]:
    *tensors, _, _, sinks = operands  # the cumulative lengths are in the plan
    grads = cx.call(hetu_attn_varlen_grad, *tensors, sinks, cx.plan(), options_of(cx))
    return tuple(cx.item(grads, i) for i in range(len(cx.node.outputs)))


# parallel_attn


def hetu_parallel_attn_grad(
    qkv: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    lse: Sequence[torch.Tensor],
    rng_state: Sequence[torch.Tensor],
    dout: Sequence[torch.Tensor],
    dlse: Sequence[torch.Tensor] | None,
    sinks: Sequence[torch.Tensor] | None,
    plan: AttnPlan,
    options: Options,
    world: World,
) -> list[tuple[torch.Tensor | None, ...]]:
    """The gradients of qkv, and of the sinks if there are some, on all pipelines that run here, in lock step.

    Args:
        qkv: The shard of each of them.
        out: Its output of the forward.
        lse: Its log-sum-exps.
        rng_state: The forward's seed and offset.
        dout: The gradient of each output.
        dlse: The gradient of each lse, or None.
        sinks: The forward's sinks on each pipeline, or None.
        plan: What each pipeline does: the backward of the forward's plan.
        options: What of the op's arguments it depends on.
        world: Which pipelines run here, and the way to the others.
    """
    comm, random = world.communicator(len(plan.pipelines)), _random(rng_state[0])
    calls = []
    for i, r in enumerate(world.pipelines(len(plan.pipelines))):
        own, own_dlse = Rows.packed(qkv[i], options), None if dlse is None else dlse[i]
        new_grads = partial(_packed_like, qkv[i], options)
        own_sinks = None if sinks is None else sinks[i]
        given = out[i], lse[i], dout[i], own_dlse
        calls.append(BackwardCall(own, new_grads, *given, plan, r, random, options, own_sinks))
    run_lock_step([call.follow(comm) for call in calls], comm.stuck)
    grads = [call.finish().qkv for call in calls]
    if sinks is None:
        return [(grad,) for grad in grads]
    of_sinks = [call.sink_gradient().to(own.dtype) for call, own in zip(calls, sinks, strict=True)]
    return list(zip(grads, of_sinks, strict=True))


def _packed_like(qkv: torch.Tensor, options: Options) -> Rows:
    return Rows.packed(qkv.new_empty(qkv.shape), options)


def _lower_parallel(cx: NodeLowering, *operands: Any) -> list[tuple[fx.Node, ...]]:
    *tensors, _, _, sinks = operands
    grads = cx.call(hetu_parallel_attn_grad, *tensors, sinks, cx.plan(), options_of(cx), cx.world())
    pipelines = [cx.item(grads, i) for i in range(len(cx.pipelines))]
    return [tuple(cx.item(one, i) for i in range(len(cx.node.outputs))) for one in pipelines]


lowering("attn_varlen_grad", backend="torch")(_lower_varlen)
lowering("parallel_attn_grad", backend="torch")(_lower_parallel)
