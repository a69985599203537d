"""Gradients of both attention ops against a dense float64 reference, on both backends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_cases import Case, cases
from support.longer import LONGER, grid
from support.parallel_checks import check_parallel
from support.plans import KV_METHODS
from support.varlen_checks import check_gradients

import hetu
from hetu.parallel import SPLITS
from hetu.parallel.plan.instructions import Attend

# parallel_attn


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=120 * LONGER)
@given(
    case=cases(return_softmax=False),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    with_lse=st.booleans(),
    holds_back=st.booleans(),
)
def test_any_strategy_on_torch(case: Case, dtype: torch.dtype, with_lse: bool, holds_back: bool) -> None:
    case.dtype = dtype
    check_parallel(case, "torch", with_lse=with_lse, holds_back=holds_back)


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=5 * LONGER)
@given(case=cases(return_softmax=False), with_lse=st.booleans(), holds_back=st.booleans())
def test_any_strategy_on_triton(case: Case, with_lse: bool, holds_back: bool) -> None:
    check_parallel(case, "triton", with_lse=with_lse, holds_back=holds_back)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("backend", "split", "method"), grid(["torch", "triton"], SPLITS, KV_METHODS))
def test_uneven_lengths_in_bfloat16(backend: str, split: str, method: str) -> None:
    case = Case([33, 0, 1, 35], [0] * 4, split, method, "1d", dtype=torch.bfloat16, cut=[0.5, 0.51], head_dim=32)
    check_parallel(case, backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("backend", "split", "packing", "dtype"),
    grid(["torch", "triton"], SPLITS, ["", "1d"], [torch.float32, torch.bfloat16]),
)
def test_two_pipelines_that_hold_back(backend: str, split: str, packing: str, dtype: torch.dtype) -> None:
    """Both parts write their gradients into the same memory, and nothing else there."""
    case = Case([35, 34], [0, 0], split, "direct", packing, dtype=dtype, cut=[0.3, 0.4], head_dim=16, heads=(4, 2))
    plan = check_parallel(case, backend)
    buffers = [[item.buffer for item in part.instructions if isinstance(item, Attend)] for part in plan.pipelines]
    assert {tuple(order) for order in buffers if 1 in order} == {(0, 1, 0)}, "whoever sees the other's rows holds back"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("head_dim", [8, 40, 128, 256])
def test_head_dims(backend: str, head_dim: int) -> None:
    check_parallel(Case([19, 14], [0, 0], "sym", head_dim=head_dim, heads=(4, 2), p=0.25), backend)


def test_the_same_bits_every_time() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        qkv = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 32])
        out, lse, _ = hetu.parallel_attn(qkv, 8, 2, [[20, 3, 18]], [[0, 0, 0]], split="stripe", p_dropout=0.2)
        grad = hetu.gradients([out, lse], qkv)
    shards = hetu.Shards([np.random.default_rng(n).standard_normal((n, 32), np.float32) for n in (20, 3, 18)])
    runs = []
    for _ in range(2):
        hetu.manual_seed(0)
        runs.append(g.run(grad, {qkv: shards}))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# attn_varlen


LENGTHS = ([0, 1, 5, 33, 7, 0, 70], [3, 1, 9, 33, 2, 0, 65])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rank3", [False, True])
def test_varlen(backend: str, is_causal: bool, rank3: bool) -> None:
    check_gradients(*LENGTHS, backend, tail=3, is_causal=is_causal, rank3=rank3)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {"p_dropout": 0.4, "is_causal": False},
        {"softmax_scale": 0.7},
        {"softmax_scale": -0.3},
        {"softmax_scale": 0.0},
        {"heads": (3, 1), "head_dim": 24},
        {"dtype": torch.bfloat16, "head_dim": 64},
        {"dtype": torch.float16, "head_dim": 16},
        {"return_softmax": True, "zero_tensors": True},
    ],
)
def test_varlen_options(backend: str, options: dict[str, Any]) -> None:
    check_gradients(*LENGTHS, backend, **options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_diagonals_at_the_edges_of_blocks(backend: str) -> None:
    lens_q = [70, 66, 65, 64, 80]
    check_gradients(
        lens_q, [n + more for n, more in zip(lens_q, (62, 63, 64, 1, -1), strict=True)], backend, heads=(1, 1)
    )


def test_varlen_in_float64() -> None:
    check_gradients(*LENGTHS, "torch", dtype=torch.float64, tail=1)


@pytest.mark.parametrize("lens", [[], [0], [0, 0]])
def test_varlen_of_nothing(lens: list[int]) -> None:
    check_gradients(lens, lens, "torch")
    check_gradients(lens, lens, "triton", tail=2)


def test_p_has_no_gradient() -> None:
    with hetu.graph("define_and_run", device="cpu"):
        qkv = hetu.placeholder(hetu.float32, [4, 24])
        p = hetu.parallel_attn(qkv, 8, 1, [[4]], [[0]], return_softmax=True)[3]
        with pytest.raises(
            hetu.HetuError, match=r"the probabilities p of parallel_attn_0, made at test_gradients\.py:"
        ):
            hetu.gradients(p, qkv)


def test_forward_and_backward_share_a_plan() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        qkv = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 24])
        grad = hetu.gradients(hetu.parallel_attn(qkv, 8, 1, [[3, 2]], [[0, 0]])[0], qkv)
    g.run(grad, {qkv: hetu.Shards([np.ones((3, 24), np.float32), np.ones((2, 24), np.float32)])})
    assert g.executor.stats()["plans"].misses == 1
