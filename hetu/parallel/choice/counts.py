"""What attention to one document is, counted from its pieces: pairs that members see, and rows that travel.

All in closed form, and exact: pieces are ``(R, B)`` arrays of tokens of each document on each member, of ints or of
symbols (:mod:`hetu.parallel.choice.numbers`). Nothing here looks at a token.

Where tokens lie is as :mod:`hetu.parallel.layout.splits` has it. Under ``normal``, ``sym`` and ``balanced`` a member
holds *blocks*, one or two intervals of positions, whose ends are sums of pieces and of their halves. Under ``stripe``
its i-th token comes after ``min(n_c, i)`` tokens of each member c, or one more of those before it in the same round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hetu.errors import StrategyError, caller
from hetu.parallel.choice.numbers import Numbers, add_up, any_of, larger, lifted, smaller, triangle
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.rules import Size, Window
from hetu.symbols import IntSymbol, as_symbol

Interval = tuple[Numbers, Numbers]
"""Begin and end of a block of each document, both ``(B,)``, or ``(R, B)`` of each member."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a query sees: to ``left`` keys before itself and ``right`` after; None is no bound."""

    left: Any
    right: Any

    @classmethod
    def of(cls, mask: Mask) -> Bounds:
        """Those of a mask.

        Raises:
            StrategyError: If the mask is no window, or a bound is a symbol that may mean no bound.
        """
        rule = mask.rule
        if not isinstance(rule, Window):
            _refuse(f"the cost of {mask.name} has no closed form", _PLAN)
        for size in rule.sizes:
            if isinstance(size, IntSymbol) and not (size.min is not None and size.min >= 0):
                _refuse(
                    f"the window's bound {size} may be -1, which is no bound: what that costs is another formula",
                    f'make it IntSymbol("{size}", min=0), or give -1 itself',
                )
        return cls(*(None if size == -1 else lifted(size) for size in rule.sizes))

    @property
    def is_full(self) -> bool:
        return self.left is None and self.right is None

    @property
    def is_causal(self) -> bool:
        return self.left is None and isinstance(self.right, int) and self.right == 0


_bounds_of = lru_cache(64)(Bounds.of)

_SQUARED = 2**31
"""Counts are made of squares of numbers of tokens; of fewer than these, 64 bits hold them."""

_PLAN = "count it from a plan: g.plan(...).cost(hardware)"


def _refuse(what: str, fix: str) -> NoReturn:
    raise StrategyError(what, op="cost", where=caller(), fix=fix)


class Counts:
    """What each split counts.

    Args:
        pieces: ``(R, B)``.
        bounds: What a query sees.
    """

    def __init__(self, pieces: Numbers, bounds: Bounds) -> None:
        self.pieces, self.bounds = pieces, bounds
        self.members = len(pieces)
        self.total = add_up(pieces, 0)

    def pairs(self) -> Numbers:
        """``(R, B)`` pairs of the queries of each member with all keys of their document."""
        raise NotImplementedError

    def whole_pairs(self) -> Numbers:
        """``(B,)`` pairs of each document."""
        return self._pairs_of((self.total * 0, self.total))

    def needed(self, receivers: Sequence[int], owner: int) -> Numbers:
        """``(B,)`` rows of an owner's shard that at least one of some receivers needs; the owner is none of them."""
        raise NotImplementedError

    def taken(self) -> Numbers:
        """``(R, R)`` rows that each receiver needs of each owner, of all documents together; 0 of its own."""
        everyone, found = range(self.members), np.zeros((self.members, self.members), object)
        for r in everyone:
            for c in everyone:
                if r != c:
                    found[r, c] = self.needed([r], c).sum()
        return found

    def gaps(self, batch: Size) -> Numbers:
        """``(R,)`` 0 where a member's rows are one stretch of the group's, which follow each other; else at least 1.

        Args:
            batch: How often each document is there.
        """
        first, last = self._ends()
        if self.pieces.shape[1] == 1:
            own = self.pieces[:, 0]
            found: Numbers = (self.total * (batch - 1) + last[:, 0] - first[:, 0] - own * batch) * any_of(own)
            return found
        before, gaps = self.total.cumsum(0) - self.total, []
        for member, own in enumerate(self.pieces):
            held = own.nonzero()[0]
            if not len(held):
                gaps.append(0)
                continue
            low, high = held[0], held[-1]
            begin, end = before[low] + first[member][low], before[high] + last[member][high]
            gaps.append(end - begin - own.sum())
        return np.array(gaps)

    def _ends(self) -> tuple[Numbers, Numbers]:
        """``(R, B)`` first position and the one after the last that each member holds, where it holds any."""
        raise NotImplementedError

    def _pairs_of(self, block: Interval) -> Numbers:
        """Pairs of blocks of queries with all keys of their document."""
        (start, end), (left, right) = block, (self.bounds.left, self.bounds.right)
        if self.bounds.is_causal:  # as below, without asking whether positions are negative
            seen: Numbers = (end - start) * (start + end + 1) // 2
            return seen
        if right is None:
            seen = (end - start) * self.total
        else:  # up to i + right, of which those past the last token are none
            seen = triangle(end + right) - triangle(start + right)
            seen = seen - triangle(end + right - self.total) + triangle(start + right - self.total)
        if left is not None:
            seen = seen - triangle(end - 1 - left) + triangle(start - 1 - left)
        return seen


