"""What a communicator is given to carry is what the plan says, to the byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.plans import holding_back

import hetu
from hetu.backends.comm import LocalComm, LocalWorld, set_world
from hetu.parallel import SPLITS
from hetu.parallel.methods import METHODS

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM
LENS = [[7, 0, 12, 5], [6, 6], [1, 30, 2, 2, 9]]


class CountingWorld(LocalWorld):
    """Notes the bytes that each pipeline sends and receives."""

    def __init__(self) -> None:
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()

    def communicator(self, count: int) -> LocalComm:
        return CountingComm(self)


class CountingComm(LocalComm):
    def __init__(self, world: CountingWorld) -> None:
        super().__init__()
        self.world = world

    def send(self, pipeline: int, instruction: Any, rows: torch.Tensor) -> None:
        self.world.sent[pipeline] += rows.nbytes
        super().send(pipeline, instruction, rows)

    def receive(self, pipeline: int, instruction: Any, place: torch.Tensor) -> None:
        self.world.received[pipeline] += place.nbytes
        super().receive(pipeline, instruction, place)


@pytest.fixture
def world() -> Iterator[CountingWorld]:
    counting = CountingWorld()
    set_world(counting)
    yield counting
    set_world(LocalWorld())


@pytest.mark.parametrize("lens", LENS, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [hetu.bfloat16, hetu.float32, hetu.float64])
@holding_back(True)
def test_moved_bytes_are_the_plans(world: CountingWorld, lens: list[int], method: str, split: str, dtype: Any) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        qkv = hetu.placeholder(dtype, [hetu.IntSymbol("rows"), WIDTH], name="qkv")
        lists = [lens], [[0] * len(lens)]
        out = hetu.parallel_attn(qkv, HEAD_DIM, HEADS // KV_HEADS, *lists, split=split, method=method)[0]
        grad = hetu.gradients(out, [qkv])[0]
    layout, plan = g.layout(0), g.plan(0)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((sum(lens), WIDTH)))
    feeds = {qkv: hetu.Shards(layout.scatter(x.to(getattr(torch, dtype.name))))}
    for fetch, plans in ((out, [plan]), (grad, [plan, plan.backward()])):
        world.sent.clear(), world.received.clear()
        g.run(fetch, feeds)
        for r in range(len(lens)):
            assert world.sent[r] == sum(one.bytes_sent(r) for one in plans)
        assert world.received.total() == world.sent.total()
