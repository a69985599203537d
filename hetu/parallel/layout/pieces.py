"""How many tokens of each document lie on each member of a group: its *pieces*, of each split."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetu.parallel.mask.segments import IntArray

SLACK = 1 / 32
"""How much more than the mean a member may do before a document is cut, as a part of the mean; and how small a part of
a document is not worth a cut."""


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


def balance_pieces(cu_seqlens: IntArray, seq_lens: IntArray, weights: NDArray[Any] | None = None) -> IntArray:
    """Pieces of ``balanced``: documents stay whole where they can, and all members get as much to do.

    A member's work on a piece is taken to be the piece's tokens times the document's *weight*. The weight is the
    document's length if none is given: exact, up to a factor, for causal and full attention to whole documents and to
    the pieces of ``sym``, whose tokens see half of their document on average.

    Documents are placed one by one, the heaviest first. What is left to be placed has some mean weight; a member whose
    tokens have to be of heavier documents than that, if it is to have its share of the work, has a *need*. The document
    goes to the member with the largest need that has room for it and stays within :data:`SLACK`; where there is none
    it is cut, and each member, in order of need, takes what it may. If that leaves the busiest member with more work
    than :func:`deal_pieces` would (members of very different sizes may have no room for what they should get),
    documents are dealt. Takes time in proportion to documents times members, 1 to 2 µs each.

    Args:
        cu_seqlens: ``(B + 1,)`` cumulative lengths of the documents.
        seq_lens: ``(R,)`` tokens of each member, as many in all.
        weights: ``(B,)`` work that one token of each document is, in any unit; None takes the documents' lengths.

    Returns:
        ``(R, B)`` tokens of each document on each member.

    Example:
        Two long documents and a few short ones: the member with fewer tokens gets the long tokens.

        >>> balance_pieces(np.array([0, 80, 160, 164, 184, 200]), np.array([116, 84])).tolist()
        [[0, 80, 4, 16, 16], [80, 0, 0, 4, 0]]
    """
    lengths = np.diff(cu_seqlens)
    weights = lengths if weights is None else weights
    pieces = np.zeros((len(seq_lens), len(lengths)), np.int64)
    members = _Members(seq_lens.tolist(), float((lengths * weights.astype(np.float64)).sum()))
    for document in np.argsort(-weights, kind="stable").tolist():
        length = lengths.item(document)
        if length:
            for member, tokens in members.place(length, weights.item(document)):
                pieces[member, document] += tokens
    dealt, most = deal_pieces(cu_seqlens, seq_lens), members.share + 2 * members.slack
    return pieces if _busiest(pieces, weights) <= max(_busiest(dealt, weights), most) else dealt


def _busiest(pieces: IntArray, weights: NDArray[Any]) -> float:
    """The work of the member that has most."""
    return float((pieces * weights.astype(np.float64)).sum(1).max(initial=0.0))


class _Members:
    """What members have room for.

    Attributes:
        room: Tokens that each still takes.
        work: What each still has to do.
        share: What each is to do in all.
        slack: How much more it may do.
        tokens: That are still to be placed, in all.
        total: Work, likewise.
    """

    def __init__(self, seq_lens: list[int], work: float) -> None:
        self.share = work / max(sum(length > 0 for length in seq_lens), 1)
        self.slack = SLACK * self.share
        self.room, self.work = list(seq_lens), [self.share] * len(seq_lens)
        self.tokens, self.total = sum(seq_lens), work

    def place(self, length: int, weight: float) -> list[tuple[int, int]]:
        """Places a document, no lighter than those that follow; gives (member, tokens) of its pieces."""
        self.tokens -= length
        self.total -= length * weight
        mean = self.total / self.tokens if self.tokens else 0.0  # weight of a token that is left
        need = [work - mean * room for work, room in zip(self.work, self.room, strict=True)]
        by_need = sorted((r for r, room in enumerate(self.room) if room), key=lambda r: (-need[r], r))
        over = weight - mean  # by how much a token lowers its member's need
        most = [
            min(room, int(max(x + self.slack, 0.0) / over) if over > 0 else room)
            for x, room in zip(need, self.room, strict=True)
        ]
        whole = next((r for r in by_need if self.room[r] >= length and most[r] >= (1 - SLACK) * length), None)
        if whole is not None:
            return [self._take(whole, length, weight)]
        placed, left = [], length
        for bounds in (most, self.room):  # beyond the slack only where there is no other room
            for r in by_need:
                tokens = min(left, bounds[r], self.room[r])
                if tokens:
                    placed.append(self._take(r, tokens, weight))
                    left -= tokens
        return placed

    def _take(self, member: int, tokens: int, weight: float) -> tuple[int, int]:
        self.room[member] -= tokens
        self.work[member] -= tokens * weight
        return member, tokens
