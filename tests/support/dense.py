"""The oracle: attention of one document in plain float64 torch, with dropout by its definition.

It takes nothing of hetu but the random numbers of dropout, and writes causality itself. ``hetu.testing.attention``
asks ``hetu.Mask`` who sees whom; it is another oracle on purpose: each can be wrong where the other is not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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


def dense_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    **options: Any,
) -> list[torch.Tensor]:
    """The gradients of one document: of ``sum(out * d_out) + sum(lse * d_lse)``, by autograd in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    unseen = max(len(q) - len(k), 0) if options["is_causal"] else len(q) * (len(k) == 0)
    if unseen == len(q) or len(q) == 0:  # nobody sees anything
        return [torch.zeros_like(x) for x in leaves]
    assert unseen == 0 or not options.get("dropout"), "dropout counts rows from the document's first"
    out, lse, _ = dense(leaves[0][unseen:], leaves[1], leaves[2], **options)
    loss = (out * d_out.double()[unseen:]).sum()
    if d_lse is not None:
        loss = loss + (lse.T * d_lse.double()[unseen:]).sum()
    return list(torch.autograd.grad(loss, leaves))


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


_GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def assert_gradient_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Absolutely, or relative to the largest gradient where that is over 1.

    Half types too: the forward's rounding of out is in a gradient absolutely, through delta, however small it is.
    """
    if not want.numel():
        return
    atol = _GRADIENT_TOLERANCE.get(dtype, 2e-2)
    torch.testing.assert_close(got.double(), want, atol=atol * max(1.0, float(want.abs().max())), rtol=0)
