"""dropout: the mask is the documented one, the same under every strategy, and drawn again for the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.backends.attention.dropout import dropout_key
from hetu.backends.torch import random as torch_random

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def run(
    x: Any, p: float, tokens: Any = None, seed: int = 3, device: str = "cpu", dtype: str = "float32"
) -> tuple[Any, Any, Any]:
    """The output, rng_state, and the gradient of the output's sum; ``Shards`` in give ``Shards`` out."""
    shards = x if isinstance(x, hetu.Shards) else [x]
    rows = [hetu.IntSymbol("rows"), *shards[0].shape[1:]] if shards[0].ndim else []
    with hetu.graph("define_and_run", device=device) as g:
        fed = hetu.placeholder(dtype, rows)
        numbers = None if tokens is None else hetu.placeholder("int64", [rows[0]])
        y = hetu.dropout(fed, p, numbers)
        grad = hetu.gradients(y, fed)
    hetu.manual_seed(seed)
    feeds = {fed: x} if numbers is None else {fed: x, numbers: tokens}
    return tuple(g.run([y, y.op.outputs[1], grad], feed_dict=feeds))


def philox(counter: Sequence[int], key: int) -> list[int]:
    """The generator in Python's own ints: another way of writing what the backend vectorises."""
    c, k = list(counter), [key % 2**32, key >> 32]
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("shape", [(5, 7), (3, 1), (4, 2, 3), (6,)])
def test_mask_is_the_documented_one(shape: tuple[int, ...], device: str) -> None:
    tokens = np.array([0, 1, 2**32 - 1, 2**32, 5, 2**40 + 3])[: shape[0]]
    y, state, _ = run(np.ones(shape, "float32"), 0.4, tokens, device=device)
    key = dropout_key(*state.tolist(), 0)
    columns = math.prod(shape[1:])
    wanted = [
        [philox((j // 4, token % 2**32, token >> 32, 0), key)[j % 4] >= math.floor(0.4 * 2**32) for j in range(columns)]
        for token in tokens.tolist()
    ]
    assert torch.equal(y.reshape(shape[0], columns).cpu() != 0, torch.tensor(wanted))
    assert state.device.type == "cpu"


@pytest.mark.parametrize("lengths", [(9,), (4, 5), (2, 0, 7)])
def test_mask_is_that_of_the_tokens_under_every_strategy(lengths: Sequence[int]) -> None:
    x = np.random.default_rng(0).standard_normal((9, 6)).astype("float32")
    whole, _, whole_grad = run(x, 0.5, np.arange(9))
    order = np.random.default_rng(1).permutation(9)
    places = np.split(order, np.cumsum(lengths)[:-1])
    shards, tokens = (hetu.Shards([array[place] for place in places]) for array in (x, np.arange(9)))
    y, _, grad = run(shards if len(lengths) > 1 else shards[0], 0.5, tokens if len(lengths) > 1 else tokens[0])
    for got, wanted in ((y, whole), (grad, whole_grad)):
        parts = got if len(lengths) > 1 else [got]
        assert torch.equal(torch.cat(list(parts)), wanted[order])
    assert 0 < (whole == 0).float().mean() < 1


def test_without_tokens_pipelines_draw_differently() -> None:
    x = np.ones((8, 16), "float32")
    y, _, grad = run(hetu.Shards([x, x]), 0.5)
    assert 0.3 < (y[0] != y[1]).float().mean() < 0.7
    for shard, own in zip(y, grad, strict=True):  # each replays its own
        assert torch.equal(shard, own)
    single = run(x, 0.5, np.arange(8))[0]
    assert torch.equal(y[0], single)  # rows count from 0


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    x = np.full((128, 131), 2.0, "float32")
    y, _, grad = run(x, p)
    kept = y != 0
    spread = (p * (1 - p) / y.numel()) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) <= 5 * spread
    assert (kept.float().mean(0) - (1 - p)).abs().max() <= 6 * (p * (1 - p) / 128) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2 / (1 - p)))
    torch.testing.assert_close(grad, y / 2)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtypes_have_the_same_mask(dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal((5, 7))
    y, _, grad = run(x, 0.25, dtype=dtype)
    wanted, _, wanted_grad = run(x.astype("float32"), 0.25)
    torch.testing.assert_close(y.float(), wanted, rtol=1e-2, atol=0)
    torch.testing.assert_close(grad.float(), wanted_grad, rtol=1e-2, atol=0)


def test_what_is_dropped_is_zero_whatever_it_was() -> None:
    y, _, _ = run(np.full((4, 8), np.inf, "float32"), 0.5)
    assert set(y.flatten().tolist()) == {0.0, math.inf}


def test_0d_is_one_row_of_one_column() -> None:
    values = {run(np.float32(3)[...], 0.5, seed=seed)[0].item() for seed in range(20)}
    assert values == {0.0, 6.0}


@pytest.mark.parametrize("entries", [1, 7, 20])
def test_blocks_make_no_difference(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((9, 7)).astype("float32")
    whole = run(x, 0.5, np.arange(9) * 3)
    monkeypatch.setitem(torch_random._BLOCK_ENTRIES, "cpu", entries)
    for got, wanted in zip(run(x, 0.5, np.arange(9) * 3), whole, strict=True):
        assert torch.equal(got, wanted)


def test_seed_runs_and_nodes() -> None:
    """A seed fixes the masks; every run and every node draws another one; the gradient replays its own node's."""
    ones = np.ones((16, 16), "float32")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [16, 16])
        ys = [hetu.dropout(x, 0.5), hetu.dropout(x, 0.5)]
        fetches = [*ys, hetu.gradients(ys[0], x), hetu.gradients(ys[1], x)]

    def masks(seed: int) -> list[list[torch.Tensor]]:
        hetu.manual_seed(seed)
        return [g.run(fetches, feed_dict={x: ones}) for _ in range(2)]

    first, again, other = masks(1), masks(1), masks(2)
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    drawn = [run[i] for run in (*first, *other) for i in range(2)]
    assert all((drawn[i] != drawn[j]).float().mean() > 0.3 for i in range(8) for j in range(i))
    for y0, y1, grad0, grad1 in first:
        assert torch.equal(y0, grad0) and torch.equal(y1, grad1)


def test_the_gradient_alone_has_the_mask_of_the_run() -> None:
    """Fetching only the gradient still computes the rng_state that it replays."""
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [8, 8])
        y = hetu.dropout(x, 0.5)
        grad = hetu.gradients(y, x)
    hetu.manual_seed(5)
    alone = g.run(grad, feed_dict={x: np.ones((8, 8))})
    hetu.manual_seed(5)
    assert torch.equal(alone, g.run(y, feed_dict={x: np.ones((8, 8))}))


def test_a_probability_of_0_gives_a_copy_of_what_was_fed() -> None:
    fed = torch.ones(3, 2)
    y, _, grad = run(fed, 0.0)
    assert torch.equal(y, fed) and y.data_ptr() != fed.data_ptr()
    assert torch.equal(grad, fed)
