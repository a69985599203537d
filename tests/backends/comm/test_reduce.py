"""Sums over pipelines in buckets: when they start, and what comes out."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from support.devices import DEVICES

import hetu
from hetu.backends.comm import reduce_in_order
from hetu.backends.comm.reduce import BUCKET_BYTES, Reducer
from hetu.backends.torch.collective import hetu_finish_reduce, hetu_start_reduce
from hetu.parallel.placement import Box, Placement


class Log:
    """Reduces rows at hand, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[torch.Size, str, int]] = []

    def __call__(self, own: torch.Tensor, op: str, count: int) -> torch.Tensor:
        self.asked.append((own.shape, op, count))
        return reduce_in_order(list(own), op)


@pytest.mark.parametrize("device", DEVICES)
def test_small_tensors_share_a_bucket_and_keep_their_shapes(device: str) -> None:
    log = Log()
    reducer = Reducer(log)
    parts = [
        [torch.randn(shape, dtype=torch.float64, device=device) for _ in range(3)]
        for shape in ((2, 3), (), (0, 4), (5,))
    ]
    started = [reducer.start(own, "sum", 3) for own in parts]
    assert not log.asked
    sums = [reducer.finish(item) for item in started]
    assert log.asked == [(torch.Size([3, 12]), "sum", 3)]
    for own, total in zip(parts, sums, strict=True):
        assert torch.equal(total, own[0] + own[1] + own[2])


@pytest.mark.parametrize("device", DEVICES)
def test_a_full_bucket_leaves_before_anybody_waits(device: str) -> None:
    log = Log()
    reducer = Reducer(log)
    large = torch.ones(BUCKET_BYTES // 4 - 1, device=device)
    first = reducer.start([large], "sum", 2)
    assert not log.asked
    second = reducer.start([torch.ones(1, device=device)], "sum", 2)
    third = reducer.start([torch.ones(2, device=device)], "sum", 2)
    assert torch.equal(reducer.finish(second).cpu(), torch.ones(1))
    assert [shape[1] for shape, _, _ in log.asked] == [len(large) + 1]
    assert torch.equal(reducer.finish(third).cpu(), torch.ones(2))
    assert len(reducer.finish(first)) == len(large)


def test_what_has_a_home_is_cut_for_each_process_and_let_go_of() -> None:
    """Process 1 of 2: of each tensor it gets its boxes, one after the other. Packed gradients are let go of."""
    sent: list[list[list[float]]] = []

    def scatter(pieces: Sequence[torch.Tensor], op: str, count: int) -> torch.Tensor:
        sent.append([piece.tolist() for piece in pieces])
        return reduce_in_order(list(pieces[1]), op)

    reducer = Reducer(Log(), scatter, rank=1)
    a, b = torch.arange(6.0).view(3, 2), torch.tensor(7.0)
    boxes = Box((0, 0), (1, 2)), Box((1, 0), (3, 1)), Box((1, 1), (3, 2))
    homes = [Placement((boxes[:1], boxes[1:])), Placement(((), (Box((), ()),)))]
    alive = weakref.ref(a)
    started = [reducer.start([x, 10 * x], "sum", 2, home) for x, home in zip((a, b), homes, strict=True)]
    whole = reducer.start([b, b], "sum", 2)
    del a
    assert reducer.finish(started[0]).tolist() == [22, 44, 33, 55] and reducer.finish(started[1]).tolist() == [77]
    assert reducer.finish(whole).item() == 14
    assert sent == [[[[0, 1], [0, 10]], [[2, 4, 3, 5, 7], [20, 40, 30, 50, 70]]]]
    assert alive() is None


def test_kinds_do_not_mix() -> None:
    log = Log()
    reducer = Reducer(log)
    started = [
        reducer.start([torch.ones(2, dtype=dtype)] * 2, op, 2)
        for dtype, op in ((torch.float32, "sum"), (torch.bfloat16, "sum"), (torch.float32, "mean"))
    ]
    assert [reducer.finish(item).tolist() for item in started] == [[2, 2], [2, 2], [1, 1]]
    assert len(log.asked) == 3


def test_a_failure_reaches_who_waits() -> None:
    def fail(own: torch.Tensor, op: str, count: int) -> torch.Tensor:
        raise RuntimeError("connection closed")

    reducer = Reducer(fail)
    started = reducer.start([torch.ones(1)], "sum", 2)
    with pytest.raises(RuntimeError, match="connection closed"):
        reducer.finish(started)


def test_gradients_leave_as_soon_as_they_are_computed() -> None:
    """In the lowered module each sum starts where its gradient is made, and is waited for at the end."""
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [4, 4], name="x")
        h = x
        for i in range(5):
            h = hetu.tanh(hetu.matmul(h, hetu.parameter(0.1, [4, 4], name=f"w{i}")))
        train = hetu.optim.SGD(lr=0.1).minimize(hetu.sum(h))
    g.run(train, {x: torch.ones(4, 4)})
    (launcher,) = g.executor._executables.launchers._items.values()
    targets = [node.target for node in launcher.executable.module.graph.nodes]
    starts = [i for i, target in enumerate(targets) if target is hetu_start_reduce]
    finishes = [i for i, target in enumerate(targets) if target is hetu_finish_reduce]
    assert len(starts) == len(finishes) == 5
    assert max(starts) < min(finishes)
    computing = [i for i, t in enumerate(targets) if callable(t) and t not in (hetu_start_reduce, hetu_finish_reduce)]
    # Between two starts the gradients of a layer are computed, and no start waits for the last of them.
    assert all(any(a < i < b for i in computing) for a, b in pairwise(starts))
