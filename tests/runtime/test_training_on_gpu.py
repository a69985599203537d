"""Training on a CUDA device: strategies, bits and checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from llama import STRATEGIES, build
from support.training import SMALL, learnable_packs
from train_lm import run_step

import hetu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def train(order: list[int], first: int = 0, path: Path | None = None, **options: object) -> list[float]:
    """Steps from ``first`` on; from a checkpoint if there is one, and to one at the end."""
    hetu.manual_seed(0)
    made = build(SMALL, device="cuda", **options)
    node = hetu.optim.AdamW(lr=1e-3, max_grad_norm=1.0).minimize(made.loss, name="train")
    if path is not None and path.exists():
        made.graph.load_state_dict(hetu.load(path))
    losses = [
        run_step(made, node, index, [pack]) for index, pack in zip(order, learnable_packs(12)[first:], strict=False)
    ]
    if path is not None:
        hetu.save(made.graph, path)
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_alternating_strategies_are_one_pipeline(dtype: str, tolerance: float) -> None:
    one = train([0] * 12, dtype=dtype)
    many = train([step % len(STRATEGIES) for step in range(12)], dtype=dtype)
    np.testing.assert_allclose(many, one, rtol=tolerance)


def test_deterministic_runs_give_the_same_bits() -> None:
    with hetu.config(deterministic=True):
        assert train([0, 1, 2, 3] * 2, dtype="bfloat16") == train([0, 1, 2, 3] * 2, dtype="bfloat16")


def test_resuming_gives_the_same_bits(tmp_path: Path) -> None:
    order = [0, 3, 1, 2, 0, 1]
    with hetu.config(deterministic=True):
        whole = train(order)
        first = train(order[:3], path=tmp_path / "state.safetensors")
        assert first + train(order[3:], first=3, path=tmp_path / "state.safetensors") == whole
