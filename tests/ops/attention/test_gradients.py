"""Gradients of both attention ops against a dense float64 reference, on both backends."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_cases import METHODS, SPLITS, Case, cases, cu_seqlens
from support.dense import dense, dropout_of
from support.plans import holding_back

import hetu
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.plan.instructions import Attend

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    **options: Any,
) -> list[torch.Tensor]:
    """The gradients of one document: of ``sum(out * d_out) + sum(lse * d_lse)``, by autograd in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    unseen = max(len(q) - len(k), 0) if options["is_causal"] else len(q) * (len(k) == 0)
    if unseen == len(q) or len(q) == 0:  # nobody sees anything
        return [torch.zeros_like(x) for x in leaves]
    assert unseen == 0 or not options.get("dropout"), "dropout counts rows from the document's first"
    out, lse, _ = dense(leaves[0][unseen:], leaves[1], leaves[2], **options)
    loss = (out * d_out.double()[unseen:]).sum()
    if d_lse is not None:
        loss = loss + (lse.T * d_lse.double()[unseen:]).sum()
    return list(torch.autograd.grad(loss, leaves))


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Absolutely, or relative to the largest gradient where that is over 1.

    Half types too: the forward's rounding of out is in a gradient absolutely, through delta, however small it is.
    """
    if not want.numel():
        return
    atol = TOLERANCE.get(dtype, 2e-2)
    torch.testing.assert_close(got.double(), want, atol=atol * max(1.0, float(want.abs().max())), rtol=0)


# parallel_attn


def by_row(x: torch.Tensor, batch: int) -> torch.Tensor:
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
    plan.verify()

    def scatter(arrays: list[torch.Tensor]) -> hetu.Shards:
        return hetu.Shards(layout.scatter(arrays[0] if len(arrays) == 1 else arrays))

    feeds: dict[Any, Any] = {qkv: scatter(whole), weights[0]: scatter(d_out)}
    if with_lse:
        feeds[weights[1]] = hetu.Shards([by_row(x, case.batch) for x in scatter(d_lse)])
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
            for mine, want in zip(got, reference(q, k, v, parts[2][start:end], own_lse, **options), strict=True):
                assert_near(mine, want, case.dtype)
    return plan


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=120)
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
@settings(max_examples=12)
@given(case=cases(return_softmax=False), with_lse=st.booleans(), holds_back=st.booleans())
def test_any_strategy_on_triton(case: Case, with_lse: bool, holds_back: bool) -> None:
    check_parallel(case, "triton", with_lse=with_lse, holds_back=holds_back)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("method", METHODS[:3])
def test_uneven_lengths_in_bfloat16(backend: str, split: str, method: str) -> None:
    case = Case([33, 0, 1, 35], [0] * 4, split, method, "1d", dtype=torch.bfloat16, cut=[0.5, 0.51], head_dim=32)
    check_parallel(case, backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("packing", ["", "1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_pipelines_that_hold_back(backend: str, split: str, packing: str, dtype: torch.dtype) -> None:
    """Both parts write their gradients into the same memory, and nothing else there."""
    case = Case([35, 34], [0, 0], split, "direct", packing, dtype=dtype, cut=[0.3, 0.4], head_dim=16, heads=(4, 2))
    plan = check_parallel(case, backend)
    own = [[item.buffer for item in part.instructions if isinstance(item, Attend)] for part in plan.pipelines]
    assert own[-1] == [0, 1, 0]


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


def check_varlen(
    lens_q: list[int], lens_k: list[int], backend: str, device: str = "cpu", tail: int = 0, **options: Any
) -> None:
    heads, head_dim, dtype = (
        options.pop("heads", (4, 2)),
        options.pop("head_dim", 8),
        options.pop("dtype", torch.float32),
    )
    rank3, p = options.pop("rank3", False), options.pop("p_dropout", 0.0)
    is_causal, scale = options.pop("is_causal", True), options.pop("softmax_scale", -1)
    generator = torch.Generator().manual_seed(3)
    rows = (sum(lens_q) + tail, sum(lens_k) + tail, sum(lens_k) + tail)
    counts = (heads[0], heads[1], heads[1])
    arrays = [torch.randn(n, h, head_dim, generator=generator).to(dtype) for n, h in zip(rows, counts, strict=True)]
    for x, used in zip(arrays[1:], (sum(lens_k),) * 2, strict=True):
        x[used:] = torch.nan  # keys of nobody
    d_out = torch.randn(rows[0], heads[0], head_dim, generator=generator).to(dtype)
    cu = [np.cumsum([0, *lens], dtype=np.int32) for lens in (lens_q, lens_k)]
    with hetu.graph("define_and_run", device=device) as g:
        fed = [hetu.placeholder(dtype, x.shape if rank3 else x.flatten(1).shape) for x in (*arrays, d_out)]
        lengths = [hetu.constant(x) for x in cu]
        results = hetu.attn_varlen(
            *fed[:3], head_dim, *lengths, p_dropout=p, is_causal=is_causal, softmax_scale=scale, **options
        )
        grads = hetu.gradients(results[0], fed[:3], fed[3])
    feeds = {x: value if rank3 else value.flatten(1) for x, value in zip(fed, (*arrays, d_out), strict=True)}
    with hetu.config(backend=backend):
        *got, rng_state = g.run([*grads, results[3]], feed_dict=feeds)
    got = [x.cpu().view(-1, h, head_dim) for x, h in zip(got, counts, strict=True)]
    want = [torch.zeros(x.shape, dtype=torch.float64) for x in got]
    for b, (at_q, at_k) in enumerate(zip(pairwise(cu[0]), pairwise(cu[1]), strict=True)):
        own_q, own_k = slice(*at_q), slice(*at_k)
        one = (arrays[0][own_q], arrays[1][own_k], arrays[2][own_k], d_out[own_q])
        dropout = dropout_of(p, rng_state)
        parts = reference(
            *one, None, is_causal=is_causal, document=b, dropout=dropout, scale=None if scale == -1 else scale
        )
        for place, whole, part in zip((own_q, own_k, own_k), want, parts, strict=True):
            whole[place] = part
    for mine, expected in zip(got, want, strict=True):
        assert_near(mine, expected, dtype)


LENGTHS = ([0, 1, 5, 33, 7, 0, 70], [3, 1, 9, 33, 2, 0, 65])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rank3", [False, True])
def test_varlen(backend: str, is_causal: bool, rank3: bool) -> None:
    check_varlen(*LENGTHS, backend, tail=3, is_causal=is_causal, rank3=rank3)


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
    check_varlen(*LENGTHS, backend, **options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_diagonals_at_the_edges_of_blocks(backend: str) -> None:
    lens_q = [70, 66, 65, 64, 80]
    check_varlen(lens_q, [n + more for n, more in zip(lens_q, (62, 63, 64, 1, -1), strict=True)], backend, heads=(1, 1))


def test_varlen_in_float64() -> None:
    check_varlen(*LENGTHS, "torch", dtype=torch.float64, tail=1)


@pytest.mark.parametrize("lens", [[], [0], [0, 0]])
def test_varlen_of_nothing(lens: list[int]) -> None:
    check_varlen(lens, lens, "torch")
    check_varlen(lens, lens, "triton", tail=2)


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
