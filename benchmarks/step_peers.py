"""Who ``step_gpu.py`` times, and on what: hetu, and the same model under ``torch.compile``, with two attentions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import numpy as np
import torch
from llama import IGNORED, Config, build, flat
from torch.nn import functional
from torch_llama import Llama, rotate

import hetu
import hetu.functional

Pack = list[np.ndarray]
Step = Callable[[Pack], torch.Tensor]
RATE, NORM = 1e-3, 1.0


@dataclass(frozen=True)
class Task:
    """What is trained, on how many tokens per step."""

    config: Config
    tokens: int
    longest: int = 8192


MODELS = {
    "small": Task(Config(layers=4, width=1024, heads=16, kv_heads=4, head_dim=64, hidden=2816), 32_768),
    "large": Task(Config(layers=16, width=2048, heads=16, kv_heads=4, head_dim=128, hidden=5632), 16_384),
    "tiny": Task(Config(layers=2, width=64, heads=2, kv_heads=1, head_dim=32, hidden=96), 256, 64),
}
"""Of 46 and 723 million parameters, and one to try the script out."""


class Packed(torch.nn.Module):
    """The model of ``torch_llama.py`` with one call of attention for all documents of a pack."""

    def __init__(self, config: Config, is_flash: bool) -> None:
        super().__init__()
        self.config, self.model, self.is_flash = config, Llama(config), is_flash

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor, cu: torch.Tensor, longest: int, position: torch.Tensor
    ) -> torch.Tensor:
        model, heads, kv_heads = self.model, self.config.heads, self.config.kv_heads
        angle = torch.outer(position.float(), model.rates).unsqueeze(1)
        angles = angle.cos(), angle.sin()
        x = model.embedding(tokens)
        for block in model.blocks:
            qkv = block.qkv(block.norm1(x)).unflatten(-1, (-1, self.config.head_dim))
            q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
            q, k = rotate(q, *angles).to(v.dtype), rotate(k, *angles).to(v.dtype)
            if self.is_flash:
                out = torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, longest, longest, 0.0, True, False)[0]
            else:
                out = hetu.functional.attn_varlen(q, k, v, cu, cu, is_causal=True)
            x = x + block.out(out.flatten(1))
            gate, up = block.gate_up(block.norm2(x)).chunk(2, -1)
            x = x + block.down(functional.silu(gate) * up)
        return functional.cross_entropy(model.head(model.norm(x)).float(), labels, ignore_index=IGNORED)


def by_hetu(task: Task, packs: list[Pack], device: str, compiles: bool) -> Step:
    """Hetu's step, after one that is taken back: on its first call Inductor tunes kernels, as the others' does."""
    hetu.manual_seed(0)
    model = build(task.config, "bfloat16", device=device)
    train = hetu.optim.AdamW(lr=RATE, max_grad_norm=NORM).minimize(model.loss)

    def step(pack: Pack) -> torch.Tensor:
        feeds, symbols = model.feeds(0, pack)
        with hetu.config(compile=compiles):
            loss: torch.Tensor = model.graph.run(train, feeds, int_symbol_dict=symbols, strategy=0)
        return loss

    before = model.graph.state_dict()
    step(packs[0])
    model.graph.load_state_dict(before)
    return step


def by_torch(task: Task, packs: list[Pack], device: str, is_flash: bool) -> Step:
    """The same by ``torch.compile``, with FlashAttention-2 or ``hetu.functional``."""
    hetu.manual_seed(0)
    packed = Packed(task.config, is_flash)
    packed.model.take(build(task.config, device="cpu").graph.state_dict()["parameters"])
    packed.to(device)
    model = torch.compile(packed, dynamic=True)
    optimizer = torch.optim.AdamW(packed.parameters(), lr=RATE)

    def gradients(pack: Pack) -> torch.Tensor:
        kept = [document for document in pack if len(document)]
        lengths = [len(document) for document in kept]
        cu = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
        tokens = torch.from_numpy(np.concatenate(kept).astype(np.int64)).to(device)
        labels = torch.from_numpy(flat(pack)[1]).to(device)
        position = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device)
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss: torch.Tensor = model(tokens, labels, cu.to(device) if is_flash else cu, max(lengths), position)
        loss.backward()
        return loss.detach()

    def step(pack: Pack) -> torch.Tensor:
        loss = gradients(pack)
        torch.nn.utils.clip_grad_norm_(packed.parameters(), NORM)
        optimizer.step()
        return loss

    gradients(packs[0])
    return step


MAKERS: dict[str, Callable[[Task, list[Pack], str], Step]] = {
    "hetu": lambda *given: by_hetu(*given, compiles=False),
    "hetu compiled": lambda *given: by_hetu(*given, compiles=True),
    "torch.compile, FlashAttention-2": lambda *given: by_torch(*given, is_flash=True),
    "torch.compile, hetu.functional": lambda *given: by_torch(*given, is_flash=False),
}
