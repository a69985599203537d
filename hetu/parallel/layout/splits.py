"""How a document lies over the members of a group: ``normal``, ``sym``, ``stripe`` and ``balanced``.

First each document is cut into *pieces*, one per member; :mod:`hetu.parallel.layout.pieces` says how large they are.
Then a split says which tokens these are, as *parts*: intervals of the document, of which each member holds a run.
All in closed form: nothing here loops over tokens or documents. Parts are those of the documents that pieces are given
of, so a member that asks for its own documents only gets no others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetu.arguments import refuse
from hetu.errors import StrategyError, caller
from hetu.parallel.layout.pieces import Totals, balance, cut, deal
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import IntArray

Ints = NDArray[Any]
"""Of int64, or of int32, which takes half the time where there are many."""


class RunsOf(NamedTuple):
    """Runs of some members, ``(m, K)`` each: ``start, start + step, ...``, of which there are ``length``, perhaps none.

    Starts of runs without tokens may be anything.
    """

    start: IntArray
    length: IntArray
    step: IntArray


class Sight(NamedTuple):
    """What queries see of the pieces of members on one side of their own: as much, all that see any.

    Attributes:
        seen: ``(R, B)`` keys of each piece that they see.
        sees: ``(K,)`` the parts whose queries do.
    """

    seen: Ints
    sees: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Parts(ABC):
    """Intervals of some documents, in order; of each interval a member holds one run.

    Attributes:
        pieces: ``(R, B)`` tokens of each document on each member.
        document: ``(K,)`` whose interval it is: a column of ``pieces``. They never decrease, and each document has one.
    """

    pieces: Ints
    document: IntArray

    @abstractmethod
    def runs(self, members: slice) -> RunsOf:
        """The runs of some members."""

    @abstractmethod
    def seen(self, member: int, owners: slice, columns: IntArray) -> tuple[Ints, Ints | None]:
        """What causal queries of a member see of the pieces of some members, which are in order of position.

        Args:
            member: Whose queries.
            owners: The members whose pieces these are.
            columns: ``(k,)`` the parts whose queries are asked for; the member has tokens in them.

        Returns:
            ``(m, k)`` keys that the last query of the run sees of the owner's piece; and the diagonals, where there are
            any: the i-th query sees the keys up to number ``i + diagonal``. None if all queries see the same.
        """

    @abstractmethod
    def used(self, members: slice, owners: slice) -> Ints:
        """``(n, m, B)`` keys that the last causal query of each of some members sees of the pieces of some others."""

    def sight(self) -> tuple[Sight, Sight] | None:
        """What causal queries see of the pieces of members before their own, and of those after it; None if it varies.

        It varies where a query of a member may see some of a piece, but less than a later one of that member does.
        """
        return None


def _total(pieces: Ints) -> Ints:
    """``(B,)`` what all members hold together, which fits where the pieces do."""
    total: Ints = np.add.reduce(pieces, 0, dtype=pieces.dtype)
    return total


def _sides(member: int, owners: slice) -> tuple[slice, slice]:
    """Which of some owners come before a member or are it, and which come after it: counted among the owners."""
    border = min(max(member + 1 - owners.start, 0), owners.stop - owners.start)
    return slice(0, border), slice(border, owners.stop - owners.start)


@dataclass(frozen=True, slots=True, eq=False)
class Blocks(Parts):
    """Each interval is cut into a block per member, in the order of the members or in the other one.

    Of two blocks of an interval one lies before the other. So a query sees of a piece what is in earlier intervals, and
    of its own interval all or nothing; only in the own run it sees up to itself.

    Attributes:
        edges: ``(R, B)`` each: tokens of a piece up to the end of the first interval of the document, of the second ...
        falls: Of each interval of a document, whether the members stand in it in falling order.
    """

    edges: tuple[Ints, ...]
    falls: tuple[bool, ...]

    def _edge(self, number: int, members: slice) -> Ints:
        """Tokens of pieces up to the beginning of an interval of each document; 0 of the first."""
        return self.edges[number - 1][members] if number else np.zeros_like(self.edges[0][members])

    def runs(self, members: slice) -> RunsOf:
        shape = members.stop - members.start, self.pieces.shape[1], len(self.edges)
        start, length = (np.empty(shape, np.int64) for _ in range(2))
        before: Ints | int = 0  # tokens in earlier intervals, of members that don't stand earlier in this one as well
        for number, falls in enumerate(self.falls):
            end, earlier = self.edges[number], slice(members.stop, None) if falls else slice(0, members.start)
            own = length[..., number]
            own[...] = end[members]
            if number:
                begin = self.edges[number - 1]
                own -= begin[members]
                before = _total(begin) - _total(begin[earlier])
            start[..., number] = _total(end[earlier]) + before
            if shape[0] > 1:
                start[..., number] += (own[::-1].cumsum(0)[::-1] if falls else own.cumsum(0)) - own
        flat = shape[0], shape[1] * shape[2]
        return RunsOf(start.reshape(flat), length.reshape(flat), np.ones(flat, np.int64))

    def seen(self, member: int, owners: slice, columns: IntArray) -> tuple[Ints, Ints | None]:
        # A table of all edges, in which each column finds what it sees of owners on either side of the member.
        own = self.pieces[owners]
        table = np.concatenate([np.zeros((len(own), 1), own.dtype), *(edge[owners] for edge in self.edges)], axis=1)
        document, number = np.divmod(columns, len(self.edges))
        begin = np.where(number > 0, 1 + document + (number - 1) * own.shape[1], 0)
        end = 1 + document + number * own.shape[1]
        falls = np.array(self.falls)[number]
        seen = np.empty((len(own), len(columns)), own.dtype)
        for side, column in zip(
            _sides(member, owners), (np.where(falls, begin, end), np.where(falls, end, begin)), strict=True
        ):
            table[side].take(column, axis=1, out=seen[side], mode="clip")
        if not owners.start <= member < owners.stop:
            return seen, None
        row = member - owners.start
        seen[row] = table[row].take(end)
        diagonal = seen - 1
        diagonal[row] = table[row].take(begin)
        return seen, diagonal

    def used(self, members: slice, owners: slice) -> Ints:
        # The last query stands in the last interval in which the member has tokens. If that is none of the last
        # interval of the document, nobody behind it has any, and of those before it the first intervals are the same.
        begin, end = self._edge(len(self.edges) - 1, owners), self.edges[-1][owners]
        before, after = (begin, end) if self.falls[-1] else (end, begin)
        return _used(self.pieces, members, owners, lambda _, some: before[some], lambda _, some: after[some])

    def sight(self) -> tuple[Sight, Sight] | None:
        sides = []
        for after in (False, True):
            # Up to which edge queries of each interval see pieces of members on this side; 0 is none.
            edges = [number + (falls == after) for number, falls in enumerate(self.falls)]
            if {*edges} - {0, edges[-1]}:
                return None
            seen = self.edges[edges[-1] - 1] if edges[-1] else np.zeros_like(self.pieces)
            sees = np.empty((self.pieces.shape[1], len(edges)), bool)
            sees[:] = [edge > 0 for edge in edges]
            sides.append(Sight(seen, sees.reshape(-1)))
        return sides[0], sides[1]


@dataclass(frozen=True, slots=True, eq=False)
class Deals(Parts):
    """Tokens of each interval are dealt one at a time to the members that take part, to all of them equally many.

    The t-th round of an interval gives a token to each of them, in the order of the members.

    Attributes:
        low: ``(K,)`` tokens of a piece in earlier intervals, of members that take part.
        high: ``(K,)`` the same with those of this interval; members whose pieces have fewer don't take part.
    """

    low: Ints
    high: Ints

    def runs(self, members: slice) -> RunsOf:
        held = self.pieces.take(self.document, axis=1)
        active = held >= self.high
        own = active[members]
        rank = active[: members.start].sum(0) + own.cumsum(0) - 1
        step = np.broadcast_to(np.maximum(active.sum(0), 1), rank.shape)
        length = own.astype(np.int64) * (self.high - self.low).astype(np.int64)
        return RunsOf(rank + np.minimum(held, self.low).sum(0), length, step)

    def seen(self, member: int, owners: slice, columns: IntArray) -> tuple[Ints, Ints | None]:
        held = self.pieces[owners].take(self.document.take(columns), axis=1)
        high, diagonal = self.high.take(columns), np.minimum(held, self.low.take(columns))
        upto, after = _sides(member, owners)
        np.minimum(held[upto], high, out=held[upto])
        np.minimum(held[after], high - 1, out=held[after])  # in the same round their tokens come later
        diagonal[after] -= 1
        np.minimum(diagonal, held - 1, out=diagonal)
        return held, diagonal

    def used(self, members: slice, owners: slice) -> Ints:
        keys = self.pieces[owners]

        def before(own: Ints, some: slice | int) -> Any:
            return np.minimum(keys[some], own)

        def after(own: Ints, some: slice | int) -> Any:
            return np.minimum(keys[some], np.maximum(own - 1, 0))

        return _used(self.pieces, members, owners, before, after)


def _used(
    pieces: Ints,
    members: slice,
    owners: slice,
    before: Callable[[Ints, slice | int], Ints],
    after: Callable[[Ints, slice | int], Ints],
) -> Ints:
    """See :meth:`Parts.used`; asks what members use of owners before or after them, given their pieces."""
    queries = pieces[members]
    used = np.empty((len(queries), owners.stop - owners.start, pieces.shape[1]), pieces.dtype)
    if len(queries) <= used.shape[1]:
        for i, own in enumerate(queries):
            for side, find in zip(_sides(members.start + i, owners), (before, after), strict=True):
                np.multiply(find(own, side), own > 0, out=used[i, side])
    else:
        for j in range(used.shape[1]):
            border = min(max(owners.start + j - members.start, 0), len(queries))
            for side, find in ((slice(0, border), after), (slice(border, None), before)):
                np.multiply(find(queries[side], j), queries[side] > 0, out=used[side, j])
    for member in range(max(members.start, owners.start), min(members.stop, owners.stop)):
        used[member - members.start, member - owners.start] = pieces[member]
    return used


def normal(pieces: Ints) -> Parts:
    """Contiguous, in the order of the members."""
    return Blocks(pieces, np.arange(pieces.shape[1]), edges=(pieces,), falls=(False,))


def sym(pieces: Ints) -> Parts:
    """A front piece of half the tokens each, in order, then the back pieces in reverse order."""
    front, each = pieces >> 1, np.arange(pieces.shape[1])
    last = _last(pieces)  # its two pieces are neighbours: one run
    front[last, each] = pieces[last, each]
    return Blocks(pieces, each.repeat(2), edges=(front, pieces), falls=(False, True))


def _last(pieces: Ints, block: int = 32) -> IntArray:
    """``(B,)`` the last member that holds tokens of each document, or any if none does; most are found near the end."""
    holds = pieces[: -block - 1 : -1] != 0
    last: IntArray = len(pieces) - 1 - holds.argmax(0)
    if len(pieces) > block and (left := np.flatnonzero(~holds.any(0))).size:
        last[left] = _last(pieces[:-block].take(left, axis=1))
    return last


def stripe(pieces: Ints) -> Parts:
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
    return Deals(pieces, document, low, high)


@dataclass(frozen=True, slots=True)
class Split:
    """How documents lie over the members of a group.

    Attributes:
        totals: Cuts documents: from ``(B + 1,)`` cu_seqlens and ``(R,)`` tokens of the members to ``(R, B + 1)``, each
            member's own cu_seqlens.
        parts: Says which tokens these pieces are.
        weighs: Whether ``totals`` may be given the weights of the documents' tokens as well.
    """

    totals: Callable[..., Totals]
    parts: Callable[[Ints], Parts]
    weighs: bool = False

    def __repr__(self) -> str:
        names = (getattr(make, "__qualname__", type(make).__name__) for make in (self.totals, self.parts))
        return f"Split({', '.join(names)}{', weighs=True' * self.weighs})"

    def cut(self, cu_seqlens: IntArray, seq_lens: IntArray, mask: Mask | None) -> Totals:
        """The totals.

        Args:
            cu_seqlens: ``(B + 1,)`` cumulative lengths of the documents.
            seq_lens: ``(R,)`` tokens of each member, as many in all.
            mask: What documents are weighed by, if they are: a token's work is the keys that its document's tokens see
                on average. None takes the documents' lengths for that.
        """
        if mask is None or not self.weighs:
            return self.totals(cu_seqlens, seq_lens)
        lengths = np.diff(cu_seqlens)
        return self.totals(cu_seqlens, seq_lens, mask.pairs(lengths) / np.maximum(lengths, 1))


SPLITS = {
    "normal": Split(cut, normal),
    "sym": Split(deal, sym),
    "stripe": Split(deal, stripe),
    "balanced": Split(balance, sym, weighs=True),
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
