"""Where a tensor lies: which boxes of it each rank holds. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple


class Box(NamedTuple):  # a key of many dicts: hashed in C
    """A part of a tensor: along each axis the indices from ``start`` up to, not including, ``stop``.

    A tensor without axes has one box, which is the whole of it.

    Example:
        >>> box = Box((0, 2), (3, 4))
        >>> box.shape, box.slices_in(Box((0, 1), (3, 9)))
        ((3, 2), (slice(0, 3, None), slice(1, 3, None)))
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor of that shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size along each axis."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    def common(self, other: Box) -> Box:
        """The part that lies in both, possibly empty."""
        start = tuple(map(max, self.start, other.start))
        return Box(start, tuple(map(max, start, map(min, self.stop, other.stop))))

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """The indices of this box within a tensor that holds ``outer``, which contains it."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True))


@dataclass(frozen=True, slots=True)
class Placement:
    """Which boxes of the whole tensor each rank holds.

    Boxes may be uneven and empty, and several ranks may hold the same elements; one rank holds no element twice.

    Attributes:
        boxes: The boxes of each rank.
    """

    boxes: tuple[tuple[Box, ...], ...]

    @classmethod
    def replicated(cls, shape: Sequence[int], ranks: int) -> Placement:
        """Every rank holds the whole tensor.

        Example:
            >>> Placement.replicated([4], 2).held_by(1)
            (Box(start=(0,), stop=(4,)),)
        """
        return cls(((Box.whole(shape),),) * ranks)

    def held_by(self, rank: int) -> tuple[Box, ...]:
        """The boxes of one rank."""
        return self.boxes[rank]


class Placements(NamedTuple):
    """The two placements of a parameter.

    Attributes:
        work: What the computation of a strategy reads: one box per rank.
        home: What a rank owns: here lie the storages, gradients are summed, optimisers update and keep their state,
            and checkpoints are gathered from. It depends on no strategy.
    """

    work: Placement
    home: Placement


def replicated(shape: Sequence[int], ranks: int) -> Placements:
    """Every rank holds and updates all of a parameter; it reads what it owns."""
    everywhere = Placement.replicated(shape, ranks)
    return Placements(everywhere, everywhere)
