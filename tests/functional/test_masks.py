"""Windows, masks, softcaps and sinks of ``hetu.functional.attn_varlen`` against the definition, and under torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support.dense_masks import Packs
from support.functional_calls import BACKENDS, cumulative
from support.masks import random_mask
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import hetu
from hetu.functional import attention, attn_varlen
from hetu.parallel import Mask

LENS_Q, LENS_K = [0, 1, 2, 7, 5], [3, 1, 0, 9, 4]
MASKS = {
    "window": Mask.window(3, 1),
    "chunked": Mask.chunked(4),
    "prefix": Mask.prefix([1, 2, 0, 4, 9]),
    "slices": Mask.slices([(0, 6), (6, 15), (3, 9)], [(0, 4), (2, 13), (13, 17)], ["causal", "bicausal", "full"]),
}


def operands(
    lens_q: list[int], lens_k: list[int], dtype: torch.dtype = torch.float64, seed: int = 0, requires_grad: bool = True
) -> list[torch.Tensor]:
    """q, k and v, and sinks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (sum(lens_q), 4, 16), (sum(lens_k), 2, 16), (sum(lens_k), 2, 16), (4,)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(requires_grad) for s in shapes]


def compare(packs: Packs, has_sinks: bool, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> None:
    """Outputs, log-sum-exps and all gradients against the definition in float64."""
    *qkv, sinks = operands(packs.lens_q, packs.lens_k, dtype, seed)
    cu_q, cu_k = cumulative(packs.lens_q), cumulative(packs.lens_k)
    data = [*qkv, sinks] if has_sinks else qkv
    own = {"softcap": packs.softcap, "sinks": sinks if has_sinks else None, **options}
    found = attn_varlen(*qkv, cu_q, cu_k, return_lse=True, **own)
    exact = [x.detach().double().requires_grad_() for x in data]
    out, lse, _ = packs.attend(*exact)
    has_lse = ~lse.detach().T.isneginf()
    weights = torch.randn_like(out), torch.where(has_lse, torch.randn_like(lse.T), 0.0)
    grads = torch.autograd.grad(found, data, [w.to(x.dtype) for w, x in zip(weights, found, strict=True)])
    total = (out * weights[0]).sum() + torch.where(has_lse, lse.T * weights[1], 0.0).sum()
    wanted = torch.autograd.grad(total, exact)
    tolerance = {torch.float64: 1e-11, torch.float32: 5e-5, torch.bfloat16: 0.1}[dtype]
    for a, b in zip((*found, *grads), (out, lse.T, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    assert [x.dtype for x in grads] == [x.dtype for x in data]


@pytest.mark.parametrize("seed", range(60))
def test_random_masks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lens_q, lens_k = (rng.integers(0, 12, rng.integers(1, 5)).tolist() for _ in range(2))
    lens_k = (lens_k * 4)[: len(lens_q)] if rng.random() < 0.6 else lens_q
    mask = random_mask(rng, lens_q, lens_k)
    softcap = float(rng.choice([0.0, 0.7, 30.0]))
    compare(Packs(lens_q, lens_k, mask, softcap), bool(rng.integers(2)), seed=seed, mask=mask)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.bfloat16), ("triton", torch.float32)])
