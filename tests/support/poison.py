"""Fresh memory that is full of NaN, so that an output row that nobody writes is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hetu.backends import memory

_MAKERS = (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")


def poison(replace: Callable[[Any, str, Any], None]) -> None:
    """Makes all that hetu allocates NaN, where it is of floats; ``replace`` sets an attribute of an owner."""
    for owner, name in _MAKERS:
        replace(owner, name, _filled(getattr(owner, name)))
    replace(memory, "empty_strided_cuda", None)  # it would pass torch.empty by


def unpoison() -> None:
    """Makes fresh memory hold what was there, in a process that may have been poisoned."""
    for owner, name in _MAKERS:
        setattr(owner, name, getattr(getattr(owner, name), "plain", getattr(owner, name)))


def _filled(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def fresh(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = plain(*args, **kwargs)
        with torch.no_grad():  # it may be a leaf
            return made.fill_(torch.nan) if made.is_floating_point() else made

    vars(fresh)["plain"] = plain
    return fresh
