"""Attention over segment tables, on both backends, against its definition in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.longer import LONGER, grid
from support.table_checks import check_forward as check
from support.tables_by_definition import Case, Step, buffers, dense, random_case, rows_of, run

from hetu.backends import families
from hetu.backends.attention.contract import Dropout, ceil_padded, dropout_key, finish_softmax, new_state
from hetu.backends.attention.family import AttendCall
from hetu.parallel import Mask
from hetu.parallel.mask.segments import SegmentTable, take_turns
from hetu.parallel.mask.varlen import varlen_tables

LENGTHS = [0, 1, 63, 127, 129]
DROPOUT = Dropout(0.3, dropout_key(11, 2, 0))


@pytest.fixture(params=["torch", "triton"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def varlen_case(q_len: list[int], k_len: list[int], rows: int, is_causal: bool) -> Case:
    """The plain varlen table, with its mask spelled out."""
    q_cu, k_cu = np.cumsum([0, *q_len]), np.cumsum([0, *k_len])
    spans, table = varlen_tables(q_cu, k_cu, rows, Mask.of(is_causal))
    seen = torch.zeros(rows, int(k_cu[-1]), dtype=torch.bool)
    for b, (n, m) in enumerate(zip(q_len, k_len, strict=True)):
        allowed = torch.ones(n, m, dtype=torch.bool)
        seen[q_cu[b] : q_cu[b + 1], k_cu[b] : k_cu[b + 1]] = allowed.tril(m - n) if is_causal else allowed
    positions = np.concatenate([np.arange(m) for m in k_len])
    return Case(spans, [Step(table, len(positions), positions)], [seen], rows, len(q_len), max(q_len), max(k_len))


@pytest.mark.parametrize(
    ("family", "head_dim", "is_causal"), grid(["torch", "triton"], [8, 24, 64, 72, 128, 256], [True, False])
)
def test_varlen(family: str, head_dim: int, is_causal: bool) -> None:
    case = varlen_case(LENGTHS, LENGTHS, sum(LENGTHS) + 3, is_causal)
    check(family, case, (2, 1), head_dim, torch.float32)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_varlen_of_unequal_lengths(family: str, is_causal: bool) -> None:
    """More keys than queries, fewer (rows that see none), no keys, no queries."""
    case = varlen_case([5, 70, 9, 0, 1, 66], [80, 3, 0, 7, 130, 65], 151, is_causal)
    check(family, case, (4, 2), 16, torch.float32)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_dropout_over_many_blocks(family: str, is_causal: bool) -> None:
    case = varlen_case(LENGTHS, LENGTHS, sum(LENGTHS), is_causal)
    check(family, case, (2, 1), 16, torch.float32, DROPOUT)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1), (6, 2)])
def test_grouped_queries(family: str, heads: tuple[int, int]) -> None:
    check(family, random_case(1, [40, 21], is_causal=True, num_steps=2), heads, 16, torch.float32)


@pytest.mark.parametrize(
    ("family", "dtype", "num_steps"), grid(["torch", "triton"], [torch.float16, torch.bfloat16], [1, 3])
)
def test_half_precision(family: str, dtype: torch.dtype, num_steps: int) -> None:
    check(family, random_case(2, [0, 1, 63, 129], is_causal=True, num_steps=num_steps, tail=2), (2, 1), 64, dtype)


steps = given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 17, 63, 64, 65, 90]), min_size=1, max_size=4),
    is_causal=st.booleans(),
    num_steps=st.integers(1, 4),
    tail=st.integers(0, 2),
    dropout=st.sampled_from([None, DROPOUT]),
)
"""Strided spans, several segments a span, negative diagonals, empty steps, merging; masks the same in any cut."""


def check_steps(backend: str, seed: int, lengths: list[int], dropout: Dropout | None, **options: Any) -> None:
    check(backend, random_case(seed, lengths, **options), (2, 1), 16, torch.float32, dropout)


@settings(max_examples=20 * LONGER)
@steps
def test_steps_on_torch(**case: Any) -> None:
    check_steps("torch", **case)


@settings(max_examples=6 * LONGER)
@steps
def test_steps_on_triton(**case: Any) -> None:
    check_steps("triton", **case)


def test_every_step_empty(family: str) -> None:
    case = random_case(3, [4, 0], is_causal=True, num_steps=3, tail=1)
    nothing = [
        Step(type(step.table)(*(np.empty(0, np.int64),) * 4), step.rows, step.key_position) for step in case.steps
    ]
    case = Case(case.spans, nothing, [mask & False for mask in case.seen], case.rows, case.slots, 4, 4)
    q, pairs = buffers(case, 2, 1, 8, torch.float32, seed=0)
    state = run(family, case, q, pairs, scale=1.0)
    assert (state.out == 0).all() and (state.lse == -torch.inf).all()


def test_middle_step_leaves_other_spans_alone(family: str) -> None:
    """A step touches only rows of spans that it attends for."""
    case = varlen_case([3, 4], [3, 4], 7, is_causal=False)
    q, [(k, v)] = buffers(case, 1, 1, 8, torch.float32, seed=0)
    state = run(family, Case(case.spans, case.steps * 2, case.seen * 2, 7, 2, 4, 4), q, [(k, v)] * 2, scale=1.0)
    assert state.acc is not None
    before = state.acc[3:].clone(), state.lse[1].clone()
    table = case.steps[0].table
    first_only = type(table)(table.query[:1], table.k_start[:1], table.k_len[:1], table.diagonal[:1])
    state.lse[1], state.out[:] = torch.nan, torch.nan
    _, middle, _ = take_turns(case.spans, [case.steps[0].table, first_only, case.steps[0].table])
    families.family(family).attend(AttendCall(q, k, v, case.spans, first_only, 1.0, middle), state)
    assert torch.equal(state.acc[3:], before[0]) and state.lse[1].isnan().all() and state.out.isnan().all()


def test_a_span_is_written_by_its_last_step(family: str) -> None:
    """Whatever follows for others; nothing of it runs on."""
    case = varlen_case([3, 4], [3, 4], 7, is_causal=False)
    q, [(k, v)] = buffers(case, 1, 1, 8, torch.float32, seed=0)
    table = case.steps[0].table
    second_only = SegmentTable(table.query[1:], table.k_start[1:], table.k_len[1:], table.diagonal[1:])
    turns = take_turns(case.spans, [table, second_only])
    state = new_state(q, case.spans, case.slots, case.slot_rows, runs_on=True)
    assert state.acc is not None
    state.out.fill_(torch.nan), state.acc.fill_(torch.nan)
    families.family(family).attend(AttendCall(q, k, v, case.spans, table, 1.0, turns[0]), state)
    done = state.out[:3].clone()
    torch.testing.assert_close(done.double(), dense(case, q, [(k, v)], scale=1.0).out[:3], rtol=0, atol=2e-5)
    assert state.out[3:].isnan().all() and not state.acc[3:].isnan().any()
    families.family(family).attend(AttendCall(q, k, v, case.spans, second_only, 1.0, turns[1]), state)
    assert torch.equal(state.out[:3], done) and not state.out.isnan().any()


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_any_scale(family: str, scale: float) -> None:
    n = 140
    case = varlen_case([n], [n], n, is_causal=True)
    q, pairs = buffers(case, 2, 1, 16, torch.float32, seed=0)
    state = run(family, case, q, pairs, scale=scale, scores=True)
    expected = dense(case, q, pairs, scale=scale)
    torch.testing.assert_close(state.out.double(), expected.out, rtol=0, atol=2e-5)
    p = finish_softmax(state, case.spans, None, torch.float32)[0, :, :n, :n]
    torch.testing.assert_close(p.double(), expected.p, rtol=0, atol=2e-5)


def test_large_scores_do_not_overflow(family: str) -> None:
    case = random_case(5, [70], is_causal=True, num_steps=3)
    q, pairs = buffers(case, 1, 1, 16, torch.float32, seed=0)
    state = run(family, case, q, pairs, scale=200.0)
    expected = dense(case, q, pairs, scale=200.0)
    torch.testing.assert_close(rows_of(case, state.lse).double(), expected.lse, rtol=1e-6, atol=0)
    assert not state.out.isnan().any()


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["kept", "dropped"])
def test_softmax(family: str, dropout: Dropout | None) -> None:
    """p: magnitudes of the undropped softmax, dropped entries negative, padding 0, and the same in any cut."""
    case = random_case(7, [0, 1, 30, 65], is_causal=True, num_steps=3, tail=1)
    q, pairs = buffers(case, 2, 1, 16, torch.float32, seed=0)
    state = run(family, case, q, pairs, scale=0.25, dropout=dropout, scores=True)
    p = finish_softmax(state, case.spans, dropout, torch.bfloat16).double()
    expected = dense(case, q, pairs, scale=0.25, dropout=dropout)
    assert p.shape == (case.slots, 2, ceil_padded(65), ceil_padded(65))
    place = torch.zeros_like(p)
    spans, keys = case.spans, np.concatenate([step.key_position for step in case.steps])
    signed = torch.where(expected.keep, expected.p, -expected.p)
    for start, length, slot, row in zip(spans.start, spans.length, spans.slot, spans.slot_row, strict=True):
        if slot >= 0:
            place[slot, :, row : row + length].index_add_(
                2, torch.from_numpy(keys), signed[:, start : start + length].nan_to_num()
            )
    torch.testing.assert_close(p, place, rtol=2**-8, atol=1e-6)
    assert (dropout is None) == bool((p >= 0).all())


def test_float64_on_the_torch_backend() -> None:
    case = random_case(9, [33, 20], is_causal=True, num_steps=3)
    q, pairs = buffers(case, 2, 1, 16, torch.float64, seed=0)
    state = run("torch", case, q, pairs, scale=0.25)
    expected = dense(case, q, pairs, scale=0.25)
    torch.testing.assert_close(state.out, expected.out, rtol=0, atol=1e-13)
    torch.testing.assert_close(rows_of(case, state.lse), expected.lse, rtol=0, atol=1e-13)


def test_plain_path_works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend's plain path cuts long queries; here so small that every row block is its own."""
    monkeypatch.setattr("hetu.backends.eager.attend._BLOCK_ENTRIES", 1)
    check("torch", varlen_case([70], [65], 70, True), (2, 1), 16, torch.float32, DROPOUT)
