"""The model of ``examples/llama.py`` as a PyTorch user would write it: what a training step is measured against."""

from __future__ import annotations

import numpy as np
import torch
from corpus import VOCABULARY
from llama import IGNORED, Config
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Attention and SwiGLU, each with a residual connection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.norm1, self.norm2 = (nn.RMSNorm(config.width, eps=1e-6) for _ in range(2))
        self.qkv = nn.Linear(config.width, config.qkv_width, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], lengths: list[int]) -> torch.Tensor:
        x = x + self.out(self.attend(self.qkv(self.norm1(x)), angles, lengths))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)

    def attend(self, qkv: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], lengths: list[int]) -> torch.Tensor:
        """Each document attends to itself: torch has no attention over packed documents on the CPU."""
        heads, kv_heads = self.config.heads, self.config.kv_heads
        q, k, v = qkv.unflatten(-1, (-1, self.config.head_dim)).split([heads, kv_heads, kv_heads], 1)
        return by_document(rotate(q, *angles), rotate(k, *angles), v, lengths)


@torch.compiler.disable  # another number of documents would compile the model anew
def by_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Attention of q, k and v ``(T, heads, head_dim)``, document by document: ``(T, heads * head_dim)``."""
    parts = []
    for own in zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True):
        batch = (x.unsqueeze(0) for x in own)
        parts.append(functional.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)[0])
    return torch.cat(parts, 1).transpose(0, 1).flatten(1)


@torch.compiler.disable
def positions(lengths: list[int], device: torch.device) -> torch.Tensor:
    """``(T,)`` each token's position in its document."""
    return torch.cat([torch.arange(n, device=device) for n in lengths])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``(T, H, head_dim)`` in halves; cos and sin are ``(T, 1, head_dim / 2)``."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Llama(nn.Module):
    """The whole model; gives the mean loss over all tokens with a label."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.register_buffer("rates", 10000.0 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        angle = torch.outer(positions(lengths, tokens.device).float(), self.rates).unsqueeze(1)
        angles = (angle.cos(), angle.sin())
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angles, lengths)
        return functional.cross_entropy(self.head(self.norm(x)), labels, ignore_index=IGNORED)

    def take(self, values: dict[str, torch.Tensor]) -> None:
        """Takes the parameters of the hetu model, by their names there."""
        with torch.no_grad():
            self.embedding.weight.copy_(values["embedding"])
            self.norm.weight.copy_(values["norm"])
            self.head.weight.copy_(values["head"])
            for i, block in enumerate(self.blocks):
                for name in ("norm1", "norm2"):
                    getattr(block, name).weight.copy_(values[f"layer{i}.{name}"])
                for name, layer in (("attention.qkv", block.qkv), ("attention.out", block.out),
                                    ("mlp.gate_up", block.gate_up), ("mlp.down", block.down)):  # fmt: skip
                    layer.weight.copy_(values[f"layer{i}.{name}"])


def tensors(documents: list[np.ndarray], labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """What the model takes for a pack."""
    kept = [document for document in documents if len(document)]
    return torch.from_numpy(np.concatenate(kept).astype(np.int64)), torch.from_numpy(labels), [len(d) for d in kept]
