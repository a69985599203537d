"""How a call meets torch: whether it may pass the dispatcher by, and what autocast makes of its inputs."""

from __future__ import annotations

import torch

from hetu.backends.torch_private import dispatch_modes, dual_level, functorch_level, tracing_state, version_of

__all__ = ["as_autocast", "is_plain", "rng_state_of", "version_of"]

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


def as_autocast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What autocast makes of an input of an op that runs in low precision."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def rng_state_of(seed: int | None) -> torch.Tensor:
    """Seed and offset of a call's dropout."""
    if seed is None:
        return torch.randint(_SEEDS, (2,), dtype=torch.int64, device="cpu")
    return torch.tensor([seed & _SEEDS, 0], dtype=torch.int64, device="cpu")
