"""How a document lies over the members of a group: ``normal``, ``sym`` and ``stripe``, in closed form.

First each document is cut into *pieces*, one a member: ``pieces[r, d]`` tokens of document d lie on member r. Then
a split says which tokens these are, as a table of *parts*. Nothing here loops over tokens or documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hetu.parallel.segments import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A table of runs of tokens: columns are intervals of documents, in order; a member has one run in each.

    The member's run in part k is ``start, start + step, ...`` (``length`` of them, perhaps none). No two parts share
    positions. In a part either the runs are blocks (step 1, one after the other) or the tokens are dealt: each
    member that takes part gets every step-th token, and all get equally many.

    Attributes:
        document: ``(K,)``, never decreasing; every document has at least one part.
        start: ``(R, K)`` position of the first token; anything where the length is 0.
        length: ``(R, K)``
        step: ``(R, K)``
        first: ``(B,)`` each document's first part.
        is_dealt: Whether tokens are dealt rather than cut into blocks.
    """

    document: IntArray
    start: IntArray
    length: IntArray
    step: IntArray
    first: IntArray
    is_dealt: bool


def cut_pieces(cu_seqlens: IntArray, seq_lens: IntArray) -> IntArray:
    """Pieces of ``normal``: the concatenation of all documents is cut into runs of ``seq_lens[r]`` tokens.

    Example:
        >>> cut_pieces(np.array([0, 2, 9]), np.array([3, 6])).tolist()
        [[2, 1], [0, 6]]
    """
    end = seq_lens.cumsum()[:, None]
    inside = np.minimum(np.maximum(cu_seqlens, end - seq_lens[:, None]), end)
    return inside[:, 1:] - inside[:, :-1]


def deal_pieces(cu_seqlens: IntArray, seq_lens: IntArray) -> IntArray:
    """Pieces of ``sym`` and ``stripe``: each document is dealt out in proportion to ``seq_lens``.

    Think of the running total T of tokens at the end of each document. Of N tokens in all, member 0 takes
    ``floor(T * n_0 / N)``, so that what it owes for rounding carries over from document to document. The rest,
    ``T - floor(T * n_0 / N)`` of ``N - n_0``, is split between member 1 and those after it by the same rule, and so on.

    Both shares never decrease as T grows by whole tokens (``T - floor(T * n_0 / N)`` is
    ``ceil(T * (N - n_0) / N)``), so no piece is negative; at ``T = N`` they are exactly ``n_0`` and ``N - n_0``, so
    every member ends with what the strategy gives it. Rounding each member's share of T by itself would not do: the
    shares would not add up to T.

    Example:
        >>> deal_pieces(np.array([0, 1, 5, 9]), np.array([3, 3, 3])).tolist()
        [[0, 1, 2], [0, 2, 1], [1, 1, 1]]
    """
    totals = np.empty((len(seq_lens), len(cu_seqlens)), np.int64)
    rest, left = cu_seqlens, int(seq_lens.sum())
    for share, length in zip(totals, seq_lens.tolist(), strict=True):
        np.multiply(rest, length, out=share)
        share //= max(left, 1)  # left is 0 only where the rest is 0 as well
        rest = rest - share
        left -= length
    return totals[:, 1:] - totals[:, :-1]


def normal(pieces: IntArray) -> Parts:
    """Contiguous, in the order of the members."""
    start = pieces.cumsum(0) - pieces
    document = np.arange(pieces.shape[1])
    return Parts(document, start, pieces, np.ones_like(pieces), first=document, is_dealt=False)


def sym(pieces: IntArray) -> Parts:
    """A front piece of half the tokens each, in order, then the back pieces in reverse order."""
    members, documents = pieces.shape
    front = pieces >> 1
    front[-1] = pieces[-1]  # the last member's two pieces are neighbours: one run
    back = pieces - front
    start, length = (np.empty((members, documents, 2), np.int64) for _ in range(2))
    length[..., 0], length[..., 1] = front, back
    np.subtract(front.cumsum(0), front, out=start[..., 0])
    np.subtract(pieces.sum(0), back.cumsum(0), out=start[..., 1])
    first, shape = np.arange(documents), (members, 2 * documents)
    ones = np.ones(shape, np.int64)
    return Parts(first.repeat(2), start.reshape(shape), length.reshape(shape), ones, 2 * first, is_dealt=False)


def stripe(pieces: IntArray) -> Parts:
    """Tokens dealt one at a time, in the order of the members, to those that still have room.

    The deal of one document goes through stages, each ended by members whose piece is complete. In the stage from
    ``low`` to ``high`` tokens a member, all members with at least ``high`` tokens take part, and the t-th round of
    the deal gives token ``dealt + t * active + rank`` to the member that is rank-th among the active ones.
    """
    levels = np.sort(pieces, axis=0).T  # (B, R): what the members hold, ascending, for each document
    is_stage = np.empty(levels.shape, bool)
    np.greater(levels[:, 1:], levels[:, :-1], out=is_stage[:, 1:])
    is_stage[:, :1] = True  # the first stage stands even if it is empty, so that every document has a part
    stage = np.flatnonzero(is_stage)
    high = levels.ravel().take(stage)
    document = stage // len(pieces)
    low = np.zeros_like(high)
    low[1:] = np.where(document[1:] == document[:-1], high[:-1], 0)
    held = pieces.take(document, axis=1)  # (R, K)
    active = held >= high
    rank = active.cumsum(0)
    step = np.maximum(rank[-1], 1)
    start = rank - 1 + np.minimum(held, low).sum(0)
    first = document.searchsorted(np.arange(pieces.shape[1]))
    return Parts(document, start, active * (high - low), np.broadcast_to(step, start.shape), first, is_dealt=True)


Split = Callable[[IntArray], Parts]

SPLITS: dict[str, tuple[Callable[[IntArray, IntArray], IntArray], Split]] = {
    "normal": (cut_pieces, normal),
    "sym": (deal_pieces, sym),
    "stripe": (deal_pieces, stripe),
}
"""Each split: how 1-D cu_seqlens become pieces, and which tokens the pieces are."""
