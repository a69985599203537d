"""hetu.integrations.flash_attn against float64, and as a replacement of the import of flash_attn."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.devices import DEVICES
from support.functional_calls import cumulative
from torch._dynamo.testing import CompileCounterWithBackend

import hetu
from hetu.integrations import flash_attn
from hetu.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

# What they are called with

OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "flash_attn_func": (["q", "k", "v"], OPTIONS),
    "flash_attn_kvpacked_func": (["q", "kv"], OPTIONS),
    "flash_attn_qkvpacked_func": (["qkv"], OPTIONS),
    "flash_attn_varlen_func": (["q", "k", "v", *LENGTHS], OPTIONS | {"block_table": None}),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *LENGTHS], OPTIONS),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], OPTIONS),
}
"""Those of flash_attn 2.8, in order."""


def test_signatures() -> None:
    assert set(flash_attn.__all__) == set(SIGNATURES)
    for name, (required, options) in SIGNATURES.items():
        parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
        assert [x.name for x in parameters] == [*required, *options], name
        assert all(x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for x in parameters)
        assert {x.name: x.default for x in parameters if x.default is not x.empty} == options, name


# What they give

LENS_Q, LENS_K = [3, 0, 7, 1], [5, 2, 4, 0]
DIMS = [(16, 16), (20, 20), (24, 16), (10, 6), (8, 12), (1, 1)]
"""head_dim of q and k, and of v: a whole one, padded, MLA's, both, wider values."""

CASES = [
    *[("torch", torch.float64, dims) for dims in DIMS],
    *[("torch", torch.float32, (20, 20)), ("torch", torch.bfloat16, (24, 16))],
    *[("triton", torch.float32, (24, 16)), ("triton", torch.float32, (8, 12)), ("triton", torch.bfloat16, (20, 20))],
]
"""Few by Triton, which is slow where it is interpreted."""


def definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence ``(n, heads, head_dim)`` in float64: out, and lse ``(heads, n)``."""
    (n, heads, dim), (m, heads_k, _) = q.shape, k.shape
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // heads_k, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (1 / math.sqrt(dim) if scale is None else scale)
    if causal:
        hidden = torch.arange(m, device=q.device) > torch.arange(n, device=q.device)[:, None] + m - n
        scores = scores.masked_fill(hidden, -torch.inf)
    sees = (scores > -torch.inf).any(-1, keepdim=True) if m else torch.zeros(heads, n, 1, dtype=bool, device=q.device)
    weights = torch.where(sees, scores, 0.0).softmax(-1) * sees
    return torch.einsum("hij,jhd->ihd", weights, v), scores.logsumexp(-1)


def packed(lens: list[int], heads: int, dim: int, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lens), heads, dim, generator=generator).to(device, dtype).requires_grad_()


def check(got: Any, want: Any, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Compares outputs, and gradients by the same weights."""
    atol = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.06}[dtype]
    seen = want[1] > -torch.inf
    weights = [torch.randn_like(x.detach().double()) for x in want]
    grads = []
    for outputs in (got, want):
        total = (outputs[0].double() * weights[0]).sum() + (outputs[1].double() * weights[1])[seen].sum()
        grads.append(torch.autograd.grad(total, inputs, retain_graph=True))
    for mine, right in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        assert mine.shape == right.shape
        torch.testing.assert_close(mine.double(), right.double(), atol=atol, rtol=atol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("backend", "dtype", "dims"), CASES, ids=str)
