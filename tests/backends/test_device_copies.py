"""Copies of plans on devices: found by one lookup, gone with what they are of, and bounded in bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.backends import memory
from hetu.backends.attention import contract
from hetu.backends.comm import buffers
from hetu.backends.memory import DeviceCopies
from hetu.backends.torch import layout_tokens
from hetu.backends.triton import launch, launch_backward
from hetu.functional import attn_varlen
from hetu.functional.attention import lengths_seen
from hetu.parallel.layout.layout import Layout


class Part:
    """A part of a plan."""

    def __init__(self) -> None:
        self.copies: dict[Any, Any] = {}


def test_the_oldest_go_first() -> None:
    home, parts = DeviceCopies(100), [Part() for _ in range(4)]
    for part in parts[:3]:
        assert home.keep(part, "key", "copy", 30) == "copy"
    home.keep(parts[0], "other", "copy", 10)
    assert home.nbytes() == 100 and all(parts[i].copies for i in range(3))
    home.keep(parts[3], "key", "copy", 50)
    assert [sorted(part.copies) for part in parts] == [[], [], ["key"], ["key"]] and home.nbytes() == 80
    home.keep(parts[0], "key", "copy", 20)
    assert home.nbytes() == 100 and parts[0].copies == {"key": "copy"}, "what went comes back as the newest"


def test_copies_die_with_what_they_are_of() -> None:
    home, parts = DeviceCopies(100), [Part() for _ in range(3)]
    for part in parts:
        home.keep(part, "key", "copy", 30)
    del parts[0], part
    assert home.nbytes() == 60
    home.keep(parts[0], "other", "copy", 40)
    assert all(part.copies for part in parts), "there was room"


def test_one_part_alone_is_bounded_too() -> None:
    home, part = DeviceCopies(100), Part()
    for key in "abc":
        home.keep(part, key, key, 45)
    assert part.copies == {"c": "c"} and home.nbytes() == 45
    home.keep(part, "d", "d", 500)
    assert part.copies == {"d": "d"} and home.nbytes() == 500, "what is in use stays, however large"
    home.keep(part, "e", "e", 1)
    assert part.copies == {"e": "e"} and home.nbytes() == 1


def test_a_copy_that_is_made_twice_counts_once() -> None:
    home, part = DeviceCopies(100), Part()
    for _ in range(5):
        home.keep(part, "key", "copy", 30)
    assert home.nbytes() == 30


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> DeviceCopies:
    """A small one in place of the process's."""
    small = DeviceCopies(6000)
    for module in (memory, contract, buffers, layout_tokens, launch, launch_backward):
        monkeypatch.setattr(module, "device_copies", small)
    return small


@pytest.mark.usefixtures("no_kernels")
def test_lengths_that_are_all_kept_do_not_fill_the_device(home: DeviceCopies, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has seen many lengths, each of which is planned still."""
    lengths_seen._items.clear()
    calls = [torch.tensor([0, *range(step, 40 * step, step)]) for step in range(1, 21)]

    def run() -> None:
        for cu_seqlens in calls:
            q = torch.zeros(int(cu_seqlens[-1]), 1, 8, requires_grad=True)
            with hetu.config(backend="triton"):
                attn_varlen(q, q, q, cu_seqlens, cu_seqlens).sum().backward()

    run()
    tables = [made.plan.table for made in lengths_seen.values()]
    held = [work.records.nbytes for table in tables for work in table.copies.values()]
    assert len(tables) == 20 and held, "their plans are there"
    assert sum(held) == home.nbytes() <= home.limit
    monkeypatch.setattr(home, "limit", 2**30)
    run()
    assert home.nbytes() > 10 * 6000, "all of them are copied again, since there is room"


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that compute nothing: this is of what is made for them."""
    monkeypatch.setattr(launch.Launcher, "__call__", lambda *_: None)


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_what_went_is_made_again(home: DeviceCopies, method: str) -> None:
    """Rows' numbers, places of log-sum-exps and tokens: with room for none of them all comes out the same."""
    layout = Layout.build([12, 12], [0, 0], split="sym")
    with hetu.graph("define_and_run", device="cpu") as g:
        qkv = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 6 * 8])
        out, lse, *_ = hetu.parallel_attn(qkv, 8, 1, [[12, 12]], [[0, 0]], split="sym", method=method)
        grad = hetu.gradients([out, lse], [qkv])[0]
    feeds = {qkv: hetu.Shards(layout.scatter(np.random.default_rng(0).standard_normal((24, 48), np.float32)))}
    results = []
    for limit in (1, 1, 2**30):
        home.limit = limit
        results.append([np.concatenate([np.asarray(x) for x in shards]) for shards in g.run([out, lse, grad], feeds)])
        assert (len(home._owners) == 1) == (limit == 1)
    for one in results[1:]:
        assert all(np.array_equal(mine, first) for mine, first in zip(one, results[0], strict=True))


def test_the_environment_sets_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory._limit() == 256 * 2**20
    monkeypatch.setenv("HETU_DEVICE_COPIES_MB", "3")
    assert memory._limit() == 3 * 2**20
    monkeypatch.setenv("HETU_DEVICE_COPIES_MB", "a lot")
    with pytest.raises(hetu.HetuError, match="HETU_DEVICE_COPIES_MB is 'a lot', expected a whole number of MiB"):
        memory._limit()
