"""NaN, infinity, and scores so large that float32 rounds them by more than they differ: on every backend."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from support.dense import dense, dense_backward
from support.devices import DEVICES, ON_CUDA
from support.longer import grid

import hetu
from hetu import functional
from hetu.backends.eager import attend as eager_attend

# Triton's interpreter computes by numpy, which tells of every infinity and every NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of an output; of the half types one digit, because Triton's interpreter cuts off where a GPU rounds."""
NAN, INF = math.nan, math.inf
WIDE = [64, 128, 256]


def attend(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int], is_causal: bool, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of documents that attend to themselves."""
    cu_seqlens = torch.tensor([0, *lens]).cumsum(0)
    with hetu.config(backend=backend):
        return functional.attn_varlen(q, k, v, cu_seqlens, cu_seqlens, is_causal=is_causal, return_lse=True, **options)


def gradients(
    backend: str, data: list[torch.Tensor], dout: torch.Tensor, lens: list[int], is_causal: bool, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Out, lse, dq, dk and dv."""
    leaves = [x.clone().requires_grad_() for x in data]
    out, lse = attend(backend, *leaves, lens, is_causal, **options)
    return out, lse, *torch.autograd.grad(out, leaves, dout)


def random(rows: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, heads, head_dim, generator=generator) * size).to(dtype)


