"""A byte-level Llama-style model as a hetu graph, and the strategies that it is trained under."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from corpus import VOCABULARY, deal

import hetu

IGNORED = -100  # the label of a document's last token, after which nothing comes

# Lengths of all strategies are expressions of two symbols.
S = hetu.IntSymbol("s")  # tokens of a pack
A = hetu.IntSymbol("a")  # of these, tokens of the first context group, where there are two
B = S - A


@dataclass(frozen=True)
class Strategy:
    """Which pipeline holds how many tokens, which context group it belongs to, and the groups' shares of a pack."""

    name: str
    lengths: list[hetu.IntSymbol]
    groups: list[int]
    shares: tuple[int, ...] = (1,)


STRATEGIES = (
    Strategy("one pipeline", [S], [0]),
    Strategy("two pipelines", [S // 2, S - S // 2], [0, 0]),
    Strategy("three of unequal lengths", [S // 6, S // 3, S - S // 6 - S // 3], [0, 0, 0]),
    Strategy("four in two context groups", [A // 2, A - A // 2, B // 3, B - B // 3], [0, 0, 1, 1], shares=(1, 2)),
)


@dataclass(frozen=True)
class Config:
    """The model's sizes."""

    layers: int = 2
    width: int = 192
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 512

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class Model:
    """The graph, what is fed to it, and what is fetched from it."""

    graph: hetu.Graph
    tokens: hetu.Tensor
    labels: hetu.Tensor
    cu_seqlens: hetu.Tensor
    logits: hetu.Tensor
    loss: hetu.Tensor

    def feeds(self, index: int, pack: list[np.ndarray]) -> tuple[dict[hetu.Tensor, Any], dict[hetu.IntSymbol, int]]:
        """What a run under a strategy is fed for a pack of documents, and the values of its symbols."""
        strategy = STRATEGIES[index]
        lists = deal(pack, strategy.shares)
        cu = [np.cumsum([0, *map(len, documents)], dtype=np.int32) for documents in lists]
        symbols = {S: sum(map(len, pack))} | ({A: int(cu[0][-1])} if len(lists) > 1 else {})
        layout = self.graph.layout(index, int_symbol_dict=symbols, cu_seqlens=cu)
        texts, labels = zip(*[flat(documents) for documents in lists], strict=True)
        feeds = {
            self.tokens: hetu.Shards(layout.scatter(texts)),
            self.labels: hetu.Shards(layout.scatter(labels)),
            self.cu_seqlens: hetu.Shards(cu[group] for group in strategy.groups),
        }
        return feeds, symbols


def flat(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of documents one after the other, and for each the one that follows it in its document."""
    empty = np.empty(0, np.int64)
    nexts = [np.append(document[1:], IGNORED) if len(document) else empty for document in documents]
    return np.concatenate([empty, *documents]), np.concatenate([empty, *nexts])


def build(config: Config, dtype: Any = hetu.float32, device: str | None = None, recompute: bool = False) -> Model:
    """Builds the graph: once, for all lengths and strategies.

    Args:
        config: The model's sizes.
        dtype: float32, or bfloat16 for products and attention in it; parameters are float32 either way.
        device: Where it runs; None for CUDA if there is one.
        recompute: Whether the backward computes each layer again, but for attention, instead of keeping what it gave.
    """
    rows, documents = hetu.IntSymbol("rows"), hetu.IntSymbol("documents")
    precision = nullcontext() if hetu.as_dtype(dtype) == hetu.float32 else hetu.autocast(dtype)
    with hetu.graph("define_and_run", num_strategy=len(STRATEGIES), device=device) as g, precision:
        tokens = hetu.placeholder(hetu.int64, [rows], name="tokens")
        labels = hetu.placeholder(hetu.int64, [rows], name="labels")
        cu_seqlens = hetu.placeholder(hetu.int32, [documents + 1], name="cu_seqlens")
        layout = {
            "multi_seq_lens_symbol": [strategy.lengths for strategy in STRATEGIES],
            "multi_cp_group_symbol": [strategy.groups for strategy in STRATEGIES],
            "packing": True,
            "split": "sym",
        }
        position, _, _ = hetu.layout_tokens(tokens, cu_seqlens=cu_seqlens, **layout)
        x = hetu.embedding(tokens, weight("embedding", VOCABULARY, config.width))
        for i in range(config.layers):
            with hetu.recompute() if recompute else nullcontext():
                normed = norm(x, f"layer{i}.norm1")
                x = x + attention(config, f"layer{i}.attention", normed, position, cu_seqlens, layout)
                x = x + feed_forward(config, f"layer{i}.mlp", norm(x, f"layer{i}.norm2"))
        logits = hetu.linear(norm(x, "norm"), weight("head", VOCABULARY, config.width))
        loss = hetu.token_mean_loss(logits, labels, ignore_index=IGNORED)
    return Model(g, tokens, labels, cu_seqlens, logits, loss)


def attention(
    config: Config, name: str, x: hetu.Tensor, position: hetu.Tensor, cu_seqlens: hetu.Tensor, layout: dict[str, Any]
) -> hetu.Tensor:
    """Grouped-query attention with rotary embeddings."""
    qkv = hetu.linear(x, weight(f"{name}.qkv", config.qkv_width, config.width))
    qkv = hetu.rotary(qkv, position, config.head_dim, num_heads=config.heads + config.kv_heads)
    attended = hetu.parallel_attn(
        qkv, config.head_dim, config.heads // config.kv_heads, cu_seqlens_q=cu_seqlens, **layout
    )[0]
    return hetu.linear(attended, weight(f"{name}.out", config.width, config.heads * config.head_dim))


def feed_forward(config: Config, name: str, x: hetu.Tensor) -> hetu.Tensor:
    """SwiGLU, with gate and up in one product."""
    gate_up = hetu.linear(x, weight(f"{name}.gate_up", 2 * config.hidden, config.width))
    return hetu.linear(hetu.swiglu(gate_up), weight(f"{name}.down", config.width, config.hidden))


def norm(x: hetu.Tensor, name: str) -> hetu.Tensor:
    width = x.shape[-1]
    return hetu.rms_norm(x, hetu.parameter(1.0, [width], name=name))


def weight(name: str, rows: int, columns: int) -> hetu.Tensor:
    init = functools.partial(torch.nn.init.normal_, std=columns**-0.5)
    return hetu.parameter(init, [rows, columns], name=name)
