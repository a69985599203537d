"""Sizes that need a GPU: 131,072 tokens, and offsets past 2**31 elements in every tensor that a kernel addresses.

Each test is a function of its sizes, and a small case of it runs on the CPU. What lies far into a tensor is surrounded
by NaN, so that an offset that wrapped round at 32 bits reads or writes what it must not, if it hits memory at all.
Wants 40 GB of a GPU's memory; only one of these tests runs at a time, also over several processes.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.dense import dense
from support.devices import ON_CUDA
from support.packs import GRADIENTS, OPERANDS, Pack, Tensors, assert_near, assert_right, by_kernels, by_op
from support.sampled import check_sampled, planted

import hetu
from hetu.backends.attention.contract import BackwardState, new_state
from hetu.backends.attention.family import AttendCall
from hetu.backends.families import family
from hetu.parallel import Mask
from hetu.parallel.mask.segments import take_turns
from hetu.parallel.mask.varlen import varlen_tables

pytestmark = pytest.mark.timeout(900)  # waiting for each other counts too

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Only one test at a time has tens of gigabytes, and leaves none behind."""
    if not torch.cuda.is_available():
        yield
        return
    with Path(tempfile.gettempdir(), "hetu-large-tests.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def large(*values: Any) -> Any:
    """The sizes of a case on CUDA."""
    return pytest.param(*values, "cuda", marks=ON_CUDA)


# 131,072 tokens


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "dtype", "device"),
    [(700, (4, 2), 16, torch.float32, "cpu"), large(131_072, (8, 2), 128, HALF), large(131_071, (2, 2), 64, HALF)],
)
def test_one_document(
    tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, is_causal: bool, device: str
) -> None:
    pack = Pack([tokens], [tokens], heads, head_dim, dtype, is_causal)
    data = planted(pack, device)
    _, got = by_op(pack, data, "triton" if device == "cuda" else "torch")
    check_sampled(pack, data, got, [0])


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "dtype", "device"),
    [
        (900, (3, 1), 8, torch.float32, "cpu"),
        large(131_072, (8, 2), 128, HALF),
        large(131_072, (7, 1), 72, torch.float16),
        large(131_072, (4, 2), 64, torch.float32),
    ],
)
def test_pack(
    tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, is_causal: bool, device: str
) -> None:
    """Lengths that are log-uniform up to a quarter of the total, zeros and ones among them."""
    rng, lens = np.random.default_rng(heads[0]), [0, 1, tokens // 4 - 1, 0]
    while (left := tokens - sum(lens)) > 0:
        lens.append(min(int(np.exp(rng.uniform(0, np.log(tokens / 4)))), left))
    pack = Pack(lens, lens, heads, head_dim, dtype, is_causal)
    data = planted(pack, device)
    _, got = by_op(pack, data, "triton" if device == "cuda" else "torch")
    check_sampled(pack, data, got, [1, 2, 4, len(lens) // 2, len(lens) - 1])


@pytest.mark.parametrize(("split", "method"), [("sym", "ring"), ("normal", "direct"), ("stripe", "all_gather")])
@pytest.mark.parametrize(
    ("lens", "heads", "head_dim", "dtype", "device"),
    [
        ([200, 0, 123, 77], (4, 2), 16, torch.float32, "cpu"),
        large([32_768, 50_001, 1, 48_302], (8, 2), 128, HALF),
    ],
)
def test_one_document_over_pipelines(
    lens: list[int], heads: tuple[int, int], head_dim: int, dtype: torch.dtype, split: str, method: str, device: str
) -> None:
    tokens, (num_q, num_kv) = sum(lens), heads
    pack = Pack([tokens], [tokens], heads, head_dim, dtype)
    data = planted(pack, device)
    whole = torch.cat([data[name] for name in ("q", "k", "v")], 1).flatten(1)
    with hetu.graph("define_and_run", device=device) as g:
        qkv = hetu.placeholder(dtype, [hetu.IntSymbol("rows"), whole.shape[1]])
        out, lse, _ = hetu.parallel_attn(
            qkv, head_dim, num_q // num_kv, [lens], [[0] * len(lens)], split=split, method=method
        )  # fmt: skip
        weights = [hetu.placeholder(dtype, out.shape), hetu.placeholder(hetu.float32, lse.shape)]
        grad = hetu.gradients([out, lse], qkv, weights)
    layout = g.layout(0)
    dlse = [x.T.unsqueeze(0).contiguous() for x in layout.scatter(data["dlse"][0].T.contiguous())]
    shards = [layout.scatter(whole), layout.scatter(data["dout"].flatten(1)), dlse]
    feeds = {fed: hetu.Shards(parts) for fed, parts in zip((qkv, *weights), shards, strict=True)}
    with hetu.config(backend="triton" if device == "cuda" else "torch"):
        results = g.run([out, lse, grad], feed_dict=feeds)
    by_row = [results[0], [x[0].T for x in results[1]], results[2]]
    got_out, got_lse, got_grad = (layout.gather(list(x)) for x in by_row)
    grads = got_grad.unflatten(1, (-1, head_dim)).split([num_q, num_kv, num_kv], 1)
    got = {"out": got_out.unflatten(1, (-1, head_dim)), "lse": got_lse.T.unsqueeze(0)}
    check_sampled(pack, data, got | dict(zip(GRADIENTS, grads, strict=True)), [0])


@pytest.mark.parametrize(("tokens", "device"), [(5, "cpu"), large(131_072)])
def test_documents_of_one_token(tokens: int, device: str) -> None:
    """As many documents as tokens: the most programs that a number of tokens can ask for."""
    pack = Pack([1] * tokens, [1] * tokens, (6, 2), 64, HALF)
    generator = torch.Generator(device).manual_seed(0)
    data = {
        name: torch.randn(pack.shape(name), generator=generator, device=device, dtype=torch.float32).to(HALF)
        for name in OPERANDS
    }
    _, got = by_op(pack, data, "triton")
    q, k, v, dout = (data[name].double() for name in OPERANDS)
    torch.testing.assert_close(got["out"].double(), v.repeat_interleave(3, 1), atol=0, rtol=0)
    scores = (q * k.repeat_interleave(3, 1)).sum(-1, keepdim=True) / 8
    torch.testing.assert_close(got["lse"].transpose(1, 2).double(), scores.transpose(1, 2), atol=1e-4, rtol=1e-5)
    assert_near(got["dv"], dout.unflatten(1, (2, 3)).sum(2), False, "dv: {}")
    for name in ("dq", "dk"):
        assert_near(got[name], torch.zeros_like(got[name], dtype=torch.float64), False, f"{name}: {{}}")


# Offsets past 2**31 elements


def only(pack: Pack, documents: list[int], device: str) -> Tensors:
    """Operands of which only these documents are not NaN."""
    generator = torch.Generator(device).manual_seed(0)
    data = {name: torch.full(pack.shape(name), torch.nan, dtype=pack.dtype, device=device) for name in OPERANDS}
    for name, x in data.items():
        for document in documents:
            x[pack.rows(name, document)].normal_(generator=generator)
    return data


@pytest.mark.parametrize(
    ("documents", "length", "heads", "head_dim", "device"), [(6, 5, (6, 2), 8, "cpu"), large(256, 512, (132, 11), 128)]
)
def test_far_queries(documents: int, length: int, heads: tuple[int, int], head_dim: int, device: str) -> None:
    """q, out and their gradients of 2.2 * 10**9 elements: the first document, the one at 2**31, and the last."""
    pack = Pack([length] * documents, [length] * documents, heads, head_dim, HALF)
    place = 2**31 // (heads[0] * head_dim * length)
    chosen = sorted({0, min(place, documents - 2), documents - 1})
    data = only(pack, chosen, device)
    _, got = by_op(pack, data, "triton")
    assert device == "cpu" or got["out"].numel() > 2**31
    assert_right(pack, data, got, chosen)


@pytest.mark.parametrize(
    ("documents", "length", "heads", "head_dim", "device"), [(6, 5, (4, 2), 8, "cpu"), large(260, 512, (96, 16), 128)]
)
def test_far_keys(documents: int, length: int, heads: tuple[int, int], head_dim: int, device: str) -> None:
    """Keys and values, and their gradients, as views of a qkv of 2.2 * 10**9 elements."""
    lens, (num_q, num_kv) = [length] * documents, heads
    pack = Pack(lens, lens, heads, head_dim, HALF)
    chosen = [0, documents - 2, documents - 1]
    width = (num_q + 2 * num_kv) * head_dim
    generator = torch.Generator(device).manual_seed(0)
    fed = [torch.full((sum(lens), w), torch.nan, dtype=HALF, device=device) for w in (width, num_q * head_dim)]
    for x in fed:
        for document in chosen:
            x[pack.rows("q", document)].normal_(generator=generator)
    assert device == "cpu" or fed[0].numel() > 2**31
    with hetu.graph("define_and_run", device=device) as g:
        qkv, dout = (hetu.placeholder(HALF, x.shape) for x in fed)
        cu_seqlens = hetu.constant(pack.cu_seqlens[0].astype(np.int32))
        out, lse, _ = hetu.parallel_attn(qkv, head_dim, num_q // num_kv, [[sum(lens)]], [[0]], True, cu_seqlens)
        grad = hetu.gradients(out, qkv, dout)
    with hetu.config(backend="triton"):
        results = g.run([out, lse, grad], feed_dict={qkv: fed[0], dout: fed[1]})

    def heads_of(x: torch.Tensor) -> list[torch.Tensor]:
        return list(x.unflatten(1, (-1, head_dim)).split([num_q, num_kv, num_kv], 1))

    data = dict(zip(OPERANDS, [*heads_of(fed[0]), fed[1].unflatten(1, (-1, head_dim))], strict=True))
    got = dict(zip(GRADIENTS, heads_of(results[2]), strict=True)) | {"out": results[0].unflatten(1, (-1, head_dim))}
    # parallel_attn has one slot for all documents; the check wants one each.
    got["lse"] = results[1][0].unflatten(1, (documents, length)).transpose(0, 1)
    assert_right(pack, data, got, chosen)


@pytest.mark.parametrize(
    ("rows", "heads", "head_dim", "device"), [(90, (6, 2), 8, "cpu"), large(131_072, (132, 11), 128)]
)
def test_far_accumulators(rows: int, heads: tuple[int, int], head_dim: int, device: str) -> None:
    """What several steps add up in float32: the output, and the gradient of q. Only the last rows see any key."""
    seeing, keys = 40, 33
    shape, kernels = (rows, heads[0], head_dim), family("triton")
    generator = torch.Generator(device).manual_seed(0)
    q = torch.full(shape, torch.nan, dtype=HALF, device=device)
    q[-seeing:].normal_(generator=generator)
    pairs = [[torch.empty(keys, heads[1], head_dim, dtype=HALF, device=device) for _ in range(2)] for _ in range(3)]
    for x in (x for pair in pairs for x in pair):
        x.normal_(generator=generator)
    spans, table = varlen_tables(np.array([0, rows - seeing, rows]), np.array([0, 0, keys]), rows, Mask.full())
    turns = take_turns(spans, [table] * 3)
    state = new_state(q, spans, 2, rows - seeing, runs_on=True)
    assert state.acc is not None and (device == "cpu" or state.acc.numel() > 2**31)
    state.acc.fill_(torch.nan)
    for turn, (k, v) in zip(turns, pairs, strict=True):
        kernels.attend(AttendCall(q, k, v, spans, table, 0.1, turn), state)
    assert not state.out[:-seeing].any() and (state.lse[0] == -torch.inf).all()
    leaves = [q[-seeing:], torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs])]
    leaves = [x.double().requires_grad_() for x in leaves]
    out, lse, _ = dense(*leaves, is_causal=False, scale=0.1)
    assert_near(state.out[-seeing:], out.detach(), True, "out: {}")
    torch.testing.assert_close(state.lse[1, :, :seeing].double(), lse.detach(), atol=1e-4, rtol=1e-5)

    delta = torch.full((rows, heads[0]), torch.nan, device=device)
    delta[-seeing:] = (q[-seeing:].float() * state.out[-seeing:].float()).sum(-1)
    lse_of_forward = state.lse
    state.acc = None
    del state
    dq = torch.full(shape, torch.nan, device=device)
    backward = BackwardState(q, lse_of_forward, delta, dq, dq)  # dout is q: one such tensor is enough
    dkv = [[torch.full_like(x, torch.nan, dtype=torch.float32) for x in pair] for pair in pairs]
    for turn, (k, v), (dk, dv) in zip(turns, pairs, dkv, strict=True):
        kernels.attend_backward(AttendCall(q, k, v, spans, table, 0.1, turn), backward, dk, dv)
    wants = torch.autograd.grad((out * leaves[0].detach()).sum(), leaves)
    gots = [dq[-seeing:], torch.cat([dk for dk, _ in dkv]), torch.cat([dv for _, dv in dkv])]
    for name, got, want in zip(GRADIENTS, gots, wants, strict=True):
        assert_near(got.to(HALF), want, False, f"{name}: {{}}")
    assert not dq[:-seeing].any()


@pytest.mark.parametrize(
    ("documents", "heads", "max_seqlen", "device"), [(9, (4, 2), 64, "cpu"), large(1_100, (16, 2), 131_072)]
)
def test_far_lse(documents: int, heads: tuple[int, int], max_seqlen: int, device: str) -> None:
    """2.3 * 10**9 elements of lse, most of them of nobody: ``max_seqlen`` may be larger than any document."""
    lens = [1 + document % 3 for document in range(documents)]
    pack = Pack(lens, lens, heads, 64, HALF)
    data = {name: x for name, x in pack.data(device=device).items() if name != "dlse"}
    _, got = by_op(pack, data, "triton", max_seqlen=max_seqlen)
    assert device == "cpu" or got["lse"].numel() > 2**31
    assert_right(pack, data, got, [0, 1, documents - 2, documents - 1])


@pytest.mark.parametrize(("tokens", "heads", "device"), [(150, (2, 1), "cpu"), large(16_300, (9, 3))])
def test_far_softmax(tokens: int, heads: tuple[int, int], device: str) -> None:
    """2.4 * 10**9 scores and probabilities."""
    pack = Pack([tokens], [tokens], heads, 16, HALF)
    data = {name: x for name, x in pack.data(device=device).items() if name != "dlse"}
    _, got = by_op(pack, data, "triton", return_softmax=True)
    p = got["p"]
    assert device == "cpu" or p.numel() > 2**31
    for head in (0, heads[0] - 1):
        key_head = head // (heads[0] // heads[1])
        one = [data["q"][-70:, head, None], *(data[name][:, key_head, None] for name in ("k", "v"))]
        want = dense(*one, is_causal=True)[2][0]
        assert_near(p[0, head, tokens - 70 : tokens, :tokens], want, True, f"p of head {head}: {{}}")
        assert not p[0, head, :, tokens:].any() and not p[0, head, tokens:].any()


@pytest.mark.parametrize("stretched", ["rows", "heads", "one row", "one head"])
@pytest.mark.parametrize(("far", "device"), [(2**20, "cpu"), large(2**31 + 2**20)])
def test_far_strides(far: int, stretched: str, device: str) -> None:
    """Few rows and heads over a buffer of more than 2**31 elements, by their strides; a single stride may be that."""
    lens_q, lens_k = {"one row": ([1, 1], [1, 1]), "rows": ([60, 0, 5], [60, 1, 4])}.get(stretched, ([20], [30]))
    pack = Pack(lens_q, lens_k, {"heads": (3, 3), "one head": (2, 2)}.get(stretched, (2, 1)), 64, HALF)
    data = pack.data()
    by_rows = "row" in stretched
    counts = [pack.shape(name)[0 if by_rows else 1] for name in OPERANDS]
    # The last head, or the first row of the last document, lies past 2**31; no tile by itself is so large.
    stride = -(-far // (sum(lens_q[:-1]) if by_rows else min(counts) - 1) // 8) * 8
    size = stride * (max(counts) - 1) + 2**13
    operands, gradients = (torch.full((size,), fill, dtype=HALF, device=device) for fill in (torch.nan, 7.0))
    views, into = dict(data), {}
    for place, name in enumerate((*OPERANDS, *GRADIENTS)):
        buffer = operands if name in OPERANDS else gradients
        strides = (stride, 64, 1) if by_rows else (64, stride, 1)
        view = buffer.as_strided(pack.shape(name), strides, 2**11 * (place % 4))  # side by side, each below 2**11 wide
        if name in OPERANDS:
            views[name] = view.copy_(data[name])
        else:
            into[name] = view.fill_(torch.nan)
    got = by_kernels(pack, views, "triton", device, into)
    assert_right(pack, data, got)
    written = sum(x.numel() for x in into.values())
    assert int(torch.count_nonzero(gradients != 7.0)) == written, "something beside the gradients was written"
