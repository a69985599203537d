"""Who is compared: each peer gives a forward and a backward of the same inputs.

``torch.nn.attention.varlen`` is not here because it calls FlashAttention-2's op, which is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from attention_cases import Inputs, Results


@dataclass(frozen=True)
class Calls:
    """A peer's work on some inputs. ``forward`` returns the output, ``backward`` dq, dk and dv."""

    forward: Callable[[], torch.Tensor]
    backward: Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def results(self) -> dict[str, Results]:
        """What both compute, by direction."""
        dq, dk, dv = self.backward()
        return {"forward": {"out": self.forward()}, "backward": {"dq": dq, "dk": dk, "dv": dv}}


def hetu(x: Inputs) -> Calls:
    """``hetu.functional.attn_varlen``; lengths on the CPU."""
    from hetu.functional import attn_varlen

    def forward(q: torch.Tensor = x.q, k: torch.Tensor = x.k, v: torch.Tensor = x.v) -> torch.Tensor:
        out = attn_varlen(q, k, v, x.cu_seqlens, x.cu_seqlens, is_causal=x.case.is_causal)
        assert isinstance(out, torch.Tensor)
        return out

    leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]
    out = forward(*leaves)
    return Calls(forward, lambda: torch.autograd.grad(out, leaves, x.dout, retain_graph=True))  # type: ignore[arg-type,return-value]


def flash_attention_2(x: Inputs) -> Calls:
    """The varlen op of FlashAttention-2 that torch has."""
    ops, lengths = torch.ops.aten, (x.cu_seqlens_there, x.cu_seqlens_there, x.longest, x.longest)

    def forward() -> Any:
        return ops._flash_attention_forward(x.q, x.k, x.v, *lengths, 0.0, x.case.is_causal, False, scale=x.scale)

    out, lse, rng_state, unused, _ = forward()

    def backward() -> Any:
        return ops._flash_attention_backward(
            x.dout, x.q, x.k, x.v, out, lse, *lengths, 0.0, x.case.is_causal, rng_state, unused, scale=x.scale
        )

    return Calls(lambda: forward()[0], backward)


def cudnn(x: Inputs) -> Calls:
    """The op of cuDNN that torch has, which takes cumulative lengths.

    In torch 2.11.0 on an H100 its forward is right but takes 65 to 75 ms of host time a call, gradients with grouped
    heads are no numbers, and one document of 32,768 tokens makes it read outside its memory, after which no peer
    of the process runs: it is measured only where it is asked for.
    """
    ops, lengths = torch.ops.aten, (x.cu_seqlens_there, x.cu_seqlens_there, x.longest, x.longest)

    def forward() -> Any:
        return ops._cudnn_attention_forward(
            x.q, x.k, x.v, None, *lengths, True, 0.0, x.case.is_causal, False, scale=x.scale
        )

    out, lse, _, _, _, _, seed, offset, _ = forward()
    bias = None  # for the op: an undefined tensor

    def backward() -> Any:
        return ops._cudnn_attention_backward(
            x.dout, x.q, x.k, x.v, out, lse, seed, offset, bias, *lengths, 0.0, x.case.is_causal, scale=x.scale
        )

    return Calls(lambda: forward()[0], backward)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(x: Inputs) -> Calls:
    """FlexAttention with a document mask, compiled; its block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = x.cu_seqlens_there.diff().long()
    document = torch.repeat_interleave(torch.arange(len(lengths), device=x.q.device), lengths)
    is_causal, tokens = x.case.is_causal, x.case.tokens

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        same = document[i] == document[j]
        return same & (i >= j) if is_causal else same

    blocks = create_block_mask(mask, None, None, tokens, tokens, device=str(x.q.device), _compile=True)
    leaves = [y.detach().transpose(0, 1)[None].requires_grad_() for y in (x.q, x.k, x.v)]
    attend = _compiled_flex()

    def forward(inputs: Any = None) -> torch.Tensor:
        out: torch.Tensor = attend(
            *(inputs or [y.detach() for y in leaves]), block_mask=blocks, scale=x.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    out = forward(leaves)

    def backward() -> Any:
        return tuple(y[0].transpose(0, 1) for y in torch.autograd.grad(out, leaves, x.dout, retain_graph=True))

    return Calls(forward, backward)


YARDSTICK = "FlashAttention-2"

PEERS: dict[str, Callable[[Inputs], Calls]] = {
    YARDSTICK: flash_attention_2,
    "hetu": hetu,
    "cuDNN": cudnn,
    "FlexAttention": flex_attention,
}
