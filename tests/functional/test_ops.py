"""The PyTorch ops under all that PyTorch does to ops: opcheck, fake tensors, modes, transforms, torch.compile."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.devices import CUDA, DEVICES
from support.functional_calls import BACKENDS, Watching, by_function, cumulative, op_arguments
from support.longer import LONGER
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


OPS = (
    *("attn_varlen", "attn_varlen_backward", "parallel_attn", "parallel_attn_backward", "dispatch", "undispatch"),
    "lengths_of_mask",
)


def test_no_op_is_captured_in_cuda_graphs() -> None:
    for module in ("hetu.functional.parallel_ops", "hetu.integrations.transformers.lengths"):
        importlib.import_module(module)
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hetu::")}
    assert names == {f"hetu::{name}" for name in OPS}
    assert all(torch.Tag.cudagraph_unsafe in getattr(torch.ops.hetu, name).default.tags for name in OPS)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("device", [CUDA])
def test_reduced_overhead_follows_the_lengths(device: str, place: str) -> None:
    def layer(x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        return attn_varlen(x * 2, x + 1, x, cu, cu, is_causal=True).sin()

    compiled = torch.compile(layer, mode="reduce-overhead")
    for cut in (3, 3, 3, 9, 1, 9):  # a graph would be captured in the second call, and replayed from the third on
        x, cu = torch.randn(12, 4, 16, device=device), torch.tensor([0, cut, 12], device=place)
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x, cu), layer(x, cu), rtol=1e-5, atol=1e-5)


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
    with pytest.raises(hetu.BindingError, match=r"cu_seqlens_q starts with 1, expected 0\s+where:  test_ops.py"):
        compiled(q, k, v, cu_q + 1, cu_k)  # when it runs
    with pytest.raises(Exception, match="q has a tangent, but attn_varlen has no forward-mode derivative"):
        torch.compile(lambda q: torch.func.jvp(lambda q: attn_varlen(q, k, v, cu_q, cu_k), (q,), (q,)))(q)


# Counts that depend on data


def starts_of(positions: torch.Tensor) -> torch.Tensor:
    """cu_seqlens of packed sequences from the positions of their tokens: as many as there are zeros."""
    return torch.cat([(positions == 0).nonzero().flatten(), torch.tensor([len(positions)])])


COUNTED: dict[str, Callable[..., Any]] = {
    "queries and keys": lambda q, k, p, r: attn_varlen(q, k, k, starts_of(p), starts_of(r), return_lse=True),
    "no end": lambda q, k, p, r: attn_varlen(q, k, k, *[(x == 0).nonzero().flatten() for x in (p, r)]),
    "rows": lambda q, k, p, r: attn_varlen(q[p >= 0], k[r >= 0], k[~(r < 0)], *[torch.tensor([0, 3])] * 2),
    "lengths": lambda q, k, p, r: attn_varlen(
        *(q, k, k),
        *[
            torch.nn.functional.pad((x == 0).cumsum(0).unique_consecutive(return_counts=True)[1].cumsum(0), (1, 0))
            for x in (p, r)
        ],
    ),
    "longest": lambda q, k, p, r: attn_varlen(q, k, k, starts_of(p), starts_of(r), (p.max() + 1).item(), r.max() + 1),
}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(("eager", name) for name in COUNTED if name == "longest" or LONGER > 1),
        *(("aot_eager", name) for name in COUNTED),
    ],
)
def test_counts_may_depend_on_data(backend: str, name: str) -> None:
    data = [torch.randn(5, 4, 16), torch.randn(7, 2, 16)]
    positions = torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    counted = COUNTED[name]
    settings = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    results = []
    with torch._dynamo.config.patch(**settings):
        for run in (torch.compile(counted, backend=backend, fullgraph=True, dynamic=True), counted):
            q, k = (x.clone().requires_grad_() for x in data)
            outputs = run(q, k, *positions)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            grads = torch.autograd.grad([x.square() for x in outputs], (q, k), [torch.ones_like(x) for x in outputs])
            results.append((*outputs, *grads))
    assert all(torch.equal(mine, right) for mine, right in zip(*results, strict=True))


@pytest.mark.usefixtures("fresh")
def test_counts_that_differ_are_refused_when_it_runs() -> None:
    q, positions = torch.randn(5, 2, 16), torch.tensor([0, 1, 0, 1, 2])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(COUNTED["queries and keys"], backend="aot_eager", fullgraph=True, dynamic=True)
        with pytest.raises(
            hetu.ShapeError,
            match=r"cu_seqlens_q and cu_seqlens_k have 3 and 6 entries, expected as many\s+where:  test_ops.py",
        ):
            compiled(q, q, positions, positions * 0)


# Compiled autograd


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("options", "is_compiled"),
    [
        (options, is_compiled)
        for options in ({}, {"dropout_p": 0.3, "seed": 5}, {"max_seqlen_q": 9})
        for is_compiled in (False, True)
        if LONGER > 1 or not options or is_compiled == ("seed" in options)
    ],
    ids=str,
)
def test_compiled_autograd_has_no_graph_break(options: dict[str, Any], is_compiled: bool) -> None:
    def attend(pack: Pack, data: Any) -> Any:
        run = torch.compile(attn_varlen, backend="aot_eager", fullgraph=True) if is_compiled else attn_varlen
        return by_function(pack, data, attend=run, **options)

    counter = CompileCounterWithBackend("aot_eager")
    compiler = torch.compile(backend=counter, fullgraph=True, dynamic=True)
    for lens_q, lens_k in LENGTH_SETS[:3]:
        if max(lens_q) > 9:
            options = {}
        pack = Pack(lens_q, lens_k, (4, 2), tail=2)
        data = pack.data()
        want = attend(pack, data)
        with torch._dynamo.compiled_autograd._enable(compiler):
            got = attend(pack, data)
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert counter.frame_count > 0


@pytest.mark.usefixtures("fresh")
def test_compiled_autograd_of_the_op() -> None:
    q, *rest = op_arguments()
    (want,) = torch.autograd.grad(torch.ops.hetu.attn_varlen(q, *rest)[0].sum(), q)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        torch.ops.hetu.attn_varlen(q, *rest)[0].sum().backward()
    assert torch.equal(q.grad, want)


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
