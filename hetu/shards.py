"""Shards: one array per pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hetu.errors import ShapeError, caller


class Shards(Sequence[Any]):
    """The arrays of all pipelines of a strategy, in order. With several pipelines ``run`` takes them and gives them.

    Args:
        arrays: One numpy array or torch tensor per pipeline; at least one.

    Example:
        >>> Shards([[1, 2], [3]])[1]
        [3]
    """

    __slots__ = ("_arrays",)

    def __init__(self, arrays: Iterable[Any]) -> None:
        self._arrays = tuple(arrays)
        if not self._arrays:
            raise ShapeError("Shards of no pipeline", where=caller(), fix="give one array per pipeline")

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: Any) -> Any:
        return self._arrays[index]

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(getattr(item, "shape", ("?",)))) for item in self._arrays)
        return f"hetu.Shards({len(self)} pipelines: {shapes})"
