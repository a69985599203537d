"""Who is compared: each peer gives a forward and a backward of the same inputs.

``torch.nn.attention.varlen`` is not here because it calls FlashAttention-2's op, which is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from attention_cases import Inputs, Results


@dataclass(frozen=True)
class Calls:
    """A peer's work on some inputs, with the tensors ``(T, heads, head_dim)`` of :class:`Inputs`.

    Attributes:
        forward: Gives the output.
        backward: Gives dq, dk and dv, from the output and the log-sum-exps of a forward that was done before. All that
            they need besides is part of it, the rows' dot products of dout and out too.
    """

    forward: Callable[[], torch.Tensor]
    backward: Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def of(self, direction: str) -> Callable[[], Any]:
        """What is timed."""
        return self.forward if direction == "forward" else self.backward

    def results(self, direction: str) -> Results:
        """What it computes, by name."""
        if direction == "forward":
            return {"out": self.forward()}
        return dict(zip(("dq", "dk", "dv"), self.backward(), strict=True))


def hetu(x: Inputs) -> Calls:
    """``hetu.functional.attn_varlen``; lengths on the CPU."""
    from hetu.functional import attn_varlen

    options: dict[str, Any] = {"is_causal": x.case.is_causal, "window_size": x.case.window_size}

    def forward(q: torch.Tensor = x.q, k: torch.Tensor = x.k, v: torch.Tensor = x.v) -> torch.Tensor:
        out = attn_varlen(q, k, v, x.cu_seqlens, x.cu_seqlens, **options)
        assert isinstance(out, torch.Tensor)
        return out

    leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]
    out = forward(*leaves)
    return Calls(forward, lambda: torch.autograd.grad(out, leaves, x.dout, retain_graph=True))  # type: ignore[arg-type,return-value]


def flash_attention_2(x: Inputs) -> Calls:
    """The varlen op of FlashAttention-2 that torch has."""
    ops, lengths = torch.ops.aten, (x.cu_seqlens_there, x.cu_seqlens_there, x.longest, x.longest)
    options: dict[str, Any] = {"scale": x.scale}
    if x.case.window is not None:
        options |= dict(zip(("window_size_left", "window_size_right"), x.case.window_size, strict=True))

    def forward() -> Any:
        return ops._flash_attention_forward(x.q, x.k, x.v, *lengths, 0.0, x.case.is_causal, False, **options)

    out, lse, rng_state, unused, _ = forward()

    def backward() -> Any:
        return ops._flash_attention_backward(
            x.dout, x.q, x.k, x.v, out, lse, *lengths, 0.0, x.case.is_causal, rng_state, unused, **options
        )

    return Calls(lambda: forward()[0], backward)


def cudnn(x: Inputs) -> Calls:
    """The op of cuDNN that torch has, which takes cumulative lengths.

    It builds cuDNN's graph anew in each call with them: much work for the host, which is not part of the times.
    """
    if x.case.window is not None:
        raise NotImplementedError("torch's op has no windows")
    ops, lengths = torch.ops.aten, (x.cu_seqlens_there, x.cu_seqlens_there, x.longest, x.longest)

    def forward() -> Any:
        return ops._cudnn_attention_forward(
            x.q, x.k, x.v, None, *lengths, True, 0.0, x.case.is_causal, False, scale=x.scale
        )[0]

    def backward() -> Any:
        # https://github.com/pytorch/pytorch/pull/186142: an illegal access, after which the process can do nothing more
        raise NotImplementedError("torch's op takes head_dim for the longest length, and reads past its buffers")

    return Calls(forward, backward)


_uncompilable: dict[Hashable, str] = {}


def _compiling(key: Hashable, call: Callable[[], Any]) -> Any:
    """What a call gives that may compile something; if that failed before, fails without trying for seconds again."""
    if key in _uncompilable:
        raise RuntimeError(_uncompilable[key])
    try:
        return call()
    except Exception as failure:
        _uncompilable[key] = str(failure)  # not the error itself, which keeps all tensors of its frames
        raise


@cache
def _compiled_flex() -> Any:
    """FlexAttention compiled for static shapes, its fastest way: once for each heads, number of tokens and mask."""
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    # Past the limit torch would run it uncompiled, with all scores in memory; fullgraph makes that an error.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex_attention(x: Inputs) -> Calls:
    """FlexAttention with a document mask, compiled; its block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = x.cu_seqlens_there.diff().long()
    document = torch.repeat_interleave(torch.arange(len(lengths), device=x.q.device), lengths)
    is_causal, tokens, variant = x.case.is_causal, x.case.tokens, (x.case.heads, x.case.tokens, x.case.mask)
    window = x.case.window

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen = document[i] == document[j]
        if is_causal:
            seen = seen & (i >= j)
        return seen if window is None else seen & (i <= j + window)  # i - j would be an int64 per pair

    blocks = create_block_mask(mask, None, None, tokens, tokens, device=x.q.device.type)
    leaves = [y.detach().transpose(0, 1)[None].requires_grad_() for y in (x.q, x.k, x.v)]
    dout, attend = x.dout.transpose(0, 1)[None], _compiled_flex()

    def forward() -> Any:
        return _compiling(variant, lambda: attend(*leaves, block_mask=blocks, scale=x.scale, enable_gqa=True))

    out = forward()

    def backward() -> Any:
        grads = _compiling((*variant, "backward"), lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
        return tuple(y[0].transpose(0, 1) for y in grads)

    return Calls(lambda: forward()[0].transpose(0, 1), backward)


YARDSTICK = "FlashAttention-2"

PEERS: dict[str, Callable[[Inputs], Calls]] = {
    YARDSTICK: flash_attention_2,
    "hetu": hetu,
    "cuDNN": cudnn,
    "FlexAttention": flex_attention,
}
