"""``dropout`` in torch, with the mask computed anew wherever it is needed.

The definition, which is the same on every device:

- A use of the op draws ``(seed, offset)``. :func:`~hetu.backends.attention.dropout.dropout_key` hashes both into a key,
  together with the number of the pipeline where rows are not told apart by tokens, and 0 where they are.
- Column ``j`` of the row of token ``t`` has the 32-bit random that is word ``j % 4`` of
  ``Philox4x32-7(counter=(j // 4, low half of t, high half of t, 0), key)``.
- The element is kept if that random is at least ``floor(p * 2**32)``; kept ones are scaled by ``1 / (1 - p)``.
"""

from __future__ import annotations

import torch
from torch import fx

from hetu.backends.attention.dropout import Dropout, dropout_key, philox
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.torch.common import outputs_of

_BLOCK_ENTRIES = {"cpu": 2**20, "cuda": 2**24}
"""Elements whose randoms are computed at a time: they take several times the memory of the elements themselves."""

_MASK32 = 2**32 - 1


def dropped(dropout: Dropout, tokens: torch.Tensor, columns: int) -> torch.Tensor:
    """Which elements are set to 0.

    Args:
        dropout: Probability and key.
        tokens: int64 ``(rows,)``, the token of each row.
        columns: Elements a row.

    Returns:
        bool ``(rows, columns)``.

    Example:
        >>> round(dropped(Dropout(0.25, key=1), torch.arange(100), 100).float().mean().item(), 1)
        0.2
    """
    quads = torch.arange((columns + 3) // 4, device=tokens.device)
    low, high = (tokens & _MASK32).unsqueeze(1), (tokens >> 32 & _MASK32).unsqueeze(1)
    words = philox((quads, low, high, torch.zeros_like(low)), dropout.key_words)
    return torch.stack([word < dropout.threshold for word in words], -1).flatten(1)[:, :columns]


def _apply(x: torch.Tensor, tokens: torch.Tensor | None, dropout: Dropout) -> torch.Tensor:
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    rows = x.shape[0] if x.ndim else 1
    old, new = x.reshape(rows, -1), out.view(rows, -1)
    columns = old.shape[1]
    if tokens is None:
        tokens = torch.arange(rows, device=x.device)
    step = max(1, _BLOCK_ENTRIES.get(x.device.type, 2**20) // columns)
    for block in (slice(start, start + step) for start in range(0, rows, step)):
        torch.mul(old[block], dropout.scale, out=new[block])
        new[block].masked_fill_(dropped(dropout, tokens[block], columns), 0)
    return out


def hetu_dropout(
    x: torch.Tensor, tokens: torch.Tensor | None, random: tuple[int, int], p: float, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` with elements dropped, and the ``rng_state`` that tells which."""
    kept = _apply(x, tokens, Dropout(p, dropout_key(*random, stream))) if p else x
    return kept, torch.tensor(random, dtype=torch.int64, device="cpu")


def hetu_dropout_grad(
    grad: torch.Tensor, tokens: torch.Tensor | None, rng_state: torch.Tensor, p: float, stream: int
) -> torch.Tensor:
    """The gradient with the same elements dropped."""
    seed, offset = rng_state.tolist()
    return _apply(grad, tokens, Dropout(p, dropout_key(seed, offset, stream))) if p else grad


def _stream(cx: NodeLowering, tokens: fx.Node | None) -> int:
    return (cx.pipeline or 0) if tokens is None else 0


@lowering("dropout", backend="torch")
def _dropout(cx: NodeLowering, x: fx.Node, tokens: fx.Node | None) -> tuple[fx.Node, ...]:
    return outputs_of(cx, cx.call(hetu_dropout, x, tokens, cx.random(), cx.node.attrs["p"], _stream(cx, tokens)))


@lowering("dropout_grad", backend="torch")
def _dropout_grad(cx: NodeLowering, grad: fx.Node, tokens: fx.Node | None, rng_state: fx.Node) -> fx.Node:
    return cx.call(hetu_dropout_grad, grad, tokens, rng_state, cx.node.attrs["p"], _stream(cx, tokens))
