"""Attention as its definition says, in float64 torch: the oracle of ``attn_varlen`` and ``parallel_attn``.

It shares nothing with kernels, plans and layouts: a mask is asked for its rule only, and every pair is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hetu.arguments import integers, is_dense, real, refuse, shown
from hetu.errors import ShapeError, caller
from hetu.parallel import Mask
from hetu.parallel.layout.splits import check_mask
from hetu.parallel.mask.rules import Chunked, Prefix, Slices, Window
from hetu.symbols.int_symbol import as_int

_OP = "attention"


def allowed_pairs(mask: Mask, lengths_q: Sequence[int], lengths_k: Sequence[int] | None = None) -> NDArray[np.bool_]:
    """Which queries see which keys, by the mask's definition and pair by pair.

    Args:
        mask: The mask, without symbols.
        lengths_q: Queries of each document.
        lengths_k: Keys of each document; None for as many as queries.

    Returns:
        ``(queries, keys)`` of all documents, one after the other.

    Example:
        >>> import hetu
        >>> hetu.testing.allowed_pairs(hetu.Mask.causal(), [1, 2]).astype(int)
        array([[1, 0, 0],
               [0, 1, 0],
               [0, 1, 1]])
    """
    if not isinstance(mask, Mask):
        refuse(mask, "mask", "a hetu.Mask", op="allowed_pairs")
    check_mask(mask)
    lengths_q = integers(lengths_q, "lengths_q", least=0, op="allowed_pairs", error=ShapeError)
    lengths_k = (
        lengths_q
        if lengths_k is None
        else integers(lengths_k, "lengths_k", least=0, op="allowed_pairs", error=ShapeError)
    )
    if len(lengths_k) != len(lengths_q):
        refuse(
            lengths_k,
            "lengths_k",
            f"one length per document, of which there are {len(lengths_q)}",
            op="allowed_pairs",
            error=ShapeError,
        )
    seen = np.zeros((sum(lengths_q), sum(lengths_k)), bool)
    if isinstance(mask.rule, Slices):
        bounds: list[list[int]] = np.reshape(np.array(mask.rule.ranges, int), (-1, 4)).tolist()
        for (q0, q1, k0, k1), kind in zip(bounds, mask.rule.kinds, strict=True):
            i, j = np.arange(q0, q1)[:, None], np.arange(k0, k1)
            ends, begins = (j - k1 <= i - q1) | (kind in ("full", "inverse_causal")), j - k0 >= i - q0
            seen[q0:q1, k0:k1] |= ends & (begins | (kind in ("full", "causal")))
        return seen
    q, k = np.cumsum([0, *lengths_q]), np.cumsum([0, *lengths_k])
    for number, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        i, j = np.arange(n)[:, None] + m - n, np.arange(m)  # the last query stands at the last key
        seen[q[number] : q[number + 1], k[number] : k[number + 1]] = _in_document(mask, number, i, j)
    return seen


def _in_document(mask: Mask, number: int, i: NDArray[Any], j: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether queries at positions i see keys at positions j of a document."""
    rule = mask.rule
    if isinstance(rule, Window):
        left, right = map(as_int, (rule.left, rule.right))
        seen: NDArray[np.bool_] = ((left < 0) | (j >= i - left)) & ((right < 0) | (j <= i + right))
    elif isinstance(rule, Chunked):
        seen = (i >= 0) & (i // rule.size == j // rule.size) & (j <= i)
    else:
        assert isinstance(rule, Prefix)
        prefix = rule.lengths[0 if rule.is_shared else number]
        seen = (i >= 0) & ((j <= i) | ((i < prefix) & (j < prefix)))
    return seen


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = None,
    *,
    mask: Mask | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attends within documents, densely and in float64. Gradients flow by autograd.

    Memory and time grow with ``T_q * T_k * H``: it is for tests.

    Args:
        q: ``(T_q, H, D)``, documents one after the other, of any floating dtype.
        k: ``(T_k, H_k, D)``; H is a multiple of H_k, and consecutive query heads share a key head.
        v: ``(T_k, H_k, D_v)``.
        cu_seqlens_q: ``(B + 1,)`` ints: where documents begin and end among the queries. ``T_q`` is its last entry.
        cu_seqlens_k: The same among the keys; None for ``cu_seqlens_q``.
        mask: Which keys a query may see; None for all of its document. Where a document has more keys than queries, or
            fewer, its last query stands at its last key.
        softmax_scale: Factor of the scores; None for ``1 / sqrt(D)``.
        softcap: If not 0, scores become ``softcap * tanh(score / softcap)``.
        sinks: ``(H,)``: one more logit per head, which takes weight and gives no value.
        weights: ``(T_q, H, T_k)``: factors of the probabilities, as dropout's 0 and ``1 / (1 - p)``.

    Returns:
        The output ``(T_q, H, D_v)``, the natural logarithm of the softmax' denominator ``(T_q, H)``, and the
        probabilities ``(T_q, H, T_k)`` without ``weights``, all in float64. A query that sees no key has output 0, and
        the logarithm is its sink, or -inf.

    Raises:
        ShapeError: If ``cu_seqlens`` and rows don't fit, or shapes.
        HetuError: If an argument is something else than it should be.

    Example:
        >>> import hetu, torch
        >>> q, k, v = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
        >>> out, lse, p = hetu.testing.attention(q, k, v, [0, 1, 3], mask=hetu.Mask.causal())
        >>> torch.equal(out[0, 0], v[0, 0].double()), p[1:, 0].sum(-1).round()
        (True, tensor([1., 1.], dtype=torch.float64))
    """
    _check(q, k, v, sinks, weights)
    softcap = real(softcap, "softcap", "a number from 0", lambda x: 0 <= x < torch.inf, op=_OP)
    if softmax_scale is not None:
        softmax_scale = real(softmax_scale, "softmax_scale", op=_OP)
    lengths_q = _lengths(cu_seqlens_q, len(q), "cu_seqlens_q")
    lengths_k = _lengths(cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, len(k), "cu_seqlens_k")
    seen = torch.from_numpy(allowed_pairs(Mask.full() if mask is None else mask, lengths_q, lengths_k)).to(q.device)
    (rows, heads, head_dim), group = q.shape, q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->ihj", q, k) * (head_dim**-0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    last = scores.new_full((rows, heads), -torch.inf) if sinks is None else sinks.double().expand(rows, heads)
    logits = torch.cat([scores.masked_fill(~seen[:, None], -torch.inf), last[..., None]], -1)
    top = logits.detach().amax(-1, keepdim=True)
    parts = (logits - top.masked_fill(top == -torch.inf, 0)).exp()
    total = parts.sum(-1, keepdim=True)
    sees = total > 0
    total = torch.where(sees, total, 1.0)  # nobody divides by 0, nor does a gradient
    lse = torch.where(sees, total.log() + top, -torch.inf).squeeze(-1)
    p = (parts / total)[..., :-1]
    return torch.einsum("ihj,jhd->ihd", p if weights is None else p * weights.double(), v), lse, p


def _check(q: Any, k: Any, v: Any, sinks: Any, weights: Any) -> None:
    """Refuses what are no tensors, or don't fit each other."""
    for name, x in {"q": q, "k": k, "v": v, "sinks": sinks, "weights": weights}.items():
        is_tensor = isinstance(x, torch.Tensor) and is_dense(x) and x.is_floating_point()
        if not (is_tensor or (x is None and name in ("sinks", "weights"))):
            refuse(x, name, "a dense floating tensor", op=_OP)
        if name in ("q", "k", "v") and (x.ndim != 3 or 0 in x.shape[1:]):
            refuse(tuple(x.shape), f"{name}.shape", "(rows, heads, head_dim)", op=_OP, error=ShapeError)
    rows, heads, head_dim = q.shape
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "k": (k, (len(k), k.shape[1] if heads % k.shape[1] == 0 else f"a divisor of {heads}", head_dim)),
        "v": (v, (*k.shape[:2], v.shape[2])),
        "sinks": (sinks, (heads,)),
        "weights": (weights, (rows, heads, len(k))),
    }
    for name, (x, shape) in wanted.items():
        if x is not None and tuple(x.shape) != shape:
            refuse(tuple(x.shape), f"{name}.shape", str(shape), op=_OP, error=ShapeError)


def _lengths(cu_seqlens: Any, rows: int, name: str) -> list[int]:
    """The documents' lengths."""
    ends = integers(cu_seqlens, name, op=_OP, error=ShapeError)
    lengths = [end - start for start, end in pairwise(ends)]
    if not ends or ends[0] != 0 or ends[-1] != rows or min(lengths, default=0) < 0:
        raise ShapeError(
            f"{name} is {shown(list(ends))}, but there are {rows} rows",
            op=_OP,
            where=caller(),
            fix=f"let it start at 0, never decrease, and end at {rows}",
        )
    return lengths
