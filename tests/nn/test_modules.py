"""hetu.nn: the results of PyTorch's modules of the same state dict, their initial values, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import hetu


class LlamaMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.norm = nn.RMSNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = LlamaMLP(16, 24)
        self.head = nn.Linear(16, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        normed = self.norm(x)[None]
        mask = nn.Transformer.generate_square_subsequent_mask(len(ids))
        x = x + self.attn(normed, normed, normed, attn_mask=mask, is_causal=True, need_weights=False)[0][0]
        return self.head(x + self.mlp(self.norm(x)))


class HetuLayer(hetu.nn.Module):
    def __init__(self) -> None:
        self.embed = hetu.nn.Embedding(11, 16, name="embed")
        self.norm = hetu.nn.RMSNorm(16, name="norm")
        self.attn = hetu.nn.Attention(16, 2, name="attn")
        self.mlp = hetu.nn.SwiGLU(16, 24, name="mlp")
        self.head = hetu.nn.Linear(16, 11, name="head")

    def __call__(self, ids: hetu.Tensor) -> hetu.Tensor:
        x = self.embed(ids)
        x = x + self.attn(self.norm(x))
        return self.head(x + self.mlp(self.norm(x)))


@pytest.mark.parametrize("strategy", [0, 1])
def test_a_state_dict_maps_by_name_and_gives_the_same(strategy: int) -> None:
    torch.manual_seed(0)
    module, ids = Layer(), torch.tensor([3, 1, 4, 1, 5, 9, 2])
    lists = [hetu.Strategy([7], [0]), hetu.Strategy([3, 4], [0, 0])]
    with hetu.graph("define_and_run", strategies=lists, device="cpu") as g:
        tokens = hetu.placeholder("int64", [hetu.IntSymbol("rows")], name="ids")
        layer = HetuLayer()
        logits = layer(tokens)
    assert [item.name for item in layer.parameters()] == list(module.state_dict())
    g.load_parameters(module.state_dict())
    layout = g.layout(strategy)
    found = g.run(logits, {"ids": hetu.Shards(layout.scatter(ids))}, strategy=strategy)
    whole = found if strategy == 0 else layout.gather(found)
    torch.testing.assert_close(whole, module(ids).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "like"),
    [
        (lambda: hetu.nn.Linear(64, 256), lambda: nn.Linear(64, 256)),
        (lambda: hetu.nn.Embedding(128, 64), lambda: nn.Embedding(128, 64)),
        (lambda: hetu.nn.RMSNorm(8), lambda: nn.RMSNorm(8)),
        (lambda: hetu.nn.SwiGLU(64, 128), lambda: LlamaMLP(64, 128)),
        (lambda: hetu.nn.Attention(64, 4), lambda: nn.MultiheadAttention(64, 4)),
        (lambda: hetu.nn.Attention(64, 4, bias=False), lambda: nn.MultiheadAttention(64, 4, bias=False)),
    ],
)
def test_initial_values_are_distributed_as_torchs(make: Callable[[], Any], like: Callable[[], nn.Module]) -> None:
    hetu.manual_seed(0)
    torch.manual_seed(0)
    with hetu.graph("define_and_run", device="cpu") as g:
        module = make()
        found = g.run(module.parameters())
    wanted = list(like().state_dict().values())
    assert [item.shape for item in found] == [item.shape for item in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.std().item() == pytest.approx(other.std().item(), rel=0.15)
        assert one.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.15 if other.std() < 0.9 else 0.4)


def test_grouped_heads_rotary_embeddings_and_options() -> None:
    values = np.random.default_rng(0).standard_normal((5, 16)).astype("float32")
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [s, 16], name="x")
        attention = hetu.nn.Attention(16, 4, num_kv_heads=2, head_dim=8, bias=False, name="attn")
        lists = {"multi_seq_lens_symbol": [[s]], "multi_cp_group_symbol": [[0]]}
        y = attention(x, hetu.arange(s), rotary_base=100.0, is_causal=False, **lists)
        qkv = hetu.rotary(hetu.linear(x, attention.in_proj_weight), hetu.arange(s), 8, num_heads=6, base=100.0)
        out = hetu.parallel_attn(qkv, 8, 2, [[s]], [[0]], is_causal=False)[0]
        wanted = hetu.linear(out, attention.out_proj.weight)
    assert attention.in_proj_weight.shape == (64, 16)
    assert [item.name for item in attention.parameters()] == ["attn.in_proj_weight", "attn.out_proj.weight"]
    assert repr(attention) == "Attention(attn.in_proj_weight: [64, 16], attn.out_proj.weight: [16, 32])"
    got, expected = g.run([y, wanted], {x: values})
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_rms_norm_adds_what_torch_adds(dtype: str) -> None:
    values = torch.tensor([[1e-3, -2e-3, 1e-4, 0.0]], dtype=getattr(torch, dtype))
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(dtype, [1, 4])
        y = hetu.nn.RMSNorm(4, dtype=dtype)(x)
    wanted = nn.RMSNorm(4, dtype=values.dtype)(values).detach()
    tolerance = 1e-2 if values.itemsize == 2 else 1e-5
    torch.testing.assert_close(g.run(y, {x: values}), wanted, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: hetu.nn.Linear(0, 3), "in_features to be an int from 1"),
        (lambda: hetu.nn.Linear(3, 3, dtype="int64"), "a floating dtype"),
        (lambda: hetu.nn.Linear(3, 3, name=3), "name to be a string"),
        (lambda: [hetu.nn.Linear(3, 3, name="one") for _ in "ab"], "a node named 'one.weight' already"),
        (lambda: hetu.nn.Embedding(3.5, 2), "num_embeddings"),
        (lambda: hetu.nn.Attention(16, 3), "embed_dim of 16 is no multiple of num_heads, 3"),
        (lambda: hetu.nn.Attention(16, 4, 3), "expected num_heads to be a multiple of num_kv_heads 3, got 4"),
        (lambda: hetu.nn.RMSNorm(4, eps=-1)(hetu.full([4], 1.0)), "eps"),
    ],
)
def test_what_is_refused(wrong: Callable[[], Any], message: str) -> None:
    with hetu.graph("define_and_run", device="cpu"), pytest.raises(hetu.HetuError, match=message) as caught:
        wrong()
    assert "test_modules.py" in str(caught.value)
