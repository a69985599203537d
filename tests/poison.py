"""Fresh memory that is full of NaN, so that an output row that nobody writes is seen."""

from __future__ import annotations

from collections.abc import Callable

import torch


def poisoned_new_empty() -> Callable[..., torch.Tensor]:
    """What takes the place of ``torch.Tensor.new_empty``, as it is now."""
    plain = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        fresh = plain(self, *args, **kwargs)  # type: ignore[arg-type]
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    return new_empty
