"""The gradients of both attention ops at run time, by calls of a kernel family's ``attend_backward``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from hetu.backends.attention.contract import BackwardState, attention_delta, compute_dtype
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.options import Options, as_heads, key_positions, with_rows
from hetu.backends.comm import Communicator, World, follow_backward, run_lock_step
from hetu.backends.families import family
from hetu.backends.lower.attention import options_of
from hetu.backends.lower.attention_heads import HeadsBackward
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.parallel import AttnPlan
from hetu.parallel.mask.segments import Turn
from hetu.parallel.plan.instructions import Attend
from hetu.parallel.plan.varlen import VarlenPlan


def _state(
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    dq: torch.Tensor,
    plan: Any,
    options: Options,
) -> BackwardState:
    """What the steps read of the queries; ``plan`` has the spans."""
    out, dout = as_heads(out, options.head_dim), as_heads(dout, options.head_dim)
    delta = attention_delta(out, dout, dlse, plan.spans, family(options.family).row_dot)
    return BackwardState(dout, lse, delta, dq)


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
    family(options.family).attend_backward(call, _state(out, lse, dout, dlse, dq, plan, options), dk, dv)
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
) -> list[torch.Tensor]:
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
    calls: list[_PipelineBackward | HeadsBackward] = []
    for i, r in enumerate(world.pipelines(len(plan.pipelines))):
        kind = _PipelineBackward if plan.pipelines[r].heads is None else HeadsBackward
        own_dlse = None if dlse is None else dlse[i]
        calls.append(kind(qkv[i], out[i], lse[i], dout[i], own_dlse, plan, r, random, options))
    run_lock_step([call.follow(comm) for call in calls], comm.stuck)
    return [call.gradient() for call in calls]


class _PipelineBackward:
    """One pipeline's share of the gradient of a ``parallel_attn``."""

    def __init__(
        self,
        qkv: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        plan: AttnPlan,
        pipeline: int,
        random: tuple[int, int],
        options: Options,
    ) -> None:
        self.options, self.layout, self.plan = options, plan.layout, plan.pipelines[pipeline]
        self.q, self.kv = options.cut(with_rows(qkv))
        self.dropout = options.dropout(random, plan.layout.group_index(pipeline))
        self.grad = qkv.new_empty(qkv.shape)
        # Sums of several parts are made in float32; what a single step computes is written as it is returned.
        high = compute_dtype(qkv.dtype)
        dq, self.dkv = options.cut(self.grad)
        self.sums, acc = self.dkv, dq
        if qkv.dtype != high and self.plan.sums_gradients:
            self.sums = qkv.new_empty(self.dkv.shape, dtype=high)
        if qkv.dtype != high and self.plan.runs_on:
            acc = qkv.new_empty(dq.shape, dtype=high)
        self.state = _state(out, lse, dout, dlse, dq, self.plan, options)
        self.state.acc = acc if self.plan.runs_on else None

    def follow(self, comm: Communicator) -> Iterator[bool]:
        """Follows its part of the plan."""
        return follow_backward(self.plan, self.kv, self.sums, comm, self.attend)

    def attend(self, step: Attend, buffer: torch.Tensor, grads: torch.Tensor, turn: Turn | None, keeps: bool) -> None:
        """The backward of one step: adds to the gradient of q, writes those of the buffer's keys and values."""
        call = AttendCall(
            self.q,
            buffer[:, 0],
            buffer[:, 1],
            self.plan.spans,
            step.table,
            self.options.softmax_scale,
            turn,
            self.dropout,
            key_positions(self.plan, step, self.layout) if self.dropout else None,
        )
        family(self.options.family).attend_backward(call, self.state, grads[:, 0], grads[:, 1], keeps)

    def gradient(self) -> torch.Tensor:
        """The gradient of the shard, once the plan is done."""
        if self.sums is not self.dkv:
            self.dkv.copy_(self.sums)
        return self.grad


def _lower_parallel(cx: NodeLowering, *operands: Any) -> list[tuple[fx.Node, ...]]:
    *tensors, _, _ = operands
    grads = cx.call(hetu_parallel_attn_grad, *tensors, cx.plan(), options_of(cx), cx.world())
    return [(cx.item(grads, i),) for i in range(len(cx.pipelines))]


lowering("attn_varlen_grad", backend="torch")(_lower_varlen)
lowering("parallel_attn_grad", backend="torch")(_lower_parallel)