class Blocks(Counts):
    """Members hold blocks, ``fronts`` of which stand in the order of the members and ``backs`` in the other."""

    def __init__(self, pieces: Numbers, bounds: Bounds, *, halves: bool) -> None:
        super().__init__(pieces, bounds)
        self.front = pieces // 2 if halves else pieces
        self.back = pieces - self.front
        self.halves = halves

    @cached_property
    def fronts(self) -> Interval:
        ends = self.front.cumsum(0)
        return ends - self.front, ends

    @cached_property
    def backs(self) -> Interval:
        behind = self.total - self.back.cumsum(0)
        return behind, behind + self.back

    def pairs(self) -> Numbers:
        if self.members == 1:
            return self.whole_pairs()[None]
        if not self.halves:
            return self._pairs_of(self.fronts)
        starts, ends = zip(self.fronts, self.backs, strict=True)
        found = self._pairs_of((np.concatenate(starts), np.concatenate(ends)))
        both: Numbers = found[: self.members] + found[self.members :]
        return both

    def taken(self) -> Numbers:
        if self.members == 1:
            return np.zeros((1, 1), np.int64)
        if not (self.bounds.is_full or self.bounds.is_causal):
            return super().taken()
        have = any_of(self.pieces)
        if self.bounds.is_full:
            found: Numbers = have @ self.pieces.T
        elif self.halves:
            found = have @ self.front.T + np.where(_follows(self.members), have @ self.back.T, 0)
        else:
            found = np.where(_follows(self.members).T, have @ self.pieces.T, 0)
        found.reshape(-1)[:: self.members + 1] = 0
        return found

    def needed(self, receivers: Sequence[int], owner: int) -> Numbers:
        have: Numbers = any_of(sum(self.pieces[r] for r in receivers))
        seen: Numbers = self.pieces[owner] * have
        if self.bounds.is_full:
            return seen
        if not self.bounds.is_causal:
            seen = self._seen(receivers, _row(self.fronts, owner))
            return seen + self._seen(receivers, _row(self.backs, owner)) if self.halves else seen
        later = [r for r in receivers if (r < owner if self.halves else r > owner)]
        after = any_of(sum(self.pieces[r] for r in later)) if later else self.total * 0
        seen = self.front[owner] * (have if self.halves else after)
        return seen + self.back[owner] * after if self.halves else seen

    def _seen(self, receivers: Sequence[int], keys: Interval) -> Numbers:
        """Keys of a block that some queries see: their windows are swept from left to right, as their blocks lie."""
        blocks = [_row(self.fronts, r) for r in receivers]
        blocks += [_row(self.backs, r) for r in reversed(receivers)] if self.halves else []
        reached, seen = keys[0], keys[0] * 0
        for start, end in blocks:
            have = any_of(end - start)
            last = keys[1] if self.bounds.right is None else smaller(end + self.bounds.right, keys[1])
            first = reached if self.bounds.left is None else larger(start - self.bounds.left, reached)
            seen = seen + larger(last - first, 0) * have
            reached = larger(reached, last * have)
        return seen

    def _ends(self) -> tuple[Numbers, Numbers]:
        if not self.halves:
            return self.fronts
        has_front = any_of(self.front)
        return self.fronts[0] * has_front + self.backs[0] * (1 - has_front), self.backs[1]


@lru_cache(64)
def _follows(members: int) -> NDArray[np.bool_]:
    """``(R, R)`` whether the second member comes after the first."""
    return np.triu(np.ones((members, members), bool), 1)


def _row(blocks: Interval, member: int) -> Interval:
    return blocks[0][member], blocks[1][member]


