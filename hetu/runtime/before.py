"""What some objects were before a change, so that the change can be taken back."""

from __future__ import annotations

from collections import deque
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler


class Before:
    """Tensors and options as they are now.

    Dicts, lists, sets, arrays and tensors are followed from the given ones to all that they hold, and keep their
    identity: :meth:`restore` puts the old contents back into the very same objects. So are the attributes of schedules
    and optimisers. Of any other object that can be called, such as a user's rule for the learning rate, the attributes
    are put back, but no further object is followed: it might lead to all of the user's program.

    Args:
        roots: What is about to be changed.

    Example:
        >>> weight, options = torch.zeros(2), {"lr": [0.1]}
        >>> before = Before(weight, options)
        >>> _ = weight.add_(1); options["lr"][0] = 0.2
        >>> before.restore()
        >>> weight, options
        (tensor([0., 0.]), {'lr': [0.1]})
    """

    def __init__(self, *roots: Any) -> None:
        self._seen: dict[int, Any] = {}  # by id; holding the objects keeps their ids from being used again
        self._tensors: list[torch.Tensor] = []
        self._arrays: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._rows: list[tuple[Any, list[Any]]] = []  # lists and deques
        self._sets: list[tuple[set[Any], set[Any]]] = []
        for root in roots:
            self._follow(root, is_root=True)
        self._values = _Values(self._tensors)

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
        self._values.restore()

    def _follow(self, value: Any, is_root: bool = False, to_objects: bool = True) -> None:
        kind = type(value)
        if kind in _PLAIN or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            self._tensors.append(value)
        elif isinstance(value, dict):
            self._dicts.append((value, dict(value)))
            for item in value.values():
                self._follow(item, to_objects=to_objects)
        elif isinstance(value, (list, deque, tuple)):
            if kind is not tuple:
                self._rows.append((value, list(value)))
            for item in value:
                self._follow(item, to_objects=to_objects)
        elif isinstance(value, set):
            self._sets.append((value, set(value)))
        elif isinstance(value, np.ndarray):
            self._arrays.append((value, value.copy()))
        elif to_objects:
            self._follow_object(value, is_root)

    def _follow_object(self, value: Any, is_root: bool) -> None:
        owner = getattr(value, "__self__", value)  # a bound method's state is its object's
        attributes = getattr(owner, "__dict__", None)
        if is_root or isinstance(owner, (LRScheduler, torch.optim.Optimizer)):
            self._follow(attributes)
        elif callable(value) and isinstance(attributes, dict) and not isinstance(owner, ModuleType):
            self._follow(attributes, to_objects=False)


_PLAIN = frozenset({int, float, bool, str, type(None)})


class _Values:
    """The values of tensors: one copy for each dtype and device, which takes a fraction of the time of many small ones.

    Args:
        tensors: Dense ones, of any shapes.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        alike: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        self._kept = [(group, torch.cat([tensor.reshape(-1) for tensor in group])) for group in alike.values()]

    def restore(self) -> None:
        """Puts them back."""
        for group, values in self._kept:
            for tensor, old in zip(group, values.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(old.view(tensor.shape))
