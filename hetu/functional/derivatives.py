"""What torch's transforms need to know of an op: its derivative, and its rule for batches.

Autograd, ``torch.func`` and forward mode meet an op in its Autograd kernel, ``torch.vmap`` in its batching rule, and
tracers see its fake, which stands beside the op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from hetu.backends.torch_private import (
    apply_of,
    dual_level,
    functorch_level,
    level_functions,
    redispatch_below_autograd,
    set_forward_mode_enabled,
)
from hetu.errors import HetuError
from hetu.functional.checks import check_storage, refuse

Gradients = tuple[torch.Tensor | None, ...]

TAGS = tuple(
    tag for name in ("pt2_compliant_tag", "cudagraph_unsafe") if (tag := getattr(torch.Tag, name, None)) is not None
)
"""Of every op. torch.compile leaves them out of CUDA graphs, which can't hold what travels between ranks, and would go
on with the lengths that the host read when the graph was captured."""


def one_by_one(op: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., Any]:
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


def for_backward(lengths: torch.Tensor) -> torch.Tensor:
    """A tensor of lengths as autograd can save them: it takes nothing that was made in ``torch.inference_mode``."""
    return lengths.clone() if lengths.is_inference() else lengths


def save_call(ctx: Any, tensors: tuple[torch.Tensor, ...], call: tuple[Any, ...]) -> None:
    """Keeps in a context what the derivative of an attention needs.

    Args:
        ctx: The context.
        tensors: The inputs that are always there, and the outputs.
        call: All other arguments: lengths, options, and tensors that may be missing.
    """
    held = [isinstance(x, torch.Tensor) for x in call]
    ctx.save_for_backward(*tensors, *(for_backward(x) for x, is_held in zip(call, held, strict=True) if is_held))
    ctx.call, ctx.held = [None if is_held else x for x, is_held in zip(call, held, strict=True)], held
    ctx.set_materialize_grads(False)


def saved_call(ctx: Any) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
    """What :func:`save_call` kept: the tensors, and the call."""
    saved = ctx.saved_tensors  # unpacked once: a checkpoint allows no more
    first = len(saved) - sum(ctx.held)
    held = iter(saved[first:])
    call = tuple(next(held) if is_held else x for x, is_held in zip(ctx.call, ctx.held, strict=True))
    return saved[:first], call


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    pass


def register_no_derivative(library: torch.library.Library, name: str, of: str) -> None:
    """Says of the op that computes the gradients of another that they have no derivative."""

    def refuse_second(ctx: Any, *grads: Any) -> NoReturn:
        refuse(
            HetuError,
            f"the gradients of {of} have no derivative: it can't be differentiated twice",
            "use torch.nn.functional.scaled_dot_product_attention where second derivatives are needed",
            of,
        )

    register_derivative(library, name, _save_nothing, refuse_second, of)


def register_derivative(
    library: torch.library.Library,
    name: str,
    save: Callable[..., None],
    differentiate: Callable[..., Gradients],
    of: str | None = None,
) -> None:
    """Gives an op its Autograd kernel.

    That which ``torch.library.register_autograd`` makes drops forward-mode tangents without a word, and knows nothing
    of ``torch.func``.

    Args:
        library: Where the op was defined.
        name: The op's.
        save: Keeps in a context what the derivative needs of inputs and outputs.
        differentiate: Gives the gradients of all inputs from a context and those of the outputs.
        of: The function that errors name, if it is another.
    """
    if redispatch_below_autograd is None:

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs, output)

        torch.library.register_autograd(f"hetu::{name}", differentiate, setup_context=setup, lib=library)
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
    defaults = tuple(argument.default_value for argument in op._schema.arguments)

    def kernel(keyset: Any, *inputs: Any) -> Any:
        inputs += defaults[len(inputs) :]  # torch leaves out last arguments that are their defaults
        tensors = {name: x for name, x in zip(names, inputs, strict=True) if isinstance(x, torch.Tensor)}
        check_storage(of or name, **tensors)
        _refuse_forward_mode(of or name, tensors)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
            with level_functions():
                return apply(keyset, *inputs)
        return redispatch(op, keyset, inputs)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def _refuse_forward_mode(op: str, tensors: Mapping[str, torch.Tensor]) -> None:
    if dual_level() < 0:
        return
    for name, x in tensors.items():
        if forward_ad.unpack_dual(x).tangent is not None:
            refuse(
                HetuError,
                f"{name} has a tangent, but {op} has no forward-mode derivative",
                "use reverse mode (torch.func.vjp, torch.autograd.grad), or scaled_dot_product_attention of "
                "torch.nn.functional under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
                op,
            )
