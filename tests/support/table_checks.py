"""Kernels over segment tables, forward and backward, against their definition in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from support.tables_by_definition import Case, Step, buffers, dense, owned_rows, rows_of, run, sinks_of

from hetu.backends.attention.contract import BackwardState, Dropout, attention_delta, sink_gradient
from hetu.backends.attention.dropout import keep_mask
from hetu.backends.attention.family import AttendCall
from hetu.backends.families import family
from hetu.parallel import Mask
from hetu.parallel.mask.varlen import varlen_tables

TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error of a gradient, relative to the largest entry."""


def whole_documents(lengths: list[int], is_causal: bool) -> Case:
    """Plain varlen attention, with its mask spelled out."""
    cu, rows = np.cumsum([0, *lengths]), sum(lengths)
    spans, table = varlen_tables(cu, cu, rows, Mask.of(is_causal))
    seen = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    seen = seen.tril() if is_causal else seen
    step = Step(table, rows, np.concatenate([np.arange(n) for n in lengths]))
    return Case(spans, [step], [seen], rows, len(lengths), max(lengths), max(lengths))


def documents_before_foreign_keys(lengths: list[int]) -> Case:
    """Causal documents, and after their keys 30 of nobody, which hold NaN."""
    case = whole_documents(lengths, True)
    (step,), (seen,) = case.steps, case.seen
    wider = Step(step.table, step.rows + 30, np.append(step.key_position, np.zeros(30, np.int64)))
    return replace(case, steps=[wider], seen=[torch.nn.functional.pad(seen, (0, 30))])


def check_forward(
    backend: str,
    case: Case,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    dropout: Dropout | None = None,
    softcap: float = 0.0,
    has_sinks: bool = False,
    device: str = "cpu",
) -> None:
    """Compares with the definition; with ``has_sinks`` the last of several heads has one of -inf, which is none."""
    q, pairs = buffers(case, *heads, head_dim, dtype, seed=head_dim)
    scale = head_dim**-0.5
    sinks = sinks_of(heads[0], dtype, head_dim) if has_sinks else None
    if sinks is not None and len(sinks) > 1:
        sinks[-1] = -torch.inf
    there = [tuple(_copied(x, device) for x in pair) for pair in pairs]
    own_sinks = None if sinks is None else sinks.to(device)
    state = run(
        backend, case, _copied(q, device), there, scale=scale, dropout=dropout, softcap=softcap, sinks=own_sinks
    )
    state.out, state.lse = state.out.cpu(), state.lse.cpu()
    expected = dense(case, q, pairs, scale=scale, dropout=dropout, softcap=softcap, sinks=sinks)
    tolerance, lse_tolerance = 2e-5, 2e-5
    if dtype not in (torch.float32, torch.float64):
        plain = dense(case, q, pairs, scale=scale, dropout=dropout, dtype=dtype, softcap=softcap, sinks=sinks)
        tolerance = 2 * float((plain.out - expected.out).abs().max())
        lse_tolerance += softcap * 2.0**-11  # of the hardware's tangent
    assert state.out.dtype == dtype
    torch.testing.assert_close(state.out.double(), expected.out, rtol=0, atol=tolerance)
    torch.testing.assert_close(rows_of(case, state.lse).double(), expected.lse, rtol=0, atol=lse_tolerance)
    live = sum(int(n) for n, slot in zip(case.spans.length, case.spans.slot, strict=True) if slot >= 0)
    assert not state.lse.isnan().any()
    assert int((state.lse > -torch.inf).sum()) <= live * q.shape[1]


def _copied(x: torch.Tensor, device: str) -> torch.Tensor:
    """A tensor on a device, with the strides that it has: a view, and not what ``to`` would make of it."""
    if x.device.type == device:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def oracle(
    case: Case,
    q: torch.Tensor,
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    dout: torch.Tensor,
    dlse: torch.Tensor,
    scale: float,
    dropout: Dropout | None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Gradients of q and of every step's k and v, of ``sum(out * dout) + sum(lse * dlse)``; dlse is ``(T_q, H_q)``.

    The last one is that of the sinks, which are finite; a zero without them.
    """
    none = torch.full((q.shape[1],), -torch.inf)
    leaves = [q.double(), *(x.double().nan_to_num(0) for pair in pairs for x in pair)]
    leaves = [x.detach().requires_grad_() for x in (*leaves, (none if sinks is None else sinks).double())]
    heads, group = q.shape[1], q.shape[1] // pairs[0][0].shape[1]
    k, v = (torch.cat(leaves[start:-1:2]).repeat_interleave(group, 1) for start in (1, 2))
    seen = torch.cat(case.seen, 1)
    spans = case.spans
    rows = seen.any(1) if sinks is None else owned_rows(spans)
    scores = torch.einsum("ihd,jhd->hij", leaves[0], k) * scale
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    hidden = scores.masked_fill(~seen, -torch.inf)[:, rows]
    lse = torch.cat([hidden, leaves[-1][:, None, None].expand(-1, hidden.shape[1], 1)], -1).logsumexp(-1)
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
    softcap: float = 0.0,
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
        call = AttendCall(q, k, v, case.spans, step.table, scale, turn, dropout, step.key_position, softcap)
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


def check_backward(
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
    softcap: float = 0.0,
    has_sinks: bool = False,
) -> None:
    """Compares with the oracle, and a second call, which keeps what others wrote, with the first, bit for bit."""
    q, pairs = buffers(case, *heads, head_dim, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    dout = torch.randn(q.shape, generator=generator).to(dtype)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = torch.randn(len(q), heads[0], generator=generator).to(high)
    dropout = Dropout(p, key=seed + 5) if p else None
    there, there_pairs = q.to(device), [(k.to(device), v.to(device)) for k, v in pairs]
    sinks = sinks_of(heads[0], dtype, seed).to(device) if has_sinks else None
    forward = run(backend, case, there, there_pairs, scale=scale, dropout=dropout, softcap=softcap, sinks=sinks)
    delta = attention_delta(forward.out, dout.to(device), lse_gradient(case, forward.lse, dlse.to(device)), case.spans)
    dq = torch.empty_like(there, dtype=dtype if in_q_dtype else high)
    acc = None
    if case.runs_on:
        acc = dq if dq.dtype == high and seed % 2 else torch.empty_like(there, dtype=high)
    state = BackwardState(dout.to(device), forward.lse, delta, dq, acc)
    got, again = (
        gradients(case, backend, there, there_pairs, state, scale, dropout, softcap, keeps) for keeps in (False, True)
    )
    for grads in (got, again):
        none = torch.zeros(heads[0])
        grads.append(none if sinks is None else sink_gradient(sinks, forward.lse, delta, case.spans))
    wanted = oracle(case, q, pairs, dout, dlse, scale, dropout, softcap, None if sinks is None else sinks.cpu())
    for mine, want in zip(got, wanted, strict=True):
        size = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        torch.testing.assert_close(mine.cpu().double(), want, atol=TOLERANCE[dtype] * size, rtol=0)
    assert all(torch.equal(one, two) for one, two in zip(got, again, strict=True)), "two calls give different bits"
