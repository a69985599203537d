"""Training in several processes: the losses and the parameters of one process, to the bit, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from corpus import cut, make_packs
from llama import Config, Model, build
from support.jobs import Step, float64_model, train
from support.pool import Pool
from support.same import assert_same

World = Callable[..., Pool]
SMALL = Config(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48)


def packs(count: int, budget: int = 64) -> list[list[np.ndarray]]:
    """Random documents, some of them empty."""
    rng = np.random.default_rng(1)
    files = [rng.integers(256, size=length).astype(np.uint8) for length in rng.integers(0, 40, 4 * count)]
    return make_packs(cut(files, 40), budget, count)


def steps(first: int = 0) -> list[Step]:
    """Every strategy; micro-batches of differing lengths, a pack without tokens; gradients that wait for other runs."""
    a, b, c, d, e, f, g = packs(7)
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


MODELS = {"float64": float64_model, "llama in float32": partial(build, SMALL, device="cpu")}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("bucket_bytes", [25 * 2**20, 3000])
def test_steps_are_those_of_one_process(world: World, size: int, model: Callable[[], Model], bucket_bytes: int) -> None:
    (alone,) = world(1).run(train, model, steps())
    for rank in world(size).run(train, model, steps(), bucket_bytes=bucket_bytes):
        assert_same(rank, alone)


def test_a_checkpoint_of_rank_0_goes_on_in_another_world(world: World, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    (alone,) = world(1).run(train, float64_model, steps())
    world(3).run(train, float64_model, steps()[:5], end=path)  # with gradients that wait
    for rank in world(4).run(train, float64_model, steps(5), begin=path):
        assert_same(rank.losses, alone.losses[5:])
        assert_same(rank.state, alone.state)
