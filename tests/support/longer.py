"""How much the tests try: ``HETU_FUZZ``, the one knob of it."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from itertools import combinations, product
from typing import Any

import torch

LONGER = int(os.environ.get("HETU_FUZZ", "1"))
"""Above 1, that many times as many random inputs are tried, and all cases of every grid rather than a part of them."""


def grid(*axes: Collection[Any]) -> list[tuple[Any, ...]]:
    """Cases of a grid of parameters: a covering part of them, or all where it may take longer and on a GPU."""
    return list(product(*axes)) if LONGER > 1 or torch.cuda.is_available() else covering(*axes)


def covering(*axes: Collection[Any]) -> list[tuple[Any, ...]]:
    """Cases of a grid in which each two values of any two axes meet at least once.

    Example:
        >>> covering("ab", "xy", [1, 2])
        [('a', 'x', 1), ('a', 'y', 2), ('b', 'x', 2), ('b', 'y', 1)]
    """
    values = [list(axis) for axis in axes]
    chosen = covering_part(list(product(*map(range, map(len, axes)))))
    return [tuple(values[axis][index] for axis, index in enumerate(case)) for case in chosen]


def covering_part(cases: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Some of the cases, in their order: each two values that meet in any of them meet in one that is chosen.

    What goes wrong for one value, or for two together, goes wrong in one of these.

    Args:
        cases: As many values each, which can be hashed.

    Example:
        >>> covering_part([("a", 1), ("a", 1), ("b", 1)])
        [('a', 1), ('b', 1)]
    """
    pairs = [set(combinations(enumerate(case), min(2, len(case)))) for case in cases]
    chosen, left = list[int](), set[Any]().union(*pairs)
    while left:
        chosen.append(max(range(len(cases)), key=lambda case: len(pairs[case] & left)))
        left -= pairs[chosen[-1]]
    return [cases[case] for case in sorted(chosen)]
