"""Attention under any mask over a whole pack in plain float64 torch, for autograd."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st
from support.masks import random_mask, seen_by_definition

from hetu.backends.attention.dropout import Dropout, keep_mask
from hetu.parallel import Mask
from hetu.parallel.mask.rules import Prefix, Slices


@dataclass
class Packs:
    """Sequences of queries and of keys, one after the other, and what may be asked of an attention over them."""

    lens_q: list[int]
    lens_k: list[int]
    mask: Mask
    softcap: float = 0.0
    scale: float | None = None
    dropout: Dropout | None = None
    seen: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.seen = torch.from_numpy(seen_by_definition(self.mask, self.lens_q, self.lens_k))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attends ``(T_q, H, D)`` to ``(T_k, H_k, D)``.

        Gives out like q, lse ``(T_q, H)``, and p ``(T_q, H, T_k)``, negative where dropout dropped.
        """
        (rows, heads, head_dim), group = q.shape, q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("ihd,jhd->ihj", q, k) * (head_dim**-0.5 if self.scale is None else self.scale)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        last = scores.new_full((rows, heads, 1), -torch.inf) if sinks is None else sinks.expand(rows, heads)[..., None]
        logits = torch.cat([scores.masked_fill(~self.seen[:, None], -torch.inf), last], -1)
        top = logits.detach().amax(-1, keepdim=True)
        weights = (logits - top.masked_fill(top == -torch.inf, 0)).exp()
        total = weights.sum(-1, keepdim=True)
        sees = total > 0
        total = torch.where(sees, total, 1.0)  # nobody divides by 0, nor does a gradient
        lse = torch.where(sees, total.log() + top, -torch.inf).squeeze(-1)
        p, keep, factor = (weights / total)[..., :-1], torch.ones_like(scores, dtype=torch.bool), 1.0
        if self.dropout is not None:
            keep, factor = self._kept(heads), self.dropout.scale
        return torch.einsum("ihj,jhd->ihd", p * keep * factor, v), lse, torch.where(keep, p, -p)

    def _kept(self, heads: int) -> torch.Tensor:
        """``(T_q, H, T_k)``: what dropout keeps. With slices the pack is one sequence."""
        assert self.dropout is not None
        kept = torch.ones(sum(self.lens_q), heads, sum(self.lens_k), dtype=torch.bool)
        lens_q, lens_k = self.lens_q, self.lens_k
        if isinstance(self.mask.rule, Slices):
            lens_q, lens_k = [sum(lens_q)], [sum(lens_k)]
        at_q, at_k = np.cumsum([0, *lens_q]), np.cumsum([0, *lens_k])
        for b, (n, m) in enumerate(zip(lens_q, lens_k, strict=True)):
            own = keep_mask(self.dropout, b, torch.arange(heads), torch.arange(n), torch.arange(m))
            kept[at_q[b] : at_q[b + 1], :, at_k[b] : at_k[b + 1]] = own.transpose(0, 1)
        return kept


@st.composite
def masks(draw: st.DrawFn, lens_q: list[int], lens_k: list[int], is_shared: bool = False) -> Mask:
    """Any mask that fits these sequences, or, if it is shared, any sequences."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    while True:
        mask = random_mask(rng, lens_q, lens_k)
        is_of_these = mask.joins or (isinstance(mask.rule, Prefix) and not mask.rule.is_shared)
        if not (is_shared and is_of_these):
            return mask
