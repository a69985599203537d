"""The backward's kernels of both backends over random segment tables, against autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.longer import LONGER
from support.table_checks import check_backward as check
from support.table_checks import whole_documents
from support.tables_by_definition import Case, Step, random_case

from hetu.backends.triton import BackwardTiles, Tile, launch_backward
from hetu.parallel import Mask
from hetu.parallel.mask.varlen import varlen_tables

BACKENDS = ["torch", "triton"]


@settings(max_examples=60 * LONGER)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=4),
    causal=st.booleans(),
    steps=st.integers(1, 3),
    p=st.sampled_from([0.0, 0.4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.3, -0.2, 0.0]),
    heads=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    seed=st.integers(0, 99),
)
def test_steps_on_torch(
    lengths: list[int],
    causal: bool,
    steps: int,
    p: float,
    dtype: torch.dtype,
    scale: float,
    heads: tuple[int, int],
    seed: int,
) -> None:
    case = random_case(seed, lengths, is_causal=causal, num_steps=steps, tail=seed % 3)
    check(case, "torch", dtype, 8, scale, p, seed, heads)


@settings(max_examples=5 * LONGER)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=2),
    causal=st.booleans(),
    steps=st.integers(1, 3),
    p=st.sampled_from([0.0, 0.4]),
    scale=st.sampled_from([0.3, 0.3, -0.2]),
    heads=st.sampled_from([(2, 1), (3, 1), (2, 2)]),
    seed=st.integers(0, 99),
)
def test_steps_on_triton(
    lengths: list[int], causal: bool, steps: int, p: float, scale: float, heads: tuple[int, int], seed: int
) -> None:
    case = random_case(seed, lengths, is_causal=causal, num_steps=steps, tail=seed % 3)
    check(case, "triton", torch.float32, 8, scale, p, seed, heads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(8, torch.float16), (24, torch.bfloat16), (64, torch.bfloat16)])
def test_half_precision(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    """A single step may write its gradients in the dtype of q, k and v; several add up in float32."""
    case = whole_documents([21, 0, 70], is_causal=True)
    check(case, backend, dtype, head_dim, head_dim**-0.5, heads=(3, 1), in_q_dtype=True)
    case = random_case(4, [7], is_causal=True, num_steps=2, tail=2)
    check(case, backend, dtype, head_dim, head_dim**-0.5, heads=(4, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_any_scale(backend: str, scale: float) -> None:
    check(random_case(5, [13], is_causal=True, num_steps=2, tail=1), backend, scale=scale, p=0.3, heads=(2, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_more_rows_than_a_block(backend: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that nobody sees, that everybody sees, and that the diagonal or an end cuts through."""
    monkeypatch.setattr("hetu.backends.eager.attend_backward.CPU_BLOCK", (7, 12))
    check(random_case(3, [150, 1], is_causal=is_causal, num_steps=2, tail=5), backend, head_dim=16, heads=(2, 1))
    check(whole_documents([200, 67], is_causal), backend, head_dim=16, p=0.2, heads=(2, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_table_over_buffers_of_other_lengths(backend: str) -> None:
    """Rows that a longer buffer has more are written too, although what the table gives is kept."""
    case = whole_documents([5, 3], is_causal=True)
    step = case.steps[0]
    check(case, backend, heads=(2, 1))
    longer = Step(step.table, step.rows + 4, np.pad(step.key_position, (0, 4)))
    seen = [torch.nn.functional.pad(case.seen[0], (0, 4))]
    check(Case(case.spans, [longer], seen, case.rows, 2, 5, 5), backend, heads=(2, 1))


def use_tiles(tiles: BackwardTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every backward take these, and none of those that were chosen before."""
    monkeypatch.setattr(launch_backward, "backward_tile", lambda *_: tiles)
    monkeypatch.setattr(launch_backward, "_kind", launch_backward._kind.__wrapped__)


@pytest.mark.parametrize("values", [Tile(32, 128, 4, 1), Tile(64, 16, 4, 1)], ids=["more", "fewer"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_keys_and_values_in_programs_of_their_own(
    values: Tile, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As wide heads have them; blocks of values are of more rows than those of keys, or of fewer."""
    tiles = BackwardTiles(Tile(16, 64, 4, 1), Tile(64, 32, 4, 2), is_split=True, own_values=values)
    use_tiles(tiles, monkeypatch)
    dtype, heads = torch.bfloat16, (2, 1)
    check(whole_documents([150, 1, 67], is_causal), "triton", dtype, 16, 0.25, heads=heads, in_q_dtype=True)
    check(whole_documents([70, 9], is_causal), "triton", dtype, 16, 0.25, p=0.2, heads=heads)
    check(random_case(3, [90, 7], is_causal=is_causal, num_steps=2, tail=5), "triton", dtype, 16, 0.25, heads=heads)


def test_rows_that_see_nothing_give_values_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """More queries than keys under a causal mask: the first rows' log-sum-exps are -inf."""
    tiles = BackwardTiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), is_split=True)
    use_tiles(tiles, monkeypatch)
    spans, table = varlen_tables(np.array([0, 40]), np.array([0, 21]), 40, Mask.causal())
    seen = torch.ones(40, 21).tril(21 - 40).bool()
    case = Case(spans, [Step(table, 21, np.arange(21))], [seen], 40, 1, 40, 21)
    check(case, "triton", torch.bfloat16, 16, 0.25, heads=(2, 1), in_q_dtype=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 128, 192, 256])
def test_on_gpu(head_dim: int, dtype: torch.dtype, p: float) -> None:
    scale = head_dim**-0.5
    for is_causal in (True, False):
        check(whole_documents([300, 1, 64], is_causal), "triton", dtype, head_dim, scale, p, device="cuda")
    case = random_case(head_dim, [150, 1, 290], is_causal=True, num_steps=3, tail=5)
    check(case, "triton", dtype, head_dim, -scale, p, heads=(3, 1), device="cuda")
