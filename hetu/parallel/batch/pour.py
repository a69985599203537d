"""Cutting one document over pipelines that have done different amounts of work."""

from __future__ import annotations

from collections.abc import Sequence


def pour(amount: float, levels: Sequence[float], rooms: Sequence[float], density: float) -> tuple[float, list[float]]:
    """Pours a document over pipelines as if it were water: those that are lowest get most, and all end level.

    Args:
        amount: Tokens of the document.
        levels: How full each pipeline is, in seconds.
        rooms: Tokens that each still takes; at least ``amount`` in all.
        density: By how much one token raises a level.

    Returns:
        The highest level that it reaches, and the tokens that each pipeline gets.

    Example:
        >>> pour(10, [0.0, 4.0, 9.0], [100, 100, 100], density=1.0)
        (7.0, [7.0, 3.0, 0.0])
        >>> pour(10, [0.0, 4.0, 9.0], [5, 100, 100], density=1.0)
        (9.0, [5, 5.0, 0.0])
    """
    tokens = [0.0] * len(levels)
    active = [r for r, room in enumerate(rooms) if room > 0]
    top = 0.0
    while active:
        top = (amount * density + sum([levels[r] for r in active])) / len(active)
        below = [r for r in active if levels[r] < top]
        if len(below) < len(active):
            active = below
            continue
        full = [r for r in active if top - levels[r] > rooms[r] * density]
        for r in full:
            tokens[r] = rooms[r]
            amount -= rooms[r]
        if not full:
            for r in active:
                tokens[r] = (top - levels[r]) / density
            break
        # Those that had no use for it before may have now: the others take less than was thought.
        active = [r for r, room in enumerate(rooms) if room > 0 and not tokens[r]]
    return max([level + x * density for level, x in zip(levels, tokens, strict=True) if x], default=0.0), tokens


def whole_tokens(tokens: Sequence[float], total: int, rooms: Sequence[int]) -> list[int]:
    """Whole numbers near the given ones, with a given sum, none above its room.

    Example:
        >>> whole_tokens([3.4, 3.3, 3.3], 10, [3, 9, 9])
        [3, 4, 3]
    """
    found = [min(int(x), room) for x, room in zip(tokens, rooms, strict=True)]
    left = total - sum(found)
    while left:  # those that get nothing come last
        for r in sorted(range(len(found)), key=lambda r: (tokens[r] == 0, found[r] - tokens[r])):
            step = min(left, rooms[r] - found[r], max(1, left // len(found)))
            found[r] += step
            left -= step
            if not left:
                break
    return found
