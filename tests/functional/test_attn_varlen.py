"""hetu.functional.attn_varlen against float64, and against the graph's op bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import CUDA, DEVICES
from support.functional_calls import BACKENDS, DTYPES, LENGTHS, by_function, by_row, cumulative
from support.longer import LONGER
from support.packs import OPERANDS, Pack, assert_right, by_op, heads_of
from torch.utils.checkpoint import checkpoint

import hetu
from hetu.backends.attention.dropout import Dropout, dropout_key
from hetu.backends.families import family
from hetu.functional import attn_varlen


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_definition(backend: str, dtype: torch.dtype, device: str) -> None:
    for is_causal in (False, True):
        pack = Pack(*LENGTHS[device], (6, 2), 40, dtype, is_causal, tail=3)
        data = pack.data(device=device)
        assert_right(pack, data, by_function(pack, data, backend))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 128, 256])
def test_any_head_dim(head_dim: int, dtype: torch.dtype, device: str) -> None:
    pack = Pack(*LENGTHS[device], heads_of(head_dim), head_dim, dtype, tail=3)
    data = pack.data(device=device)
    assert_right(pack, data, by_function(pack, data, "triton"))


packs = st.builds(
    lambda pairs, **options: Pack([a for a, _ in pairs], [b for _, b in pairs], **options),
    pairs=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    is_causal=st.booleans(),
    tail=st.integers(0, 3),
)


@pytest.mark.usefixtures("poisoned")
@given(pack=packs, has_dlse=st.booleans())
def test_random_lengths(pack: Pack, has_dlse: bool) -> None:
    data = pack.data()
    if not has_dlse:
        del data["dlse"]
    assert_right(pack, data, by_function(pack, data))


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=15 * LONGER)
@given(pack=packs, p=st.sampled_from([0.0, 0.3]))
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_graph_bit_for_bit(backend: str, pack: Pack, p: float) -> None:
    """Forward and backward, with the dropout of a graph whose generator had the same seed."""
    data = pack.data()
    hetu.manual_seed(11)
    _, want = by_op(pack, data, backend, p_dropout=p)
    got = by_function(pack, data, backend, dropout_p=p, seed=11)
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend: str, device: str) -> None:
    lens = [17, 0, 5] if device == "cpu" else [300, 0, 1, 65, 129]
    pack = Pack(lens, lens, (2, 1), 64, dropout=Dropout(0.3, dropout_key(5, 0, 0)))
    data = pack.data(device=device)
    assert_right(pack, data, by_function(pack, data, backend, dropout_p=0.3, seed=5))


def test_offset_of_the_generator() -> None:
    """The op takes any state that a graph's op may have returned."""
    pack = Pack([9, 4], [9, 4], dropout=Dropout(0.4, dropout_key(7, 3, 0)))
    data = pack.data()
    cu = cumulative([9, 4])
    out, _ = torch.ops.hetu.attn_varlen(
        data["q"], data["k"], data["v"], cu, cu, torch.tensor([7, 3]), None, None, True, 0.4, None
    )
    hetu.manual_seed(7)
    hetu.rng.take(3)
    _, want = by_op(pack, data, "torch", p_dropout=0.4)
    assert torch.equal(out, want["out"])


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.3, -1])
def test_softmax_scale(scale: float) -> None:
    pack = Pack([6, 3], [6, 5], head_dim=16)
    data = pack.data()
    scaled = dict(data, k=data["k"] * scale * 4)  # 4 = sqrt(16), which the default divides by
    torch.testing.assert_close(by_function(pack, data, softmax_scale=scale)["out"], by_function(pack, scaled)["out"])


