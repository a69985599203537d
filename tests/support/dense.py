"""The oracle: attention of one document in plain float64 torch, with dropout by its definition."""

from __future__ import annotations

from functools import partial

import torch

from hetu.backends.attention.dropout import Dropout, dropout_key, keep_mask


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool,
    scale: float | None = None,
    document: int = 0,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attends ``(n, H, D)`` to ``(m, H_k, D)``; gives out ``(n, H, D)``, lse ``(H, n)``, signed p ``(H, n, m)``."""
    (n, heads, head_dim), m = q.shape, len(k)
    group = heads // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    numbers = partial(torch.arange, device=q.device)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (head_dim**-0.5 if scale is None else scale)
    if is_causal:
        hidden = numbers(m)[None, :] > numbers(n)[:, None] + m - n
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1) if m else scores.new_full((heads, n), -torch.inf)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    keep = torch.ones_like(p, dtype=torch.bool)
    factor = 1.0
    if dropout is not None:
        keep = keep_mask(dropout, document, numbers(heads), numbers(n), numbers(m))
        factor = 1 / (1 - dropout.p)
    out = torch.einsum("hij,jhd->ihd", p * keep * factor, v)
    return out, lse, torch.where(keep, p, -p)


def dropout_of(p: float, rng_state: torch.Tensor, group: int = 0) -> Dropout | None:
    """The dropout that an op with this ``rng_state`` used."""
    return Dropout(p, dropout_key(*rng_state.tolist(), group)) if p else None


def tolerance(dtype: torch.dtype, reference: torch.Tensor, plain: torch.Tensor) -> float:
    """float32: 2e-5. Half types: twice the error of a plain attention in that type."""
    if dtype == torch.float64:
        return 1e-12
    if dtype == torch.float32:
        return 2e-5
    return 2 * float((plain.double() - reference).abs().max()) + 1e-6 if reference.numel() else 0.0


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
    """A plain attention in the inputs' own dtype, the yardstick of half precision."""
    (n, heads, head_dim), m = q.shape, len(k)
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * head_dim**-0.5
    if is_causal:
        scores = scores.masked_fill(torch.arange(m)[None, :] > torch.arange(n)[:, None] + m - n, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num(0), v)
