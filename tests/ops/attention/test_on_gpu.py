"""Both ops end to end on a CUDA device, where the Triton kernels run compiled; a few cases show the checks on the CPU.

``python -m pytest -m gpu -n 14 --dist worksteal`` compiles in as many processes; ``-m "gpu and not slow"`` leaves out
what differs from another test in its head_dim alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.attention_cases import METHOD_CHOICES, Case, cases
from support.devices import CUDA, DEVICES, ON_CUDA
from support.longer import LONGER
from support.packs import Pack, assert_right, by_op, heads_of
from support.parallel_checks import check_case, check_parallel
from support.varlen_checks import check_forward, check_gradients, run_varlen

import hetu
from hetu.parallel import SPLITS

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]

LENGTHS = {
    "cpu": ([0, 1, 2, 7, 19], [3, 1, 0, 9, 15]),
    "cuda": ([0, 1, 63, 127, 129, 5, 700], [3, 1, 63, 130, 127, 0, 900]),
}
"""No queries, no keys, one of either, odd ones, more queries than keys and fewer; small where they are interpreted."""


def check_op(pack: Pack, device: str, backend: str = "triton", **options: Any) -> None:
    """One op, forward and backward with a gradient of lse, fed where it runs and checked there."""
    data = pack.data(device=device)
    drawn, got = by_op(pack, data, backend, **options)
    assert got["out"].device.type == device
    assert_right(drawn, data, got)


# attn_varlen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "device"),
    [
        pytest.param(24, "cpu"),
        *(
            pytest.param(d, "cuda", marks=ON_CUDA if d in (8, 24, 64, 128, 256) else [*ON_CUDA, pytest.mark.slow])
            for d in range(8, 257, 8)
        ),
    ],
)
def test_any_head_dim(head_dim: int, dtype: torch.dtype, device: str) -> None:
    for is_causal in (False, True):
        check_op(Pack(*LENGTHS[device], heads_of(head_dim), head_dim, dtype, is_causal, tail=3), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_on_torch(dtype: torch.dtype, device: str) -> None:
    """The torch backend, on CUDA as well."""
    for is_causal in (False, True):
        check_op(Pack(*LENGTHS[device], (6, 2), 40, dtype, is_causal, tail=3), device, "torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "device"), [(8, "cpu"), *(pytest.param(d, "cuda", marks=ON_CUDA) for d in (8, 40, 64, 128, 256))]
)
def test_dropout(head_dim: int, dtype: torch.dtype, device: str) -> None:
    lens = [17, 0, 5] if device == "cpu" else [300, 0, 1, 65, 129]
    for is_causal in (False, True):
        check_op(Pack(lens, lens, heads_of(head_dim), head_dim, dtype, is_causal), device, p_dropout=0.3)


@pytest.mark.parametrize("p_dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "device"), [(8, "cpu"), *(pytest.param(d, "cuda", marks=ON_CUDA) for d in (8, 40, 64, 128, 256))]
)
def test_softmax(head_dim: int, dtype: torch.dtype, p_dropout: float, device: str) -> None:
    lens = [17, 0, 1] if device == "cpu" else [300, 0, 1, 65, 129]
    pack = Pack(lens, lens, heads_of(head_dim), head_dim, dtype)
    check_op(pack, device, return_softmax=True, p_dropout=p_dropout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("seed", "device"), [(0, "cpu"), *(pytest.param(n, "cuda", marks=ON_CUDA) for n in range(3))])
def test_short_documents(seed: int, dtype: torch.dtype, device: str) -> None:
    rng = np.random.default_rng(seed)
    count, longest = (8, 6) if device == "cpu" else (150, [3, 40, 150][seed])
    lens_q, lens_k = (rng.integers(0, longest, count).tolist() for _ in range(2))
    check_op(Pack(lens_q, lens_q if seed == 1 else lens_k, (6, 2), 64, dtype, tail=seed), device)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("softmax_scale", [0.5, 0.0, -0.3])
def test_softmax_scale(softmax_scale: float, backend: str, device: str) -> None:
    check_gradients([70, 1, 130], [90, 1, 130], backend, device, softmax_scale=softmax_scale, head_dim=64)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_forward_against_plain_attention(head_dim: int, dtype: torch.dtype, is_causal: bool, device: str) -> None:
    """Half types within twice the error of a plain attention in the same type."""
    lens_q, lens_k = LENGTHS["cuda"]
    options = {"dtype": dtype, "head_dim": head_dim, "is_causal": is_causal, "heads": heads_of(head_dim)}
    results, arrays = run_varlen(lens_q, lens_k, backend="triton", device=device, tail=3, **options)
    check_forward(lens_q, lens_k, results, arrays, is_causal=is_causal)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dropout_is_replayed(backend: str, device: str) -> None:
    check_gradients([5, 200, 67], [5, 200, 67], backend, device, p_dropout=0.3, head_dim=64)


# parallel_attn


@pytest.mark.parametrize("device", [CUDA])
@settings(max_examples=60 * LONGER)
@given(case=cases())
def test_any_strategy(case: Case, device: str) -> None:
    check_case(case, "triton", device)


@pytest.mark.parametrize("device", [CUDA])
@settings(max_examples=60 * LONGER)
@given(case=cases(return_softmax=False))
def test_any_strategy_gradients(case: Case, device: str) -> None:
    check_parallel(case, "triton", device)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("method", METHOD_CHOICES)
def test_uneven_lengths(split: str, method: str, device: str) -> None:
    case = Case([630, 0, 1, 651], [0] * 4, split, method, "1d", dtype=torch.bfloat16, cut=[0.5, 0.51], head_dim=128)
    check_case(case, "triton", device)
    check_parallel(case, "triton", device)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(("heads", "is_causal"), [((2, 2), True), ((4, 1), False)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_steps_of_long_documents(head_dim: int, heads: tuple[int, int], is_causal: bool, device: str) -> None:
    """Rows see thousands of keys in a step: the tiles are those for long documents."""
    case = Case([3600, 1, 2400], [0] * 3, "sym", "ring", "1d", dtype=torch.bfloat16, cut=[0.9], head_dim=head_dim)
    case.heads, case.is_causal = heads, is_causal
    check_case(case, "triton", device)
    check_parallel(case, "triton", device)


@pytest.mark.parametrize("packing", ["", "1d", "2d"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("method", METHOD_CHOICES)
@pytest.mark.parametrize(("dtype", "device"), [pytest.param(t, "cuda", marks=ON_CUDA, id=str(t)) for t in DTYPES])
def test_groups_of_pipelines(packing: str, split: str, method: str, dtype: torch.dtype, device: str) -> None:
    """Two context groups in any order, a batch or documents, both masks, dropout, groups of 7 query heads."""
    options = {"batch": 1 if packing else 2, "cut": [0.3, 0.3, 0.31], "dtype": dtype, "head_dim": 64}
    for is_causal, heads, p in ((True, (7, 1), 0.0), (False, (6, 2), 0.2)):
        case = Case([64, 33, 0, 130, 1], [0, 3, 0, 3, 0], split, method, packing, is_causal=is_causal, **options)
        case.heads, case.p = heads, p
        check_case(case, "triton", device)
        check_parallel(case, "triton", device)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_have_the_same_bits_every_time(device: str) -> None:
    lens, head_dim = ([3000, 17, 1500], 64) if device == "cuda" else ([9, 1, 6], 8)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(n, 6 * head_dim, generator=generator).bfloat16() for n in lens]
    with hetu.graph("define_and_run", device=device) as g:
        qkv = hetu.placeholder(hetu.bfloat16, [hetu.IntSymbol("rows"), 6 * head_dim])
        out, lse, _ = hetu.parallel_attn(qkv, head_dim, 4, [lens], [[0, 0, 0]], split="sym")
        grad = hetu.gradients([out, lse], qkv)
    with hetu.config(backend="triton"):
        one, two = (g.run(grad, {qkv: hetu.Shards(data)}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
