"""Random masks of every kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import hetu
from hetu.parallel import Mask
from hetu.parallel.mask.rules import KINDS


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
