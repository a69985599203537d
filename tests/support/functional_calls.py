"""Calls of hetu.functional.attn_varlen, and what they give in the shapes in which the graph's op gives it."""

from __future__ import annotations

from typing import Any

import torch
from support.packs import GRADIENTS, Pack, Tensors
from torch.utils._python_dispatch import TorchDispatchMode

import hetu
from hetu.functional import attn_varlen

BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = {
    "cpu": ([0, 1, 2, 7, 19], [3, 1, 0, 9, 15]),
    "cuda": ([0, 1, 63, 127, 129, 5, 700], [3, 1, 63, 130, 127, 0, 900]),
}
"""No queries, no keys, one of either, odd ones, more queries than keys and fewer; small where they are interpreted."""


def cumulative(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def by_slot(pack: Pack, lse: torch.Tensor) -> torch.Tensor:
    """The lse ``(H_q, T_q)`` as ``(B, H_q, longest)``, which is what the graph's op gives."""
    slots = lse.new_full((len(pack.lens_q), pack.heads[0], max(pack.lens_q, default=0)), -torch.inf)
    for b, n in enumerate(pack.lens_q):
        slots[b, :, :n] = lse[:, pack.rows("q", b)]
    return slots


def by_row(pack: Pack, slots: torch.Tensor) -> torch.Tensor:
    """The inverse, for the gradient of lse; that of the tail is NaN: it goes nowhere."""
    lse = slots.new_full((pack.heads[0], pack.shape("q")[0]), torch.nan)
    for b, n in enumerate(pack.lens_q):
        lse[:, pack.rows("q", b)] = slots[b, :, :n]
    return lse


def by_function(
    pack: Pack, data: Tensors, backend: str = "torch", attend: Any = attn_varlen, **options: Any
) -> Tensors:
    """The output, lse and gradients of a pack by the function, in the shapes that the graph's op gives them."""
    q, k, v = (data[name].detach().requires_grad_() for name in "qkv")
    cu_q, cu_k = (torch.from_numpy(cu) for cu in pack.cu_seqlens)
    with hetu.config(backend=backend):
        out, lse = attend(q, k, v, cu_q, cu_k, is_causal=pack.is_causal, return_lse=True, **options)
        targets, weights = [out], [data["dout"]]
        if "dlse" in data:
            targets, weights = [out, lse], [data["dout"], by_row(pack, data["dlse"])]
        grads = torch.autograd.grad(targets, [q, k, v], weights)
    assert out.is_contiguous() and lse.is_contiguous() and lse.shape == (pack.heads[0], len(q))
    assert (lse[:, len(q) - pack.tail :] == -torch.inf).all()
    return {"out": out.detach(), "lse": by_slot(pack, lse.detach()), **dict(zip(GRADIENTS, grads, strict=True))}


def op_arguments(device: str = "cpu", requires_grad: bool = True, p: float = 0.0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(rows, heads, 16, generator=generator).to(device).requires_grad_(requires_grad)
        for rows, heads in ((10, 4), (12, 2), (12, 2))
    )
    state = torch.tensor([3, 4]) if p else None
    return q, k, v, cumulative([3, 0, 5]), cumulative([6, 1, 4], torch.int64), state, None, 6, True, p, 0.3


class Watching(TorchDispatchMode):
    """Notes the ops that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [op.name() for op in self.seen]
