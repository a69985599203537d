"""Where a tensor lies: which boxes of it each rank holds, and what each stage of sharded training cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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

    def is_in(self, outer: Box) -> bool:
        """Whether another box has all of it."""
        return self.common(outer) == self

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """The indices of this box within a tensor that holds ``outer``, which contains it."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True))


UNIT = 128
"""Elements between which no cut is made: kernels that compute vectors of elements then see the same vectors as in a
whole tensor, and tensors too small to be worth a message stay whole."""

LARGEST_UNIT = 1 / 16
"""What part of a rank's share whole rows may have, so that cuts lie between rows."""


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

    @classmethod
    def owned(cls, shape: Sequence[int], ranks: int) -> Placement:
        """Each element has one owner: every rank holds a run of elements in row-major order, of about the same length.

        A run begins between two rows if rows are short, else between two runs of ``UNIT`` elements; so it has one box,
        or a few. Each is contiguous in memory. Of small tensors some ranks have nothing.

        Example:
            >>> [[box.shape for box in boxes] for boxes in Placement.owned([8, 1024], 3).boxes]
            [[(2, 1024), (1, 640)], [(1, 384), (2, 1024), (1, 256)], [(1, 768), (2, 1024)]]
        """
        if not prod(shape):
            return cls(((Box.whole(shape),), *[()] * (ranks - 1)))
        unit = _unit(shape, ranks)
        units = -(-prod(shape) // unit)
        edges = [min(units * rank // ranks * unit, prod(shape)) for rank in range(ranks + 1)]
        return cls(tuple(tuple(boxes_of_run(shape, *edge)) for edge in pairwise(edges)))

    def held_by(self, rank: int) -> tuple[Box, ...]:
        """The boxes of one rank."""
        return self.boxes[rank]

    def numel_of(self, rank: int) -> int:
        """How many elements a rank holds."""
        return sum(box.numel for box in self.boxes[rank])

    def over(self, ranks: int) -> Placement:
        """The same boxes over the first few ranks: rank r of them holds what r, r + ranks, r + 2 * ranks, ... held.

        Example:
            >>> Placement.owned([1024], 4).over(3).numel_of(0)
            512
        """
        return Placement(
            tuple(tuple(box for boxes in self.boxes[rank::ranks] for box in boxes) for rank in range(ranks))
        )

    def is_in_order(self, shape: Sequence[int]) -> bool:
        """Whether the boxes of all ranks, one after the other, are the elements of a tensor in row-major order.

        Example:
            >>> Placement.owned([8, 1024], 3).is_in_order([8, 1024]), Placement.replicated([4], 2).is_in_order([4])
            (True, False)
        """
        place = 0
        for box in (box for boxes in self.boxes for box in boxes if box.numel):
            if boxes_of_run(shape, place, place + box.numel) != [box]:
                return False
            place += box.numel
        return place == prod(shape)

    @property
    def is_cut(self) -> bool:
        """Whether ranks hold different elements."""
        return any(boxes != self.boxes[0] for boxes in self.boxes)


def _unit(shape: Sequence[int], ranks: int) -> int:
    """Elements between which an owned tensor is not cut: rows of as many axes as are short enough."""
    most = prod(shape) / ranks * LARGEST_UNIT
    rows = [prod(shape[axis:]) for axis in range(1, len(shape))]
    return max([UNIT, *(row for row in rows if row <= most and row % UNIT == 0)])


def boxes_of_run(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes that elements make up which follow each other in row-major order.

    Args:
        shape: Of the whole tensor.
        start: The number of the first element.
        stop: The number after the last.

    Example:
        >>> [(box.start, box.stop) for box in boxes_of_run([3, 4], 2, 8)]
        [((0, 2), (1, 4)), ((1, 0), (2, 4))]
    """
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    inner, row = tuple(shape[1:]), prod(shape[1:])

    def within(number: int, first: int, last: int) -> list[Box]:
        """Of one row, from element ``first`` up to ``last``."""
        return [Box((number, *box.start), (number + 1, *box.stop)) for box in boxes_of_run(inner, first, last)]

    (first, skipped), (last, left) = divmod(start, row), divmod(stop, row)
    if first == last:
        return within(first, skipped, left)
    begin = first + (skipped > 0)
    rows = [Box((begin, *[0] * len(inner)), (last, *inner))] if begin < last else []
    return [*within(first, skipped, row if skipped else 0), *rows, *within(last, 0, left)]


class Placements(NamedTuple):
    """Where a parameter lies, and all that belongs to it. None of it depends on a strategy.

    Attributes:
        value: Where the storages of its value lie.
        gradient: Where its gradients are summed, and wait.
        state: Where it is updated, and where its optimiser's state lies. Each of its boxes lies in one of ``gradient``
            and in one of ``value`` on the same rank.
    """

    value: Placement
    gradient: Placement
    state: Placement


class Stage(NamedTuple):
    """What a ``zero_stage`` cuts over the ranks, so that each element has one owner; the rest is whole on each."""

    cuts_state: bool
    cuts_gradients: bool
    cuts_values: bool


STAGES = (Stage(False, False, False), Stage(True, False, False), Stage(True, True, False), Stage(True, True, True))
"""By the number that users give."""


def placed(shape: Sequence[int], ranks: int, stage: int = 0) -> Placements:
    """Where a parameter lies that is trained at a ``zero_stage``.

    Example:
        >>> [placement.is_cut for placement in placed([1024, 64], 2, stage=1)]
        [False, False, True]
    """
    whole, owned = Placement.replicated(shape, ranks), Placement.owned(shape, ranks)
    cuts = STAGES[stage]
    return Placements(
        owned if cuts.cuts_values else whole,
        owned if cuts.cuts_gradients else whole,
        owned if cuts.cuts_state else whole,
    )
