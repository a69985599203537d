"""Eager graphs: each op gives what a run gives, when it is built; what means something in later runs is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.graph import GoodSample, registry

SAMPLES = [
    pytest.param(sample, id=f"{name}-{i}")
    for name, definition in registry().items()
    for i, sample in enumerate(definition.samples()[0][:2])
    if name not in {"placeholder", "parameter"}
]


def as_list(built: Any) -> list[hetu.Tensor]:
    return list(built) if isinstance(built, (list, tuple)) else [built]


def with_gradients(sample: GoodSample, inputs: list[hetu.Tensor]) -> list[hetu.Tensor]:
    outputs = as_list(sample.build(*inputs))
    floating = [item for item in outputs if item.dtype.is_floating and not item.on_cpu]
    sources = [item for item in inputs if item.dtype.is_floating]
    try:
        return outputs + (hetu.gradients(floating, sources) if floating and sources else [])
    except hetu.HetuError:  # it has no rule
        return outputs


@pytest.mark.parametrize("sample", SAMPLES)
def test_an_op_and_its_gradient_give_what_a_run_gives(sample: GoodSample) -> None:
    hetu.manual_seed(3)
    with hetu.graph("define_and_run", device="cpu") as g, hetu.config(backend="torch"):
        inputs = [hetu.placeholder(feed.dtype, list(feed.shape)) for feed in sample.feeds]
        outputs = with_gradients(sample, inputs)
        expected = g.run(outputs, dict(zip(inputs, sample.feeds, strict=True)))
    hetu.manual_seed(3)
    with hetu.graph("eager", device="cpu") as e, hetu.config(backend="torch"):
        got = with_gradients(sample, [hetu.constant(feed) for feed in sample.feeds])
    e.verify()
    assert len(got) == len(expected)
    for tensor, wanted in zip(got, expected, strict=True):
        assert tensor.shape == tuple(wanted.shape)
        torch.testing.assert_close(e.eager[tensor], wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_values_can_be_read_and_decided_on() -> None:
    with hetu.graph("eager", device="cpu"):
        x = hetu.constant([[1.0, -2.0], [3.0, 4.0]])
        assert x.numpy().tolist() == [[1.0, -2.0], [3.0, 4.0]]
        assert np.asarray(x[0], "float64").dtype == np.float64
        assert x.sum().item() == 6.0
        if x.max() > 3:
            x = x.clamp(max=3)
        assert [row.sum().item() for row in x] == [-1.0, 6.0]
        x.numpy()[0] = 7  # a copy
        assert x[0, 0].item() == 1.0
        assert x.bfloat16().numpy().dtype == np.float32
        assert repr(x.sum()).endswith("float32[], tensor(5.))")
        with pytest.raises(hetu.HetuError, match="expected one element"):
            x.item()


def test_parameters_begin_as_in_any_graph_and_modules_work() -> None:
    values = np.random.default_rng(0).standard_normal((5, 8)).astype("float32")

    def build(x: hetu.Tensor) -> list[hetu.Tensor]:
        block = hetu.nn.SwiGLU(8, 16, name="mlp")
        y = hetu.nn.RMSNorm(8, name="norm")(block(x))
        return [y, *hetu.gradients(hetu.sum(y * y), [x, *block.parameters()])]

    hetu.manual_seed(5)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [5, 8])
        expected = g.run(build(x), {x: values})
    hetu.manual_seed(5)
    with hetu.graph("eager", device="cpu"):
        for tensor, wanted in zip(build(hetu.constant(values)), expected, strict=True):
            np.testing.assert_allclose(tensor.numpy(), wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_each_use_of_a_random_op_draws_anew() -> None:
    with hetu.graph("eager", device="cpu"):
        x = hetu.full([100], 1.0)
        one, other = hetu.dropout(x, 0.5), hetu.dropout(x, 0.5)
        assert one.numpy().tolist() != other.numpy().tolist()
        dx = hetu.gradients(one, x)
        assert dx.numpy().tolist() == one.numpy().tolist(), "the backward drops what the forward dropped"


def test_blocks_around_ops_mean_what_they_can() -> None:
    with hetu.graph("eager", device="cpu"):
        x = hetu.constant([1.0, 2.0])
        with hetu.recompute():
            y = hetu.exp(hetu.tanh(x))
        assert hetu.gradients(y, x).shape == (2,)
        with hetu.autocast("bfloat16"):
            assert hetu.matmul(x, x).dtype == hetu.bfloat16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda g, x: hetu.placeholder("float32", [2]), "no later run that feeds a placeholder"),
        (lambda g, x: hetu.optim.SGD(lr=0.1).minimize(hetu.sum(x * hetu.parameter(1.0, [2]))), "minimize needs runs"),
        (lambda g, x: g.run(x), "has run each op when it was built"),
        (lambda g, x: g.state_dict(), "has run each op when it was built"),
        (lambda g, x: g.load_parameters({}), "has run each op when it was built"),
        (lambda g, x: hetu.embedding(hetu.constant([9]), hetu.constant([[1.0]])), "expected 0 to below 1"),
        (lambda g, x: hetu.full([hetu.IntSymbol("s")], 1.0), "no value for s"),
        (lambda g, x: x + hetu.constant([1.0, 2.0, 3.0]), "2 and 3 differ"),
        (lambda g, x: hetu.op(lambda t: t[:1], [2])(x), "as promised"),
        (lambda g, x: hetu.graph("eager", num_strategy=2), "runs on one pipeline"),
        (lambda g, x: hetu.graph("lazy"), "kind to be"),
    ],
)
def test_what_is_refused(wrong: Callable[[hetu.Graph, hetu.Tensor], Any], message: str) -> None:
    with hetu.graph("eager", device="cpu") as g:
        x = hetu.constant([1.0, 2.0])
        with pytest.raises(hetu.HetuError, match=message) as caught:
            wrong(g, x)
        assert "test_eager.py" in str(caught.value)
        assert (x + 1).numpy().tolist() == [2.0, 3.0], "the graph goes on"
    g.verify()


def test_attention_with_symbols_of_its_own() -> None:
    """What ops find out for themselves, the longest document, is known to what is built from them."""
    rng = np.random.default_rng(0)
    values, cu = rng.standard_normal((6, 24)).astype("float32"), np.array([0, 2, 6], np.int32)
    with hetu.graph("define_and_run", device="cpu") as g:
        qkv, cu_seqlens = hetu.placeholder("float32", [6, 24]), hetu.placeholder("int32", [3])
        q, k, v = hetu.split(qkv, 8, 1)
        out, lse, _, _ = hetu.attn_varlen(q, k, v, 8, cu_seqlens, cu_seqlens, is_causal=True)
        expected = g.run([out, lse, hetu.gradients(out * out, qkv)], {qkv: values, cu_seqlens: cu})
    with hetu.graph("eager", device="cpu") as e:
        qkv, cu_seqlens = hetu.constant(values), hetu.constant(cu)
        q, k, v = hetu.split(qkv, 8, 1)
        out, lse, _, _ = hetu.attn_varlen(q, k, v, 8, cu_seqlens, cu_seqlens, is_causal=True)
        grad = hetu.gradients(out * out, qkv)
        both = hetu.parallel_attn(qkv, 8, 1, [[6]], [[0]], True, cu_seqlens)[0]
    e.verify()
    assert lse.shape == (2, 1, 4)
    for tensor, wanted in zip([out, lse, grad], expected, strict=True):
        np.testing.assert_allclose(tensor.numpy(), wanted.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both.numpy(), out.numpy(), rtol=1e-5, atol=1e-6)
