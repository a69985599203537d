"""The backward's kernels of both backends over random segment tables, against autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables_by_definition import Case, Step, buffers, random_case, run

from hetu.backends.attention.contract import BackwardState, Dropout, attention_delta
from hetu.backends.attention.dropout import keep_mask
from hetu.backends.attention.family import AttendCall
from hetu.backends.families import family
from hetu.backends.triton import BackwardTiles, Tile, launch_backward
from hetu.parallel.mask.segments import varlen_tables

TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error of a gradient, relative to the largest entry."""


def oracle(
    case: Case,
    q: torch.Tensor,
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    dout: torch.Tensor,
    dlse: torch.Tensor,
    scale: float,
    dropout: Dropout | None,
) -> list[torch.Tensor]:
    """Gradients of q and of every step's k and v, of ``sum(out * dout) + sum(lse * dlse)``; dlse is ``(T_q, H_q)``."""
    leaves = [q.double(), *(x.double().nan_to_num(0) for pair in pairs for x in pair)]
    leaves = [x.detach().requires_grad_() for x in leaves]
    heads, group = q.shape[1], q.shape[1] // pairs[0][0].shape[1]
    k, v = (torch.cat(leaves[start::2]).repeat_interleave(group, 1) for start in (1, 2))
    seen = torch.cat(case.seen, 1)
    spans = case.spans
    rows = seen.any(1)
    scores = torch.einsum("ihd,jhd->hij", leaves[0], k) * scale
    lse = scores.masked_fill(~seen, -torch.inf)[:, rows].logsumexp(-1)
    p = (scores[:, rows] - lse.unsqueeze(-1)).exp() * seen[rows]
    if dropout is not None:
        documents = torch.from_numpy(np.repeat(spans.document, spans.length)).clamp(min=0)
        runs = zip(spans.position, spans.step, spans.length, strict=True)
        parts = [begin + step * torch.arange(length) for begin, step, length in runs]
        queries = torch.cat([torch.empty(0, dtype=torch.int64), *parts])
        keys = torch.from_numpy(np.concatenate([step.key_position for step in case.steps]))
        keep = keep_mask(dropout, documents, torch.arange(heads), queries, keys)
        p = p * keep[:, rows] * dropout.scale
    loss = (torch.einsum("hij,jhd->ihd", p, v) * dout.double()[rows]).sum() + (lse.T * dlse.double()[rows]).sum()
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def gradients(
    case: Case,
    backend: str,
    q: torch.Tensor,
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    state: BackwardState,
    scale: float,
    dropout: Dropout | None,
    keeps: bool = False,
) -> list[torch.Tensor]:
    """What the backend computes, step by step, into memory that held NaN: in the dtype of ``state.dq``.

    With ``keeps`` rows that no segment names have to be NaN afterwards; they are 0 in what is returned.
    """
    state.dq.fill_(torch.nan)
    if state.acc is not None:
        state.acc.fill_(torch.nan)
    grads = []
    for step, turn, (k, v) in zip(case.steps, case.turns, pairs, strict=True):
        wide = q.new_full((len(k), 2, *k.shape[1:]), torch.nan, dtype=state.dq.dtype)
        call = AttendCall(q, k, v, case.spans, step.table, scale, turn, dropout, step.key_position)
        family(backend).attend_backward(call, state, wide[:, 0], wide[:, 1], keeps)
        if keeps:
            others = ~named_keys(step)
            assert wide[others].isnan().all()
            wide[others] = 0
        grads += [wide[:, 0], wide[:, 1]]
    return [state.dq.clone(), *grads]


def named_keys(step: Step) -> torch.Tensor:
    """Which rows of a step's buffer segments name."""
    named = torch.zeros(step.rows, dtype=torch.bool)
    for k_start, k_len in zip(step.table.k_start, step.table.k_len, strict=True):
        named[k_start : k_start + k_len] = True
    return named


def lse_gradient(case: Case, lse: torch.Tensor, dlse: torch.Tensor) -> torch.Tensor:
    """``(slots, H_q, S)`` from dlse ``(T_q, H_q)``."""
    spans, slots = case.spans, torch.zeros_like(lse)
    for start, length, slot, slot_row in zip(spans.start, spans.length, spans.slot, spans.slot_row, strict=True):
        if slot >= 0:
            slots[slot, :, slot_row : slot_row + length] = dlse[start : start + length].T
    return slots


def check(
    case: Case,
    backend: str,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 8,
    scale: float = 0.3,
    p: float = 0.0,
    seed: int = 0,
    heads: tuple[int, int] = (4, 2),
    device: str = "cpu",
    in_q_dtype: bool = False,
) -> None:
    """Compares with the oracle, and a second call, which keeps what others wrote, with the first, bit for bit."""
    q, pairs = buffers(case, *heads, head_dim, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    dout = torch.randn(q.shape, generator=generator).to(dtype)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = torch.randn(len(q), heads[0], generator=generator).to(high)
    dropout = Dropout(p, key=seed + 5) if p else None
    there, there_pairs = q.to(device), [(k.to(device), v.to(device)) for k, v in pairs]
    forward = run(backend, case, there, there_pairs, scale=scale, dropout=dropout)
    delta = attention_delta(forward.out, dout.to(device), lse_gradient(case, forward.lse, dlse.to(device)), case.spans)
    dq = torch.empty_like(there, dtype=dtype if in_q_dtype else high)
    acc = None
    if case.runs_on:
        acc = dq if dq.dtype == high and seed % 2 else torch.empty_like(there, dtype=high)
    state = BackwardState(dout.to(device), forward.lse, delta, dq, acc)
    got, again = (gradients(case, backend, there, there_pairs, state, scale, dropout, keeps) for keeps in (False, True))
    for mine, want in zip(got, oracle(case, q, pairs, dout, dlse, scale, dropout), strict=True):
        size = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        torch.testing.assert_close(mine.cpu().double(), want, atol=TOLERANCE[dtype] * size, rtol=0)
    assert all(torch.equal(one, two) for one, two in zip(got, again, strict=True)), "two calls give different bits"


BACKENDS = ["torch", "triton"]


@settings(max_examples=60)
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


@settings(max_examples=5)
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


def whole_documents(lengths: list[int], is_causal: bool) -> Case:
    """Plain varlen attention, with its mask spelled out."""
    cu, rows = np.cumsum([0, *lengths]), sum(lengths)
    spans, table = varlen_tables(cu, cu, rows, is_causal)
    seen = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    seen = seen.tril() if is_causal else seen
    step = Step(table, rows, np.concatenate([np.arange(n) for n in lengths]))
    return Case(spans, [step], [seen], rows, len(lengths), max(lengths), max(lengths))


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
    dtype, heads = torch.bfloat16, (4, 2)
    check(whole_documents([150, 1, 67], is_causal), "triton", dtype, 16, 0.25, heads=heads, in_q_dtype=True)
    check(whole_documents([70, 9], is_causal), "triton", dtype, 16, 0.25, p=0.2, heads=heads)
    check(random_case(3, [90, 7], is_causal=is_causal, num_steps=2, tail=5), "triton", dtype, 16, 0.25, heads=heads)


def test_rows_that_see_nothing_give_values_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """More queries than keys under a causal mask: the first rows' log-sum-exps are -inf."""
    tiles = BackwardTiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), is_split=True)
    use_tiles(tiles, monkeypatch)
    spans, table = varlen_tables(np.array([0, 40]), np.array([0, 21]), 40, True)
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
