"""Feeds: what is read as it is, what is converted where nothing is lost, and what would lose its meaning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hetu


def plus_one(dtype: str = "float32") -> tuple[hetu.Graph, hetu.Tensor, hetu.Tensor]:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(dtype, [hetu.IntSymbol("n")], name="x")
        y = x + 1
    return g, x, y


@pytest.mark.parametrize(
    "value",
    [
        np.ma.masked_array(np.ones(3, np.float32), [0, 1, 0]),
        torch.ones(3).to_sparse(),
        torch.ones(3, device="meta"),
        torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    ],
    ids=["masked", "sparse", "meta", "nested"],
)
@pytest.mark.filterwarnings("ignore")
def test_feeds_that_would_lose_their_meaning_are_refused(value: Any) -> None:
    g, x, y = plus_one()
    for feed in (value, hetu.Shards([value])):
        with pytest.raises(hetu.BindingError, match=r"x was fed a .*\n  where:  test_feed_values.py"):
            g.run(y, {x: feed})
    assert g.run(y, {x: [1.0]}).tolist() == [2.0]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64"])
@pytest.mark.parametrize("fed", ["uint8", "int8", "int16", "int32", "int64"])
def test_ints_of_torch_are_converted_where_they_fit_as_those_of_numpy_are(dtype: str, fed: str) -> None:
    g, x, y = plus_one(dtype)
    array = np.array([0, 3, 100], fed)
    assert torch.equal(g.run(y, {x: torch.from_numpy(array)}), g.run(y, {x: array}))
    top = np.array([np.iinfo(fed).max], fed)
    if np.iinfo(fed).max > np.iinfo(dtype).max:
        for value in (top, torch.from_numpy(top)):
            with pytest.raises(hetu.DTypeError, match="values that don't fit"):
                g.run(y, {x: value})


@pytest.mark.parametrize("fed", [torch.ones(2), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.float64)])
def test_other_kinds_of_torch_are_not_converted(fed: torch.Tensor) -> None:
    g, x, y = plus_one("int32")
    with pytest.raises(hetu.DTypeError, match="x is int32, but a torch"):
        g.run(y, {x: fed})


def test_cumulative_lengths_may_be_torchs_int64() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        q = hetu.placeholder("float32", [5, 8], name="q")
        cu = hetu.placeholder("int32", [3], name="cu")
        outs = [hetu.attn_varlen(q, q, q, 8, cu, cu)[0], hetu.layout_tokens(q, [[5]], [[0]], True, cu)[1]]
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor([2, 3]).cumsum(0)])
    for a, b in zip(g.run(outs, {q: x, cu: ends}), g.run(outs, {q: x, cu: ends.numpy()}), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", ["gpu", "mps", "meta", "cuda:99", 2**63, -1, b"cpu", ["cpu"]])
def test_a_device_that_is_none_or_not_there_is_refused(device: Any) -> None:
    g, x, y = plus_one()
    with pytest.raises(hetu.HetuError, match="device"):
        g.run(y, {x: [1.0]}, device=device)

    def build() -> Any:
        with hetu.graph("define_and_run", device=device) as other:
            z = hetu.full([1], 1.0)
        return other.run(z)

    with pytest.raises(hetu.HetuError, match="device"):
        build()
    assert g.run(y, {x: [1.0]}, device=torch.device("cpu")).tolist() == [2.0]


@pytest.mark.parametrize("fetches", [None, 5, [[]], [None], {1: 2}, {"z": {}}, object], ids=repr)
@pytest.mark.parametrize("method", ["run", "prepare"])
def test_what_is_no_tensor_can_not_be_fetched(fetches: Any, method: str) -> None:
    g, x, y = plus_one()
    for given in (fetches, [y, fetches]):
        with pytest.raises(hetu.HetuError, match=r"fetches(.|\n)*fix:    pass a graph tensor, or a flat list of them"):
            getattr(g, method)(given, {x: [1.0]})
    assert g.run((y,), {x: [1.0]})[0].tolist() == [2.0] and g.run({}, {x: [1.0]}) == {}


@pytest.mark.parametrize("fetches", ["z", ["z"], {"z": "z"}, [{}]], ids=repr)
@pytest.mark.parametrize("method", ["run", "prepare"])
def test_names_that_nothing_has_can_not_be_fetched(fetches: Any, method: str) -> None:
    g, x, _ = plus_one()
    with pytest.raises(hetu.HetuError, match=r"no tensor named .z., as fetches says|pass a graph tensor"):
        getattr(g, method)(fetches, {x: [1.0]})


@pytest.mark.parametrize("run_level", ["Update", None, ["grad"], 1, b"grad"])
def test_run_levels_are_names(run_level: Any) -> None:
    g, x, y = plus_one()
    with pytest.raises(hetu.HetuError, match="there is no run_level"):
        g.run(y, {x: [1.0]}, run_level=run_level)


def test_counts_beyond_all_reason_are_refused() -> None:
    g, x, y = plus_one()
    for count in (2**63, 2**16 + 1, 0, True, 1.0, None):
        with pytest.raises(hetu.HetuError, match="num_micro_batches"):
            g.run(y, {x: [1.0]}, num_micro_batches=count)
        with pytest.raises(hetu.StrategyError, match="num_strategy"):
            hetu.graph("define_and_run", num_strategy=count)
    with g, pytest.raises(hetu.ShapeError, match="at most 65536 pieces"):
        hetu.split(hetu.full([2**40], 1.0), 1)
    assert g.run(y, {x: [1.0]}, num_micro_batches=np.int64(1), strategy=np.int8(0)).tolist() == [2.0]
