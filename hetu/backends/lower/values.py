"""What a module's nodes say of themselves, and values that are on their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from hetu.graph import Tensor

MADE_BY, VALUE, SIZE = "made_by", "value", "size"
"""Entries of the ``meta`` of a module's nodes, for who reads the module later.

The first is the hetu node that a call was emitted for and the pipeline, ``(node, pipeline)``; the second the tensor
that the value is and whose, ``(tensor, pipeline)``; the third the size that an int is, ``(expression, pipeline)``.
"""


class Deferred:
    """A value that is on its way: what ends the waiting is emitted where somebody reads it first.

    Args:
        finish: Emits that.

    Attributes:
        known: What the finished value is, as for :data:`VALUE`.
    """

    def __init__(self, finish: Callable[[], fx.Node]) -> None:
        self._finish = finish
        self._value: fx.Node | None = None
        self.known: tuple[Tensor, int] | None = None

    def value(self) -> fx.Node:
        """The finished value."""
        if self._value is None:
            self._value = self._finish()
            if self.known is not None:
                self._value.meta.setdefault(VALUE, self.known)
        return self._value


def finished(value: Any) -> Any:
    """A value that may be on its way, once it is there."""
    return value.value() if isinstance(value, Deferred) else value
