"""A small model's configuration, and what tests train it on."""

from __future__ import annotations

import numpy as np
from corpus import cut, make_packs
from llama import Config
from support.jobs import Step

SMALL = Config(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48)


def learnable_packs(count: int, budget: int = 96) -> list[list[np.ndarray]]:
    """Random documents of an alphabet that can be learnt: each token tells much of the next."""
    rng = np.random.default_rng(0)
    documents = []
    for length in rng.integers(0, 60, 4 * count):
        steps = rng.integers(1, 4, length)
        documents.append(((np.cumsum(steps) + rng.integers(256)) % 256).astype(np.uint8))
    return make_packs(cut(documents, 60), budget, count)


def ragged_packs(count: int, budget: int = 64) -> list[list[np.ndarray]]:
    """Random documents, some of them empty."""
    rng = np.random.default_rng(1)
    files = [rng.integers(256, size=length).astype(np.uint8) for length in rng.integers(0, 40, 4 * count)]
    return make_packs(cut(files, 40), budget, count)


def steps(first: int = 0) -> list[Step]:
    """Every strategy; micro-batches of differing lengths, a pack without tokens; gradients that wait for other runs."""
    a, b, c, d, e, f, g = ragged_packs(7)
    empty = [np.empty(0, np.uint8)]
    made = [
        Step(0, [a]),
        Step(3, [b, a[:2]]),
        Step(1, [c], "grad"),
        Step(2, [d], "compute_only"),
        Step(2, [e[:1], f, empty, g[:3]], "grad"),
        Step(3, [b]),
        Step(1, [d[:2], c]),
        Step(0, [f, empty], "grad"),
        Step(2, [g]),
    ]
    return made[first:]
