"""``parallel_attn``, and what cuts and joins rows, as PyTorch ops that torch.compile and checkpointing know.

As in :mod:`hetu.functional.attention`, a call has two parts: it is planned, which seen calls skip, and it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hetu.backends.attention.contract import compute_dtype
from hetu.backends.attention.options import with_rows
from hetu.backends.comm import run_lock_step
from hetu.backends.pipelines import BackwardCall, ForwardCall, Rows
from hetu.errors import ShapeError
from hetu.functional.checks import check_heads, check_options, check_storage, refuse
from hetu.functional.derivatives import (
    TAGS,
    Gradients,
    for_backward,
    one_by_one,
    register_derivative,
    register_no_derivative,
    save_call,
    saved_call,
)
from hetu.functional.masking import SCHEMA, Masking, check_masking, parted
from hetu.functional.sharding import PlannedCall, Sharding, sharding_of

OP = "parallel_attn"


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    sharding: Sharding,
    rng_state: torch.Tensor | None,
    method: str,
    is_causal: bool,
    dropout_p: float,
    softmax_scale: float | None,
    masking: Masking,
) -> PlannedCall:
    """Checks a call and finds its plan, on which all ranks of the group agreed.

    Raises:
        HetuError: Whatever :func:`hetu.functional.parallel_attn` refuses.
        CommunicationError: If the ranks call different things, or one is gone.
    """

    def check() -> None:
        check_storage(OP, q=q, k=k, v=v)
        check_heads(q, k, v, OP)
        check_options(rng_state, dropout_p, softmax_scale, OP)
        check_masking(masking, q, OP)
        for name, x in (("q", q), ("k", k)):
            if len(x) != sharding.rows:
                refuse(
                    ShapeError,
                    f"{name} has {len(x)} rows, but rank {sharding.rank} of the group holds {sharding.rows}",
                    "give the rows that cp.dispatch gives this rank",
                    OP,
                )

    call = sharding.call(q, k, v, method, is_causal, dropout_p, softmax_scale, masking, check)
    if call.world.is_distributed:
        sharding.agree(int(table[0]), call, () if rng_state is None else rng_state.tolist())
    return call


def forward(
    call: PlannedCall,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rng_state: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, like q, and lse ``(H_q, rows)``, both contiguous."""
    world, shape = call.world, (1, len(q), 0)
    with world.hanging_up():
        step = ForwardCall(_rows(q, k, v), call.plan, world.rank, _random(rng_state), shape, call.options, sinks)
        _follow(call, step)
        out, lse = step.outputs()
    return out, lse[0]


def backward(
    call: PlannedCall,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rng_state: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[Rows, torch.Tensor | None]:
    """The gradients of q, k and v, the latter two beside each other, and that of the sinks: what the own rows do."""
    own, new_grads = _rows(q, k, v), partial(Rows.new, q, k.shape[1])
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = None if dlse is None else dlse[None]
    plan, rank, random = call.plan.backward(), call.world.rank, _random(rng_state)
    with call.world.hanging_up():
        step = BackwardCall(
            own, new_grads, out, lse[None], dout, dlse, plan, rank, random, call.backward_options, sinks
        )
        _follow(call, step)
        grads = step.finish()
        dsinks = None if sinks is None else step.sink_gradient().to(sinks.dtype)
    return grads, dsinks


def _follow(call: PlannedCall, step: ForwardCall | BackwardCall) -> None:
    """Follows this rank's part of a plan, while the others follow theirs."""
    call.world.begin()
    comm = call.world.communicator(call.world.size)
    run_lock_step([step.follow(comm)], comm.stuck)


def _rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Rows:
    """A rank's own rows."""
    return Rows(with_rows(q), with_rows(k), with_rows(v), None)


def _random(rng_state: torch.Tensor | None) -> tuple[int, int]:
    seed, offset = (0, 0) if rng_state is None else rng_state.tolist()
    return seed, offset


# The ops

_library = torch.library.Library("hetu", "FRAGMENT")
_TENSORS = "Tensor q, Tensor k, Tensor v"
_CALL = (
    "Tensor table, Tensor? rng_state, str split, str group, str method, bool is_causal, float dropout_p, "
    f"float? softmax_scale, {SCHEMA}"
)
_library.define(f"parallel_attn({_TENSORS}, {_CALL}) -> (Tensor out, Tensor lse)", tags=TAGS)
_library.define(
    f"parallel_attn_backward(Tensor? dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor lse, {_CALL}) "
    "-> (Tensor dq, Tensor dkv, Tensor dsinks)",
    tags=TAGS,
)
_library.define("dispatch(Tensor x, Tensor like, Tensor table, str split, str group, int dim) -> Tensor", tags=TAGS)
_library.define("undispatch(Tensor x, Tensor like, Tensor table, str split, str group, int dim) -> Tensor", tags=TAGS)


def _planned(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: tuple[Any, ...]
) -> tuple[PlannedCall, torch.Tensor | None, torch.Tensor | None]:
    """The plan of an op's call, the state of its dropout, and its sinks."""
    (table, rng_state, split, group, *options), masking = parted(call)
    planned = prepare(q, k, v, table, sharding_of(table, split, group), rng_state, *(*options, masking))
    return planned, rng_state, masking.sinks


@torch.library.impl("hetu::parallel_attn", "CompositeExplicitAutograd", lib=_library)
def _forward_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    planned, rng_state, sinks = _planned(q, k, v, call)
    return forward(planned, q, k, v, rng_state, sinks)


@torch.library.register_fake("hetu::parallel_attn", lib=_library)
def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, rng_state, _, _, _, _, dropout_p, softmax_scale = call[:8]
    check_heads(q, k, v, OP)
    check_options(rng_state, dropout_p, softmax_scale, OP)
    check_masking(Masking(*call[8:]), q, OP)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=compute_dtype(q.dtype))


