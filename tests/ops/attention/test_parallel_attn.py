"""parallel_attn, end to end: every strategy gives the result of one device, on both backends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.attention_cases import METHOD_CHOICES, Case, cases
from support.longer import LONGER, grid
from support.parallel_checks import check_case, lse_rows, run_case

import hetu
from hetu.parallel import SPLITS


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=150 * LONGER)
@given(case=cases())
def test_any_strategy_on_torch(case: Case) -> None:
    check_case(case, "torch")


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=10 * LONGER)
@given(case=cases())
def test_any_strategy_on_triton(case: Case) -> None:
    check_case(case, "triton")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("backend", "split", "method"), grid(["torch", "triton"], SPLITS, METHOD_CHOICES))
def test_uneven_lengths_in_bfloat16(backend: str, split: str, method: str) -> None:
    check_case(
        Case([63, 0, 1, 65], [0, 0, 0, 0], split, method, "1d", dtype=torch.bfloat16, cut=[0.5, 0.51], head_dim=64),
        backend,
    )


def dropped(case: Case) -> torch.Tensor:
    """Which weights were dropped, rows in sequence order, of a case with one group."""
    hetu.manual_seed(5)
    results, layout, whole = run_case(case, "torch")
    weights = layout.gather([lse_rows(x, case.lens[r]) for r, x in enumerate(results[3])])
    return weights[..., : len(whole[0])] < 0


def test_dropout_is_the_same_under_every_strategy_split_and_method() -> None:
    options = {"p": 0.3, "return_softmax": True, "is_causal": False, "packing": "1d", "cut": [0.3]}
    one = dropped(Case([60], [0], **options))
    assert 0.25 < one.float().sum() / (18 * 18 + 42 * 42) / 2 < 0.35
    for lens in ([30, 30], [7, 0, 41, 12]):
        for split in SPLITS:
            for method in METHOD_CHOICES:
                assert torch.equal(dropped(Case(lens, [0] * len(lens), split, method, **options)), one)


def test_groups_draw_from_different_streams() -> None:
    hetu.manual_seed(5)
    results, _, _ = run_case(Case([40, 40], [0, 1], p=0.5, return_softmax=True, is_causal=False), "torch")
    assert not torch.equal(results[3][0] < 0, results[3][1] < 0)


def two_strategies() -> tuple[hetu.Graph, Any, Any, hetu.IntSymbol]:
    s, rows = hetu.IntSymbol("s"), hetu.IntSymbol("rows")
    with hetu.graph("define_and_run", num_strategy=2, device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [rows, 24], name="qkv")
        out = hetu.parallel_attn(x, 8, 1, [[s], [s // 2, s - s // 2]], [[0], [0, 0]])[0]
    return g, x, out, s


def test_strategies_switch_without_a_rebuild() -> None:
    g, x, out, s = two_strategies()
    for n in (10, 7, 10):
        data = np.random.default_rng(n).standard_normal((n, 24), np.float32)
        one = g.run(out, feed_dict={x: data}, int_symbol_dict={s: n}, strategy=0)
        layout = g.layout(1, int_symbol_dict={s: n})
        two = g.run(out, feed_dict={x: hetu.Shards(layout.scatter(data))}, int_symbol_dict={s: n}, strategy=1)
        assert isinstance(two, hetu.Shards) and len(two) == 2
        torch.testing.assert_close(layout.gather(list(two)), one, atol=1e-6, rtol=1e-5)
    stats = g.executor.stats()
    assert stats["executables"].misses == 2 and stats["plans"].misses == 4 and stats["bindings"].hits == 2


def test_auto_takes_what_can_run() -> None:
    g, x, out, s = two_strategies()
    data = np.ones((6, 24), np.float32)
    assert g.prepare(out, {x: data}, int_symbol_dict={s: 6}).strategy == 0
    shards = hetu.Shards([data[:3], data[3:]])
    assert g.prepare(out, {x: shards}, int_symbol_dict={s: 6}, strategy="auto").strategy == 1
    with pytest.raises(hetu.StrategyError, match="none of the 2 strategies can run"):
        g.run(out, feed_dict={x: hetu.Shards([data] * 3)}, int_symbol_dict={s: 6})


def test_wrong_shards_are_refused() -> None:
    g, x, out, s = two_strategies()
    shards = hetu.Shards([np.ones((4, 24), np.float32), np.ones((3, 24), np.float32)])
    with pytest.raises(hetu.BindingError) as caught:
        g.run(out, feed_dict={x: shards}, int_symbol_dict={s: 7}, strategy=1)
    text = str(caught.value)
    assert "qkv has 4 rows on pipeline 0, but the strategy gives it 3 tokens" in text
    assert "where:  test_parallel_attn.py:" in text and "s = 7   from int_symbol_dict" in text


def test_micro_batches_of_differing_lengths() -> None:
    g, x, out, s = two_strategies()
    feeds = [np.random.default_rng(n).standard_normal((n, 24), np.float32) for n in (5, 9)]
    both = g.run(out, feed_dict={x: feeds}, int_symbol_dict={s: [5, 9]}, strategy=0, num_micro_batches=2)
    for data, got in zip(feeds, both, strict=True):
        alone = g.run(out, feed_dict={x: data}, int_symbol_dict={s: len(data)}, strategy=0)
        assert torch.equal(got, alone)


def test_no_sympy_while_running(monkeypatch: pytest.MonkeyPatch) -> None:
    import sympy

    g, x, out, s = two_strategies()

    def feeds(n: int) -> dict[Any, Any]:
        return {x: hetu.Shards([np.ones((n // 2, 24), np.float32), np.ones((n - n // 2, 24), np.float32)])}

    g.run(out, feed_dict=feeds(6), int_symbol_dict={s: 6}, strategy=1)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("sympy was called during a run")

    for owner in (sympy.Basic, sympy.Integer, sympy.Expr):
        monkeypatch.setattr(owner, "__new__", refuse)
    for name in ("subs", "xreplace", "doit"):
        monkeypatch.setattr(sympy.Basic, name, refuse)
    g.run(out, feed_dict=feeds(9), int_symbol_dict={s: 9}, strategy=1)
