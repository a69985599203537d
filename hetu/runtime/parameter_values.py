"""Parameters as the micro-batches of one run read them: in other dtypes too, each made once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hetu.backends.lower.lowering import ParameterInput
from hetu.backends.torch_private import copy_all
from hetu.runtime.parameters import ParameterStore


class ParameterValues:
    """What modules are given of parameters, for as long as a run computes.

    Args:
        store: Has their values.
        device: Where the run computes.

    Attributes:
        store: The same.
    """

    def __init__(self, store: ParameterStore, device: torch.device) -> None:
        self.store, self._device = store, device
        self._cast: dict[ParameterInput, torch.Tensor] = {}

    def values(self, wanted: Sequence[ParameterInput]) -> list[torch.Tensor]:
        """The values of some parameters, each in the dtype that is wanted of it. Nobody writes to them."""
        own = [self.store.value(item.node).to(self._device) for item in wanted]
        missing = [(item, x) for item, x in zip(wanted, own, strict=True) if self._is_missing(item, x)]
        if missing:
            made = [torch.empty_like(x, dtype=item.dtype) for item, x in missing]
            copy_all(made, [x for _, x in missing])
            self._cast.update(zip([item for item, _ in missing], made, strict=True))
        return [self._cast.get(item, x) for item, x in zip(wanted, own, strict=True)]

    def _is_missing(self, item: ParameterInput, value: torch.Tensor) -> bool:
        return value.dtype != item.dtype and item not in self._cast

    def clear(self) -> None:
        """Lets go of what was made."""
        self._cast.clear()
