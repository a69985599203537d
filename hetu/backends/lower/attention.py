"""Both attention ops at run time: plans in, calls of a kernel family's ``attend`` out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hetu.backends.attention.contract import finish_softmax, new_state
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.options import Options, Random, as_heads, signature, wide_sinks
from hetu.backends.comm import World, run_lock_step
from hetu.backends.families import choose, family
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.lower.traced import aside
from hetu.backends.pipelines import ForwardCall, Rows
from hetu.parallel import AttnPlan
from hetu.parallel.plan.varlen import VarlenPlan


def options_of(cx: NodeLowering) -> Options:
    """The options of an attention node, with the kernel family that takes it; notes which one and why."""
    choice = choose(cx.backend, signature(cx.node, cx.device))
    cx.note(str(choice))
    return Options.of(cx.node, choice.family.name)


# attn_varlen


def hetu_attn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: VarlenPlan,
    random: Random,
    batch: int,
    max_seqlen_q: int,
    columns: int,
    fills_lse: bool,
    options: Options,
) -> tuple[torch.Tensor, ...]:
    """Runs ``attn_varlen`` on one pipeline; gives its output, lse and, if asked for, p."""
    rows = as_heads(q, options.head_dim)
    dropout = options.dropout(random, 0)
    wanted = columns if options.return_softmax else None
    state = new_state(rows, plan.spans, batch, max_seqlen_q, runs_on=False, columns=wanted, fills_lse=fills_lse)
    if options.zero_tensors:
        state.lse.zero_()
    call = AttendCall(
        rows,
        as_heads(k, options.head_dim),
        as_heads(v, options.head_dim),
        plan.spans,
        plan.table,
        options.softmax_scale,
        None,
        dropout,
        plan.key_position if options.needs_positions else None,
        options.softcap,
        wide_sinks(sinks, q.dtype),
    )
    family(options.family).attend(call, state)
    outputs = state.out if q.ndim == 3 else state.out.view(q.shape), state.lse
    return (*outputs, finish_softmax(state, plan.spans, dropout, q.dtype)) if options.return_softmax else outputs


@aside
def hetu_no_softmax(q: torch.Tensor) -> torch.Tensor:
    """What stands for p where it was not asked for."""
    return q.new_empty(0)


@aside
def hetu_rng_state(random: Random) -> torch.Tensor:
    """Seed and offset as a tensor; a call of its own, so that nothing is made where nobody fetches it."""
    return torch.tensor(random, dtype=torch.int64, device="cpu")


def _lower_varlen(cx: NodeLowering, q: Any, k: Any, v: Any, *others: Any) -> tuple[fx.Node, ...]:
    lse, p = cx.node.outputs[1:3]
    columns = cx.size(p.symbolic_shape[3]) if cx.node.attrs["return_softmax"] else 0
    batch, max_q = cx.size(lse.symbolic_shape[0]), cx.size(lse.symbolic_shape[2])
    options, sinks = options_of(cx), others[-1]  # the cumulative lengths are in the plan
    fills_lse = cx.node.attrs["return_softmax"] or cx.is_read(1, but_by="attn_varlen_grad")
    sizes = batch, max_q, columns, fills_lse
    outputs = cx.call(hetu_attn_varlen, q, k, v, sinks, cx.plan(), cx.random(), *sizes, options)
    softmax = cx.item(outputs, 2) if options.return_softmax else cx.call(hetu_no_softmax, q)
    return cx.item(outputs, 0), cx.item(outputs, 1), softmax, cx.call(hetu_rng_state, cx.random())


# parallel_attn


def hetu_parallel_attn(
    qkv: Sequence[torch.Tensor],
    sinks: Sequence[torch.Tensor] | None,
    plan: AttnPlan,
    random: Random,
    shapes: Sequence[tuple[int, int, int]],
    options: Options,
    world: World,
) -> list[tuple[torch.Tensor, ...]]:
    """Runs ``parallel_attn`` on all pipelines that run here, in lock step.

    Args:
        qkv: The shard of each of them.
        sinks: The sinks that each of them has, or None.
        plan: What each pipeline of the strategy does.
        random: Seed and offset.
        shapes: The (batch, seq_len, columns of p) of each that runs here.
        options: What of the op's arguments it depends on.
        world: Which these are, and the way to the others.

    Returns:
        Output, lse and, if asked for, p of each that runs here.
    """
    comm = world.communicator(len(plan.pipelines))
    calls = []
    for i, r in enumerate(world.pipelines(len(plan.pipelines))):
        own, own_sinks = Rows.packed(qkv[i], options), None if sinks is None else sinks[i]
        calls.append(ForwardCall(own, plan, r, random, shapes[i], options, own_sinks))
    run_lock_step([call.follow(comm) for call in calls], comm.stuck)
    results = [call.outputs() for call in calls]
    return [(out.flatten(1), *rest) for out, *rest in results]


def _lower_parallel(cx: NodeLowering, qkv: list[Any], *others: Any) -> list[tuple[fx.Node, ...]]:
    node, shapes = cx.node, []
    for r in cx.pipelines:
        batch, _, seq_len = cx.shape(1, pipeline=r)
        shapes.append((batch, seq_len, cx.shape(3, pipeline=r)[3] if len(node.outputs) > 3 else 0))
    options, sinks = options_of(cx), others[-1]
    results = cx.call(hetu_parallel_attn, qkv, sinks, cx.plan(), cx.random(), shapes, options, cx.world())
    pipelines = [cx.item(results, i) for i in range(len(cx.pipelines))]
    values = [[cx.item(one, i) for i in range(len(node.outputs) - 1)] for one in pipelines]
    return [(out, lse, cx.call(hetu_rng_state, cx.random()), *p) for out, lse, *p in values]


lowering("attn_varlen", backend="torch")(_lower_varlen)
lowering("parallel_attn", backend="torch")(_lower_parallel)
