"""How many tokens of each document lie on each member of a group: its *pieces*, of each split.

Each function here gives them as running totals, ``(R, B + 1)``: entry ``[r, d]`` counts the tokens that member r holds
of the documents before d. So a row is the ``cu_seqlens`` of a member, and it says in which rows of the member's shard
the pieces lie; a piece is the difference of two neighbours. They are int32, which holds what a group may have and takes
half the time where there are many members and documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetu.parallel.mask.segments import IntArray

SLACK = 1 / 32
"""How much more than the mean a member may do before a document is cut, as a part of the mean; and how small a part of
a document is not worth a cut."""


Totals = NDArray[np.int32]


def cut(cu_seqlens: IntArray, seq_lens: IntArray) -> Totals:
    """Totals of ``normal``: the concatenation of all documents is cut into runs of ``seq_lens[r]`` tokens.

    Example:
        >>> cut(np.array([0, 2, 9]), np.array([3, 6])).tolist()
        [[0, 2, 3], [0, 0, 6]]
    """
    begin = (seq_lens.cumsum() - seq_lens)[:, None]
    return (cu_seqlens - begin).clip(0, seq_lens[:, None]).astype(np.int32)


def deal(cu_seqlens: IntArray, seq_lens: IntArray) -> Totals:
    """Totals of ``sym`` and ``stripe``: each document is dealt out in proportion to ``seq_lens``.

    Think of the running total T of tokens at the end of each document. Of N tokens in all, member 0 takes
    ``floor(T * n_0 / N)``, so that what it owes for rounding carries over from document to document. The rest,
    ``T - floor(T * n_0 / N)`` of ``N - n_0``, is split between member 1 and those after it by the same rule, and so on.

    Both shares never decrease as T grows by whole tokens (``T - floor(T * n_0 / N)`` is
    ``ceil(T * (N - n_0) / N)``), so no piece is negative; at ``T = N`` they are exactly ``n_0`` and ``N - n_0``, so
    every member ends with what the strategy gives it. Rounding each member's share of T by itself would not do: the
    shares would not add up to T.

    Example:
        >>> deal(np.array([0, 1, 5, 9]), np.array([3, 3, 3])).tolist()
        [[0, 0, 1, 3], [0, 0, 2, 3], [0, 1, 2, 3]]
    """
    totals = np.empty((len(seq_lens), len(cu_seqlens)), np.int32)
    rest, left = cu_seqlens.copy(), int(seq_lens.sum())
    share = np.empty_like(rest)
    for row, length in zip(totals, seq_lens.tolist(), strict=True):
        np.multiply(rest, length, out=share)  # needs int64
        share //= max(left, 1)  # left is 0 only where the rest is 0 as well
        rest -= share
        row[...] = share
        left -= length
    return totals


def balance(cu_seqlens: IntArray, seq_lens: IntArray, weights: NDArray[Any] | None = None) -> Totals:
    """Totals of ``balanced``: documents stay whole where they can, and all members get as much to do.

    A member's work on a piece is taken to be the piece's tokens times the document's *weight*. The weight is the
    document's length if none is given: exact, up to a factor, for causal and full attention to whole documents and to
    the pieces of ``sym``, whose tokens see half of their document on average.

    Documents are placed one by one, the heaviest first. What is left to be placed has some mean weight; a member whose
    tokens have to be of heavier documents than that, if it is to have its share of the work, has a *need*. The document
    goes to the member with the largest need that has room for it and stays within :data:`SLACK`; where there is none
    it is cut, and each member, in order of need, takes what it may. If that leaves the busiest member with more work
    than :func:`deal` would (members of very different sizes may have no room for what they should get), documents are
    dealt. Takes some microseconds per document, and a few nanoseconds more per document and member.

    Args:
        cu_seqlens: ``(B + 1,)`` cumulative lengths of the documents.
        seq_lens: ``(R,)`` tokens of each member, as many in all.
        weights: ``(B,)`` work that one token of each document is, in any unit; None takes the documents' lengths.

    Returns:
        ``(R, B + 1)`` running totals of the tokens of each member.

    Example:
        Two long documents and a few short ones: the member with fewer tokens gets the long tokens.

        >>> totals = balance(np.array([0, 80, 160, 164, 184, 200]), np.array([116, 84]))
        >>> np.diff(totals).tolist()
        [[0, 80, 4, 16, 16], [80, 0, 0, 4, 0]]
    """
    lengths = np.diff(cu_seqlens)
    weights = lengths if weights is None else weights
    members = _Members(seq_lens, float((lengths * weights.astype(np.float64)).sum()))
    order = (-weights).argsort(kind="stable")
    order = order[lengths[order] > 0]
    for document, length, weight in zip(order.tolist(), lengths[order].tolist(), weights[order].tolist(), strict=True):
        members.place(document, length, weight)
    totals = members.totals(len(lengths))
    most = members.share + 2 * members.slack
    if (members.share - members.work).max(initial=0.0) <= most * (1 - 1e-9):  # far from what rounding could change
        return totals
    dealt = deal(cu_seqlens, seq_lens)
    return totals if _busiest(totals, weights) <= max(_busiest(dealt, weights), most) else dealt


def _busiest(totals: Totals, weights: NDArray[Any]) -> float:
    """The work of the member that has most."""
    return float((np.diff(totals) * weights.astype(np.float64)).sum(1).max(initial=0.0))


class _Members:
    """What members have room for.

    Attributes:
        room: ``(R,)`` tokens that each still takes; floats, which hold them exactly.
        work: ``(R,)`` what each still has to do.
        share: What each is to do in all.
        slack: How much more it may do.
        need: ``(R,)`` what each had of it at the last document.
        tokens: That are still to be placed, in all.
        total: Work, likewise.
        placed: ``(document, member, tokens)`` of each piece.
    """

    def __init__(self, seq_lens: IntArray, work: float) -> None:
        self.share = work / max(int((seq_lens > 0).sum()), 1)
        self.slack = SLACK * self.share
        self.room, self.work = seq_lens.astype(np.float64), np.full(len(seq_lens), self.share)
        self.need = np.empty_like(self.work)
        self.tokens, self.total = int(seq_lens.sum()), work
        self.placed: list[tuple[int, int, int]] = []

    def place(self, document: int, length: int, weight: float) -> None:
        """Places a document, no lighter than those that follow."""
        self.tokens -= length
        self.total -= length * weight
        mean = self.total / self.tokens if self.tokens else 0.0  # weight of a token that is left
        need = np.multiply(self.room, -mean, out=self.need)
        need += self.work
        over = weight - mean  # by how much a token lowers its member's need
        # Who needs more may take more: if the neediest with room may not have it whole, nobody may.
        neediest = int(need.argmax())
        if self.room.item(neediest) < length:
            neediest = int(np.where(self.room >= length, need, -np.inf).argmax())
        if self.room.item(neediest) >= length and (
            over <= 0 or int(max(need.item(neediest) + self.slack, 0.0) / over) >= (1 - SLACK) * length
        ):
            self._take(document, neediest, length, weight)
        else:
            self._cut(document, length, weight, need, over)

    def _cut(self, document: int, length: int, weight: float, need: NDArray[np.float64], over: float) -> None:
        """Each member, in order of need, takes what it may; beyond the slack only where there is no other room."""
        most = np.minimum(np.maximum(need + self.slack, 0.0) / over, self.room) if over > 0 else self.room
        for bounds in (most, self.room):
            for member in self._with_room(need):
                tokens = min(length, int(bounds.item(member)), int(self.room.item(member)))
                if tokens:
                    self._take(document, member, tokens, weight)
                    length -= tokens
                if not length:
                    return

    def _with_room(self, need: NDArray[np.float64], few: int = 32) -> Iterator[int]:
        """Members that have room, in order of need; a few of many are found before all are sorted."""
        left = np.flatnonzero(self.room > 0)
        while len(left):
            own = need[left]
            least = -np.partition(-own, few)[few] if len(left) > 4 * few else -np.inf
            first = np.flatnonzero(own >= least)
            yield from left[first[(-own[first]).argsort(kind="stable")]].tolist()
            left, few = left[own < least], len(left)

    def _take(self, document: int, member: int, tokens: int, weight: float) -> None:
        self.room[member] -= tokens
        self.work[member] -= tokens * weight
        self.placed.append((document, member, tokens))

    def totals(self, documents: int) -> Totals:
        """``(R, B + 1)`` running totals of the pieces."""
        # A total stays as it is up to the next document of which the member holds tokens, or to the end of its row.
        members, row = len(self.room), documents + 1
        document, member, tokens = np.array(self.placed, np.int64).reshape(-1, 3).T
        place = np.concatenate([np.arange(members) * row, member * row + document + 1])
        order = place.argsort(kind="stable")
        place = place[order]
        upto = np.concatenate([np.zeros(members, np.int64), tokens])[order].cumsum()
        begins = np.flatnonzero(order < members)
        before = upto[begins].repeat(np.diff(begins, append=len(order)))
        flat = (upto - before).astype(np.int32).repeat(np.diff(place, append=members * row))
        totals: Totals = flat.reshape(members, row)
        return totals
