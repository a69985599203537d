"""parallel_attn and its gradients, under any strategy, against a dense float64 attention of each document."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from support.attention_cases import Case, cu_seqlens
from support.dense import assert_gradient_near, dense, dense_backward, dropout_of, plain, tolerance
from support.plans import holding_back

import hetu
from hetu.parallel.attn_plan import AttnPlan


def run_case(
    case: Case, backend: str, device: str = "cpu"
) -> tuple[list[hetu.Shards], hetu.Layout, list[torch.Tensor]]:
    """Builds, scatters and runs; gives the outputs as Shards, the layout and each group's qkv."""
    generator = torch.Generator().manual_seed(case.seed)
    num_q, num_kv = case.heads
    width = (num_q + 2 * num_kv) * case.head_dim
    members = case.members
    whole = [torch.randn(sum(case.documents(m)), width, generator=generator).to(case.dtype) for m in members.values()]
    lens = [hetu.IntSymbol(f"n{r}") for r in range(len(case.lens))]
    with hetu.graph("define_and_run", device=device) as g:
        qkv = hetu.placeholder(case.dtype, [hetu.IntSymbol("rows"), width], name="qkv")
        cu = None
        if case.packing:
            shape = [hetu.IntSymbol("pieces"), hetu.IntSymbol("b")][case.packing == "1d" :]
            cu = hetu.placeholder(hetu.int32, shape, name="cu")
        outputs = hetu.parallel_attn(
            qkv, case.head_dim, num_q // num_kv, [lens], [case.groups], bool(case.packing), cu,
            p_dropout=case.p, is_causal=case.is_causal, return_softmax=case.return_softmax,
            split=case.split, method=case.method,
        )  # fmt: skip
    symbols = dict(zip(lens, case.lens, strict=True))
    tables = [cu_seqlens(case, m) for m in members.values()] if case.packing else None
    layout = g.layout(0, int_symbol_dict=symbols, cu_seqlens=tables, batch=case.batch)
    g.plan(0, int_symbol_dict=symbols, cu_seqlens=tables, batch=case.batch).verify()
    feeds = {qkv: hetu.Shards(layout.scatter(whole[0] if len(whole) == 1 else whole))}
    if tables is not None and cu is not None:
        order = list(members)
        feeds[cu] = hetu.Shards([tables[order.index(group)] for group in case.groups])
    with hetu.config(backend=backend):
        results = g.run(outputs, feed_dict=feeds, int_symbol_dict=symbols)
    shards = [r if isinstance(r, hetu.Shards) else [r] for r in results]
    return [hetu.Shards([x.cpu() for x in one]) for one in shards], layout, whole


def check_case(case: Case, backend: str, device: str = "cpu") -> None:
    results, layout, whole = run_case(case, backend, device)
    out, lse, rng_state = results[:3]
    outs, lses = layout.gather(list(out)), layout.gather([lse_rows(x) for x in lse])
    weights = (
        layout.gather([lse_rows(x, case.lens[r]) for r, x in enumerate(results[3])]) if case.return_softmax else []
    )
    if len(whole) == 1:
        outs, lses, weights = [outs], [lses], [weights]
    num_q, num_kv = case.heads
    for i, members in enumerate(case.members.values()):
        q, k, v = whole[i].unflatten(1, (-1, case.head_dim)).split([num_q, num_kv, num_kv], 1)
        at = np.cumsum([0, *case.documents(members)])
        for b, (start, end) in enumerate(pairwise(at)):
            one = (q[start:end], k[start:end], v[start:end])
            dropout = dropout_of(case.p, rng_state[0], i)
            want, want_lse, want_p = dense(*one, is_causal=case.is_causal, document=b, dropout=dropout)
            atol = tolerance(case.dtype, want, plain(*one, is_causal=case.is_causal))
            got = outs[i][start:end].view(-1, num_q, case.head_dim)
            torch.testing.assert_close(got.double(), want, atol=atol, rtol=0)
            torch.testing.assert_close(lses[i][start:end].double(), want_lse.T, atol=1e-4, rtol=1e-5)
            if case.return_softmax:
                first = start if case.packing else 0
                got_p = weights[i][start:end, :, first : first + end - start]
                torch.testing.assert_close(got_p.double(), want_p.transpose(0, 1), atol=2e-5, rtol=0)
                assert (weights[i][start:end, :, :first] == 0).all()
                assert (weights[i][start:end, :, first + end - start :] == 0).all()


