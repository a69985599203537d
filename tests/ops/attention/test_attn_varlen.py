"""attn_varlen, end to end, against a dense float64 attention, on both backends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dense import dense
from support.longer import LONGER, grid
from support.varlen_checks import check_forward, run_varlen

import hetu

BACKENDS = ("torch", "triton")


lengths = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_lengths(backend: str) -> None:
    @settings(max_examples={"torch": 50, "triton": 10}[backend] * LONGER)
    @given(
        pairs=lengths,
        heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
        is_causal=st.booleans(),
        tail=st.integers(0, 3),
        rank=st.sampled_from([2, 3]),
        p=st.sampled_from([0.0, 0.3]),
        return_softmax=st.booleans(),
        zero_tensors=st.booleans(),
        seed=st.integers(0, 9),
    )
    def holds(
        pairs: list[tuple[int, int]], heads: tuple[int, int], tail: int, rank: int, p: float, seed: int, **options: Any
    ) -> None:
        lens_q, lens_k = [a for a, _ in pairs], [b for _, b in pairs]
        results, arrays = run_varlen(
            lens_q, lens_k, heads=heads, backend=backend, tail=tail, rank=rank, seed=seed, p_dropout=p, **options
        )
        check_forward(lens_q, lens_k, results, arrays, p=p, **options)

    holds()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("backend", "dtype", "is_causal"), grid(BACKENDS, [torch.float32, torch.bfloat16, torch.float16], [False, True])
)
def test_lengths_around_tiles(backend: str, dtype: torch.dtype, is_causal: bool) -> None:
    lens_q, lens_k = [0, 1, 63, 127, 129, 5], [3, 1, 63, 130, 127, 0]
    results, arrays = run_varlen(lens_q, lens_k, dtype=dtype, backend=backend, head_dim=64, is_causal=is_causal)
    check_forward(lens_q, lens_k, results, arrays, is_causal=is_causal)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [8, 24, 40, 128, 200, 256])
def test_head_dims(backend: str, head_dim: int) -> None:
    results, arrays = run_varlen([33, 7], [33, 20], head_dim=head_dim, backend=backend, is_causal=True)
    check_forward([33, 7], [33, 20], results, arrays, is_causal=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
def test_p_alone(backend: str) -> None:
    """Where nobody fetches lse it is not filled between sequences; p is 0 there all the same."""
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [8, 16])
        cu = hetu.constant(np.array([0, 5, 8], np.int32))
        _, lse, p, _ = hetu.attn_varlen(x, x, x, 16, cu, cu, return_softmax=True)
    data = np.random.default_rng(0).standard_normal((8, 16), np.float32)
    with hetu.config(backend=backend):
        alone, (_, beside) = g.run(p, {x: data}), g.run([lse, p], {x: data})
    assert torch.equal(alone, beside) and (alone[1, :, 3:] == 0).all() and (alone[0, :, :5].sum(-1) > 0.99).all()


def test_float64_is_exact_to_twelve_digits() -> None:
    results, arrays = run_varlen([17, 3], [17, 9], dtype=torch.float64, is_causal=True)
    assert results[1].dtype == torch.float64
    check_forward([17, 3], [17, 9], results, arrays, is_causal=True)


def test_float64_on_the_triton_backend_falls_to_torch() -> None:
    results, arrays = run_varlen([5], [5], dtype=torch.float64, backend="triton")
    check_forward([5], [5], results, arrays)


def test_larger_max_seqlen_is_fine_and_smaller_is_refused() -> None:
    results, _ = run_varlen([5, 2], [5, 2], max_q=9)
    assert results[1].shape == (2, 2, 9)
    with pytest.raises(hetu.BindingError) as caught:
        run_varlen([5, 7, 2], [5, 7, 2], max_q=6)
    text = str(caught.value)
    assert "[attn_varlen] max_seqlen_q is 6, but sequence 1 of cu_seqlens_q has 7 tokens" in text
    assert "where:  varlen_checks.py:" in text
    assert "bound:  max_q = 6   from int_symbol_dict" in text
    assert "fix:    bind max_q to at least 7, or leave it unbound" in text


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("scale", [0.5, 0.0, -0.3])
def test_softmax_scale(backend: str, scale: float) -> None:
    results, (q, k, v) = run_varlen([6], [6], backend=backend, softmax_scale=scale, is_causal=True)
    want, _, _ = dense(q, k, v, is_causal=True, scale=scale)
    torch.testing.assert_close(results[0].view(q.shape).double(), want, atol=2e-5, rtol=0)


def test_seed_fixes_dropout_and_each_run_advances() -> None:
    hetu.manual_seed(11)
    first = run_varlen([40], [40], p_dropout=0.5)[0]
    second = run_varlen([40], [40], p_dropout=0.5)[0]
    hetu.manual_seed(11)
    again = run_varlen([40], [40], p_dropout=0.5)[0]
    assert first[3].tolist() == [11, 0] and second[3].tolist() == [11, 1]
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([1, 4], "cu_seqlens_q starts with 1, expected 0"),
        ([0, 5, 3], "cu_seqlens_q decreases from 5 to 3 at sequence 1"),
        ([0, 9], "cu_seqlens_q ends at 9, but q has 6 rows"),
    ],
)
def test_bad_cu_seqlens(cu: list[int], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [6, 16])
        fed = hetu.placeholder(hetu.int32, [len(cu)])
        out = hetu.attn_varlen(x, x, x, 16, fed, fed)[0]

    def computed(*_: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(type(g.executor), "_launch", computed)
    with pytest.raises(hetu.BindingError, match=message.replace("[", "\\[")):
        g.run(out, feed_dict={x: np.zeros((6, 16), np.float32), fed: cu})


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [6, 32])
        q, k = hetu.placeholder(hetu.float32, [32, 6]), hetu.placeholder(hetu.float32, [6, 32])
        cu = hetu.constant(np.array([0, 2, 6], np.int32))
        out = hetu.attn_varlen(hetu.transpose(q, 0, 1), k, x, 16, cu, cu)[0]
    values = torch.randn(6, 32)
    wide = np.random.default_rng(0).standard_normal((6, 64)).astype(">f4")  # big-endian, and every second column
    keys = wide[::-1, ::2]
    with hetu.config(backend=backend):
        got = g.run(out, feed_dict={x: values[:, torch.arange(32)], q: values.t().contiguous(), k: keys})
    heads = [torch.as_tensor(np.asarray(item, np.float32).copy()).view(6, 2, 16) for item in (values, keys, values)]
    want = torch.cat([dense(*[item[a:b] for item in heads], is_causal=False)[0] for a, b in ((0, 2), (2, 6))])
    torch.testing.assert_close(got.double(), want.view(6, 32), atol=2e-5, rtol=0)


def test_cu_seqlens_computed_in_the_graph() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [6, 16])
        half = hetu.placeholder(hetu.int32, [3])
        cu = half + half
        out, lse, *_ = hetu.attn_varlen(x, x, x, 16, cu, cu)
    data = np.random.default_rng(0).standard_normal((6, 16), np.float32)
    got, got_lse = g.run([out, lse], feed_dict={x: data, half: [0, 1, 3]})
    heads = torch.from_numpy(data).view(6, 1, 16)
    want = torch.cat([dense(*[heads[a:b]] * 3, is_causal=False)[0] for a, b in ((0, 2), (2, 6))])
    torch.testing.assert_close(got.double(), want.view(6, 16), atol=2e-5, rtol=0)
    assert got_lse.shape == (2, 1, 4)


def test_other_lengths_compile_nothing_and_seen_lengths_plan_nothing() -> None:
    n, b = hetu.IntSymbol("n"), hetu.IntSymbol("b")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [n, 16])
        cu = hetu.placeholder(hetu.int32, [b + 1])
        out = hetu.attn_varlen(x, x, x, 16, cu, cu)[0]
    for lens in ([3, 4], [5], [1, 0, 2], [3, 4]):
        data = np.zeros((sum(lens), 16), np.float32)
        g.run(out, feed_dict={x: data, cu: np.cumsum([0, *lens], dtype=np.int32)})
    stats = g.executor.stats()
    assert (stats["executables"].misses, stats["executables"].hits) == (1, 3)
    assert (stats["bindings"].misses, stats["bindings"].hits) == (3, 1)
    assert stats["plans"].misses == 3
