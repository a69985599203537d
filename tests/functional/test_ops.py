"""The PyTorch ops under all that PyTorch does to ops: opcheck, fake tensors, modes, transforms, torch.compile."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from support.devices import DEVICES
from support.functional_calls import BACKENDS, Watching, by_function, cumulative, op_arguments
from support.packs import Pack
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

import hetu
from hetu.functional import attn_varlen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool, p: float, device: str) -> None:
    torch.library.opcheck(torch.ops.hetu.attn_varlen.default, op_arguments(device, requires_grad, p))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_dlse", [False, True])
def test_opcheck_of_the_backward(has_dlse: bool, device: str) -> None:
    q, k, v, *call = op_arguments(device, requires_grad=False, p=0.2)
    out, lse = torch.ops.hetu.attn_varlen(q, k, v, *call)
    dlse = torch.randn_like(lse) if has_dlse else None
    arguments = (torch.randn_like(out), dlse, q, k, v, out, lse, *call)
    torch.library.opcheck(torch.ops.hetu.attn_varlen_backward.default, arguments)


def test_opcheck_of_strides() -> None:
    """Outputs and gradients are contiguous whatever the inputs are, fake ones too."""
    q, k, v, *call = op_arguments(requires_grad=False)
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    out, lse = torch.ops.hetu.attn_varlen(q, k, v, *call)
    for op, arguments in (
        (torch.ops.hetu.attn_varlen, (q, k, v, *call)),
        (torch.ops.hetu.attn_varlen_backward, (out, None, q, k, v, out, lse, *call)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils="test_faketensor")


class Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_ops_and_change_nothing() -> None:
    pack = Pack([5, 3], [4, 7])
    data = pack.data()
    want = by_function(pack, data)
    with Watching() as mode:
        got = by_function(pack, data)
    assert [name for name in mode.names if "hetu" in name] == ["hetu::attn_varlen", "hetu::attn_varlen_backward"]
    q = data["q"].requires_grad_()
    out = attn_varlen(q, data["k"], data["v"], cumulative([5, 3]), cumulative([4, 7]), is_causal=True)
    with Watching() as mode:  # entered after the forward
        out.sum().backward()
    assert "hetu::attn_varlen_backward" in mode.names
    with Passing():
        also = by_function(pack, data)
    assert all(torch.equal(got[name], want[name]) and torch.equal(also[name], want[name]) for name in want)


def test_fake_and_meta_tensors() -> None:
    q, k, v, cu_q, cu_k, *_ = op_arguments()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v, cu_q, cu_k)]
        out, lse = attn_varlen(*fakes, return_lse=True, dropout_p=0.5)
        (out.sum() + lse.sum()).backward()
    outside = attn_varlen(*fakes, return_lse=True)
    metas = [x.detach().to("meta") for x in (q, k, v, cu_q, cu_k)]
    for got in ((out, lse), outside, attn_varlen(*metas, return_lse=True)):
        assert [(x.shape, x.dtype) for x in got] == [((10, 4, 16), torch.float32), ((4, 10), torch.float32)]
    assert fakes[0].grad is not None and fakes[0].grad.shape == q.shape


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_jit_trace() -> None:
    q, k, v, cu_q, cu_k, *_ = op_arguments(requires_grad=False)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attn_varlen(q, k, v, cu_q, cu_k)

    other = torch.randn_like(q)
    assert torch.equal(torch.jit.trace(attend, (q, k, v))(other, k, v), attend(other, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(backend: str) -> None:
    q, k, v, cu_q, cu_k, *_ = op_arguments(requires_grad=False)
    other = torch.randn_like(q)
    with hetu.config(backend=backend):
        both = torch.func.vmap(lambda q: attn_varlen(q, k, v, cu_q, cu_k))(torch.stack([q, other]))
        assert torch.equal(both[1], attn_varlen(other, k, v, cu_q, cu_k))


def test_is_differentiated_once() -> None:
    q, k, v, cu_q, cu_k, *_ = op_arguments()
    out = attn_varlen(q, k, v, cu_q, cu_k)
    (once,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    assert torch.equal(once, torch.autograd.grad(attn_varlen(q, k, v, cu_q, cu_k).sum(), q)[0])
    with pytest.raises(hetu.HetuError, match="it can't be differentiated twice"):
        once.sum().backward()


def test_inference_mode() -> None:
    q, k, v, cu_q, cu_k, *_ = op_arguments()
    with torch.inference_mode():
        out = attn_varlen(q, k, v, cu_q.clone(), cu_k.clone())
    assert torch.equal(out, attn_varlen(q, k, v, cu_q, cu_k)) and not out.requires_grad


# torch.compile

LENGTH_SETS = [
    ([3, 5], [4, 6]),
    ([7, 2, 9], [1, 8, 20]),
    ([40], [50]),
    ([0, 3, 3, 3], [5, 5, 5, 5]),
    ([11, 13], [17, 19]),
]
"""Other lengths, totals and numbers of sequences."""


def check_compiled(backend: Any, length_sets: Any = tuple(LENGTH_SETS), device: str = "cpu", **options: Any) -> None:
    """Compiled and plain calls in turns, forward and backward: bits are the same."""
    compiled = torch.compile(attn_varlen, backend=backend, fullgraph=True, dynamic=True)
    for lens_q, lens_k in length_sets:
        if "max_seqlen_q" in options:
            options["max_seqlen_q"] = max(lens_q)
        pack = Pack(lens_q, lens_k, (4, 2), tail=2)
        data = pack.data(device=device)
        results = []
        for attend in (compiled, attn_varlen):
            torch.manual_seed(3)
            results.append(by_function(pack, data, default(device), attend, **options))
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def default(device: str) -> str:
    return "triton" if device == "cuda" else "torch"


@pytest.fixture
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [{}, {"max_seqlen_q": 9}, {"dropout_p": 0.3}, {"dropout_p": 0.3, "seed": 5}], ids=str
)
def test_compiles_once_for_all_lengths(options: dict[str, Any], device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    check_compiled(counter, device=device, **options)
    assert counter.frame_count == 2  # forward and backward


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("device", DEVICES)
def test_inductor(device: str) -> None:
    check_compiled("inductor", LENGTH_SETS[:2], device)


@pytest.mark.usefixtures("fresh")
def test_compiled_under_autocast() -> None:
    q, k, v, cu_q, cu_k, *_ = op_arguments()
    compiled = torch.compile(attn_varlen, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(q, k, v, cu_q, cu_k), attn_varlen(q, k, v, cu_q, cu_k))
    assert compiled(q, k, v, cu_q, cu_k).dtype == torch.float32


@pytest.mark.usefixtures("fresh")
def test_errors_when_compiled() -> None:
    q, k, v, cu_q, cu_k, *_ = op_arguments()
    compiled = torch.compile(attn_varlen, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="q, k and v have head_dim 16, 8 and 16, expected the same"):
        compiled(q, k[:, :, :8], v, cu_q, cu_k)  # while it is traced
    with pytest.raises(hetu.BindingError, match="cu_seqlens_q starts with 1, expected 0"):
        compiled(q, k, v, cu_q + 1, cu_k)  # when it runs


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any) -> Any:
            return attn_varlen(q, k, v, cu_q, cu_k, is_causal=True)

    example = tuple(op_arguments(requires_grad=False)[:5])
    n, m, b = (torch.export.Dim(name) for name in "nmb")
    exported = torch.export.export(Model(), example, dynamic_shapes=({0: n}, {0: m}, {0: m}, {0: b}, {0: b}))
    q, k = torch.randn(20, 4, 16), torch.randn(33, 2, 16)
    others = (q, k, k, cumulative([20]), cumulative([33]))
    assert torch.equal(exported.module()(*others), Model()(*others))