def lse_rows(x: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """``(batch, H, seq_len, ...)`` as rows ``(batch * seq_len, H, ...)``."""
    x = x if rows is None else x[:, :, :rows]
    return x.transpose(1, 2).flatten(0, 1)


def lse_slots(x: torch.Tensor, batch: int) -> torch.Tensor:
    """Rows ``(batch * n, H)`` as ``(batch, H, n)``, as softmax_lse is."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()


def check_parallel(
    case: Case, backend: str, device: str = "cpu", with_lse: bool = True, holds_back: bool = True
) -> AttnPlan:
    """Compares with the reference; gives the backward's plan."""
    generator = torch.Generator().manual_seed(case.seed)
    (num_q, num_kv), head_dim, members = case.heads, case.head_dim, case.members
    width, out_width = (num_q + 2 * num_kv) * head_dim, num_q * head_dim
    totals = [sum(case.documents(m)) for m in members.values()]
    whole, d_out = ([torch.randn(n, w, generator=generator).to(case.dtype) for n in totals] for w in (width, out_width))
    lse_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    d_lse = [torch.randn(n, num_q, generator=generator).to(lse_dtype) for n in totals]
    lens = [hetu.IntSymbol(f"n{r}") for r in range(len(case.lens))]
    with hetu.graph("define_and_run", device=device) as g:
        qkv = hetu.placeholder(case.dtype, [hetu.IntSymbol("rows"), width], name="qkv")
        shape = [hetu.IntSymbol("pieces"), hetu.IntSymbol("b")][case.packing == "1d" :]
        cu = hetu.placeholder(hetu.int32, shape, name="cu") if case.packing else None
        out, lse, rng_state = hetu.parallel_attn(
            qkv, head_dim, num_q // num_kv, [lens], [case.groups], bool(case.packing), cu,
            p_dropout=case.p, is_causal=case.is_causal, split=case.split, method=case.method,
        )  # fmt: skip
        weights = [hetu.placeholder(out.dtype, out.shape), hetu.placeholder(lse.dtype, lse.shape)]
        targets = [out, lse] if with_lse else [out]
        d_qkv = hetu.gradients(targets, qkv, weights[: len(targets)])
    symbols = dict(zip(lens, case.lens, strict=True))
    tables = [cu_seqlens(case, m) for m in members.values()] if case.packing else None
    layout = g.layout(0, int_symbol_dict=symbols, cu_seqlens=tables, batch=case.batch)
    with holding_back(holds_back):
        plan = g.plan(0, int_symbol_dict=symbols, cu_seqlens=tables, batch=case.batch).backward()  # the run's
        plan.need(range(len(case.lens)))
    plan.verify()

    def scatter(arrays: list[torch.Tensor]) -> hetu.Shards:
        return hetu.Shards(layout.scatter(arrays[0] if len(arrays) == 1 else arrays))

    feeds: dict[Any, Any] = {qkv: scatter(whole), weights[0]: scatter(d_out)}
    if with_lse:
        feeds[weights[1]] = hetu.Shards([lse_slots(x, case.batch) for x in scatter(d_lse)])
    if tables is not None and cu is not None:
        order = list(members)
        feeds[cu] = hetu.Shards([tables[order.index(group)] for group in case.groups])
    with hetu.config(backend=backend):
        grad, state = g.run([d_qkv, rng_state], feed_dict=feeds, int_symbol_dict=symbols)
    grads = layout.gather([x.cpu() for x in (grad if isinstance(grad, hetu.Shards) else [grad])])
    grads = [grads] if len(whole) == 1 else grads
    for i, group in enumerate(members.values()):
        parts = [x.unflatten(1, (-1, head_dim)) for x in (whole[i], grads[i], d_out[i])]
        dropout = dropout_of(case.p, state[0] if isinstance(state, hetu.Shards) else state, i)
        for b, (start, end) in enumerate(pairwise(np.cumsum([0, *case.documents(group)]))):
            (q, k, v), got = (x[start:end].split([num_q, num_kv, num_kv], 1) for x in parts[:2])
            own_lse = d_lse[i][start:end] if with_lse else None
            options = {"is_causal": case.is_causal, "document": b, "dropout": dropout}
            for mine, want in zip(got, dense_backward(q, k, v, parts[2][start:end], own_lse, **options), strict=True):
                assert_gradient_near(mine, want, case.dtype)
    return plan
