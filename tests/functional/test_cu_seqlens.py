"""How hetu.functional.attn_varlen reads lengths: what is kept by value, and the host copies of those on a device."""

from __future__ import annotations

import gc

import pytest
import torch
from support.devices import CUDA, DEVICES, ON_CUDA
from support.functional_calls import by_function, cumulative
from support.packs import Pack

import hetu
from hetu.cache import LRU
from hetu.functional import attention as functional_attention
from hetu.functional import attn_varlen, varlen


def test_lengths_that_change_in_place_are_read_again() -> None:
    q = torch.randn(8, 1, 8)
    cu = cumulative([5, 3])
    memory = cu.numpy()
    before = attn_varlen(q, q, q, cu, cu)
    memory[1] = 2  # torch counts no version
    torch.testing.assert_close(attn_varlen(q, q, q, cu, cu), attn_varlen(q, q, q, *[cumulative([2, 6])] * 2))
    memory[1] = 5
    assert torch.equal(attn_varlen(q, q, q, cu, cu), before)


def test_plans_keep_no_memory_of_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(8, 1, 8)
    cu, same = (cumulative([3, 2, 3], torch.int64) for _ in range(2))
    monkeypatch.setattr(functional_attention, "lengths_seen", LRU(4))
    attn_varlen(q, q, q, cu, cu)
    cu[1:] = 1
    kept = attn_varlen(q, q, q, same, same, dropout_p=0.5, seed=1)
    monkeypatch.setattr(functional_attention, "lengths_seen", LRU(4))
    assert torch.equal(kept, attn_varlen(q, q, q, same, same, dropout_p=0.5, seed=1))


def test_int32_and_int64_lengths_of_the_same_bytes() -> None:
    q = torch.randn(5, 1, 8)
    wide, narrow = (attn_varlen(q, q, q, *[cumulative([1, 4], dtype)] * 2) for dtype in (torch.int64, torch.int32))
    assert torch.equal(wide, narrow)
    with pytest.raises(hetu.BindingError, match="cu_seqlens_q decreases from 1 to 0"):
        attn_varlen(q, q, q, *[torch.tensor([0, 0, 1, 0, 5, 0], dtype=torch.int32)] * 2)


def test_seen_lengths_over_fewer_rows_are_refused() -> None:
    q, k = torch.randn(5, 1, 8), torch.randn(9, 1, 8)
    cu_q, cu_k = cumulative([5]), cumulative([9])
    attn_varlen(q, k, k, cu_q, cu_k)
    with pytest.raises(hetu.BindingError, match="cu_seqlens_k ends at 9, but k has 8 rows"):
        attn_varlen(q, k[:8], k[:8], cu_q, cu_k)
    with pytest.raises(hetu.BindingError, match="cu_seqlens_q ends at 5, but q has 4 rows"):
        attn_varlen(q[:4], k, k, cu_q, cu_k)


def test_seen_lengths_are_planned_once() -> None:
    q = torch.randn(12, 2, 8)
    attn_varlen(q, q, q, cumulative([5, 7]), cumulative([5, 7]))
    misses = functional_attention.lengths_seen.stats().misses
    for dtype in (torch.float32, torch.float64):
        x = q.to(dtype).requires_grad_()
        attn_varlen(x, x, x, cumulative([5, 7]), cumulative([5, 7])).sum().backward()
    assert functional_attention.lengths_seen.stats().misses == misses


# cu_seqlens on a device


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What ``Tensor.cpu`` was called on; it copies in any case, as from a device."""
    seen: list[torch.Tensor] = []

    def cpu(self: torch.Tensor) -> torch.Tensor:
        seen.append(self.detach().clone())
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    return seen


def test_device_lengths_are_copied_once_a_version(copies: list[torch.Tensor]) -> None:
    cu, other = cumulative([2, 3]), cumulative([2, 3])
    assert varlen._on_host(cu) is varlen._on_host(cu) and len(copies) == 1
    assert varlen._on_host(other) is not varlen._on_host(cu) and len(copies) == 2
    cu[1] = 1
    assert varlen._on_host(cu).tolist() == [0, 1, 5] and len(copies) == 3
    cu.data = torch.tensor([0, 4, 5], dtype=torch.int32)  # no new version, other memory
    assert varlen._on_host(cu).tolist() == [0, 4, 5] and len(copies) == 4


def test_host_copies_live_as_long_as_their_tensor(copies: list[torch.Tensor]) -> None:
    before = len(varlen._host_copies)
    cu = cumulative([2, 3])
    varlen._on_host(cu)
    assert len(varlen._host_copies) == before + 1
    copies.clear()
    del cu
    gc.collect()
    assert len(varlen._host_copies) == before


def test_tensors_without_versions_are_copied_every_time(copies: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        cu = cumulative([2, 3])
        varlen._on_host(cu)
        cu[1] = 1
        assert varlen._on_host(cu).tolist() == [0, 1, 5] and len(copies) == 2


def train(q: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    q = q.clone().requires_grad_()
    attn_varlen(q, q, q, cu, cu, is_causal=True).sum().backward()
    assert q.grad is not None
    return q.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_made_inside", [False, True])
def test_lengths_first_seen_in_inference_mode_can_be_trained_with(is_made_inside: bool, device: str) -> None:
    q, cu = torch.randn(5, 1, 16, device=device), cumulative([2, 3]).to(device)
    with torch.inference_mode():
        cu = cu.clone() if is_made_inside else cu
        attn_varlen(q, q, q, cu, cu, is_causal=True)
    want = train(q, cumulative([2, 3]))
    assert torch.equal(train(q, cu), want)
    x, cu = q.clone().requires_grad_(), cu.cpu()
    torch.ops.hetu.attn_varlen(x, x, x, cu, cu, None, None, None, True, 0.0, None)[0].sum().backward()
    assert torch.equal(x.grad, want)


def test_a_host_copy_that_is_made_in_inference_mode_is_an_ordinary_tensor(copies: list[torch.Tensor]) -> None:
    cu = cumulative([2, 3])
    with torch.inference_mode():
        assert not varlen._on_host(cu).is_inference()
    assert torch.equal(train(torch.ones(5, 1, 16), varlen._on_host(cu)), train(torch.ones(5, 1, 16), cu))
    assert len(copies) == 1


@pytest.mark.parametrize("device", [CUDA])
def test_lengths_on_the_device(device: str) -> None:
    pack = Pack([9, 4], [9, 4], (2, 1), 64, torch.bfloat16)
    data = pack.data(device=device)
    want = by_function(pack, data, "triton")
    cu = cumulative([9, 4]).to(device)
    q, k, v = (data[name] for name in "qkv")
    assert torch.equal(attn_varlen(q, k, v, cu, cu, is_causal=True), want["out"])
    compiled = torch.compile(attn_varlen, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(q, k, v, cu, cu, is_causal=True), want["out"])


@pytest.mark.parametrize("where", [pytest.param(name, marks=ON_CUDA) for name in ("cpu", "cuda")])
def test_nothing_waits_for_the_device(where: str) -> None:
    """Lengths seen before, forward and backward: with cu_seqlens from the host, or copied from the device before."""
    pack = Pack([300, 40], [300, 40], (2, 1), 64, torch.bfloat16)
    data = pack.data(device="cuda")
    q, k, v = (data[name].requires_grad_() for name in "qkv")
    cu = cumulative([300, 40]).to(where)

    def step() -> None:
        attn_varlen(q, k, v, cu, cu, is_causal=True).backward(data["dout"])

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