def test_varlen(backend: str, dtype: torch.dtype, dims: tuple[int, int], causal: bool, device: str) -> None:
    dim, dim_v = dims
    q = packed(LENS_Q, 4, dim, dtype, device, 0)
    k, v = packed(LENS_K, 2, dim, dtype, device, 1), packed(LENS_K, 2, dim_v, dtype, device, 2)
    scale = None if causal else 0.3
    cu_q, cu_k = cumulative(LENS_Q).to(device), cumulative(LENS_K).to(device)
    with hetu.config(backend=backend):
        out, lse, s_dmask = flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, 7, 5, 0.0, scale, causal, return_attn_probs=True, deterministic=True
        )
        alone = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max(LENS_Q), max(LENS_K), 0.0, scale, causal)
        assert torch.equal(alone, out) and out.dtype == dtype and s_dmask.shape == (0,) and s_dmask.dtype == dtype
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        parts = [
            definition(q[slice(*a)], k[slice(*b)], v[slice(*b)], causal, scale)
            for a, b in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
        ]
        want = torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts], 1)
        check((out, lse), want, [q, k, v], dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlens", [(6, 6), (3, 6), (6, 3), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(batch: int, seqlens: tuple[int, int], causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, seqlens[0], 4, 12), (batch, seqlens[1], 2, 12), (batch, seqlens[1], 2, 8)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    out, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    assert out.shape == (batch, seqlens[0], 4, 8) and lse.shape == (batch, 4, seqlens[0]) and lse.is_contiguous()
    assert torch.equal(flash_attn_func(q, k, v, 0.0, None, causal), out)
    if batch:
        parts = [definition(*one, causal, None) for one in zip(q, k, v, strict=True)]
        want = torch.stack([x for x, _ in parts]), torch.stack([x for _, x in parts])
        check((out, lse), want, [q, k, v], torch.float64)


def test_the_causal_mask_is_aligned_to_the_bottom_right() -> None:
    """A query may see the keys of the triangle that ends at the last key: weights of equal scores are uniform."""
    v = torch.eye(8).view(1, 8, 1, 8)
    for n, m in ((2, 5), (5, 2)):
        out = flash_attn_func(torch.zeros(1, n, 1, 8), torch.zeros(1, m, 1, 8), v[:, :m], causal=True)
        want = torch.ones(n, m).tril(m - n)
        assert torch.allclose(out[0, :, 0, :m], want / want.sum(-1, keepdim=True).clamp(min=1))


def test_packed_ones_are_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 5, 3, 2, 12, generator=generator).requires_grad_()
    q, k, v = qkv.unbind(2)
    options: dict[str, Any] = {"softmax_scale": 0.2, "causal": True, "return_attn_probs": True}
    want = flash_attn_func(q, k, v, **options)
    cu = cumulative([4, 6])
    flat, flat_want = qkv.flatten(0, 1), flash_attn_varlen_func(*qkv.flatten(0, 1).unbind(1), cu, cu, 6, 6, **options)
    for got, right in (
        (flash_attn_qkvpacked_func(qkv, **options), want),
        (flash_attn_kvpacked_func(q, qkv[:, :, 1:], **options), want),
        (flash_attn_varlen_qkvpacked_func(flat, cu, 6, **options), flat_want),
        (flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 6, 6, **options), flat_want),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
        grads = [torch.autograd.grad(x[0].sin().sum(), qkv, retain_graph=True)[0] for x in (got, right)]
        assert torch.equal(*grads)


