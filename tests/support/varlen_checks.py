"""attn_varlen and its gradients against a dense float64 attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from support.dense import assert_gradient_near, dense, dense_backward, dropout_of, plain, tolerance

import hetu


def run_varlen(
    lens_q: list[int],
    lens_k: list[int],
    *,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    backend: str = "torch",
    tail: int = 0,
    rank: int = 2,
    seed: int = 0,
    max_q: int | None = None,
    device: str = "cpu",
    **options: Any,
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Builds, feeds and runs one op; gives its outputs and the fed q, k, v of rank 3."""
    generator = torch.Generator().manual_seed(seed)
    rows = (sum(lens_q) + tail, sum(lens_k) + tail, sum(lens_k) + tail)
    counts = (heads[0], heads[1], heads[1])
    arrays = [torch.randn(n, h, head_dim, generator=generator).to(dtype) for n, h in zip(rows, counts, strict=True)]
    n, m, b = (hetu.IntSymbol(name) for name in ("n", "m", "b"))
    top = hetu.IntSymbol("max_q")
    with hetu.graph("define_and_run", device=device) as g:
        shapes = [
            [size, h, head_dim] if rank == 3 else [size, h * head_dim]
            for size, h in zip((n, m, m), counts, strict=True)
        ]
        q, k, v = (hetu.placeholder(dtype, shape) for shape in shapes)
        cu_q, cu_k = (hetu.placeholder(hetu.int32, [b + 1]) for _ in range(2))
        outputs = hetu.attn_varlen(q, k, v, head_dim, cu_q, cu_k, top, None, **options)
    feeds = {t: x if rank == 3 else x.flatten(1) for t, x in zip((q, k, v), arrays, strict=True)}
    feeds |= {cu_q: np.cumsum([0, *lens_q], dtype=np.int32), cu_k: np.cumsum([0, *lens_k], dtype=np.int32)}
    with hetu.config(backend=backend):
        symbols = {} if max_q is None else {top: max_q}
        results = g.run(outputs, feed_dict=feeds, int_symbol_dict=symbols)
    assert results[0].device.type == device and results[3].device.type == "cpu"
    return [result.cpu() for result in results], tuple(arrays)  # type: ignore[return-value]


def check_forward(
    lens_q: list[int], lens_k: list[int], results: list[torch.Tensor], arrays: Any, *, p: float = 0.0, **options: Any
) -> None:
    """Compares everything that an op returned with the oracle, slot by slot."""
    q, k, v = arrays
    out, lse, weights, rng_state = results
    is_causal, wants_p = options.get("is_causal", False), options.get("return_softmax", False)
    out = out.view(q.shape)
    at_q, at_k = np.cumsum([0, *lens_q]), np.cumsum([0, *lens_k])
    empty = 0.0 if options.get("zero_tensors") else -torch.inf
    for b, (n, m) in enumerate(zip(lens_q, lens_k, strict=True)):
        one = (q[at_q[b] : at_q[b + 1]], k[at_k[b] : at_k[b + 1]], v[at_k[b] : at_k[b + 1]])
        want, want_lse, want_p = dense(*one, is_causal=is_causal, document=b, dropout=dropout_of(p, rng_state))
        atol = tolerance(q.dtype, want, plain(*one, is_causal=is_causal))
        torch.testing.assert_close(out[at_q[b] : at_q[b + 1]].double(), want, atol=atol, rtol=0)
        torch.testing.assert_close(lse[b, :, :n].double(), want_lse, atol=1e-4, rtol=1e-5)
        assert (lse[b, :, n:] == empty).all()
        if wants_p:
            assert weights.shape[2] % 128 == 0 and weights.shape[3] % 128 == 0
            torch.testing.assert_close(weights[b, :, :n, :m].double(), want_p, atol=2e-5, rtol=0)
            assert (weights[b, :, n:] == 0).all() and (weights[b, :, :, m:] == 0).all()
    assert (out[at_q[-1] :] == 0).all()
    assert weights.numel() == 0 or wants_p
    assert rng_state.shape == (2,) and rng_state.dtype == torch.int64 and rng_state.device.type == "cpu"


def check_gradients(
    lens_q: list[int], lens_k: list[int], backend: str, device: str = "cpu", tail: int = 0, **options: Any
) -> None:
    heads, head_dim, dtype = (
        options.pop("heads", (4, 2)),
        options.pop("head_dim", 8),
        options.pop("dtype", torch.float32),
    )
    rank3, p = options.pop("rank3", False), options.pop("p_dropout", 0.0)
    is_causal, scale = options.pop("is_causal", True), options.pop("softmax_scale", -1)
    generator = torch.Generator().manual_seed(3)
    rows = (sum(lens_q) + tail, sum(lens_k) + tail, sum(lens_k) + tail)
    counts = (heads[0], heads[1], heads[1])
    arrays = [torch.randn(n, h, head_dim, generator=generator).to(dtype) for n, h in zip(rows, counts, strict=True)]
    for x, used in zip(arrays[1:], (sum(lens_k),) * 2, strict=True):
        x[used:] = torch.nan  # keys of nobody
    d_out = torch.randn(rows[0], heads[0], head_dim, generator=generator).to(dtype)
    cu = [np.cumsum([0, *lens], dtype=np.int32) for lens in (lens_q, lens_k)]
    with hetu.graph("define_and_run", device=device) as g:
        fed = [hetu.placeholder(dtype, x.shape if rank3 else x.flatten(1).shape) for x in (*arrays, d_out)]
        lengths = [hetu.constant(x) for x in cu]
        results = hetu.attn_varlen(
            *fed[:3], head_dim, *lengths, p_dropout=p, is_causal=is_causal, softmax_scale=scale, **options
        )
        grads = hetu.gradients(results[0], fed[:3], fed[3])
    feeds = {x: value if rank3 else value.flatten(1) for x, value in zip(fed, (*arrays, d_out), strict=True)}
    with hetu.config(backend=backend):
        *got, rng_state = g.run([*grads, results[3]], feed_dict=feeds)
    got = [x.cpu().view(-1, h, head_dim) for x, h in zip(got, counts, strict=True)]
    want = [torch.zeros(x.shape, dtype=torch.float64) for x in got]
    for b, (at_q, at_k) in enumerate(zip(pairwise(cu[0]), pairwise(cu[1]), strict=True)):
        own_q, own_k = slice(*at_q), slice(*at_k)
        one = (arrays[0][own_q], arrays[1][own_k], arrays[2][own_k], d_out[own_q])
        dropout = dropout_of(p, rng_state)
        parts = dense_backward(
            *one, None, is_causal=is_causal, document=b, dropout=dropout, scale=None if scale == -1 else scale
        )
        for place, whole, part in zip((own_q, own_k, own_k), want, parts, strict=True):
            whole[place] = part
    for mine, expected in zip(got, want, strict=True):
        assert_gradient_near(mine, expected, dtype)
