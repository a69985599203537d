"""Shards: one array per pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from hetu.arguments import refuse
from hetu.errors import ShapeError


class Shards(Sequence[Any]):
    """The arrays of all pipelines of a strategy, in order. With several pipelines ``run`` takes them and gives them.

    Args:
        arrays: One numpy array or torch tensor per pipeline, in order; at least one.

    Raises:
        ShapeError: If there are none, or what came has no items in order.

    Example:
        >>> Shards([[1, 2], [3]])[1]
        [3]
    """

    __slots__ = ("_arrays",)

    def __init__(self, arrays: Iterable[Any]) -> None:
        is_ordered = not isinstance(arrays, (str, bytes, Mapping, Set))
        try:
            self._arrays = tuple(arrays) if is_ordered else ()
        except Exception:  # no iterable, or one of the user's own that fails
            self._arrays = ()
        if not self._arrays:
            refuse(arrays, "arrays", "a list of one array per pipeline", op="Shards", error=ShapeError)

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: Any) -> Any:
        return self._arrays[index]

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(getattr(item, "shape", ("?",)))) for item in self._arrays)
        return f"hetu.Shards({len(self)} pipelines: {shapes})"
