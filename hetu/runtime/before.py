"""What some objects were before a change, so that the change can be taken back."""

from __future__ import annotations

from collections import deque
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

_PLAIN = frozenset({int, float, bool, str, type(None)})


class Before:
    """Tensors and options as they are now.

    Dicts, lists, sets, arrays and tensors are followed from the given objects to all that they hold, and keep their
    identity: :meth:`restore` puts the old contents back into the very same objects. So are the attributes of schedules
    and optimisers. Of any other object that can be called, such as a user's rule for the learning rate, the attributes
    are put back, but no further object is followed: it might lead to all of the user's program.

    Args:
        objects: What is about to be changed: tensors, or objects with attributes.

    Example:
        >>> schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(2)]), 1)
        >>> before = Before(schedule)
        >>> schedule.last_epoch = 7
        >>> before.restore()
        >>> schedule.last_epoch
        0
    """

    def __init__(self, *objects: Any) -> None:
        self._seen: dict[int, Any] = {}  # by id; holding the objects keeps their ids from being used again
        self._tensors: list[torch.Tensor] = []
        self._arrays: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._rows: list[tuple[Any, list[Any]]] = []  # lists and deques
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._others: list[Any] = []
        self._follow([x if isinstance(x, torch.Tensor) else getattr(x, "__dict__", None) for x in objects])
        for item in self._others:
            attributes = getattr(getattr(item, "__self__", item), "__dict__", None)  # a bound method's are its object's
            if callable(item) and isinstance(attributes, dict):
                self._follow([attributes], to_objects=False)
        self._values = [(group, _joined(group)) for group in _alike(self._tensors)]

    def restore(self) -> None:
        """Takes back all that was changed since."""
        for items, old in self._dicts:
            items.clear()
            items.update(old)
        for row, values in self._rows:
            row.clear()
            row.extend(values)
        for members, had in self._sets:
            members.clear()
            members.update(had)
        for array, numbers in self._arrays:
            array[...] = numbers
        with torch.no_grad():
            for group, joined in self._values:
                for tensor, old_value in zip(group, joined.split([t.numel() for t in group]), strict=True):
                    tensor.copy_(old_value.view(tensor.shape))

    def keep_where(self, flag: torch.Tensor) -> None:
        """Puts the old values of tensors on the flag's device back, there and without waiting, if it is set.

        Of these tensors :meth:`restore` does nothing any more, and their copies are let go of.
        """
        left = []
        with torch.no_grad():
            for group, joined in self._values:
                if joined.device != flag.device:
                    left.append((group, joined))
                    continue
                for tensor, old_value in zip(group, joined.split([t.numel() for t in group]), strict=True):
                    torch.where(flag, old_value.view(tensor.shape), tensor, out=tensor)
        self._values = left

    def _follow(self, left: list[Any], to_objects: bool = True) -> None:
        """Notes what is found on the way; a loop over a list, for every update comes here with hundreds of tensors."""
        seen, tensors, dicts = self._seen, self._tensors, self._dicts
        while left:
            value = left.pop()
            kind = type(value)
            if kind in _PLAIN or id(value) in seen:
                continue
            seen[id(value)] = value
            if isinstance(value, torch.Tensor):
                tensors.append(value)
            elif isinstance(value, dict):
                dicts.append((value, value.copy()))
                left += value.values()
            elif isinstance(value, (list, deque)):
                self._rows.append((value, list(value)))
                left += value
            elif isinstance(value, (LRScheduler, torch.optim.Optimizer)):
                left.append(value.__dict__)
            elif isinstance(value, tuple):
                left += value
            elif isinstance(value, set):
                self._sets.append((value, set(value)))
            elif isinstance(value, np.ndarray):
                self._arrays.append((value, value.copy()))
            elif to_objects and not isinstance(value, (type, ModuleType)):
                self._others.append(value)


def _alike(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors in groups of one dtype and device, scalars apart."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device, tensor.ndim == 0), []).append(tensor)
    return list(groups.values())


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All values one after the other: one copy takes a fraction of the time of many small ones."""
    if tensors[0].ndim == 0:
        return torch.stack(tensors)
    return torch.cat([tensor if tensor.ndim == 1 else tensor.reshape(-1) for tensor in tensors])
