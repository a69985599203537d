"""Attention under any mask over a whole pack in plain float64 torch, for autograd."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from support.masks import random_mask

from hetu.backends.attention.dropout import Dropout, keep_mask
from hetu.parallel import Mask
from hetu.parallel.mask.rules import Prefix, Slices
from hetu.testing import attention


@dataclass
class Packs:
    """Sequences of queries and of keys, one after the other, and what may be asked of an attention over them."""

    lens_q: list[int]
    lens_k: list[int]
    mask: Mask
    softcap: float = 0.0
    scale: float | None = None
    dropout: Dropout | None = None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attends ``(T_q, H, D)`` to ``(T_k, H_k, D)``.

        Gives out like q, lse ``(T_q, H)``, and p ``(T_q, H, T_k)``, negative where dropout dropped.
        """
        keep = (
            torch.ones(len(q), q.shape[1], len(k), dtype=torch.bool) if self.dropout is None else self._kept(q.shape[1])
        )
        weights = None if self.dropout is None else keep.double() * self.dropout.scale
        starts = [np.cumsum([0, *lens]) for lens in (self.lens_q, self.lens_k)]
        options = {"softmax_scale": self.scale, "softcap": self.softcap, "sinks": sinks, "weights": weights}
        out, lse, p = attention(q, k, v, *starts, mask=self.mask, **options)
        return out, lse, torch.where(keep, p, -p)

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
