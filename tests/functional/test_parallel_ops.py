"""``parallel_attn`` and ContextParallel on one process: what PyTorch does to ops, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import hetu
from hetu.functional import ContextParallel, attn_varlen, parallel_attn, sharding
from hetu.parallel import Mask

LENGTHS = torch.tensor([0, 5, 5, 12])


def operands(dtype: torch.dtype = torch.float64, rows: int = 12, requires_grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 4, 16), (rows, 2, 16), (rows, 2, 16)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(requires_grad) for s in shapes]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_one_process_computes_what_attn_varlen_does(backend: str, is_causal: bool) -> None:
    cp, data = ContextParallel(LENGTHS), operands(torch.float32, requires_grad=True)
    with hetu.config(backend=backend):
        found = parallel_attn(*data, cp, is_causal=is_causal, return_lse=True)
        want = attn_varlen(*data, LENGTHS, LENGTHS, is_causal=is_causal, return_lse=True)
    weights = [torch.randn_like(x) for x in found]
    grads, wanted = (torch.autograd.grad(x, data, weights) for x in (found, want))
    for a, b in zip((*found, *grads), (*want, *wanted), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool, p: float) -> None:
    cp = ContextParallel(LENGTHS)
    state = torch.tensor([7, 0]) if p else None
    call = (cp.table, state, cp.split, cp.group_name, cp.method, True, p, None)
    data = operands(requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.hetu.parallel_attn.default, (*data, *call))
    plain = [x.detach() for x in data]
    out, lse = torch.ops.hetu.parallel_attn(*plain, *call)
    for dlse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), dlse, *plain, out, lse, *call)
        torch.library.opcheck(torch.ops.hetu.parallel_attn_backward.default, arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mask", [Mask.window(2, 1), Mask.prefix([3, 0, 2])], ids=repr)
def test_one_process_computes_what_attn_varlen_does_under_a_mask(backend: str, mask: Mask) -> None:
    cp, data = ContextParallel(LENGTHS), operands(torch.float32, requires_grad=True)
    data.append(torch.linspace(-1, 1, 4, requires_grad=True))
    options: dict[str, Any] = {"mask": mask, "softcap": 2.0, "return_lse": True}
    with hetu.config(backend=backend):
        found = parallel_attn(*data[:3], cp, sinks=data[3], **options)
        want = attn_varlen(*data[:3], LENGTHS, LENGTHS, sinks=data[3], **options)
    weights = [torch.randn_like(x) for x in found]
    grads, wanted = (torch.autograd.grad(x, data, weights) for x in (found, want))
    for a, b in zip((*found, *grads), (*want, *wanted), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_masks_and_sinks(requires_grad: bool) -> None:
    cp, code = ContextParallel(LENGTHS), torch.from_numpy(Mask.prefix([3, 0, 2]).code)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=requires_grad)
    call = (cp.table, None, cp.split, cp.group_name, cp.method, True, 0.0, None, -1, -1, code, 2.0, sinks)
    data = operands(requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.hetu.parallel_attn.default, (*data, *call))
    plain, call = [x.detach() for x in data], (*call[:-1], sinks.detach())
    out, lse = torch.ops.hetu.parallel_attn(*plain, *call)
    arguments = (torch.randn_like(out), torch.randn_like(lse), *plain, out, lse, *call)
    torch.library.opcheck(torch.ops.hetu.parallel_attn_backward.default, arguments)


def test_checkpointing_and_inference_mode_under_a_mask() -> None:
    cp, mask, (q, k, v) = ContextParallel(LENGTHS), Mask.chunked(3), operands(requires_grad=True)
    with torch.inference_mode():
        want = parallel_attn(q, k, v, cp, mask=mask)
    found = checkpoint(lambda *x: parallel_attn(*x, cp, mask=mask), q, k, v, use_reentrant=False)
    found.sum().backward()
    assert torch.equal(found, want) and q.grad is not None


def test_masks_that_change_at_each_step_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "_MOST_CALLS", 3)
    cp, (q, k, v) = ContextParallel(torch.tensor([0, 3, 12])), operands()
    cu = torch.tensor([0, 3, 12])
    for n in (1, 2, 3, 4, 5, 1):
        mask = Mask.prefix([0, n])
        assert torch.equal(parallel_attn(q, k, v, cp, mask=mask), attn_varlen(q, k, v, cu, cu, mask=mask))
        assert len(cp.sharding._calls) <= 3


def test_plans_of_masks() -> None:
    cp = ContextParallel(LENGTHS, mask=Mask.window(1, 0))
    assert cp.plan(4, 2, 16, window_size=(3, 5)).mask == Mask.window(3, 0)
    assert cp.plan(4, 2, 16, mask=Mask.chunked(3)).mask == Mask.chunked(3)
    assert cp.plan(4, 2, 16).mask is cp.plan(4, 2, 16, mask=Mask.causal()).mask
    with pytest.raises(hetu.HetuError, match="which has symbols"):
        ContextParallel(LENGTHS, mask=Mask.chunked(hetu.IntSymbol("size")))


@pytest.mark.parametrize("op", ["dispatch", "undispatch"])
@pytest.mark.parametrize("dim", [0, 1])
def test_opcheck_of_cutting_and_joining(op: str, dim: int) -> None:
    cp = ContextParallel(LENGTHS)
    x = torch.randn((12, 3) if dim == 0 else (3, 12), requires_grad=True)
    arguments = (x, cp.position_ids, cp.table, cp.split, cp.group_name, dim)
    torch.library.opcheck(getattr(torch.ops.hetu, op).default, arguments)


def test_what_is_made_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        cp = ContextParallel(LENGTHS)
        parallel_attn(*operands(), cp)
    data = operands(requires_grad=True)
    parallel_attn(*data, cp).sum().backward()
    embedding = torch.nn.Embedding(12, 4)
    cp.dispatch(embedding(cp.position_ids)).sum().backward()
    assert all(x.grad is not None for x in (*data, embedding.weight))


def test_autocast() -> None:
    cp, data = ContextParallel(LENGTHS), operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = parallel_attn(*data, cp)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, parallel_attn(*(x.bfloat16() for x in data), cp))


def test_batched_gradients() -> None:
    cp, data = ContextParallel(LENGTHS), operands(requires_grad=True)
    out = parallel_attn(*data, cp)
    weights = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, data, weights, is_grads_batched=True, retain_graph=True)
    for i, weight in enumerate(weights):
        for a, b in zip(batched, torch.autograd.grad(out, data, weight, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


def test_forward_mode_and_second_derivatives_are_refused() -> None:
    cp, (q, k, v) = ContextParallel(LENGTHS), operands(requires_grad=True)
    with forward_ad.dual_level(), pytest.raises(hetu.HetuError, match="parallel_attn has no forward-mode"):
        parallel_attn(forward_ad.make_dual(q.detach(), torch.ones_like(q)), k, v, cp)
    (dq,) = torch.autograd.grad(parallel_attn(q, k, v, cp).square().sum(), q, create_graph=True)
    with pytest.raises(hetu.HetuError, match="gradients of parallel_attn have no derivative"):
        dq.sum().backward()


def test_a_value_that_a_user_changes_is_the_user_s_own() -> None:
    cp = ContextParallel(LENGTHS)
    cp.position_ids.zero_()
    assert ContextParallel(LENGTHS).position_ids.tolist() == [*range(5), *range(7)]


def test_plans_are_shared_and_proven_on_request() -> None:
    one, other = ContextParallel(LENGTHS), ContextParallel(LENGTHS)
    assert one.plan(4, 2, 16) is other.plan(4, 2, 16)
    plan = ContextParallel(torch.tensor([0, 13]), method="ring").plan(8, 8, 8)
    assert "proven" not in plan.memo
    with hetu.config(verify_plans=True):
        assert ContextParallel(torch.tensor([0, 13]), method="ring").plan(8, 8, 8) is plan
    assert plan.memo["proven"]
    assert "13 tokens" in str(ContextParallel(torch.tensor([0, 13])))


def test_labels_and_means() -> None:
    cp = ContextParallel(LENGTHS)
    ids = torch.arange(24).view(2, 12)
    labels = cp.next_tokens(ids, dim=1, ignore_index=-1)
    assert labels[0].tolist() == [1, 2, 3, 4, -1, 6, 7, 8, 9, 10, 11, -1]
    loss = torch.tensor(6.0, requires_grad=True)
    mean = cp.token_mean(loss, labels, ignore_index=-1)
    mean.backward()
    assert mean.item() == pytest.approx(6 / 20) and loss.grad is not None and loss.grad.item() == pytest.approx(1 / 20)
    assert cp.token_mean(torch.zeros(()), torch.full((3,), -100)).isnan()


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rows of q": (
        {"q": torch.zeros(11, 4, 16, dtype=torch.float64)},
        hetu.ShapeError,
        "q has 11 rows, but rank 0 of the group holds 12",
    ),
    "dtypes": ({"v": torch.zeros(12, 2, 16, dtype=torch.float32)}, hetu.DTypeError, "expected one dtype"),
    "no tensor": ({"k": np.zeros((12, 2, 16))}, hetu.DTypeError, "k must be a tensor"),
    "no context": ({"cp": LENGTHS}, hetu.HetuError, "cp to be a ContextParallel"),
    "scale of flash_attn 1": ({"softmax_scale": float("nan")}, hetu.HetuError, "give None for 1/sqrt"),
    "window": ({"window_size": (128, 0, 1)}, hetu.HetuError, "window_size"),
    "softcap": ({"softcap": -30.0}, hetu.HetuError, "softcap"),
    "sinks": ({"sinks": torch.zeros(3)}, hetu.ShapeError, r"sinks has shape \[3\], expected \[4\]"),
    "mask": ({"mask": "sliding"}, hetu.HetuError, "mask"),
    "mask and window": ({"mask": Mask.full(), "window_size": (1, 0)}, hetu.HetuError, "mask and window_size were both"),
    "prefixes": ({"mask": Mask.prefix([1])}, hetu.BindingError, "prefixes of 1 documents, but there are 3"),
    "slices": ({"mask": Mask.slices([(0, 13)], [(0, 2)], ["full"])}, hetu.BindingError, "reach to position 13"),
    "dropout": ({"dropout_p": 1.0}, hetu.HetuError, "a probability"),
    "flag": ({"is_causal": "no"}, hetu.HetuError, "is_causal to be a bool"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_calls_that_are_refused(what: str) -> None:
    changes, kind, text = REFUSED[what]
    q, k, v = operands()
    with pytest.raises(kind, match=text) as caught:
        parallel_attn(**{"q": q, "k": k, "v": v, "cp": ContextParallel(LENGTHS), **changes})
    assert "test_parallel_ops.py" in str(caught.value) and "fix:" in str(caught.value)


CONTEXTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not cumulative": ({"cu_seqlens": torch.tensor([0, 5, 3])}, hetu.BindingError, "decreases from 5 to 3"),
    "floats": ({"cu_seqlens": torch.tensor([0.0, 5.0])}, hetu.DTypeError, "int32 or int64"),
    "nothing": ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, hetu.ShapeError, r"shape \(B \+ 1,\)"),
    "pieces": ({"cu_seqlens": torch.zeros(2, 3, dtype=torch.int64)}, hetu.ShapeError, r"\(1, B \+ 1\) for 1 ranks"),
    "meta": ({"cu_seqlens": LENGTHS.to("meta")}, hetu.DTypeError, "dense tensor of real numbers"),
    "split": ({"split": "zigzag"}, hetu.StrategyError, "use one of normal, sym"),
    "method": ({"method": "p2p"}, hetu.StrategyError, "use one of auto, ring"),
    "too few tokens": ({"tokens": [11]}, hetu.BindingError, "11"),
    "ranks": ({"tokens": [6, 6]}, hetu.ShapeError, "one per rank"),
    "group": ({"group": 3}, hetu.HetuError, "a process group or a 1-D DeviceMesh"),
}


@pytest.mark.parametrize("what", CONTEXTS)
def test_contexts_that_are_refused(what: str) -> None:
    changes, kind, text = CONTEXTS[what]
    with pytest.raises(kind, match=text) as caught:
        ContextParallel(**{"cu_seqlens": LENGTHS, **changes})
    assert "test_parallel_ops.py" in str(caught.value)


@pytest.mark.parametrize("method", ["dispatch", "undispatch", "next_tokens"])
def test_rows_that_are_refused(method: str) -> None:
    cp = ContextParallel(LENGTHS)
    for x, dim, text in (
        (torch.zeros(11), 0, "has 11 entries along dim 0 of"),
        (torch.zeros(12), 1, "expected dim to be an int from -1 to 0"),
        (torch.zeros(()), 0, "a tensor with a dim of tokens"),
        ([0] * 12, 0, "must be a tensor"),
    ):
        with pytest.raises(hetu.HetuError, match=text):
            getattr(cp, method)(x, dim)
