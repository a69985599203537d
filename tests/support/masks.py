"""Random masks of every kind, and what each lets queries see, by its definition and pair by pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import hetu
from hetu.parallel import Mask
from hetu.parallel.mask.rules import KINDS, Chunked, Prefix, Slices, Window

Array = np.ndarray


def random_mask(rng: np.random.Generator, q_lens: Sequence[int], k_lens: Sequence[int]) -> Mask:
    """A mask that fits sequences of these lengths."""
    kind, longest = rng.integers(0, 5), max(*q_lens, *k_lens, 1)
    if kind == 0:
        return Mask.window(*rng.integers(-1, longest + 1, 2).tolist())
    if kind == 1:
        return Mask.chunked(int(rng.integers(1, longest + 2)))
    if kind == 2:
        return Mask.prefix(int(rng.integers(0, longest + 1)))
    if kind == 3:
        return Mask.prefix(rng.integers(0, longest + 1, len(q_lens)).tolist())
    return random_slices(rng, sum(q_lens), sum(k_lens))


def random_slices(rng: np.random.Generator, queries: int, keys: int, most: int = 4) -> Mask:
    """Slices that share no pair: those that would are left out."""
    ranges: tuple[list[tuple[int, int]], list[tuple[int, int]], list[str]] = ([], [], [])
    made = Mask.slices(*ranges)
    for _ in range(int(rng.integers(1, most + 1))):
        q, k = (tuple(np.sort(rng.integers(0, size + 1, 2)).tolist()) for size in (queries, keys))
        more = ([*ranges[0], q], [*ranges[1], k], [*ranges[2], str(rng.choice(KINDS))])
        try:
            made, ranges = Mask.slices(*more), more
        except hetu.HetuError:
            continue
    return made


def seen_by_definition(mask: Mask, q_lens: Sequence[int], k_lens: Sequence[int]) -> Array:
    """``(queries, keys)`` of all sequences together: which queries see which keys."""
    seen = np.zeros((sum(q_lens), sum(k_lens)), bool)
    if isinstance(mask.rule, Slices):
        bounds = np.reshape(mask.rule.ranges, (-1, 4)).tolist()
        for (q0, q1, k0, k1), kind in zip(bounds, mask.rule.kinds, strict=True):
            i, j = np.arange(q0, q1)[:, None], np.arange(k0, k1)
            ends, begins = (j - k1 <= i - q1) | (kind in ("full", "inverse_causal")), j - k0 >= i - q0
            seen[q0:q1, k0:k1] |= ends & (begins | (kind in ("full", "causal")))
        return seen
    q, k = np.cumsum([0, *q_lens]), np.cumsum([0, *k_lens])
    for number, (n, m) in enumerate(zip(q_lens, k_lens, strict=True)):
        i, j = np.arange(n)[:, None] + m - n, np.arange(m)
        seen[q[number] : q[number + 1], k[number] : k[number + 1]] = _in_document(mask, number, i, j)
    return seen


def _in_document(mask: Mask, number: int, i: Array, j: Array) -> Array:
    """Whether queries at positions i see keys at positions j of a document."""
    rule = mask.rule
    if isinstance(rule, Window):
        return ((rule.left < 0) | (j >= i - rule.left)) & ((rule.right < 0) | (j <= i + rule.right))
    if isinstance(rule, Chunked):
        return (i >= 0) & (i // rule.size == j // rule.size) & (j <= i)
    assert isinstance(rule, Prefix)
    prefix = rule.lengths[0 if rule.is_shared else number]
    return (i >= 0) & ((j <= i) | ((i < prefix) & (j < prefix)))
