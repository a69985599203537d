"""How a document lies over the members of a group: ``normal``, ``sym``, ``stripe`` and ``balanced``.

First each document is cut into *pieces*, one per member: ``pieces[r, d]`` tokens of document d lie on member r. Then
a split says which tokens these are, as a table of *parts*. All in closed form: nothing here loops over tokens or
documents. How many they are, :mod:`hetu.parallel.layout.pieces` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hetu.arguments import refuse
from hetu.errors import StrategyError, caller
from hetu.parallel.layout.pieces import balance_pieces, cut_pieces, deal_pieces
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import IntArray


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


def normal(pieces: IntArray) -> Parts:
    """Contiguous, in the order of the members."""
    start = pieces.cumsum(0) - pieces
    document = np.arange(pieces.shape[1])
    return Parts(document, start, pieces, np.ones_like(pieces), first=document, is_dealt=False)


def sym(pieces: IntArray) -> Parts:
    """A front piece of half the tokens each, in order, then the back pieces in reverse order."""
    members, documents = pieces.shape
    front = pieces >> 1
    # The two pieces of the last member that has any are neighbours: one run.
    last, each = members - 1 - (pieces[::-1] > 0).argmax(0), np.arange(documents)
    front[last, each] = pieces[last, each]
    back = pieces - front
    start, length = (np.empty((members, documents, 2), np.int64) for _ in range(2))
    length[..., 0], length[..., 1] = front, back
    np.subtract(front.cumsum(0), front, out=start[..., 0])
    np.subtract(pieces.sum(0), back.cumsum(0), out=start[..., 1])
    shape = (members, 2 * documents)
    ones = np.ones(shape, np.int64)
    return Parts(each.repeat(2), start.reshape(shape), length.reshape(shape), ones, 2 * each, is_dealt=False)


def stripe(pieces: IntArray) -> Parts:
    """Tokens dealt one at a time, in the order of the members, to those that still have room.

    The deal of one document goes through stages, each ended by members whose piece is complete. In the stage from
    ``low`` to ``high`` tokens per member, all members with at least ``high`` tokens take part, and the t-th round of
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


@dataclass(frozen=True, slots=True)
class Split:
    """How documents lie over the members of a group.

    Attributes:
        pieces: Cuts documents: from ``(B + 1,)`` cu_seqlens and ``(R,)`` tokens of the members to ``(R, B)`` pieces.
        parts: Says which tokens these pieces are.
        weighs: Whether ``pieces`` may be given the weights of the documents' tokens as well.
    """

    pieces: Callable[..., IntArray]
    parts: Callable[[IntArray], Parts]
    weighs: bool = False

    def cut(self, cu_seqlens: IntArray, seq_lens: IntArray, mask: Mask | None) -> IntArray:
        """The pieces.

        Args:
            cu_seqlens: ``(B + 1,)`` cumulative lengths of the documents.
            seq_lens: ``(R,)`` tokens of each member, as many in all.
            mask: What documents are weighed by, if they are: a token's work is the keys that its document's tokens see
                on average. None takes the documents' lengths for that.
        """
        if mask is None or not self.weighs:
            return self.pieces(cu_seqlens, seq_lens)
        lengths = np.diff(cu_seqlens)
        return self.pieces(cu_seqlens, seq_lens, mask.pairs(lengths) / np.maximum(lengths, 1))


SPLITS = {
    "normal": Split(cut_pieces, normal),
    "sym": Split(deal_pieces, sym),
    "stripe": Split(deal_pieces, stripe),
    "balanced": Split(balance_pieces, sym, weighs=True),
}
"""The splits by name."""


def check_mask(mask: Any) -> None:
    """Demands a mask of numbers, or None.

    Raises:
        StrategyError: If it is something else, or a number is a symbol.
    """
    if mask is None:
        return
    if not isinstance(mask, Mask):
        refuse(mask, "mask", "a hetu.Mask or None", op="layout", error=StrategyError)
    if mask.symbols:
        what = f"the mask {mask.name} has no value for {', '.join(map(str, mask.symbols))}"
        fix = "give a mask of ints; mask.bound(...) makes one"
        raise StrategyError(what, op="layout", where=caller(), fix=fix)
