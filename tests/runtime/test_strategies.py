"""Training a small model: whatever the strategies of its steps, the loss is that of one device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from llama import STRATEGIES, Model, build, flat
from support.training import SMALL
from support.training import learnable_packs as packs
from train_lm import run_step

import hetu


def model(**options: Any) -> tuple[Model, hetu.Tensor]:
    hetu.manual_seed(0)
    made = build(SMALL, device="cpu", **options)
    return made, hetu.optim.AdamW(lr=1e-3, max_grad_norm=1.0).minimize(made.loss, name="train")


def train(order: list[int], data: list[list[np.ndarray]], **options: Any) -> list[float]:
    made, node = model(**options)
    return [run_step(made, node, index, [pack]) for index, pack in zip(order, data, strict=True)]


def test_fifty_steps_under_alternating_strategies_are_those_of_one_pipeline() -> None:
    data = packs(50)
    one = train([0] * 50, data)
    many = train([step % len(STRATEGIES) for step in range(50)], data)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert np.mean(one[-5:]) < np.mean(one[:5]) - 0.3


def test_a_step_of_uneven_micro_batches_is_a_step_of_one_batch() -> None:
    (first, second, third), whole = packs(3), []
    for pack in (first[:1], second, third):
        whole += pack
    one, many = model(), model()
    a = run_step(*one, 0, [whole])
    b = run_step(*many, 3, [first[:1], second, third])
    np.testing.assert_allclose(b, a, rtol=1e-5)
    for name, value in one[0].graph.state_dict()["parameters"].items():
        torch.testing.assert_close(many[0].graph.state_dict()["parameters"][name], value, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_deterministic_runs_give_the_same_bits(backend: str) -> None:
    order, data = ([1], packs(1, 24)) if backend == "triton" else ([1, 3], packs(2))
    with hetu.config(deterministic=True, backend=backend):
        assert train(order, data) == train(order, data)
    assert not torch.are_deterministic_algorithms_enabled()


def test_bfloat16_follows_float32() -> None:
    data = packs(20)
    full, half = train([0] * 20, data), train([step % 2 for step in range(20)], data, dtype=hetu.bfloat16)
    np.testing.assert_allclose(half, full, rtol=2e-2)
    made, _ = model(dtype=hetu.bfloat16)
    state = made.graph.state_dict()
    assert {value.dtype for value in state["parameters"].values()} == {torch.float32}


def test_labels_that_are_all_ignored_change_nothing() -> None:
    made, node = model()
    before = made.graph.state_dict()["parameters"]
    loss = run_step(made, node, 1, [[np.array([5], np.uint8)]])  # one token, after which nothing comes
    assert loss == 0.0
    decay = 1 - 1e-3 * 1e-2
    for name, value in made.graph.state_dict()["parameters"].items():
        torch.testing.assert_close(value, before[name] * decay)


def test_lengths_never_lower_again() -> None:
    made, node = model()
    for index, pack in enumerate(packs(12)):
        run_step(made, node, index % len(STRATEGIES), [pack])
    # Two modules a strategy: the count of the step's labels, and the step.
    assert made.graph.executor.stats()["executables"].misses == 2 * len(STRATEGIES)


def test_labels_follow_their_tokens() -> None:
    documents = [np.array([7, 8, 9], np.uint8), np.empty(0, np.uint8), np.array([1], np.uint8)]
    tokens, labels = flat(documents)
    assert tokens.tolist() == [7, 8, 9, 1]
    assert labels.tolist() == [8, 9, -100, -100]
