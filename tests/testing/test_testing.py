"""hetu.testing: what users test their own graphs with says what is so, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.errors import HetuError, ShapeError
from hetu.testing import allowed_pairs, assert_bound, assert_shapes, assert_strategies_agree, attention, bind, counting


def two_strategies(packing: bool = False) -> tuple[hetu.Graph, dict[str, hetu.Tensor], hetu.IntSymbol]:
    s = hetu.IntSymbol("s")
    with hetu.Graph("define_and_run", num_strategy=2) as g:
        qkv = hetu.placeholder(hetu.float64, [hetu.IntSymbol("rows"), 4 * 8], name="qkv")
        cu = hetu.placeholder(hetu.int32, [hetu.IntSymbol("ends")], name="cu") if packing else None
        lengths, groups = [[s], [s // 3, s - s // 3]], [[0], [0, 0]]
        out = hetu.parallel_attn(
            qkv, 8, 2, lengths, groups, packing, cu, cu, softcap=3.0, window_size=(4, 0), split="sym"
        )[0]
        scale = hetu.parameter(2.0, [1], dtype=hetu.float64, name="scale")
    return g, {"qkv": qkv, "out": out, "scale": scale} | ({"cu": cu} if cu is not None else {}), s


def test_a_run_binds_from_shapes_alone() -> None:
    n, m = hetu.IntSymbol("n"), hetu.IntSymbol("m")
    with hetu.Graph("define_and_run") as g:
        x = hetu.placeholder(hetu.bfloat16, [2 * n + 1, m], name="x")
        y = hetu.placeholder(hetu.float32, [n], name="y")
        z = hetu.concat([x, x], 0)
    bound = bind(g, [z, y], {x: (7, 2**40), y: (3,)})
    assert bound.strategy == 0 and bound.values(n) == (3,) and bound.shapes(z) == ((14, 2**40),)
    assert str(bound).splitlines() == [
        "strategy 0: 1 pipeline",
        "pipeline 0",
        "  n = 3, from shape of x, dimension 0: 2*n + 1 is 7",
        f"  m = {2**40}, from shape of x, dimension 1",
    ]
    assert_bound(bound, {n: 3, 2 * n + m: [2**40 + 6]})
    assert_shapes(bound, {z: (14, 2**40), y: [(3,)]})
    with pytest.raises(
        AssertionError, match=r"n is 3, expected 4\n  n = 3, from shape of x, dimension 0: 2\*n \+ 1 is 7$"
    ):
        assert_bound(bound, {n: 4, m: 2**40})
    with pytest.raises(
        AssertionError, match=r"concat_0 is \[4\*n \+ 2, m\] = \(14, \d+\), expected \(14, 5\)\n  n = 3"
    ):
        assert_shapes(bound, {z: (14, 5)})
    with pytest.raises(HetuError, match="shape of x, dimension 0 is 8, but"):
        bind(g, z, {x: (8, 1)})


def test_every_pipeline_binds() -> None:
    g, of, s = two_strategies()
    bound = bind(g, of["out"], {of["qkv"]: [(3, 32), (7, 32)]}, int_symbol_dict={s: 10}, strategy=1)
    rows = of["qkv"].symbolic_shape[0]
    assert bound.strategy == 1 and bound.values(rows) == (3, 7) and bound.shapes(of["out"]) == ((3, 16), (7, 16))
    assert_bound(bound, {rows: [3, 7], s: 10})
    with pytest.raises(AssertionError, match="rows on pipeline 1 is 7, expected 3"):
        assert_bound(bound, {rows: 3})
    with pytest.raises(AssertionError, match="1 values are expected, but there are 2 pipelines"):
        assert_bound(bound, {rows: [3]})
    text = str(bound)
    assert "strategy 1: 2 pipelines" in text and "10 tokens of 1 document on 2 pipelines" in text
    assert "object at 0x" not in repr(bound) and repr(bound.prepared).startswith("<strategy 1 on 2 pipelines")


@pytest.mark.parametrize("lengths", [[10], [0], [1], [3, 0, 1, 9]])
def test_all_strategies_give_the_oracle(lengths: list[int]) -> None:
    g, of, s = two_strategies(packing=True)
    total, ends = sum(lengths), np.cumsum([0, *lengths]).astype(np.int32)
    qkv = torch.randn(total, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    q, k, v = (x.unflatten(1, (x.shape[1] // 8, 8)) for x in qkv.split([16, 8, 8], 1))
    out, lse, p = attention(q, k, v, ends, mask=hetu.Mask.window(4, 0), softcap=3.0)
    feeds = {of["qkv"]: qkv, of["cu"]: ends}
    options: dict[str, Any] = {"cu_seqlens": ends, "rtol": 1e-12, "atol": 1e-12}
    one, _ = assert_strategies_agree(
        g, [of["out"], of["scale"]], feeds, [{s: total}] * 2, reference=[out.reshape(total, 16), [2.0]], **options
    )
    assert torch.equal(one, out.reshape(total, 16)) and lse.shape == (total, 2) and p.shape == (total, 2, total)
    if total:
        wrong = one.clone()
        wrong[-1, -1] += 2**20
        with pytest.raises(AssertionError, match=rf"under strategy 0: [^$]*Greatest absolute difference: {2**20}"):
            assert_strategies_agree(g, [of["out"]], feeds, [{s: total}] * 2, reference=[wrong], **options)
    with pytest.raises(HetuError, match="1 dicts of symbols for 2 strategies"):
        assert_strategies_agree(g, [of["out"]], feeds, [{s: total}], **options)


def test_a_strategy_that_differs_is_named() -> None:
    s = hetu.IntSymbol("s")
    with hetu.Graph("define_and_run", num_strategy=2) as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 24], name="x")
        out = hetu.parallel_attn(x, 8, 1, [[s], [s // 2, s - s // 2]], [[0], [0, 0]])[0]
        own = hetu.sum(x, 0)  # of the pipeline's own rows
    with pytest.raises(AssertionError, match=f"{own.name} under strategy 1 differs between pipelines 0 and 1"):
        assert_strategies_agree(g, [out, own], {x: torch.randn(4, 24)}, [{s: 4}, {s: 4}])


def test_what_is_made_anew_is_counted() -> None:
    g, of, s = two_strategies()
    feeds: Callable[[int], dict[hetu.Tensor, Any]] = lambda n: {of["qkv"]: np.ones((n, 32))}  # noqa: E731
    with counting(g) as first:
        g.run(of["out"], feeds(4), int_symbol_dict={s: 4}, strategy=0)
    with counting(g) as second:
        g.run(of["out"], feeds(4), int_symbol_dict={s: 4}, strategy=0)
        g.run(of["out"], feeds(5), int_symbol_dict={s: 5}, strategy=0)
    assert (first.executables, first.plans, first.bindings) == (1, 1, 1)
    assert (second.executables, second.plans, second.bindings) == (0, 1, 1)


def test_the_oracle_by_hand() -> None:
    q = torch.tensor([[[2.0]], [[0.0]]])
    k, v = torch.tensor([[[1.0]], [[3.0]], [[5.0]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]])
    sinks = torch.tensor([0.0], requires_grad=True)
    out, lse, p = attention(q, k, v, [0, 1, 2, 2], [0, 1, 1, 3], sinks=sinks, softmax_scale=0.5)
    weight = np.exp(1) / (np.exp(1) + 1)
    np.testing.assert_allclose(out.detach(), [[[weight, 0]], [[0, 0]]])
    np.testing.assert_allclose(lse.detach(), [[np.log(np.exp(1) + 1)], [0]])
    (gradient,) = torch.autograd.grad(lse.sum(), sinks)
    np.testing.assert_allclose(gradient, [2 - weight])
    assert attention(q, k, v, [0, 1, 2, 2], [0, 1, 1, 3])[1][1, 0] == -torch.inf and p[1].sum() == 0
    with pytest.raises(ShapeError, match=r"cu_seqlens_k is \[0, 2\], but there are 3 rows"):
        attention(q, k, v, [0, 2])
    with pytest.raises(ShapeError, match="cu_seqlens_q"):
        attention(q, k, v, [1, 2], [0, 3])


def test_pairs_by_hand() -> None:
    assert allowed_pairs(hetu.Mask.window(1, 1), [2], [4]).astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert allowed_pairs(hetu.Mask.chunked(2), [3]).astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert allowed_pairs(hetu.Mask.prefix(2), [3]).astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    slices = hetu.Mask.slices([(0, 2)], [(1, 3)], ["bicausal"])
    assert allowed_pairs(slices, [1, 2]).astype(int).tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
