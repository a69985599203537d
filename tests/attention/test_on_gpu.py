"""The same checks on a CUDA device, where the Triton kernels run compiled."""

from __future__ import annotations

import pytest
import torch
from attention.test_attn_varlen import check, run_varlen
from attention.test_gradients import check_parallel, check_varlen
from attention.test_parallel_attn import METHODS, SPLITS, Case, cases, check_case
from hypothesis import given, settings

import hetu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attn_varlen(dtype: torch.dtype, head_dim: int, is_causal: bool) -> None:
    lens_q, lens_k = [0, 1, 63, 127, 129, 5, 700], [3, 1, 63, 130, 127, 0, 900]
    options = {"dtype": dtype, "head_dim": head_dim, "is_causal": is_causal}
    results, arrays = run_varlen(lens_q, lens_k, backend="triton", device="cuda", tail=3, **options)
    check(lens_q, lens_k, results, arrays, is_causal=is_causal)


@settings(max_examples=60)
@given(case=cases())
def test_any_strategy(case: Case) -> None:
    check_case(case, "triton", "cuda")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("method", METHODS)
def test_uneven_lengths_in_bfloat16(split: str, method: str) -> None:
    case = Case([630, 0, 1, 651], [0] * 4, split, method, "1d", dtype=torch.bfloat16, cut=[0.5, 0.51], head_dim=128)
    check_case(case, "triton", "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attn_varlen_gradients(dtype: torch.dtype, head_dim: int, is_causal: bool) -> None:
    lens_q, lens_k = [0, 1, 63, 127, 129, 5, 700], [3, 1, 63, 130, 127, 0, 900]
    options = {"dtype": dtype, "head_dim": head_dim, "is_causal": is_causal}
    check_varlen(lens_q, lens_k, "triton", "cuda", tail=3, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dropout_is_replayed(backend: str) -> None:
    check_varlen([5, 200, 67], [5, 200, 67], backend, "cuda", p_dropout=0.3, head_dim=64)


@settings(max_examples=60)
@given(case=cases(return_softmax=False))
def test_any_strategy_gradients(case: Case) -> None:
    check_parallel(case, "triton", "cuda")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("method", METHODS)
def test_uneven_lengths_in_bfloat16_gradients(split: str, method: str) -> None:
    case = Case([630, 0, 1, 651], [0] * 4, split, method, "1d", dtype=torch.bfloat16, cut=[0.5, 0.51], head_dim=128)
    check_parallel(case, "triton", "cuda")


def test_gradients_have_the_same_bits_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(n, 6 * 64, generator=generator).bfloat16() for n in (3000, 17, 1500)]
    with hetu.graph("define_and_run", device="cuda") as g:
        qkv = hetu.placeholder(hetu.bfloat16, [hetu.IntSymbol("rows"), 6 * 64])
        out, lse, _ = hetu.parallel_attn(qkv, 64, 4, [[3000, 17, 1500]], [[0, 0, 0]], split="sym")
        grad = hetu.gradients([out, lse], qkv)
    one, two = (g.run(grad, {qkv: hetu.Shards(data)}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
