"""How much the tests try: ``HETU_FUZZ``, the one knob of it."""

from __future__ import annotations

import os
from collections.abc import Collection
from itertools import combinations, product
from typing import Any

import torch

LONGER = int(os.environ.get("HETU_FUZZ", "1"))
"""Above 1, that many times as many random inputs are tried, and all cases of every grid rather than a part of them."""


def grid(*axes: Collection[Any]) -> list[tuple[Any, ...]]:
    """Cases of a grid of parameters: a covering part of them, or all where it may take longer and on a GPU."""
    return list(product(*axes)) if LONGER > 1 or torch.cuda.is_available() else covering(*axes)


def covering(*axes: Collection[Any]) -> list[tuple[Any, ...]]:
    """Cases in which each two values of any two axes meet at least once.

    What goes wrong for one value, or for two together, goes wrong in one of them.

    Example:
        >>> covering("ab", "xy", [1, 2])
        [('a', 'x', 1), ('a', 'y', 2), ('b', 'x', 2), ('b', 'y', 1)]
    """
    cases = [tuple(enumerate(case)) for case in product(*map(range, map(len, axes)))]
    pairs = {case: set(combinations(case, min(2, len(axes)))) for case in cases}
    chosen, left = [], set[Any]().union(*pairs.values())
    while left:
        chosen.append(max(cases, key=lambda case: len(pairs[case] & left)))
        left -= pairs[chosen[-1]]
    values = [list(axis) for axis in axes]
    return [tuple(values[axis][index] for axis, index in case) for case in sorted(chosen)]