def test_narrower_types(backend: str, dtype: torch.dtype, kind: str) -> None:
    with hetu.config(backend=backend):
        compare(Packs(LENS_Q, LENS_K, MASKS[kind], 2.0), True, dtype, mask=MASKS[kind])


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [(0, 0), (3, 0), (-1, 2), (2, -1), (4, 1), (30, 30)], ids=str)
def test_windows_are_flash_attentions(window: tuple[int, int], is_causal: bool) -> None:
    """Aligned to the bottom right; ``is_causal`` makes the right bound 0."""
    mask = Mask.window(window[0], 0 if is_causal else window[1])
    compare(Packs(LENS_Q, LENS_K, mask), False, window_size=window, is_causal=is_causal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_short_forms_give_the_same_bits(backend: str) -> None:
    q, k, v, _ = operands(LENS_Q, LENS_K, torch.float32, requires_grad=False)
    call = partial(attn_varlen, q, k, v, cumulative(LENS_Q), cumulative(LENS_K))
    with hetu.config(backend=backend):
        full, causal = call(), call(is_causal=True)
        for same in (call(window_size=(-1, -1), softcap=0), call(mask=Mask.full(), is_causal=True)):
            assert torch.equal(same, full)
        for same in (call(window_size=[-1, 0]), call(mask=Mask.window(-1, 0)), call(mask=Mask.causal())):
            assert torch.equal(same, causal)
        for right in (-1, 0, 1, 5):
            assert torch.equal(call(window_size=(2, right)), call(mask=Mask.window(2, right)))
        assert torch.equal(call(window_size=(np.int32(2), 5), is_causal=True), call(mask=Mask.window(2, 0)))


def test_gradients_by_differences() -> None:
    q, k, v, sinks = operands([3, 2], [4, 2])

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> Any:
        lengths = cumulative([3, 2]), cumulative([4, 2])
        return attn_varlen(q, k, v, *lengths, window_size=(1, 0), softcap=1.5, sinks=sinks, return_lse=True)

    assert torch.autograd.gradcheck(attend, (q, k, v, sinks))


def test_dropout_drops_the_same_under_a_mask() -> None:
    """What is dropped depends on positions alone: a mask only hides more."""
    q, k, _, _ = operands([6], [6], requires_grad=False)
    v = torch.eye(6, 16, dtype=torch.float64)[:, None].expand(6, 2, 16)
    cu = cumulative([6])
    call = partial(attn_varlen, q, k, v, cu, cu, dropout_p=0.5, seed=3)
    full, some = call() != 0, call(mask=Mask.window(2, 1)) != 0
    seen = torch.from_numpy(Mask.window(2, 1).matrix(6, 6))
    assert torch.equal(some[..., :6], full[..., :6] & seen[:, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sinks_have_a_type_of_their_own(dtype: torch.dtype) -> None:
    q, k, v, sinks = operands(LENS_Q, LENS_K, torch.float32)
    own, other = sinks.detach().to(dtype).requires_grad_(), sinks.detach().to(dtype).float().requires_grad_()
    call = partial(attn_varlen, q, k, v, cumulative(LENS_Q), cumulative(LENS_K), is_causal=True)
    out = call(sinks=own)
    assert torch.equal(out, call(sinks=other))
    (grad,), (wanted,) = (torch.autograd.grad(call(sinks=x).sum(), x) for x in (own, other))
    assert grad.dtype == dtype and torch.equal(grad, wanted.to(dtype))


def test_a_row_without_keys_has_its_sink_as_lse() -> None:
    q, k, v, sinks = operands([3], [1], requires_grad=False)
    cu_q, cu_k = cumulative([2]), cumulative([0])  # the third row belongs to no sequence
    out, lse = attn_varlen(q, k, v, cu_q, cu_k, sinks=sinks, return_lse=True)
    assert not out.any() and torch.equal(lse, sinks[:, None].expand(4, 3))


# Under torch


def test_autocast_leaves_sinks_as_they_are() -> None:
    q, k, v, sinks = operands(LENS_Q, LENS_K, torch.float32)
    call = partial(attn_varlen, cu_seqlens_q=cumulative(LENS_Q), cu_seqlens_k=cumulative(LENS_K), sinks=sinks)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(q, k, v)
    assert out.dtype == torch.bfloat16 and torch.equal(out, call(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    (grad,) = torch.autograd.grad(out.sum(), sinks)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_checkpointing(is_reentrant: bool) -> None:
    *qkv, sinks = operands(LENS_Q, LENS_K)
    cu_q, cu_k = cumulative(LENS_Q), cumulative(LENS_K)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> Any:
        return attn_varlen(q, k, v, cu_q, cu_k, mask=MASKS["slices"], softcap=3.0, sinks=sinks).sin().sum()

    found = []
    for run in (partial(checkpoint, attend, use_reentrant=is_reentrant), attend):
        leaves = [x.detach().requires_grad_() for x in (*qkv, sinks)]
        run(*leaves).backward()
        found.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_made_in_inference_mode_can_be_trained_with() -> None:
    *qkv, sinks = operands(LENS_Q, LENS_K)
    lengths = cumulative(LENS_Q), cumulative(LENS_K)
    for mask in MASKS.values():
        with torch.inference_mode():
            want = attn_varlen(*qkv, *lengths, mask=mask, sinks=sinks)
        out = attn_varlen(*qkv, *lengths, mask=mask, sinks=sinks)
        out.sum().backward()
        assert torch.equal(out, want)


def test_batches_of_sinks() -> None:
    q, k, v, _ = operands(LENS_Q, LENS_K, requires_grad=False)
    sinks = torch.randn(3, 4, dtype=torch.float64)
    call = partial(attn_varlen, q, k, v, cumulative(LENS_Q), cumulative(LENS_K), window_size=(2, 0))

    def total(sinks: torch.Tensor) -> torch.Tensor:
        return call(sinks=sinks).sin().sum()

    found = torch.func.vmap(lambda s: call(sinks=s))(sinks)
    assert torch.equal(found, torch.stack([call(sinks=s) for s in sinks]))
    grads = torch.func.vmap(torch.func.grad(total))(sinks)
    assert torch.equal(grads, torch.stack([torch.func.grad(total)(s) for s in sinks]))
    with pytest.raises(hetu.HetuError, match="can't be differentiated twice"):
        torch.func.grad(lambda s: torch.func.grad(total)(s).sum())(sinks[0])


def op_call(kind: str | None, requires_grad: bool) -> tuple[Any, ...]:
    """Arguments of the op: of a mask, or of a window."""
    *qkv, sinks = operands(LENS_Q, LENS_K, torch.float32, requires_grad=requires_grad)
    plain = cumulative(LENS_Q), cumulative(LENS_K), None, None, None, True, 0.0, None
    masking = (3, -1, None) if kind is None else (-1, -1, torch.from_numpy(MASKS[kind].code))
    return *qkv, *plain, *masking, 2.0, sinks.detach().bfloat16().requires_grad_(requires_grad)


@pytest.mark.parametrize("kind", [None, "prefix"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool, kind: str | None) -> None:
    torch.library.opcheck(torch.ops.hetu.attn_varlen.default, op_call(kind, requires_grad))


@pytest.mark.parametrize("kind", [None, "slices"])
def test_opcheck_of_the_backward(kind: str | None) -> None:
    q, k, v, *call = op_call(kind, requires_grad=False)
    out, lse = torch.ops.hetu.attn_varlen(q, k, v, *call)
    arguments = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *call)
    torch.library.opcheck(torch.ops.hetu.attn_varlen_backward.default, arguments)


def steps(kind: str) -> list[dict[str, Any]]:
    """What changes from step to step."""
    if kind == "window":
        return [{"window_size": (w, 0), "is_causal": True} for w in (3, 7, 20, -1)]
    if kind == "window ahead":
        return [{"window_size": (w, w + 3)} for w in (3, 7, 20)]
    kinds = {
        "prefix": [Mask.prefix([2, n]) for n in (3, 9, 5)],
        "slices": [Mask.slices([], [], [])]
        + [Mask.slices([(0, n), (n, 9)], [(0, 5), (1, 9)], ["full", "causal"]) for n in (3, 7)],
        "any": [Mask.window(3, 2), Mask.chunked(5), Mask.prefix(3), Mask.prefix([1, 2]), Mask.causal()],
    }
    return [{"mask": mask} for mask in kinds[kind]]


@pytest.mark.parametrize("kind", ["window", "window ahead", "prefix", "slices", "any"])
def test_compiles_once_for_all_masks_and_lengths(kind: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attn_varlen, backend=counter, fullgraph=True, dynamic=True)
    for number, options in enumerate(steps(kind)):
        lens_q, lens_k = [number, 9 + number], [5 + number, 17 + 2 * number]
        *qkv, sinks = operands(lens_q, lens_k)
        results = []
        for attend in (compiled, attn_varlen):
            out = attend(*qkv, cumulative(lens_q), cumulative(lens_k), softcap=2.0, sinks=sinks, **options)
            results.append((out, *torch.autograd.grad(out.sin().sum(), (*qkv, sinks))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 2  # forward and backward


# What is known, and what is refused


def test_a_mask_that_was_seen_is_not_planned_again() -> None:
    q, k, v, _ = operands([31, 2], [31, 2], requires_grad=False)
    cu, known = cumulative([31, 2]), attention.lengths_seen.stats().misses
    for _ in range(3):
        attn_varlen(q, k, v, cu, cu, mask=Mask.prefix([3, 1]))
        attn_varlen(q, k, v, cu, cu, mask=Mask.prefix([4, 1]))
        attn_varlen(q, k, v, cu, cu, window_size=(5, 5))
    assert attention.lengths_seen.stats().misses == known + 3


SYMBOL = hetu.IntSymbol("w")
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mask": Mask.causal(), "window_size": (3, 0)}, hetu.HetuError, "mask and window_size were both given"),
    ({"mask": Mask.window(SYMBOL, 0)}, hetu.HetuError, r"mask is Mask.window\(.*\), which has symbols"),
    ({"mask": "causal"}, hetu.HetuError, "expected mask to be a hetu.Mask"),
    ({"mask": Mask.prefix([1, 2])}, hetu.BindingError, "prefixes of 2 documents, but there are 5"),
    ({"mask": Mask.slices([(0, 99)], [(0, 3)], ["full"])}, hetu.BindingError, "reach to position 99"),
    ({"window_size": (SYMBOL, 0)}, hetu.HetuError, r"expected window_size\[0\] to be an int"),
    ({"window_size": (3,)}, hetu.HetuError, r"expected window_size to be \(left, right\)"),
    ({"window_size": (3, -2)}, hetu.HetuError, r"expected window_size\[1\] to be an int of at least -1"),
    ({"window_size": (True, 0)}, hetu.HetuError, r"expected window_size\[0\] to be an int"),
    ({"window_size": (1.5, 0)}, hetu.HetuError, r"expected window_size\[0\] to be an int"),
    (
        {"window_size": None},
        hetu.HetuError,
        r"expected window_size to be \(left, right\), got None(.|\n)*how many keys before",
    ),
    (
        {"window_size": 3},
        hetu.HetuError,
        r"expected window_size to be \(left, right\), got 3(.|\n)*how many keys before",
    ),
    ({"softcap": -1.0}, hetu.HetuError, "expected softcap to be a finite number of at least 0"),
    ({"softcap": float("inf")}, hetu.HetuError, "expected softcap to be a finite number"),
    ({"softcap": 1e-300}, hetu.HetuError, "that float32 holds, got 1e-300"),
    ({"softcap": 1e39}, hetu.HetuError, r"that float32 holds, got 1e\+39"),
    ({"sinks": 3.0}, hetu.DTypeError, "sinks must be a tensor"),
    ({"sinks": torch.ones(4, dtype=torch.int64)}, hetu.DTypeError, "sinks is int64, expected a floating-point type"),
    ({"sinks": torch.ones(2)}, hetu.ShapeError, r"sinks has shape \[2\], expected \[4\]"),
    ({"sinks": torch.ones(4, 1)}, hetu.ShapeError, r"sinks has shape \[4, 1\], expected \[4\]"),
    ({"sinks": torch.ones(4, device="meta")}, hetu.HetuError, "sinks is on meta, and q on cpu"),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refusals(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    q, k, v, _ = operands(LENS_Q, LENS_K, torch.float32, requires_grad=False)
    for _ in range(2):  # also after a call that was right
        with pytest.raises(kind, match=message) as caught:
            attn_varlen(q, k, v, cumulative(LENS_Q), cumulative(LENS_K), **options)
        assert "where:  test_masks.py" in str(caught.value)
        attn_varlen(q, k, v, cumulative(LENS_Q), cumulative(LENS_K), sinks=torch.ones(4))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_op_refuses_windows_and_caps_that_are_none(device: str) -> None:
    x, cu = torch.ones(4, 2, 8, device=device), cumulative([4])
    wrong = [(-2, 0, 0.0, "left bound is -2"), (0, -5, 0.0, "right bound is -5"), (0, 0, -1.0, "got -1.0")]
    for left, right, softcap, message in [*wrong, (0, 0, float("nan"), "got nan")]:
        call = (cu, cu, None, None, None, False, 0.0, None, left, right, None, softcap, None)
        with pytest.raises(hetu.HetuError, match=message):
            torch.ops.hetu.attn_varlen(x, x, x, *call)


@pytest.mark.parametrize(
    ("options", "message"), [({"window_size": (-2, 0)}, "left bound is -2"), ({"softcap": -1.0}, "got -1.0")]
)
def test_a_trace_says_what_is_refused(options: dict[str, Any], message: str) -> None:
    x, cu = torch.ones(4, 2, 8), cumulative([4])
    with pytest.raises(Exception, match=message):
        torch.compile(lambda x: attn_varlen(x, x, x, cu, cu, **options), backend="eager", fullgraph=True)(x)


def test_an_op_refuses_what_no_mask_has_as_code() -> None:
    for code in ([], [9, 0, 0], [0, 0, 1, 5], [2, 1, 2, 1, 3, 4], [3, 1, 4, 7, 0, 1, 0, 1], [0, 0, 2, -5, 0]):
        q, k, v, *call = op_call("window", requires_grad=False)
        call[10] = torch.tensor(code, dtype=torch.int64)
        with pytest.raises(hetu.HetuError, match=r"\[mask\]"):
            torch.ops.hetu.attn_varlen(q, k, v, *call)
