"""Masks as arrays of ints: what a compiled model takes instead of an object, so that other masks recompile nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from hetu.errors import HetuError, caller
from hetu.parallel.mask.rules import RULES, Rule
from hetu.parallel.mask.segments import IntArray

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
        >>> from hetu.parallel.mask.rules import Prefix, Window
        >>> encode(Window(7, 0))[:6].tolist(), encode(Prefix((3,), True))[:6].tolist()
        ([0, 0, 2, 7, 0, 0], [2, 1, 1, 1, 3, 0])
    """
    if not all(isinstance(size, int) for size in rule.sizes):
        return np.empty(0, np.int64)
    values: list[Any] = [RULES.index(type(rule)), len(rule.words), len(rule.sizes), *rule.words, *rule.sizes]
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
        rule: Rule = RULES[number].made(tuple(values[:words]), tuple(values[words : words + sizes]))
        is_right = np.array_equal(encode(rule), code)
    except (IndexError, TypeError, ValueError):
        is_right = False
    if not is_right:
        what = f"a mask's code is {code.tolist()}, which no mask has"
        raise HetuError(what, op="mask", where=caller(), fix="give Mask.code")
    rule.check()
    return rule
