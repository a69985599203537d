"""Indices that only a device knows: nothing waits for it, nothing trains on from them, and the next run raises.

On a CPU the device's way is taken where :func:`as_on_a_device` says that the host can't look: torch tensors count as if
they lay on a device.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from support.devices import CUDA
from support.lookups import HOW, OPS, Lookup
from support.same import assert_same

import hetu
from hetu import rng
from hetu.backends.torch import index_flags
from hetu.planning import indices
from hetu.runtime.unseen import UnseenRun

OPTIMIZERS = {
    "SGD": functools.partial(hetu.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": functools.partial(hetu.optim.Adam, lr=0.1, amsgrad=True, max_grad_norm=1.0),
    "AdamW": functools.partial(
        hetu.optim.AdamW, lr=0.1, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5)
    ),
}
WAYS = ["as a device does", CUDA]


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device; on a CPU what it knows is hidden from the host."""
    if request.param == "cuda":
        return "cuda"
    monkeypatch.setattr(index_flags, "DEFERRED", {"cpu"})
    monkeypatch.setattr(indices, "is_on_host", lambda value: not isinstance(value, torch.Tensor))
    return "cpu"


def fed(ids: list[int], way: str, dtype: str = "int64") -> torch.Tensor:
    return torch.tensor(ids, dtype=getattr(torch, dtype), device=way)


def caught_up(way: str) -> None:
    """The device has come to the end of all runs."""
    if way == "cuda":
        torch.cuda.synchronize()


