"""The backward's kernels of both backends over random segment tables, against autograd in float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from backends.tables import Case, buffers, random_case, run
from hypothesis import given, settings
from hypothesis import strategies as st

from hetu.backends.attention import BackwardState, Dropout, attention_delta
from hetu.backends.dropout import keep_mask
from hetu.backends.kernels import attention_kernel, backward_kernel
from hetu.parallel.segments import SegmentTable, varlen_tables

HEADS_Q, HEADS_K = 4, 2


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
    k, v = (torch.cat(leaves[start::2]).repeat_interleave(HEADS_Q // HEADS_K, 1) for start in (1, 2))
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
        keep = keep_mask(dropout, documents, torch.arange(HEADS_Q), queries, keys)
        p = p * keep[:, rows] * dropout.scale
    loss = (torch.einsum("hij,jhd->ihd", p, v) * dout.double()[rows]).sum() + (lse.T * dlse.double()[rows]).sum()
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def gradients(
    case: Case,
    backend: str,
    q: torch.Tensor,
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    dout: torch.Tensor,
    dlse: torch.Tensor,
    scale: float,
    dropout: Dropout | None,
) -> list[torch.Tensor]:
    """What the backend computes, step by step, into memory that held NaN."""
    forward = run(attention_kernel(backend), case, q, pairs, scale=scale, dropout=dropout)
    spans = case.spans
    slots = torch.zeros_like(forward.lse)
    for start, length, slot, slot_row in zip(spans.start, spans.length, spans.slot, spans.slot_row, strict=True):
        if slot >= 0:
            slots[slot, :, slot_row : slot_row + length] = dlse[start : start + length].T
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq = torch.full(q.shape, torch.nan, dtype=high)
    state = BackwardState(dout, forward.lse, attention_delta(forward.out, dout, slots, spans), dq)
    grads = [dq]
    for number, (step, (k, v)) in enumerate(zip(case.steps, pairs, strict=True)):
        wide = torch.full((len(k), 2, *k.shape[1:]), torch.nan, dtype=high)
        backward_kernel(backend)(
            q, k, v, spans, step.table, state, wide[:, 0], wide[:, 1],
            softmax_scale=scale, first=number == 0, dropout=dropout, key_position=step.key_position,
        )  # fmt: skip
        grads += [wide[:, 0], wide[:, 1]]
    return grads


def check(case: Case, backend: str, dtype: torch.dtype, head_dim: int, scale: float, p: float, seed: int) -> None:
    q, pairs = buffers(case, HEADS_Q, HEADS_K, head_dim, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    dout = torch.randn(q.shape, generator=generator).to(dtype)
    dlse = torch.randn(len(q), HEADS_Q, generator=generator).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    dropout = Dropout(p, key=seed + 5) if p else None
    got = gradients(case, backend, q, pairs, dout, dlse, scale, dropout)
    for mine, want in zip(got, oracle(case, q, pairs, dout, dlse, scale, dropout), strict=True):
        size = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        atol = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 5e-2}[dtype] * size
        torch.testing.assert_close(mine.double(), want, atol=atol, rtol=0)


LENGTHS = st.lists(st.integers(0, 20), max_size=4)


@settings(max_examples=60)
@given(
    lengths=LENGTHS,
    causal=st.booleans(),
    steps=st.integers(1, 3),
    p=st.sampled_from([0.0, 0.4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.3, -0.2, 0.0]),
    seed=st.integers(0, 99),
)
def test_steps_on_torch(
    lengths: list[int], causal: bool, steps: int, p: float, dtype: torch.dtype, scale: float, seed: int
) -> None:
    case = random_case(seed, lengths, is_causal=causal, num_steps=steps, tail=seed % 3)
    check(case, "torch", dtype, 8, scale, p, seed)


@settings(max_examples=5)
@given(
    lengths=LENGTHS,
    causal=st.booleans(),
    steps=st.integers(1, 3),
    p=st.sampled_from([0.0, 0.4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    head_dim=st.sampled_from([8, 24]),
    scale=st.sampled_from([0.3, 0.3, -0.2, 0.0]),
    seed=st.integers(0, 99),
)
def test_steps_on_triton(
    lengths: list[int], causal: bool, steps: int, p: float, dtype: torch.dtype, head_dim: int, scale: float, seed: int
) -> None:
    case = random_case(seed, lengths, is_causal=causal, num_steps=steps, tail=seed % 3)
    check(case, "triton", dtype, head_dim, scale, p, seed)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_more_rows_than_a_block(backend: str) -> None:
    case = random_case(3, [150, 1, 90], is_causal=True, num_steps=2, tail=5)
    check(case, backend, torch.float32, 16, 0.25, 0.0, 3)


# The key-major work list


def visits_of(lens_q: list[int], lens_k: list[int], block_n: int, causal: bool) -> None:
    """Every key that a segment names is in one block, and a block visits just the segments that meet it."""
    from hetu.backends.triton import key_work_list

    cu_q, cu_k = (np.cumsum([0, *lens]) for lens in (lens_q, lens_k))
    spans, table = varlen_tables(cu_q, cu_k, int(cu_q[-1]), causal)
    items, segments = key_work_list(spans, table, block_n)
    rows = [row for k_row, count, _, _ in items.tolist() for row in range(k_row, k_row + count)]
    named = {
        row for start, count in zip(table.k_start, table.k_len, strict=True) for row in range(start, start + count)
    }
    assert sorted(rows) == sorted(named)
    weights = []
    for k_row, count, begin, end in items.tolist():
        assert 0 < count <= block_n
        meets = (table.k_start < k_row + count) & (table.k_start + table.k_len > k_row)
        assert sorted(segments[begin:end].tolist()) == np.flatnonzero(meets).tolist()
        first = np.maximum(np.maximum(k_row - table.k_start, 0) - table.diagonal, 0)
        weights.append(int((spans.length[table.query] - first)[meets].clip(0).sum()))
    assert weights == sorted(weights, reverse=True), "the heaviest block is not first"


@pytest.mark.parametrize(("block_n", "causal"), [*product([1, 4, 64], [False, True])])
def test_key_work_list(block_n: int, causal: bool) -> None:
    visits_of([5, 0, 9, 3], [5, 2, 7, 0], block_n, causal)
    visits_of([200], [131], block_n, causal)


def test_key_work_list_of_overlapping_segments() -> None:
    from hetu.backends.triton import key_work_list

    spans, _ = varlen_tables(np.array([0, 3, 6]), np.array([0, 3, 6]), 6, True)
    table = SegmentTable(*(np.array(x) for x in ([0, 1, 1], [2, 2, 9], [3, 6, 2], [2, 5, 1])))
    items, segments = key_work_list(spans, table, 4)
    found = {tuple(item[:2]): sorted(segments[item[2] : item[3]].tolist()) for item in items.tolist()}
    assert found == {(2, 4): [0, 1], (6, 2): [1], (9, 2): [2]}


def test_key_work_list_of_nothing() -> None:
    from hetu.backends.triton import key_work_list

    spans, table = varlen_tables(np.array([0, 0]), np.array([0, 4]), 3, True)
    items, segments = key_work_list(spans, table, 16)
    assert len(items) == len(segments) == 0
