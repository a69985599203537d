"""parallel_attn under masks, caps and sinks, under any strategy, against their definition in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from support.attention_cases import Case, cases, cu_seqlens
from support.dense import assert_gradient_near, dropout_of
from support.dense_masks import Packs, masks
from support.parallel_checks import lse_rows, lse_slots

import hetu
from hetu import Mask


@st.composite
def masked_cases(draw: st.DrawFn, **fixed: Any) -> tuple[Case, Mask]:
    """A strategy, and a mask that fits all its groups."""
    case = draw(cases(**fixed))
    if draw(st.booleans()):
        case.groups = [0] * len(case.lens)
        case.batch = case.batch if sum(case.lens) else 1  # no tokens have no batch to speak of
    documents = case.documents(next(iter(case.members.values())))
    mask = draw(masks(documents, documents, is_shared=len(case.members) > 1))
    case.return_softmax &= not (mask.joins and case.batch > 1)
    return case, mask


def check_masked(
    case: Case,
    mask: Mask,
    backend: str = "torch",
    *,
    softcap: float = 0.0,
    sink_dtype: torch.dtype | None = None,
    weighs_by: Mask | None = None,
) -> hetu.Layout:
    """Runs the op and the gradient of a random sum of its output and lse, and compares all with the definition.

    Args:
        case: The strategy and what it holds.
        mask: What tokens see.
        backend: Whose kernels run.
        softcap: Of the scores.
        sink_dtype: Of the sinks; None for none.
        weighs_by: The strategy's mask.
    """
    generator = torch.Generator().manual_seed(case.seed)
    (num_q, num_kv), head_dim, members = case.heads, case.head_dim, list(case.members.values())
    high = torch.float64 if case.dtype == torch.float64 else torch.float32

    def new(width: int, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randn(sum(case.documents(own)), width, generator=generator).to(dtype) for own in members]

    whole, d_out = new((num_q + 2 * num_kv) * head_dim, case.dtype), new(num_q * head_dim, case.dtype)
    d_lse = new(num_q, high)
    sinks = None if sink_dtype is None else torch.randn(num_q, generator=generator).to(sink_dtype)

    lens = [hetu.IntSymbol(f"n{r}") for r in range(len(case.lens))]
    strategy = hetu.Strategy(lens, case.groups, mask=weighs_by)
    with hetu.graph("define_and_run", strategies=[strategy], device="cpu") as g:
        qkv = hetu.placeholder(case.dtype, [hetu.IntSymbol("rows"), whole[0].shape[1]], name="qkv")
        shape = [hetu.IntSymbol("pieces"), hetu.IntSymbol("b")][case.packing == "1d" :]
        cu = hetu.placeholder(hetu.int32, shape, name="cu") if case.packing else None
        x_sinks = None if sinks is None else hetu.placeholder(sinks.dtype, sinks.shape)
        outputs = hetu.parallel_attn(
            qkv, head_dim, num_q // num_kv, None, None, bool(case.packing), cu, p_dropout=case.p,
            return_softmax=case.return_softmax, split=case.split, method=case.method,
            mask=mask, softcap=softcap, sinks=x_sinks,
        )  # fmt: skip
        weights = [hetu.placeholder(item.dtype, item.shape) for item in outputs[:2]]
        grads = hetu.gradients(outputs[:2], [qkv] if x_sinks is None else [qkv, x_sinks], weights)
    symbols = dict(zip(lens, case.lens, strict=True))
    tables = [cu_seqlens(case, own) for own in members] if case.packing else None
    about = {"int_symbol_dict": symbols, "cu_seqlens": tables, "batch": case.batch}
    layout, plan = g.layout(0, **about), g.plan(0, **about)
    plan.verify()
    plan.backward().verify()

    def scatter(arrays: list[torch.Tensor]) -> hetu.Shards:
        return hetu.Shards(layout.scatter(arrays[0] if len(arrays) == 1 else arrays))

    feeds: dict[Any, Any] = {qkv: scatter(whole), weights[0]: scatter(d_out)}
    feeds[weights[1]] = hetu.Shards([lse_slots(x, case.batch) for x in scatter(d_lse)])
    if tables is not None and cu is not None:
        feeds[cu] = hetu.Shards([tables[list(case.members).index(group)] for group in case.groups])
    if x_sinks is not None:
        feeds[x_sinks] = sinks
    with hetu.config(backend=backend):
        found = g.run([*outputs, *grads], feeds, int_symbol_dict=symbols)
    shards = [list(item) if isinstance(item, hetu.Shards) else [item] for item in found]
    _compare(case, mask, softcap, layout, shards, (whole, d_out, d_lse), sinks)
    return layout


def _compare(
    case: Case,
    mask: Mask,
    softcap: float,
    layout: hetu.Layout,
    shards: list[list[torch.Tensor]],
    fed: tuple[list[torch.Tensor], ...],
    sinks: torch.Tensor | None,
) -> None:
    """Compares results with the definition, group by group; gradients of sinks add up over pipelines."""
    (num_q, num_kv), head_dim = case.heads, case.head_dim
    out, lse, rng_state, *rest = shards
    p = rest.pop(0) if case.return_softmax else None

    def gather(of_pipelines: list[torch.Tensor]) -> list[torch.Tensor]:
        whole = layout.gather(of_pipelines)
        return whole if isinstance(whole, list) else [whole]

    got = [gather(out), gather([lse_rows(x) for x in lse]), gather(rest[0])]
    got_p = None if p is None else gather([lse_rows(x, case.lens[r]) for r, x in enumerate(p)])
    atol = {torch.float64: 1e-11, torch.float32: 2e-5}.get(case.dtype, 2e-2)
    of_sinks = None if sinks is None else torch.zeros(num_q, dtype=torch.float64)
    for i, members in enumerate(case.members.values()):
        documents = case.documents(members)
        packs = Packs(documents, documents, mask, softcap, dropout=dropout_of(case.p, rng_state[0], i))
        qkv = fed[0][i].double().requires_grad_()
        wide = None if sinks is None else sinks.double().requires_grad_()
        q, k, v = qkv.unflatten(1, (-1, head_dim)).split([num_q, num_kv, num_kv], 1)
        want, want_lse, want_p = packs.attend(q, k, v, wide)
        torch.testing.assert_close(
            got[0][i].double(), want.detach().flatten(1), atol=atol, rtol=1e-2 if case.dtype.itemsize == 2 else 0
        )
        torch.testing.assert_close(got[1][i].double(), want_lse.detach(), atol=atol, rtol=1e-5)
        if got_p is not None:
            _compare_p(case, documents, got_p[i].double(), want_p.detach(), atol)
        d_out, d_lse = fed[1][i].double(), fed[2][i].double()
        loss = (want.flatten(1) * d_out).sum() + torch.where(want_lse > -torch.inf, want_lse * d_lse, 0.0).sum()
        leaves = [qkv] if wide is None else [qkv, wide]
        d_qkv, *d_sinks = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        assert_gradient_near(got[2][i], d_qkv, case.dtype)
        if of_sinks is not None:
            of_sinks += d_sinks[0]
    if sinks is not None and of_sinks is not None:
        assert all(x.dtype == sinks.dtype and x.shape == sinks.shape for x in rest[1])
        lowest = min(case.dtype, sinks.dtype, key=lambda dtype: dtype.itemsize)
        assert_gradient_near(torch.stack([x.double() for x in rest[1]]).sum(0), of_sinks, lowest)


def _compare_p(case: Case, documents: list[int], got: torch.Tensor, want: torch.Tensor, atol: float) -> None:
    """Columns count the keys of the pack, or those of each sequence of a batch."""
    if case.packing or case.batch == 1:
        torch.testing.assert_close(got[:, :, : want.shape[2]], want, atol=atol, rtol=0)
        assert (got[:, :, want.shape[2] :] == 0).all()
        return
    at = np.cumsum([0, *documents])
    for start, stop in pairwise(at):
        own = want[start:stop, :, start:stop]
        torch.testing.assert_close(got[start:stop, :, : stop - start], own, atol=atol, rtol=0)
