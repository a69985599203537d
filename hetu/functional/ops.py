"""``attn_varlen`` as PyTorch ops, ``hetu::attn_varlen`` and its backward: what torch's transforms need to know of them.

Autograd, ``torch.func`` and forward mode meet an op in its Autograd kernel, ``torch.vmap`` in its batching rule, and
tracers see its fake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from hetu.backends.attention.contract import compute_dtype
from hetu.backends.torch_private import (
    apply_of,
    dual_level,
    functorch_level,
    level_functions,
    redispatch_below_autograd,
    set_forward_mode_enabled,
)
from hetu.errors import HetuError
from hetu.functional.attention import backward, forward, prepare
from hetu.functional.checks import check, check_storage, refuse

__all__ = ["for_backward"]

Gradients = tuple[torch.Tensor | None, ...]

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


# Batches


def _one_by_one(op: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., Any]:
    """The batching rule of an op: it runs once per sample, which may have lengths of its own."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        count = info.batch_size

        def samples(x: Any, dim: int | None) -> tuple[Any, ...]:
            if dim is None:
                return (x,) * max(count, 1)
            return x.unbind(dim) if count else (x.sum(dim),)  # zeros: of an empty batch only the shapes matter

        batches = [samples(x, dim) for x, dim in zip(arguments, in_dims, strict=True)]
        results = [op(*sample) for sample in zip(*batches, strict=True)]
        outputs = tuple(torch.stack(parts)[:count] for parts in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


torch.library.register_vmap("hetu::attn_varlen", _one_by_one(torch.ops.hetu.attn_varlen), lib=_library)
torch.library.register_vmap(
    "hetu::attn_varlen_backward", _one_by_one(torch.ops.hetu.attn_varlen_backward), lib=_library
)


# Derivatives


def for_backward(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The lengths as autograd can save them: it takes nothing that was made in ``torch.inference_mode``."""
    return cu_seqlens.clone() if cu_seqlens.is_inference() else cu_seqlens


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, rng_state, *ctx.options = inputs
    lengths = for_backward(cu_seqlens_q), for_backward(cu_seqlens_k)
    ctx.save_for_backward(q, k, v, *output, *lengths, rng_state)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Gradients:
    grads = torch.ops.hetu.attn_varlen_backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
    return *grads, *(None,) * (len(ctx.options) + 3)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    refuse(
        HetuError,
        "the gradients of attn_varlen have no derivative: it can't be differentiated twice",
        "use torch.nn.functional.scaled_dot_product_attention where second derivatives are needed",
    )


def _register_derivative(name: str, save: Callable[..., None], differentiate: Callable[..., Gradients]) -> None:
    """Gives an op its Autograd kernel.

    That which ``torch.library.register_autograd`` makes drops forward-mode tangents without a word, and knows nothing
    of ``torch.func``.

    Args:
        name: The op's.
        save: Keeps in a context what the derivative needs of inputs and outputs.
        differentiate: Gives the gradients of all inputs from a context and those of the outputs.
    """
    if redispatch_below_autograd is None:

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs, output)

        torch.library.register_autograd(f"hetu::{name}", differentiate, setup_context=setup, lib=_library)
        return
    redispatch, op = redispatch_below_autograd, getattr(torch.ops.hetu, name).default

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
            if functorch_level() is None:
                output = redispatch(op, keyset, inputs)
            else:  # levels further out differentiate too, and an autograd function switches that off
                with torch.enable_grad(), set_forward_mode_enabled(True):
                    output = redispatch(op, keyset, inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None, *differentiate(ctx, *grads)

    apply = apply_of(Derivative)
    names = [argument.name for argument in op._schema.arguments]

    def kernel(keyset: Any, *inputs: Any) -> Any:
        tensors = {name: x for name, x in zip(names, inputs, strict=True) if isinstance(x, torch.Tensor)}
        check_storage(**tensors)
        _refuse_forward_mode(tensors)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
            with level_functions():
                return apply(keyset, *inputs)
        return redispatch(op, keyset, inputs)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _refuse_forward_mode(tensors: Mapping[str, torch.Tensor]) -> None:
    if dual_level() < 0:
        return
    for name, x in tensors.items():
        if forward_ad.unpack_dual(x).tangent is not None:
            refuse(
                HetuError,
                f"{name} has a tangent, but attn_varlen has no forward-mode derivative",
                "use reverse mode (torch.func.vjp, torch.autograd.grad), or scaled_dot_product_attention of "
                "torch.nn.functional under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
            )


_register_derivative("attn_varlen", _save, _differentiate)
_register_derivative("attn_varlen_backward", _save_nothing, _no_second_derivative)