@torch.library.impl("hetu::parallel_attn_backward", "CompositeExplicitAutograd", lib=_library)
def _backward_op(
    dout: torch.Tensor | None, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, lse, *call = rest
    planned, rng_state, sinks = _planned(q, k, v, tuple(call))
    grads, dsinks = backward(planned, dout, dlse, q, k, v, out, lse, rng_state, sinks)
    assert grads.kv is not None, "made by Rows.new"
    return grads.q, grads.kv.unflatten(1, (2, -1)), q.new_empty(0) if dsinks is None else dsinks


@torch.library.register_fake("hetu::parallel_attn_backward", lib=_library)
def _backward_fake(
    dout: torch.Tensor | None, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (rows, heads, head_dim), sinks = k.shape, Masking(*rest[10:]).sinks
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty((rows, 2, heads, head_dim)), dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, *call = inputs
    save_call(ctx, (q, k, v, *output), tuple(call))


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Gradients:
    saved, call = saved_call(ctx)
    dq, dkv, dsinks = torch.ops.hetu.parallel_attn_backward(dout, dlse, *saved, *call)
    return dq, *dkv.unbind(1), *(None,) * (len(call) - 1), None if call[-1] is None else dsinks


register_derivative(_library, OP, _save, _differentiate)
register_no_derivative(_library, f"{OP}_backward", OP)
# Each sample in its turn, on all ranks alike.
torch.library.register_vmap(f"hetu::{OP}", one_by_one(torch.ops.hetu.parallel_attn), lib=_library)
torch.library.register_vmap(f"hetu::{OP}_backward", one_by_one(torch.ops.hetu.parallel_attn_backward), lib=_library)


# Cutting and joining. A whole tensor is one value that all ranks hold: each op is the other's gradient.


@torch.library.impl("hetu::dispatch", "CompositeExplicitAutograd", lib=_library)
def _dispatch_op(
    x: torch.Tensor, like: torch.Tensor, table: torch.Tensor, split: str, group: str, dim: int
) -> torch.Tensor:
    return x.index_select(dim, sharding_of(table, split, group).own_rows(x.device))


@torch.library.register_fake("hetu::dispatch", lib=_library)
@torch.library.register_fake("hetu::undispatch", lib=_library)
def _moved_fake(
    x: torch.Tensor, like: torch.Tensor, table: torch.Tensor, split: str, group: str, dim: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:dim], like.shape[0], *x.shape[dim + 1 :]))


@torch.library.impl("hetu::undispatch", "CompositeExplicitAutograd", lib=_library)
def _undispatch_op(
    x: torch.Tensor, like: torch.Tensor, table: torch.Tensor, split: str, group: str, dim: int
) -> torch.Tensor:
    sharding = sharding_of(table, split, group)
    sharding.agree_on_rows(int(table[0]))
    everything = sharding.world.gather_rows(x.movedim(dim, 0).contiguous(), sharding.counts)
    whole = everything.index_select(0, sharding.places(x.device))
    return whole.movedim(0, dim).contiguous()


def _save_move(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, _, table, ctx.split, ctx.group, ctx.dim = inputs
    ctx.save_for_backward(for_backward(table), _counted(x, ctx.dim))


def _counted(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A tensor without memory of its own that has as many entries as x along a dim: what compiled sizes come from."""
    return torch.empty(1, dtype=torch.int8, device="cpu").expand(x.shape[dim])


def _undo(op: Callable[..., torch.Tensor], ctx: Any, grad: torch.Tensor) -> Gradients:
    table, like = ctx.saved_tensors
    return op(grad, like, table, ctx.split, ctx.group, ctx.dim), *(None,) * 5


for _name, _undoing in (("dispatch", torch.ops.hetu.undispatch), ("undispatch", torch.ops.hetu.dispatch)):
    register_derivative(_library, _name, _save_move, partial(_undo, _undoing), f"cp.{_name}")
    torch.library.register_vmap(f"hetu::{_name}", one_by_one(getattr(torch.ops.hetu, _name)), lib=_library)
