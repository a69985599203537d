"""How a call meets torch: whether it may pass the dispatcher by, and what autocast makes of its inputs."""

from __future__ import annotations

from typing import Any

import torch

from hetu.arguments import flag, integer, real
from hetu.backends.torch_private import (
    dispatch_modes,
    dual_level,
    functorch_level,
    is_legacy_batched,
    tracing_state,
    version_of,
)

__all__ = ["cast_as_autocast", "checked_options", "is_plain", "may_pass_by", "rng_state_of", "version_of"]

_PLAIN = {torch.Tensor, torch.nn.Parameter}
_SEEDS = 2**63 - 1


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether nothing watches or transforms what is done to the tensors, of which the first one has data.

    Then the op may be computed without torch's dispatcher. What needs it: fake and other subclasses, dispatch modes
    (such as FLOP counters), ``torch.func``, forward mode, ``torch.jit.trace``.
    """
    for x in tensors:
        if x is not None and type(x) not in _PLAIN:
            return False
    return dispatch_modes() == 0 and functorch_level() is None and tracing_state() is None and dual_level() < 0


def may_pass_by(*grads: torch.Tensor | None) -> bool:
    """Whether a backward may be computed without the dispatcher, and its gradients will not be differentiated."""
    return (
        not torch.compiler.is_compiling()  # asked first: compiled autograd can't follow the others
        and not torch.is_grad_enabled()
        and is_plain(*grads)
        and not any(is_legacy_batched(x) for x in grads if x is not None)
    )


def cast_as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What autocast makes of the inputs of an op that runs in low precision, if it is on for the first one's device."""
    kind = tensors[0].device.type
    if tensors[0].is_meta or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def checked_options(
    op: str, is_causal: Any, return_lse: Any, dropout_p: Any, softmax_scale: Any, seed: Any
) -> tuple[bool, bool, float, float | None, int | None]:
    """The options that all attentions have, as Python's own bools and numbers.

    Raises:
        HetuError: If one is none.
    """
    flags = flag(is_causal, "is_causal", op=op), flag(return_lse, "return_lse", op=op)
    dropped = real(dropout_p, "dropout_p", "a probability in [0, 1)", lambda p: 0 <= p < 1, op=op)
    if softmax_scale is not None:
        softmax_scale = real(softmax_scale, "softmax_scale", op=op, fix="give None for 1/sqrt(head_dim)")
    if seed is not None:
        seed = integer(seed, "seed", op=op, fix="give an int, or None to draw one")
    return *flags, dropped, softmax_scale, seed


def rng_state_of(seed: int | None) -> torch.Tensor:
    """Seed and offset of a call's dropout."""
    if seed is None:
        return torch.randint(_SEEDS, (2,), dtype=torch.int64, device="cpu")
    return torch.tensor([seed & _SEEDS, 0], dtype=torch.int64, device="cpu")
