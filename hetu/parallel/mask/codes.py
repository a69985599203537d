"""Masks as arrays of ints: what a compiled model takes instead of an object, so that other masks recompile nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from hetu.errors import HetuError, caller
from hetu.parallel.mask.rules import KINDS, Chunked, Prefix, Rule, Slices, Window
from hetu.parallel.mask.segments import IntArray

_RULES: tuple[type[Rule], ...] = (Window, Chunked, Prefix, Slices)


def encode(rule: Rule) -> IntArray:
    """A rule as an array: the number of its class, how many words say what its sizes mean, these words, and the sizes.

    Returns:
        int64; empty if a size is a symbol.

    Example:
        >>> encode(Window(7, 0)).tolist(), encode(Prefix((3,), True)).tolist()
        ([0, 0, 7, 0], [2, 1, 1, 3])
    """
    if not all(isinstance(size, int) for size in rule.sizes):
        return np.empty(0, np.int64)
    words: list[int] = []
    if isinstance(rule, Prefix):
        words = [int(rule.is_shared)]
    elif isinstance(rule, Slices):
        words = [KINDS.index(kind) for kind in rule.kinds]
    return np.array([_RULES.index(type(rule)), len(words), *words, *rule.sizes], np.int64)


def decode(code: IntArray) -> Rule:
    """The rule that :func:`encode` made an array of; checked, because anybody may call an op.

    Raises:
        HetuError: If it is no rule's.
    """
    try:
        number, count, *values = code.tolist()
        return _rule(_RULES[number], values[:count], tuple(values[count:]))
    except (IndexError, TypeError, ValueError):
        what = f"a mask's code is {code.tolist()}, which no mask has"
        raise HetuError(what, op="mask", where=caller(), fix="give Mask.code") from None


def _rule(kind: type[Rule], words: list[int], sizes: tuple[int, ...]) -> Rule:
    made: Any
    if kind is Prefix:
        (is_shared,) = words
        made = Prefix(sizes, bool(is_shared))
        if made.is_shared and len(sizes) != 1:
            raise ValueError("one prefix for all")
    elif kind is Slices:
        made = Slices(sizes, tuple(KINDS[word] for word in words))
        if len(sizes) != 4 * len(words):
            raise ValueError("four bounds per slice")
    else:
        made = kind(*sizes)
    return made.with_sizes(sizes)
