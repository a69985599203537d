"""Masks as arrays of ints: what a compiled model takes instead of an object, so that other masks recompile nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from hetu.errors import HetuError, caller
from hetu.parallel.mask.rules import KINDS, Chunked, Prefix, Rule, Slices, Window
from hetu.parallel.mask.segments import IntArray

_RULES: tuple[type[Rule], ...] = (Window, Chunked, Prefix, Slices)

_STEP = 61
"""A code's length is a multiple of this: torch.compile takes sizes that are equal at first for one size ever after, and
few other sizes are a multiple of it."""


def encode(rule: Rule) -> IntArray:
    """A rule as an array.

    It holds the number of the rule's class, how many words and how many sizes follow, the words, which say what the
    sizes mean, and the sizes; then zeros.

    Returns:
        int64; empty if a size is a symbol.

    Example:
        >>> encode(Window(7, 0))[:6].tolist(), encode(Prefix((3,), True))[:6].tolist()
        ([0, 0, 2, 7, 0, 0], [2, 1, 1, 1, 3, 0])
    """
    if not all(isinstance(size, int) for size in rule.sizes):
        return np.empty(0, np.int64)
    words: list[int] = []
    if isinstance(rule, Prefix):
        words = [int(rule.is_shared)]
    elif isinstance(rule, Slices):
        words = [KINDS.index(kind) for kind in rule.kinds]
    values: list[Any] = [_RULES.index(type(rule)), len(words), len(rule.sizes), *words, *rule.sizes]
    code = np.zeros(-(-len(values) // _STEP) * _STEP, np.int64)
    code[: len(values)] = values
    return code


def decode(code: IntArray) -> Rule:
    """The rule that :func:`encode` made an array of; checked, because anybody may call an op.

    Raises:
        HetuError: If it is no rule's.
    """
    try:
        number, words, sizes, *values = code.tolist()
        return _rule(_RULES[number], values[:words], tuple(values[words : words + sizes]))
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
