"""What all methods say alike: in which order a member turns to the others, and how a transfer is called."""

from __future__ import annotations

import numpy as np

from hetu.parallel.plan.instructions import Runs


def around(size: int, member: int, direction: int) -> list[int]:
    """All other members, nearest first; each starts with another, so that nobody is everyone's first target.

    Example:
        >>> around(4, 1, 1), around(4, 1, -1)
        ([2, 3, 0], [0, 3, 2])
    """
    return [(member + direction * hop) % size for hop in range(1, size)]


def transfer_number(step: int, source: int, target: int, num_pipelines: int) -> int:
    """A number that both ends know without asking: unique over steps and pairs of pipelines."""
    return (step * num_pipelines + source) * num_pipelines + target


def hop_of(transfer: int, num_pipelines: int) -> int:
    """The step that a number was made from.

    Example:
        >>> hop_of(transfer_number(3, source=1, target=0, num_pipelines=2), 2)
        3
    """
    return transfer // num_pipelines**2


def whole(rows: int) -> Runs:
    """Rows 0 to ``rows`` as one run, or none if there are none."""
    return Runs.of(np.zeros(min(rows, 1), np.int64), np.array([rows] if rows else [], np.int64), rows)
