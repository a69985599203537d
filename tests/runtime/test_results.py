"""What a run takes and gives: arguments are read once, and results belong to the caller."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch

import hetu

ONCE: dict[str, Callable[[list[Any]], Iterable[Any]]] = {
    "a generator": lambda items: (item for item in items),
    "a map": lambda items: map(operator.itemgetter(0), [[item] for item in items]),
    "a filter": lambda items: filter(lambda item: True, items),
    "an iterator": iter,
    "a zip": lambda items: (item for item, _ in zip(items, items, strict=True)),
}


def one_weight() -> tuple[hetu.Graph, Any, Any, Any]:
    with hetu.graph("define_and_run", device="cpu") as g:
        w = hetu.parameter(1.0, [1], name="w")
        x = hetu.placeholder("float32", [1], name="x")
        train = hetu.optim.SGD(lr=0.5).minimize(hetu.sum(w * x))
    return g, x, w, train


@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.parametrize("run_level", ["update", "grad", "compute_only"])
def test_fetches_that_can_be_read_once(kind: str, run_level: str) -> None:
    g, x, w, train = one_weight()
    feeds = {x: [1.0]}
    try:
        first = g.run(ONCE[kind]([train, w]), feeds, run_level=run_level)
        assert [float(value) for value in first] == [1.0, 1.0]
    except hetu.HetuError:
        pass
    fresh = one_weight()
    for _ in range(2):
        again = g.run([train, w], feeds, run_level="compute_only")
        assert len(again) == 2 and again[0] == again[1] == g.run(w)
    assert g.prepare([w], feeds).subgraph.fetches == (w,)
    assert [float(v) for v in fresh[0].run([fresh[3], fresh[2]], {fresh[1]: [1.0]})] == [1.0, 1.0]


def test_a_fetch_given_twice_is_two_results() -> None:
    g, x, w, train = one_weight()
    a, b, c, d = g.run([train, w, train, w], {x: [1.0]}, run_level="compute_only")
    for one, other in ((a, c), (b, d)):
        one += 5
        assert float(other) == 1.0
    with g:
        y = x + 1
    lists = g.run([y, y], {x: [[1.0], [2.0]]}, num_micro_batches=2)
    lists[0][0] += 5
    assert [float(item) for item in lists[1]] == [2.0, 3.0]
    shards = g.run([y, y], {x: hetu.Shards([[1.0], [2.0]])})
    shards[0][1].fill_(9.0)
    assert [float(item) for item in shards[1]] == [2.0, 3.0]


def test_pipelines_and_micro_batches_share_no_result() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("int64", [2], name="x")
        total, reduced = hetu.step_sum(x), hetu.all_reduce(x * 2)
        view = hetu.reshape(reduced, [2, 1])
    fed = [hetu.Shards([[1, 2], [3, 4]]), hetu.Shards([[5, 6], [7, 8]])]
    results = g.run([total, reduced, view], {x: fed}, num_micro_batches=2)
    flat = [shard for micro_batches in results for shards in micro_batches for shard in shards]
    before = [item.clone() for item in flat]
    for i, item in enumerate(flat):
        item += 100
        for other, value in zip(flat[i + 1 :], before[i + 1 :], strict=True):
            assert torch.equal(other, value)


def test_gradients_and_constants_are_ordinary_tensors() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [3], name="x")
        y = hetu.placeholder("float32", [3], name="y")
        constant = hetu.constant([1.0, 2.0, 3.0])
        dx, dy = hetu.gradients(hetu.sum(x + y), [x, y])
        stretched = hetu.transpose(hetu.broadcast_to(hetu.reshape(x, [3, 1]), [3, 4]), 0, 1)
    feeds = {x: torch.tensor([1.0, 2.0, 3.0]), y: np.ones(3, np.float32)}
    fetches = [dx, dy, stretched, constant, x, y]
    for result in g.run(fetches, feeds):
        result += 1.0
        assert not result.requires_grad
    again = g.run(fetches, feeds)
    assert [item.flatten()[:3].tolist() for item in (*again[:2], *again[3:])] == [
        [1.0, 1.0, 1.0],
        [1.0, 1.0, 1.0],
        [1.0, 2.0, 3.0],
        [1.0, 2.0, 3.0],
        [1.0, 1.0, 1.0],
    ]


# What caches tell apart


@pytest.mark.parametrize("value", [True, 1.0, np.float64(1.0), np.bool_(True)])
@pytest.mark.parametrize("call", ["run", "prepare"])
def test_a_symbol_takes_no_float_or_bool_whatever_ran_before(value: Any, call: str) -> None:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        y = hetu.full([s], 1.0)
    for right in (1, np.int64(1), np.uint8(1)):
        assert g.run(y, int_symbol_dict={s: right}).shape == (1,)
    with pytest.raises(hetu.BindingError, match="expected an int"):
        getattr(g, call)(y, int_symbol_dict={s: value})


ORDERS = ["<", ">"]


@pytest.mark.parametrize("op", ["attn_varlen", "parallel_attn", "layout_tokens"])
def test_cu_seqlens_in_the_other_byte_order(op: str) -> None:
    """256 and 65,536 are each other's bytes in reverse."""
    rows = hetu.IntSymbol("rows")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [rows, 24], name="x")
        cu = hetu.placeholder("int32", [3], name="cu")
        if op == "attn_varlen":
            out = hetu.attn_varlen(x, x, x, 8, cu, cu)[0]
        elif op == "parallel_attn":
            out = hetu.parallel_attn(x, 8, 1, [[rows]], [[0]], True, cu)[0]
        else:
            out = hetu.layout_tokens(x, [[rows]], [[0]], True, cu)[1]
    data = np.random.default_rng(0).standard_normal((65536 + 256 if op == "layout_tokens" else 768, 24), np.float32)
    ends = [0, 256, len(data)]
    results = {}
    for order in ORDERS:
        results[order] = g.run(out, {x: data, cu: np.array(ends, f"{order}i4")})
        if op == "layout_tokens":
            other = g.run(out, {x: data, cu: np.array([0, 65536, len(data)], f"{order}i4")})
            assert int((other == 0).sum()) == 65536
    assert torch.equal(*results.values())
    assert g.executor.stats()["bindings"].misses == 1 + (op == "layout_tokens"), "one content is one key"
