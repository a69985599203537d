"""The kernel of ``swiglu`` against float64: both directions, all shapes, and huge values."""

from __future__ import annotations

import pytest
import torch
from support.devices import WHERE_KERNELS_RUN as DEVICE
from torch.nn import functional

import hetu
from hetu.backends.lower.lowering import find_lowering
from hetu.backends.triton import swiglu


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written is NaN."""

    def full(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(swiglu, "empty", full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1), (3, 1), (5, 7), (2, 3, 64), (3, 1024), (2, 1500), (9, 130)])
def test_it_is_what_float64_gives(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *outer, half = shape
    torch.manual_seed(0)
    gate_up = (3 * torch.randn(*outer, 2 * half)).to(DEVICE, dtype)
    grad = torch.randn(*outer, half).to(DEVICE, dtype)
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    out = functional.silu(gate) * up
    out.backward(grad.double())
    tolerance = torch.finfo(dtype).eps
    for got, wanted in ((swiglu.swiglu(gate_up), out.detach()), (swiglu.swiglu(gate_up, grad), exact.grad)):
        assert got.dtype == dtype and wanted is not None
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=1e-6)


def test_a_gradient_may_be_strided() -> None:
    gate_up, grads = (torch.randn(4, 12, device=DEVICE).bfloat16() for _ in range(2))
    strided = grads[:, ::2]
    assert torch.equal(swiglu.swiglu(gate_up, strided), swiglu.swiglu(gate_up, strided.contiguous()))


def test_huge_gates_saturate() -> None:
    gate_up = torch.tensor([[1e4, -1e4, torch.inf, -3e38, 2.0, 2.0, 2.0, 2.0]], device=DEVICE).bfloat16()
    ones = torch.ones(1, 4, device=DEVICE).bfloat16()
    assert swiglu.swiglu(gate_up).tolist() == (functional.silu(gate_up[:, :4].float()) * 2).bfloat16().tolist()
    assert swiglu.swiglu(gate_up, ones)[0, :2].tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("dtype", "is_joined", "is_static", "device", "is_taken"),
    [
        ("bfloat16", True, True, "cuda", True),
        ("float16", True, True, "cuda", True),
        ("float32", True, True, "cuda", False),
        ("bfloat16", False, True, "cuda", False),
        ("bfloat16", True, False, "cuda", False),
        ("bfloat16", True, True, "cpu", False),
    ],
)
def test_who_computes_what(dtype: str, is_joined: bool, is_static: bool, device: str, is_taken: bool) -> None:
    with hetu.graph("define_and_run"):
        shape = [hetu.IntSymbol("n"), 8 if is_static else 2 * hetu.IntSymbol("m")]
        x, other = (hetu.placeholder(dtype, shape, name=name) for name in ("x", "other"))
        out = hetu.swiglu(x) if is_joined else hetu.swiglu(x, other)
        (grad,) = hetu.gradients([hetu.sum(out)], [x])
    for tensor in (out, grad):
        found = find_lowering(tensor.op, "torch", torch.device(device))
        assert (found.declines is not None) == is_taken