def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has not come to any run yet."""
    monkeypatch.setattr(UnseenRun, "is_told", lambda run: False)


def refused(lookup: Lookup, act: Any, number: int, runs: int = 0) -> None:
    caught_up(lookup.graph.device or "cpu")
    with pytest.raises(hetu.BindingError) as caught:
        act()
    text = str(caught.value)
    assert f"{lookup.name} of an earlier run" in text and f"holds {number} at [" in text, text
    assert f"expected 0 to below {lookup.size}" in text and "where:  lookups.py:" in text
    assert (f"({runs} came after it)" in text) == bool(runs)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fetch", ["y", "dx", "train"])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_an_index_that_only_the_device_knows(op: str, how: str, fetch: str, dtype: str, way: str) -> None:
    lookup, twin = (Lookup(op, how, dtype, device=way) for _ in range(2))
    hetu.manual_seed(5)
    lookup.run(lookup.train, fed([0, 1], way, dtype))
    before, drawn = lookup.graph.state_dict(), rng.get_state()
    for wrong in (lookup.size, -1, np.iinfo(dtype).min, np.iinfo(dtype).max):
        given = lookup.run(getattr(lookup, fetch), fed([0, wrong], way, dtype))
        if fetch == "y":
            assert torch.isnan(given).all(), "what is read of such a run shows it"
        refused(lookup, lambda: lookup.run(lookup.y, fed([0, 1], way, dtype)), wrong)
        assert rng.get_state() == drawn
        assert_same(lookup.graph.state_dict(), before)
    after = lookup.run(lookup.train, fed([1, 1], way, dtype))
    hetu.manual_seed(5)
    twin.run(twin.train, fed([0, 1], way, dtype))
    assert_same(after, twin.run(twin.train, fed([1, 1], way, dtype)))
    assert_same(lookup.graph.state_dict(), twin.graph.state_dict())


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("op", OPS)
def test_right_indices_give_the_bits_that_the_host_would(op: str, way: str) -> None:
    found = []
    for ids in (np.array([0, 2]), fed([0, 2], way)):  # the host looks at arrays of numpy in both ways
        lookup = Lookup(op, device=way)
        hetu.manual_seed(3)
        found.append(lookup.run([lookup.y, lookup.dx, lookup.train], ids))
        found.append(lookup.graph.state_dict())
    assert_same(found[:2], found[2:])


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("levels", [["update"], ["grad", "update"], ["grad"]])
def test_later_runs_do_not_train_on(name: str, levels: list[str], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host may be several runs ahead when the device comes to the wrong index."""
    lookup = Lookup("embedding", device=way, optimizer=OPTIMIZERS[name]())
    lookup.run(lookup.train, fed([0, 1], way))
    lookup.run(lookup.train, fed([2, 1], way), run_level="grad")
    before, drawn = lookup.graph.state_dict(), rng.get_state()
    with monkeypatch.context() as patch:
        waiting(patch)
        lookup.run(lookup.train, fed([0, 9], way), run_level=levels[0])
        for level in levels[1:] * 2:
            lookup.run(lookup.train, fed([0, 1], way), run_level=level)
    refused(lookup, lookup.graph.state_dict, 9, runs=len(levels[1:] * 2))
    assert rng.get_state() == drawn
    assert_same(lookup.graph.state_dict(), before)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_wrong_inference_takes_no_update_back(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup, twin = (Lookup("embedding", device=way) for _ in range(2))
    for one in (lookup, twin):
        hetu.manual_seed(4)
        one.run(one.train, fed([0, 1], way))
        with monkeypatch.context() as patch:
            waiting(patch)
            one.run(one.dx, fed([0, 9 if one is lookup else 1], way))
            assert one.run(one.train, fed([3, 1], way))
    refused(lookup, lookup.graph.state_dict, 9)
    mine, wanted = lookup.graph.state_dict(), twin.graph.state_dict()
    for part in ("parameters", "optimizers"):
        assert_same(mine[part], wanted[part])


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_first_run_is_waited_for(way: str) -> None:
    """It makes parameters and optimisers, which are made again, perhaps by another seed."""
    lookup = Lookup("embedding", device=way)
    with pytest.raises(hetu.BindingError, match=r"ids holds 9 at \[1\]"):
        lookup.run(lookup.train, fed([0, 9], way))
    assert not lookup.graph.state_dict()["optimizers"]
    lookup.run(lookup.train, fed([0, 1], way))


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_micro_batches_and_pipelines(way: str) -> None:
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([2, 2], [0, 0])], device=way) as g:
        ids = hetu.placeholder("int64", [2], name="tokens")
        y = hetu.sum(hetu.embedding(ids, hetu.parameter(1.0, [4, 2], name="w")))
        train = hetu.optim.SGD(lr=0.1).minimize(y, name="train")
    good = hetu.Shards([fed([0, 1], way), fed([2, 1], way)])
    g.run(train, {ids: [good, good]}, num_micro_batches=2)
    before = g.state_dict()
    for batch in (0, 1):
        batches = [good, good]
        batches[batch] = hetu.Shards([fed([0, 1], way), fed([7, 1], way)])
        g.run(train, {ids: batches}, num_micro_batches=2)
        caught_up(way)
        with pytest.raises(hetu.BindingError, match=r"ids of an earlier run holds 7 at \[0\]"):
            g.run(train, {ids: [good, good]}, num_micro_batches=2)
        assert_same(g.state_dict(), before)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_ignored_labels_are_no_indices(way: str) -> None:
    for op in ("cross_entropy", "token_mean_loss"):
        lookup = Lookup(op, device=way)
        for ids in ([-100, 1], [-100, -100]):
            lookup.run([lookup.y, lookup.train], fed(ids, way))
        lookup.graph.state_dict()
        lookup.run(lookup.y, fed([-100, -99], way))
        refused(lookup, lookup.graph.state_dict, -99)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_rows_that_were_looked_up_wrongly_are_nan(way: str) -> None:
    with hetu.graph("define_and_run", device=way) as g:
        ids = hetu.placeholder("int64", [2, 2], name="ids")
        x = hetu.placeholder("float32", [3, 2], name="x")
        rows, picked = hetu.embedding(ids, x), hetu.gather(x, 0, ids)
        losses = hetu.cross_entropy(rows, ids, reduction="none")
    feeds = {ids: fed([0, 1, 1, 0], way).view(2, 2), x: torch.ones(3, 2, device=way)}
    for found in g.run([rows, picked, losses], feeds):
        assert not torch.isnan(found).any()
    feeds[ids] = fed([0, 5, 1, 0], way).view(2, 2)
    for found in g.run([rows, picked, losses], feeds):
        caught_up(way)
        wrong = torch.isnan(found).flatten(2).any(2) if found.ndim == 3 else torch.isnan(found)
        assert wrong.tolist() == [[False, True], [False, False]]
    with pytest.raises(hetu.BindingError, match=r"ids of an earlier run holds 5 at \[0, 1\]"):
        g.run(rows, feeds)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_ids_that_were_overwritten_since(way: str) -> None:
    lookup, ids = Lookup("embedding", device=way), fed([0, 9], way)
    lookup.run(lookup.y, fed([0, 1], way))
    lookup.run(lookup.y, ids)
    ids.zero_()
    caught_up(way)
    with pytest.raises(hetu.BindingError, match="ids of an earlier run held a number out of range"):
        lookup.run(lookup.y, ids)
    lookup.run(lookup.y, ids)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_loading_a_state_ends_what_was_to_be_judged(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = Lookup("embedding", device=way)
    lookup.run(lookup.train, fed([0, 1], way))
    saved = lookup.graph.state_dict()
    waiting(monkeypatch)
    lookup.run(lookup.train, fed([0, 9], way))
    lookup.graph.load_state_dict(saved)
    assert_same(lookup.graph.state_dict(), saved)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_failure_of_another_kind_leaves_nothing_to_judge(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise LookupError("no such step")

    lookup = Lookup("embedding", device=way)
    lookup.run(lookup.train, fed([0, 1], way))
    before = lookup.graph.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(type(lookup.graph.executor.state), "commit", fails)
        with pytest.raises(hetu.HetuError, match="no such step"):
            lookup.run(lookup.train, fed([0, 9], way))
    assert not lookup.graph.executor.state.unseen.runs
    assert_same(lookup.graph.state_dict(), before)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_run_does_not_wait_for_the_device(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = Lookup("token_mean_loss", device=way)
    lookup.run(lookup.train, fed([0, 1], way))
    lookup.graph.state_dict()
    waits: list[UnseenRun] = []
    monkeypatch.setattr(UnseenRun, "is_told", lambda run: False)
    monkeypatch.setattr(UnseenRun, "is_flagged", lambda run: bool(waits.append(run)))
    for _ in range(3):
        lookup.run(lookup.train, fed([0, 1], way))
    assert not waits and lookup.graph.executor.state.unseen.runs
    lookup.graph.state_dict()
    assert len(waits) == 3 and not lookup.graph.executor.state.unseen.runs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_of_a_gpu_that_are_fed_to_a_graph_on_the_cpu() -> None:
    lookup = Lookup("embedding")
    lookup.run(lookup.train, fed([0, 1], "cuda"))
    with pytest.raises(hetu.BindingError, match=r"fed as numbers, holds 9 at \[1\]"):
        lookup.run(lookup.train, fed([0, 9], "cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_not_waited_for() -> None:
    lookup = Lookup("token_mean_loss", device="cuda")
    ids, x = fed([0, 1], "cuda"), torch.ones(4, 3, device="cuda")
    feeds = {lookup.ids: ids, lookup.x: x}
    for _ in range(2):
        lookup.graph.run(lookup.train, feeds)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            lookup.graph.run(lookup.train, feeds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