def test_zero_sequences() -> None:
    q = torch.randn(3, 2, 8)
    for rows in (0, 3):
        out, lse = attn_varlen(q[:rows], q, q, cumulative([]), cumulative([]), return_lse=True)
        assert out.shape == (rows, 2, 8) and (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    pack = Pack([5, 3], [4, 7], (4, 2), 16)
    data = pack.data()
    want = by_function(pack, data, backend)
    qkv = torch.randn(11, 8, 16)
    qkv[:8, :4], qkv[:, 4:6], qkv[:, 6:] = data["q"], data["k"], data["v"]
    packed = dict(data, q=qkv[:8, :4], k=qkv[:, 4:6], v=qkv[:, 6:])
    by_heads = {name: data[name].transpose(0, 1).contiguous().transpose(0, 1) for name in OPERANDS}
    by_columns = {name: data[name].mT.contiguous().mT for name in OPERANDS}  # has to be copied
    for given_ in (packed, data | by_heads, data | by_columns):
        got = by_function(pack, given_, backend)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_expanded_or_absent(backend: str) -> None:
    pack = Pack([5, 3], [4, 7])
    data = pack.data()
    ones = dict(data, dout=torch.ones(()).expand(pack.shape("q")), dlse=torch.zeros_like(data["dlse"]))
    assert_right(pack, ones, by_function(pack, ones, backend))
    q = data["q"].requires_grad_()
    cu_q, cu_k = cumulative([5, 3]), cumulative([4, 7])
    with hetu.config(backend=backend):
        _, lse = attn_varlen(q, data["k"], data["v"], cu_q, cu_k, is_causal=True, return_lse=True)
        weight = by_row(pack, data["dlse"])
        (only_lse,) = torch.autograd.grad(lse, q, weight)
    want = by_function(pack, dict(data, dout=torch.zeros(pack.shape("q"))), backend)["dq"]
    assert torch.equal(only_lse, want)


def test_the_backward_runs_where_the_forward_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA it runs in a thread of autograd's, which doesn't know of ``hetu.config``."""
    q, cu = torch.randn(5, 1, 8, requires_grad=True), cumulative([5])
    with hetu.config(backend="triton"):
        out = attn_varlen(q, q, q, cu, cu)
    seen: list[str] = []
    for name in BACKENDS:
        kernel = family(name).attend_backward
        noting = partial(lambda name, kernel, *call: seen.append(name) or kernel(*call), name, kernel)
        monkeypatch.setattr(family(name), "attend_backward", noting)
    out.sum().backward()
    assert seen == ["triton"]


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_one_input_needs_a_gradient(name: str) -> None:
    pack = Pack([5, 3], [4, 7])
    data = pack.data()
    want = by_function(pack, data)[f"d{name}"]
    data[name].requires_grad_()
    out, lse = attn_varlen(
        *(data[x] for x in "qkv"), cumulative([5, 3]), cumulative([4, 7]), is_causal=True, return_lse=True
    )
    grads = torch.autograd.grad([out, lse], data[name], [data["dout"], by_row(pack, data["dlse"])])
    assert torch.equal(grads[0], want)


# dropout's generator


def test_manual_seed_fixes_dropout() -> None:
    q, cu = torch.randn(30, 2, 8), cumulative([30])

    def draw() -> torch.Tensor:
        return attn_varlen(q, q, q, cu, cu, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first) and not torch.equal(first, second)
    before = torch.get_rng_state()
    assert torch.equal(
        attn_varlen(q, q, q, cu, cu, dropout_p=0.5, seed=3), attn_varlen(q, q, q, cu, cu, dropout_p=0.5, seed=3)
    )
    attn_varlen(q, q, q, cu, cu)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn that nobody needs


def test_checkpointing_replays_dropout() -> None:
    q, cu = torch.randn(30, 2, 8, requires_grad=True), cumulative([30])

    def attend(x: torch.Tensor) -> torch.Tensor:
        return attn_varlen(x, x, x, cu, cu, dropout_p=0.5)

    grads = []
    for run in (attend, lambda x: checkpoint(attend, x, use_reentrant=False)):
        torch.manual_seed(0)
        grads += torch.autograd.grad(run(q).square().sum(), q)
    assert torch.equal(*grads)


# autocast


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str, device: str) -> None:
    """The inputs are cast, and nothing inside: as without autocast, bit for bit, in the backward too."""
    pack = Pack([9, 4], [9, 4], (2, 1), 64, torch.bfloat16)
    data = pack.data(device=device)
    want = by_function(pack, data, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert all(torch.equal(x, want[name]) for name, x in by_function(pack, data, backend).items())
        wide = dict(data, q=data["q"].float(), k=data["k"].float(), v=data["v"].float())
        got = by_function(pack, wide, backend)
        assert got["out"].dtype == torch.bfloat16 and got["dq"].dtype == torch.float32
        assert all(torch.equal(x.to(want[name].dtype), want[name]) for name, x in got.items())
        double = [data[name].double() for name in "qkv"]
        assert attn_varlen(*double, *[cumulative([9, 4])] * 2).dtype == torch.float64
