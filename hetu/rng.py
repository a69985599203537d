"""The generator that dropout draws from: a seed, and an offset that every run advances."""

from __future__ import annotations

import secrets
import threading

from hetu.arguments import integer

_lock = threading.Lock()
_seed = secrets.randbits(62)
_offset = 0


def manual_seed(seed: int) -> None:
    """Fixes the seed of everything random in the runs that follow, and restarts the offset at 0.

    Source: a seed and an offset, as CUDA's Philox generators have them: Salmon et al., "Parallel random numbers: as
    easy as 1, 2, 3", 2011.

    Args:
        seed: Any int; its lower 63 bits count.

    Raises:
        HetuError: If it is no int.

    Example:
        >>> manual_seed(7); take(3); take(1)
        (7, 0)
        (7, 3)
    """
    global _seed, _offset
    number = integer(seed, "seed", op="manual_seed")
    with _lock:
        _seed, _offset = number & (2**63 - 1), 0


def take(count: int) -> tuple[int, int]:
    """Draws ``count`` consecutive offsets and returns ``(seed, first offset)``."""
    global _offset
    with _lock:
        first = _offset
        _offset += count
        return _seed, first


def give_back(seed: int, first: int, count: int) -> None:
    """Takes back a draw of which nothing came, unless somebody has drawn or seeded since.

    Args:
        seed: The seed that :func:`take` gave.
        first: The first offset that it gave.
        count: How many offsets it gave.

    Example:
        >>> manual_seed(7); give_back(*take(3), 3); get_state()
        (7, 0)
    """
    global _offset
    with _lock:
        if (_seed, _offset) == (seed, first + count):
            _offset = first


def get_state() -> tuple[int, int]:
    """The seed, and the next offset to be drawn.

    Example:
        >>> manual_seed(7); take(3); get_state()
        (7, 0)
        (7, 3)
    """
    with _lock:
        return _seed, _offset


def set_state(seed: int, offset: int) -> None:
    """Goes on from where :func:`get_state` was called."""
    global _seed, _offset
    with _lock:
        _seed, _offset = seed, offset