class Dealt(Counts):
    """Tokens are dealt one at a time to the members that still have room."""

    def __init__(self, pieces: Numbers, bounds: Bounds) -> None:
        super().__init__(pieces, bounds)
        if not (bounds.is_full or bounds.is_causal) and not _are_equal(pieces):
            _refuse(
                "under the split 'stripe' the cost of a window has no closed form where members hold different lengths",
                "give all pipelines of a group the same length, take another split, or " + _PLAN,
            )

    def pairs(self) -> Numbers:
        if self.bounds.is_full:
            found: Numbers = self.pieces * self.total
        elif self.bounds.is_causal:  # the i-th query comes after i keys, or i + 1, of those that there are
            n, keys, after = self.pieces[:, None], self.pieces[None], self._after()
            found = (triangle(n - 1 + after) - triangle(n - 1 + after - keys)).sum(1)
        else:
            everyone = range(self.members)
            found = np.array([sum(self._pairs(r, c) for c in everyone) for r in everyone])
        return found

    def taken(self) -> Numbers:
        if not self.bounds.is_causal:
            return super().taken()
        found: Numbers = smaller(self.pieces[None], larger(self.pieces[:, None] - 1 + self._after(), 0)).sum(2)
        np.fill_diagonal(found, 0)
        return found

    def _after(self) -> Numbers:
        """``(R, R, 1)`` 1 where a receiver comes after an owner in each round, or is the same, else 0."""
        return np.tri(self.members, dtype=np.int64)[:, :, None]

    def _pairs(self, receiver: int, owner: int) -> Any:
        """Pairs of one member's queries with one member's keys, of equal lengths under a window."""
        n = self.pieces[receiver]
        low, high = self._steps(receiver, owner)
        below = n * 0 if low is None else _clamped(n, low)
        return (n * n if high is None else _clamped(n, high + 1)) - below

    def _steps(self, receiver: int, owner: int) -> tuple[Any, Any]:
        """A query's i-th token sees the keys from number ``i + low`` to ``i + high`` of an owner; of equal lengths."""
        left, right, apart = self.bounds.left, self.bounds.right, receiver - owner
        low = None if left is None else -((left - apart) // self.members)
        return low, None if right is None else (apart + right) // self.members

    def needed(self, receivers: Sequence[int], owner: int) -> Numbers:
        keys = self.pieces[owner]
        seen: Numbers = keys * 0
        if self.bounds.is_full:
            seen = keys * any_of(sum(self.pieces[r] for r in receivers))
        elif self.bounds.is_causal:
            for r in receivers:
                seen = larger(seen, smaller(keys, self.pieces[r] - 1 + int(owner <= r)))
        else:
            reached = seen
            for r in sorted(receivers):
                low, high = self._steps(r, owner)
                first = reached if low is None else larger(reached, low)
                last = keys if high is None else smaller(keys, keys + high)
                has_any = 1 if low is None or high is None else any_of(larger(high - low + 1, 0))
                seen = seen + larger(last - first, 0) * has_any
                reached = larger(reached, last * has_any)
        return seen

    def _ends(self) -> tuple[Numbers, Numbers]:
        first, last = [], []
        for member, own in enumerate(self.pieces):
            before = [any_of(self.pieces[r]) for r in range(member)]
            first.append(sum(before, own * 0))
            up_to = [smaller(self.pieces[r], own - 1 + int(r <= member)) for r in range(self.members)]
            last.append(sum(up_to, own * 0))
        return np.array(first), np.array(last)


def _clamped(n: Numbers, shift: Any) -> Any:
    """The sum over i from 0 to n - 1 of ``i + shift``, not below 0 and not above n."""
    return triangle(n - 1 + shift) - triangle(n * 0 + shift - 1) - triangle(shift - 1 + n * 0) + triangle(shift - 1 - n)


def _are_equal(pieces: Numbers) -> bool:
    """Whether all members hold as many tokens of each document, whatever the values of symbols."""
    items = [list(map(as_symbol, row)) for row in pieces.tolist()]
    return all(row == items[0] for row in items)


def counts_of(pieces: Numbers, split: str, mask: Mask) -> Counts:
    """The counts of a group's documents.

    Args:
        pieces: ``(R, B)`` tokens of each document on each member.
        split: Which tokens these are.
        mask: Causal, full or a window.

    Raises:
        StrategyError: If the mask has no closed form under the split.

    Example:
        >>> counts_of(np.array([[2], [3]]), "normal", Mask.causal()).pairs().tolist()
        [[3], [12]]
    """
    bounds = _bounds_of(mask)
    if pieces.dtype != object and isinstance(bounds.right, int) and pieces.sum() + bounds.right >= _SQUARED:
        pieces = pieces.astype(object)
    if split == "stripe":
        return Dealt(pieces, bounds)
    return Blocks(pieces, bounds, halves=split != "normal")
