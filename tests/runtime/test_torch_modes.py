"""What a user's code sets in torch, around a graph or for good, changes nothing: types and places are the graph's."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from support.states import Trained

import hetu

ROWS = 9
X, Y = np.random.default_rng(0).standard_normal((2, ROWS, 16)).astype(np.float32)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


def steps(mode: Callable[[], AbstractContextManager[Any]], backend: str) -> list[torch.Tensor]:
    """All that four steps of a small model give, under two strategies in turn, everything under the mode."""
    hetu.manual_seed(0)
    s, rows = hetu.IntSymbol("s"), hetu.IntSymbol("rows")
    with mode(), hetu.config(backend=backend):
        with hetu.graph("define_and_run", num_strategy=2, device="cpu") as g:
            x, y = (hetu.placeholder(hetu.float32, [rows, 16], name=name) for name in "xy")
            weight = hetu.parameter(functools.partial(torch.nn.init.normal_, std=0.1), [48, 16])
            lens = [[s], [s // 3, s - s // 3]]
            out, lse, rng_state = hetu.parallel_attn(hetu.linear(x, weight), 8, 1, lens, [[0], [0, 0]], p_dropout=0.1)
            scale, shift = hetu.constant(np.full(16, 2, np.float32)), hetu.parameter(0.5, [16])
            error = out * scale + shift - y
            train = hetu.optim.SGD(lr=0.01).minimize(hetu.sum(error * error))
        results: list[Any] = []
        for step in range(4):
            layout = g.layout(step % 2, int_symbol_dict={s: ROWS})
            feeds = {x: hetu.Shards(layout.scatter(X)), y: hetu.Shards(layout.scatter(Y))}
            fetched = g.run([train, out, lse, rng_state], feeds, int_symbol_dict={s: ROWS}, strategy=step % 2)
            results += [x for item in fetched for x in (item if isinstance(item, hetu.Shards) else [item])]
        return results + g.run([weight, shift])


FIRST: dict[str, Callable[[Any], Any]] = {
    "the loss": lambda model: model.step(run_level="compute_only"),
    "a weight": lambda model: model.values(),
    "the state": lambda model: model.state(),
    "loading": lambda model: model.graph.load_state_dict(model.state()),
    "a file": lambda model: model.graph.load_state_dict(there_and_back(model)),
    "gradients": lambda model: model.step(run_level="grad"),
    "a step": lambda model: model.step(),
}


def there_and_back(model: Trained) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        hetu.save(model.graph, f"{folder}/state")
        return hetu.load(f"{folder}/state")


@pytest.mark.parametrize("mode", ["a default device", "a default dtype", "inference"])
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_what_a_mode_saw_first_can_be_trained(kind: str, first: str, mode: str) -> None:
    ends = []
    for around in (MODES[mode], nullcontext):
        hetu.manual_seed(0)
        model = Trained(getattr(hetu.optim, kind)(lr=0.1, weight_decay=0.1, max_grad_norm=1.0))
        with around():
            FIRST[first](model)
        hetu.manual_seed(1)
        ends.append(([model.step() for _ in range(3)], model.values()))
    assert ends[0] == ends[1]


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "a default device": functools.partial(torch.device, "meta"),
    "a default dtype": functools.partial(default_dtype, torch.float64),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_change_nothing(mode: str, backend: str) -> None:
    want, got = steps(nullcontext, backend), steps(MODES[mode], backend)
    assert len(got) == len(want) > 16
    for one, other in zip(got, want, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device) and bool(one.isfinite().all())
        assert torch.equal(one, other)
