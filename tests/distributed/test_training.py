"""Training in several processes: the losses and the parameters of one process, to the bit, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from llama import Model, build
from support.jobs import float64_model, recomputed, train
from support.longer import grid
from support.pool import Pool
from support.same import assert_same
from support.training import SMALL, steps

World = Callable[..., Pool]
Alone = Callable[[Callable[[], Model]], Any]
MODELS = {"float64": float64_model, "llama in float32": partial(build, SMALL, device="cpu")}


@pytest.fixture(scope="module")
def alone(world: World) -> Alone:
    """What one process trains: once for each model."""
    return cache(lambda model: world(1).run(train, model, steps())[0])


@pytest.mark.parametrize(("size", "model", "bucket_bytes"), grid([2, 3, 4], MODELS, [25 * 2**20, 3000]))
def test_steps_are_those_of_one_process(world: World, alone: Alone, size: int, model: str, bucket_bytes: int) -> None:
    for rank in world(size).run(train, MODELS[model], steps(), bucket_bytes=bucket_bytes):
        assert_same(rank, alone(MODELS[model]))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_steps_with_recomputation_are_those_without(world: World, alone: Alone, model: Callable[[], Model]) -> None:
    """Attention, and its dropout, is computed again and exchanges keys and values again."""
    for size in (1, 3):
        for rank in world(size).run(train, partial(recomputed, model), steps()):
            assert_same(rank, alone(model))


def test_a_checkpoint_of_rank_0_goes_on_in_another_world(world: World, alone: Alone, tmp_path: Path) -> None:
    path, whole = tmp_path / "state.safetensors", alone(float64_model)
    world(3).run(train, float64_model, steps()[:5], end=path)  # with gradients that wait
    for rank in world(4).run(train, float64_model, steps(5), begin=path):
        assert_same(rank.losses, whole.losses[5:])
        assert_same(rank.state, whole.state)