def test_dropout_is_drawn_from_torchs_generator() -> None:
    q = torch.randn(2, 6, 2, 12)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(flash_attn_func(q, q, q, 0.5))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_compiles_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return out, lse, flash_attn_varlen_func(*flat, cu, cu, None, None, softmax_scale=0.4)

    compiled = torch.compile(both, backend=counter, fullgraph=True, dynamic=True)
    for batch, n in ((7, 5), (3, 6)):
        generator = torch.Generator().manual_seed(n)
        q, k = (torch.randn(batch, n, heads, 20, generator=generator).requires_grad_() for heads in (4, 2))
        v = torch.randn(batch, n, 2, 12, generator=generator).requires_grad_()
        results = []
        for run in (compiled, both):
            outputs = run(q, k, v, cumulative([batch * n - 3, 3]))
            results.append((*outputs, *torch.autograd.grad([x.sin().sum() for x in outputs], (q, k, v))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count <= 2  # forward and backward, which some versions of torch count


# What they refuse

Q, CU = torch.zeros(2, 4, 2, 16), cumulative([4, 4])


MISSING: list[tuple[dict[str, Any], str]] = [
    ({"window_size": (128, -2)}, "expected window_size[1] to be an int of at least -1"),
    ({"window_size": (128,)}, "expected window_size to be (left, right)"),
    ({"window_size": None}, "expected window_size to be"),
    ({"softcap": -1.0}, "expected softcap to be a finite number of at least 0"),
    ({"softcap": "no"}, "expected softcap to be a finite number"),
    ({"alibi_slopes": torch.ones(2)}, "alibi_slopes are given"),
    ({"deterministic": 1}, "expected deterministic to be a bool"),
    ({"return_attn_probs": 1}, "expected return_attn_probs to be a bool"),
    ({"causal": "yes"}, "expected causal to be a bool"),
    ({"return_attn_probs": True, "dropout_p": 0.1}, "return_attn_probs asks for S_dmask under dropout"),
    ({"dropout_p": 1.5}, "dropout_p"),
    ({"softmax_scale": "big"}, "expected softmax_scale to be a finite number"),
]


@pytest.mark.parametrize(("options", "message"), MISSING, ids=[message for _, message in MISSING])
def test_options_that_are_not_there(options: dict[str, Any], message: str) -> None:
    flat = Q.flatten(0, 1)
    for function, arguments in (
        (flash_attn_func, (Q, Q, Q)),
        (flash_attn_kvpacked_func, (Q, torch.stack([Q, Q], -3))),
        (flash_attn_qkvpacked_func, (torch.stack([Q, Q, Q], -3),)),
        (flash_attn_varlen_func, (flat, flat, flat, CU, CU, 4, 4)),
        (flash_attn_varlen_kvpacked_func, (flat, torch.stack([flat, flat], -3), CU, CU, 4, 4)),
        (flash_attn_varlen_qkvpacked_func, (torch.stack([flat, flat, flat], -3), CU, 4)),
    ):
        with pytest.raises(hetu.HetuError) as caught:
            function(*arguments, **options)
        text = str(caught.value)
        assert message in text and "where:  test_flash_attn.py" in text and "fix: " in text


UNFIT: list[tuple[Any, tuple[Any, ...], str]] = [
    (flash_attn_func, (Q[0], Q, Q), "q has 3 dimensions [4, 2, 16], expected 4"),
    (flash_attn_func, (Q, [1.0], Q), "k must be a tensor, got [1.0]"),
    (flash_attn_func, (Q, Q[:1], Q[:1]), "q, k and v are [2, 4, 2, 16], [1, 4, 2, 16] and"),
    (flash_attn_func, (Q, Q, Q[:, :3]), "q, k and v are "),
    (flash_attn_func, (Q, Q[..., :8], Q), "q and k have head_dim 16 and 8"),
    (flash_attn_func, (*[torch.zeros(1, 2, 1, 264)] * 3,), "the heads of q and v have 264 and 264 entries"),
    (flash_attn_func, (Q, Q, torch.zeros(2, 4, 2, 300)), "the heads of q and v have 16 and 300 entries"),
    (flash_attn_func, (Q.int(), Q.int(), Q.int()), "q is int32"),
    (flash_attn_func, (Q, Q.half(), Q), "q, k and v are float32, float16 and float32"),
    (flash_attn_kvpacked_func, (Q, torch.stack([Q] * 3, -3)), "kv is [2, 4, 3, 2, 16], expected (batch, seqlen, 2"),
    (flash_attn_qkvpacked_func, (Q,), "qkv has 4 dimensions [2, 4, 2, 16], expected 5"),
    (flash_attn_varlen_func, (*[Q] * 3, CU, CU, 4, 4), "q has 4 dimensions"),
    (flash_attn_varlen_func, (*[Q[0]] * 3, CU, CU, 4, 4), "cu_seqlens_q ends at 8, but q has 4 rows"),
    (flash_attn_varlen_func, (*[Q[0]] * 3, CU[:2], CU[:2], 3, 4), "max_seqlen_q is 3, but sequence 0"),
    (flash_attn_varlen_func, (*[Q[0]] * 3, CU[:2], CU[:2], 4, 4, *OPTIONS.values(), CU), "block_table is given"),
    (flash_attn_varlen_qkvpacked_func, (torch.stack([Q[0]] * 3, -3), [0, 4], 4), "cu_seqlens_q must be a tensor"),
]


@pytest.mark.parametrize(("function", "arguments", "message"), UNFIT, ids=[message for *_, message in UNFIT])
def test_tensors_that_do_not_fit(function: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(hetu.HetuError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert message in text and "where:  test_flash_attn.py" in text and "fix: " in text


# As a replacement

SCRIPT = """
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func


class Attention(torch.nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads, self.qkv, self.out = heads, torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

    def forward(self, x, cu_seqlens=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if cu_seqlens is None:
            return self.out(flash_attn_func(q, k, v, dropout_p=0.0, causal=True).flatten(-2))
        longest = int(cu_seqlens.diff().max())
        lengths = (cu_seqlens, cu_seqlens, longest, longest)
        out = flash_attn_varlen_func(q, k, v, *lengths, causal=True, window_size=(-1, -1))
        return self.out(out.flatten(-2))


torch.manual_seed(0)
model, x = Attention(), torch.randn(2, 6, 32)
padded = model(x)
flat = model(x.flatten(0, 1), torch.tensor([0, 6, 12], dtype=torch.int32))
(padded.sum() + flat.sum()).backward()
q, k, v = model.qkv(x).unflatten(-1, (3, 4, -1)).unbind(-3)
want = torch.nn.functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)
want = model.out(want.transpose(1, 2).flatten(-2))
assert torch.allclose(padded, want, atol=1e-5) and torch.allclose(flat.view_as(want), want, atol=1e-5)
assert model.qkv.weight.grad.abs().sum() > 0
print("as it was")
"""


def test_a_file_runs_with_one_line_changed(tmp_path: Path) -> None:
    old, new = "from flash_attn import", "from hetu.integrations.flash_attn import"
    assert SCRIPT.count(old) == 1
    path = tmp_path / "train.py"
    path.write_text(SCRIPT.replace(old, new))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)
    assert done.stdout == "as it was\n", done.stderr


def test_nothing_else_imports_it_and_it_imports_no_flash_attn() -> None:
    text = (
        "import sys, hetu, hetu.functional; hetu.functional.attn_varlen; print('hetu.integrations' in sys.modules); "
        "import hetu.integrations.flash_attn; print('flash_attn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