def skip_float64(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 is computed in torch")


# NaN and infinity


PLACES = {"short": (2, slice(4, 5)), "long": (3, slice(80, 81)), "block": (3, slice(512, 515))}
"""Rows of q or k in a document, and which. The last ones are a block of keys of their own for most kernels."""


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_is_seen_where_it_is_seen(
    device: str, backend: str, dtype: torch.dtype, is_causal: bool, place: str, where: str, value: float
) -> None:
    """A whole row of q or k: infinite entries too make NaN of a dot product, with both signs among the other's."""
    skip_float64(backend, dtype)
    document, rows = PLACES[place]
    if backend == "triton" and device == "cpu":
        if place == "block" or value == -INF:
            pytest.skip("the interpreter takes long")
        lens = [3, 1, 7, 100]
    else:
        lens = [3, 1, 7, 515]
    begin, end = sum(lens[:document]), sum(lens[: document + 1])
    data = [random(sum(lens), 1, 16, dtype, seed).to(device) for seed in range(3)]
    clean, clean_lse = attend(backend, *data, lens, is_causal)
    index = "qk".index(where)
    data[index] = data[index].clone()
    data[index][begin + rows.start : begin + rows.stop] = value
    out, lse = attend(backend, *data, lens, is_causal)
    ill = torch.zeros(len(out), dtype=torch.bool, device=device)
    if where == "q":
        ill[begin + rows.start : begin + rows.stop] = True
    else:
        ill[begin + (rows.start if is_causal else 0) : end] = True
    assert out[ill].isnan().all() and lse[:, ill].isnan().all()
    assert out[~ill].isfinite().all()
    if value != value:
        assert torch.equal(out[~ill], clean[~ill]) and torch.equal(lse[:, ~ill], clean_lse[:, ~ill])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_nan_are_nan(device: str, backend: str, dtype: torch.dtype) -> None:
    """Those of what sees it, and those of other documents are finite."""
    skip_float64(backend, dtype)
    data = [random(9, 2, 16, dtype, seed).to(device) for seed in range(4)]
    data[1][4] = NAN
    _, _, *grads = gradients(backend, data[:3], data[3], [3, 6], True)
    for name, grad in zip("qkv", grads, strict=True):
        assert grad[:3].isfinite().all(), name
        assert grad[4:].isnan().all() if name == "q" else grad[4].isnan().all(), name


@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_scale_hides_nan(backend: str, scale: float) -> None:
    data = [random(5, 1, 16, torch.float32, seed) for seed in range(3)]
    data[0][1], data[1][3] = NAN, NAN
    out, lse = attend(backend, *data, [5], True, softmax_scale=scale)
    assert out.isnan().any(-1)[:, 0].tolist() == lse.isnan()[0].tolist() == [False, True, False, True, True]


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_sink_fills_its_head(backend: str, method: str) -> None:
    """On one pipeline and on two; rows that see no key have it as lse."""
    mask = hetu.Mask.slices([(0, 9)], [(2, 10)], ["causal"])
    with hetu.config(backend=backend), hetu.graph("define_and_run", num_strategy=2, device="cpu") as g:
        x, sinks = hetu.placeholder("float32", [hetu.IntSymbol("rows"), 48]), hetu.placeholder("float32", [2])
        lens, groups = [[10], [4, 6]], [[0], [0, 0]]
        fetches = hetu.parallel_attn(x, 8, 1, lens, groups, method=method, mask=mask, sinks=sinks)[:2]
        data, given = random(10, 6, 8, torch.float32, 1).flatten(1), torch.tensor([NAN, 0.5])
        one, one_lse = g.run(fetches, {x: data, sinks: given}, strategy=0)
        out, lse = g.run(fetches, {x: hetu.Shards([data[:4], data[4:]]), sinks: given}, strategy=1)
    for rows, sums in ((one, one_lse), (torch.cat(list(out)), torch.cat(list(lse), -1))):
        assert rows[1:9, :8].isnan().all() and rows[:, 8:].isfinite().all()
        assert sums[0, 0].isnan().all() and sums[0, 1].isfinite().all()


# Scores of -inf


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_scores_of_minus_infinity_weigh_nothing(device: str, backend: str) -> None:
    """In any place among those that are finite; a row that sees nothing else has no softmax, nor a silent 0."""
    q = torch.ones(200, 1, 8, device=device)
    v = torch.arange(200.0, device=device)[:, None, None].expand(200, 1, 8)
    for hidden in (slice(0, 1), slice(0, 150), slice(100, 200), slice(10, 190)):
        k = torch.zeros(200, 1, 8, device=device)
        k[hidden] = -3e38
        out, lse = attend(backend, q, k, v, [200], True, softmax_scale=1.0)
        weighs = torch.ones(200, device=device)
        weighs[hidden] = 0
        count = weighs.cumsum(0)
        want = (weighs * v[:, 0, 0]).cumsum(0) / count  # NaN where there is nothing
        torch.testing.assert_close(out[:, 0, 0], want, equal_nan=True)
        torch.testing.assert_close(lse[0], count.log())


@pytest.mark.parametrize(
    ("backend", "low", "is_causal", "method"),
    grid(BACKENDS, ["first", "second", "both"], [True, False], ["ring", "all_gather", "direct", "ulysses"]),
)
def test_parts_of_minus_infinity_weigh_nothing(backend: str, low: str, is_causal: bool, method: str) -> None:
    """One pipeline, or both, hold keys whose scores are -inf: it comes out as with all keys on one."""
    n = [hetu.IntSymbol("n0"), hetu.IntSymbol("n1")]
    lens, groups = [[n[0], n[1]], [n[0] + n[1]]], [[0, 0], [0]]
    with hetu.config(backend=backend), hetu.graph("define_and_run", num_strategy=2, device="cpu") as g:
        x = hetu.placeholder("float32", [hetu.IntSymbol("rows"), 48], name="x")
        out, lse = hetu.parallel_attn(
            x, 8, 1, lens, groups, is_causal=is_causal, softmax_scale=1.0, method=method
        )[:2]  # fmt: skip
        rows = random(40, 6, 8, torch.float32, 1)
        rows[:, :2] = rows[:, :2].abs() + 1.0
        rows[slice(0, 20) if low == "first" else slice(20, 40) if low == "second" else slice(0, 40), 2:4] = -3e38
        data = rows.flatten(1)
        sizes = dict(zip(n, (20, 20), strict=True))
        two, two_lse = g.run([out, lse], {x: hetu.Shards([data[:20], data[20:]])}, int_symbol_dict=sizes, strategy=0)
        one, one_lse = g.run([out, lse], {x: data}, int_symbol_dict=sizes, strategy=1)
    torch.testing.assert_close(torch.cat(list(two)), one, equal_nan=True)
    torch.testing.assert_close(torch.cat(list(two_lse), -1), one_lse)
    blind = 40 if low == "both" else 20 if low == "first" and is_causal else 0
    assert one[:blind].isnan().all() and one[blind:].isfinite().all()


# Large scores


@pytest.mark.parametrize(
    ("value", "packed", "dtype", "backend"),
    grid(
        [133120.0, 30000.0, 1000.0],
        [([1], True), ([1], False), ([2, 1, 70], True), ([70, 1], False)],
        DTYPES,
        BACKENDS,
    ),
    ids=str,
)
@pytest.mark.parametrize(("device", "head_dim"), [("cpu", 64), *(pytest.param("cuda", d, marks=ON_CUDA) for d in WIDE)])
def test_one_large_value_everywhere(
    device: str,
    backend: str,
    dtype: torch.dtype,
    head_dim: int,
    packed: tuple[list[int], bool],
    value: float,
) -> None:
    """All weights of a row are equal, whatever the scores: the output is the value itself."""
    lens, is_causal = packed
    skip_float64(backend, dtype)
    if dtype == torch.float16 and value > 65504:
        pytest.skip("float16 ends before")
    if device == "cuda":
        lens = [*lens, 1, 700, 1]
    x = torch.full((sum(lens), 1, head_dim), value, dtype=dtype, device=device)
    dout = random(sum(lens), 1, head_dim, dtype, 4).to(device)
    out, lse, dq, dk, dv = gradients(backend, [x, x, x], dout, lens, is_causal)
    torch.testing.assert_close(out, x, rtol=ROUNDING[dtype], atol=0.0)
    begin = 0
    for length in lens:
        rows = slice(begin, begin := begin + length)
        want = dense(*[x[rows]] * 3, is_causal=is_causal)[1]
        rounding = 4e-6 if device == "cuda" else 1e-6  # tensor cores take three products for one of float32
        torch.testing.assert_close(lse[:, rows].double(), want, rtol=rounding, atol=0.0)
        if length == 1:  # one key has all the weight: nothing depends on q and k
            score = float(x[0, 0, 0].double() ** 2) * head_dim**0.5
            # cuBLAS adds up products of other shapes in another order: a score of float64 differs between the passes
            same(dv[rows], dout[rows], device, 2**-47 * score if dtype == torch.float64 else 0.0)
            noise = score * {torch.float64: 2**-50}.get(dtype, 2**-20)
            assert max(g[rows].abs().max().item() for g in (dq, dk)) <= noise * dout[rows].abs().max().item() * 8
        assert (dv[rows].abs() <= 1.02 * dout[rows].abs().sum(0) + 1e-3).all(), "a probability above 1"
    if dtype != torch.float16:  # what is left of a difference, times such values, is past its end
        assert dq.isfinite().all() and dk.isfinite().all()


def same(mine: torch.Tensor, right: torch.Tensor, device: str, noise: float = 0.0) -> None:
    """Equal, to the bit where a division is exact; a GPU divides by what it multiplies with, up to a rounding.

    ``noise`` is what a GPU may be off by, as a part of the right value.
    """
    if device == "cuda":
        torch.testing.assert_close(mine, right, rtol=max(ROUNDING[right.dtype], noise), atol=0.0)
    else:
        assert torch.equal(mine, right)


@pytest.mark.parametrize(("size", "is_causal", "backend"), grid([30.0, 1e3, 1e5, 1e8], [True, False], BACKENDS))
@pytest.mark.parametrize("device", DEVICES)
def test_large_scores_that_differ(device: str, backend: str, is_causal: bool, size: float) -> None:
    """float64's softmax, where scores differ by more than float32 rounds them: the largest has all the weight."""
    lens = [150, 1, 40]
    q, k = (random(191, 2, 16, torch.float32, seed, size).to(device) for seed in (1, 2))
    v, dout = (random(191, 2, 16, torch.float32, seed).to(device) for seed in (3, 4))
    out, lse, *grads = gradients(backend, [q, k, v], dout, lens, is_causal)
    begin = 0
    for length in lens:
        rows = slice(begin, begin := begin + length)
        want, want_lse, _ = dense(q[rows], k[rows], v[rows], is_causal=is_causal)
        # A dot product is rounded by what is summed up, which may be far more than the sum.
        lengths = q[rows].norm(dim=-1) * k[rows].norm(dim=-1).amax(0) * 16**-0.5
        assert ((lse[:, rows] - want_lse).abs() <= 2e-4 + 2e-6 * lengths.T).all()
        far = (out[rows].double() - want).abs().amax(-1) > 0.05
        assert far.sum() <= 0.02 * far.numel(), "rounding decides between two keys here and there"
        bound = dout[rows].abs().sum(0)
        assert (grads[2][rows].abs() <= 1.05 * bound + 1e-3).all(), "a probability above 1"
        if size <= 30.0:
            for mine, right in zip(
                grads, dense_backward(q[rows], k[rows], v[rows], dout[rows], None, is_causal=is_causal), strict=True
            ):
                torch.testing.assert_close(
                    mine[rows].double(), right, atol=2e-3 * max(1.0, float(right.abs().max())), rtol=0
                )
    assert all(grad.isfinite().all() for grad in grads)


def test_weights_of_matrix_products_have_a_sum_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's flash attention isn't taken, as on a GPU: lse, which is rounded, has no part in them."""
    monkeypatch.setattr(eager_attend, "flash_attention_cpu", None)
    for value in (1e3, 3e4):
        x = torch.full((703, 1, 64), value)
        torch.testing.assert_close(attend("torch", x, x, x, [1, 1, 700, 1], False)[0], x, rtol=1e-6, atol=0.0)
    q, k = (random(150, 2, 16, torch.float32, seed, 30.0) for seed in (1, 2))
    v, dout = (random(150, 2, 16, torch.float32, seed) for seed in (3, 4))
    _, _, *grads = gradients("torch", [q, k, v], dout, [150], False)
    for mine, right in zip(grads, dense_backward(q, k, v, dout, None, is_causal=False), strict=True):
        torch.testing.assert_close(mine.double(), right, atol=1e-3 * float(right.abs().max()), rtol=0)


@pytest.mark.parametrize("sink", [-2.6e38, -1e10, -1e6, 1e6, 1e10, 2.6e38])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_sinks_of_any_size(device: str, backend: str, head_dim: int, sink: float) -> None:
    """They have all the weight or none. The rows of the first document see no key."""
    q, k, v = (random(5, 1, head_dim, torch.float32, seed).to(device) for seed in range(3))
    cu_seqlens_q, cu_seqlens_k, sinks = torch.tensor([0, 2, 5]), torch.tensor([0, 0, 5]), torch.tensor([sink])
    with hetu.config(backend=backend):
        run = partial(functional.attn_varlen, q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal=False, return_lse=True)
        (out, lse), (plain, plain_lse) = run(sinks=sinks.to(device)), run()
    torch.testing.assert_close(out[2:], plain[2:] if sink < 0 else torch.zeros_like(plain[2:]))
    torch.testing.assert_close(lse[0, 2:], plain_lse[0, 2:] if sink < 0 else torch.full_like(lse[0, 2:], sink))
    torch.testing.assert_close(lse[0, :2], torch.full_like(lse[0, :2], sink), rtol=1e-6, atol=0.0)
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))


@pytest.mark.parametrize("score", [-3e38, -2.4e38, -1e30, -1e10, -65537.0, -65536.0, -65530.0, 65537.0, 1e10, 3e38])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_one_score_of_any_size(device: str, backend: str, score: float) -> None:
    q, v = torch.ones(1, 1, 16, device=device), random(1, 1, 16, torch.float32, 0).to(device)
    k = torch.full((1, 1, 16), score / 16, device=device)
    out, lse, *_, dv = gradients(backend, [q, k, v], v, [1], True, softmax_scale=1.0)
    same(out, v, device)
    assert lse.item() == pytest.approx(score, rel=1e-6)
    same(dv, v, device)


FAR_APART = [0.0, -(2.0**33), 2.0**33, -1.5 * 2.0**127]
"""Sums of sixteen equal numbers, which no order of the sum rounds."""


@pytest.mark.parametrize("before", FAR_APART)
@pytest.mark.parametrize("after", FAR_APART)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_scores_far_apart_one_block_after_the_other(device: str, backend: str, before: float, after: float) -> None:
    """Whichever block of keys comes first, the larger scores have all the weight, or both the same."""
    q, k = torch.ones(300, 1, 16, device=device), torch.empty(300, 1, 16, device=device)
    k[:150], k[150:] = before / 16, after / 16
    v = random(300, 1, 16, torch.float32, 0).to(device)
    out, lse = attend(backend, q, k, v, [300], False, softmax_scale=1.0)
    means = v[:150].mean(0), v[150:].mean(0)
    want = (means[0] + means[1]) / 2 if before == after else means[after > before]
    torch.testing.assert_close(out, want.expand(300, 1, 16), atol=1e-5, rtol=1e-4)
    largest = max(before, after) + math.log(300 if before == after else 150)
    torch.testing.assert_close(lse, torch.full_like(lse, largest), rtol=1e-6, atol=1e-4)
