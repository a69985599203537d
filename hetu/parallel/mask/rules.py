"""The kinds of masks: each is a few numbers, and says which bands it is for sequences of given lengths.

A new kind is a class here and a constructor of :class:`~hetu.parallel.mask.mask.Mask`.

Query i of n stands at key ``i + m - n`` of m: masks are aligned to the bottom right, as in FlashAttention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from hetu.errors import BindingError, HetuError, caller
from hetu.parallel.mask.bands import Bands
from hetu.parallel.mask.segments import IntArray, count_up
from hetu.symbols import IntSymbol

Size = int | IntSymbol

MOST = 2**53
"""The largest number in a mask: sums and differences of such are no problem for 64 bits."""


class Rule(ABC):
    """Which keys a query may see. Rules are frozen dataclasses, and so compare and hash by value.

    Attributes:
        joins: Whether positions count the whole pack, as if it were one sequence.
    """

    __slots__ = ()
    joins: ClassVar[bool] = False

    @property
    @abstractmethod
    def sizes(self) -> tuple[Size, ...]:
        """The numbers that it is made of."""

    @property
    def words(self) -> tuple[int, ...]:
        """What it is beside its sizes, as ints."""
        return ()

    @classmethod
    def made(cls, words: tuple[int, ...], sizes: tuple[Size, ...]) -> Self:
        """The rule with these words and sizes, unchecked."""
        return cls(*sizes)

    @abstractmethod
    def check(self) -> None:
        """Checks those of its numbers that are ints.

        Raises:
            HetuError: If one is out of its range.
        """

    @abstractmethod
    def bands(self, q_len: IntArray, k_len: IntArray) -> Bands:
        """The bands for sequences of these lengths, if no number is a symbol.

        Args:
            q_len: ``(B,)`` queries of each sequence.
            k_len: ``(B,)`` keys of each sequence.

        Raises:
            BindingError: If the mask doesn't fit the lengths.
        """

    @property
    @abstractmethod
    def typical_lengths(self) -> tuple[int, ...]:
        """Lengths of documents of which a drawing shows the kind."""


@dataclass(frozen=True, slots=True)
class Window(Rule):
    """A query sees the keys from ``left`` before its position to ``right`` after it; -1 is no bound."""

    left: Size
    right: Size

    @property
    def sizes(self) -> tuple[Size, ...]:
        return self.left, self.right

    def check(self) -> None:
        for name, size in zip(("left", "right"), self.sizes, strict=True):
            _demand(f"the window's {name} bound", size, -1, "give the number of keys, or -1 for no bound")

    def bands(self, q_len: IntArray, k_len: IntArray) -> Bands:
        (left, right), zeros, shift = _ints(self), np.zeros_like(q_len), k_len - q_len
        lower, upper = None if left < 0 else shift - left, None if right < 0 else shift + right
        return Bands.of(np.arange(len(q_len)), (zeros, q_len), (zeros, k_len), lower, upper)

    @property
    def typical_lengths(self) -> tuple[int, ...]:
        return (2 * max(*_ints(self), 3) + 2,)

    def __str__(self) -> str:
        names: dict[tuple[Size, Size], str] = {(-1, -1): "full()", (-1, 0): "causal()"}
        return names.get((self.left, self.right), f"window({self.left}, {self.right})")


@dataclass(frozen=True, slots=True)
class Chunked(Rule):
    """Causal inside consecutive chunks of ``size`` keys of each sequence."""

    size: Size

    @property
    def sizes(self) -> tuple[Size, ...]:
        return (self.size,)

    def check(self) -> None:
        _demand("the size of a chunk", self.size, 1, "give its number of tokens")

    def bands(self, q_len: IntArray, k_len: IntArray) -> Bands:
        (size,) = _ints(self)
        chunks = -(-k_len // size)
        sequence = np.arange(len(q_len)).repeat(chunks)
        begin = count_up(chunks) * size
        end, shift = np.minimum(begin + size, k_len[sequence]), (k_len - q_len)[sequence]
        queries = np.maximum(begin - shift, 0), np.maximum(end - shift, 0)
        return Bands.of(sequence, queries, (begin, end), None, shift)

    @property
    def typical_lengths(self) -> tuple[int, ...]:
        return (3 * _ints(self)[0],)

    def __str__(self) -> str:
        return f"chunked({self.size})"


@dataclass(frozen=True, slots=True)
class Prefix(Rule):
    """The first tokens of each sequence see each other, all others see what stands before them.

    Attributes:
        lengths: How many these are: one number per sequence, or one for all. A shorter sequence is all prefix.
        is_shared: Whether it is one for all.
    """

    lengths: tuple[Size, ...]
    is_shared: bool

    @property
    def sizes(self) -> tuple[Size, ...]:
        return self.lengths

    @property
    def words(self) -> tuple[int, ...]:
        return (int(self.is_shared),)

    @classmethod
    def made(cls, words: tuple[int, ...], sizes: tuple[Size, ...]) -> Self:
        return cls(sizes, bool(words[0]))

    def check(self) -> None:
        if self.is_shared and len(self.lengths) != 1:
            what = f"one prefix for all documents has {len(self.lengths)} lengths"
            raise HetuError(what, op="mask", where=caller(), fix="give one length")
        for number, size in enumerate(self.lengths):
            _demand("lengths" if self.is_shared else f"lengths[{number}]", size, 0, "give a number of tokens")

    def bands(self, q_len: IntArray, k_len: IntArray) -> Bands:
        given = np.array(_ints(self), np.int64)
        if self.is_shared:
            given = given.repeat(len(k_len))
        elif not (q_len.any() or k_len.any()):  # without tokens a batch has no size: any number of lengths fits
            given = np.zeros_like(k_len)
        elif len(given) != len(k_len):
            what = f"the mask has prefixes of {len(given)} documents, but there are {len(k_len)}"
            raise BindingError(what, op="mask", where=caller(), fix="give one length per document, or one for all")
        prefix, shift, zeros = np.minimum(given, k_len), k_len - q_len, np.zeros_like(k_len)
        first = np.clip(prefix - shift, 0, q_len)  # the first query behind the prefix
        each = np.arange(len(k_len))
        return Bands.of(
            np.concatenate([each, each]),
            (np.concatenate([np.maximum(-shift, 0), first]), np.concatenate([first, q_len])),
            (np.concatenate([zeros, zeros]), np.concatenate([prefix, k_len])),
            None,
            np.concatenate([k_len, shift]),
        )

    @property
    def typical_lengths(self) -> tuple[int, ...]:
        return tuple(2 * max(size, 2) for size in _ints(self))

    def __str__(self) -> str:
        return f"prefix({self.lengths[0] if self.is_shared else _listed(self.lengths)})"


KINDS = ("full", "causal", "inverse_causal", "bicausal")
"""Kinds of slices, by MagiAttention's names: no diagonal; one that ends in the last query and key; one that begins in
the first ones; both."""


@dataclass(frozen=True, slots=True)
class Slices(Rule):
    """Rectangles of queries and keys, counted over the whole pack, each with diagonals of its kind.

    Attributes:
        ranges: ``(q_start, q_stop, k_start, k_stop)`` of each slice, one after the other.
        kinds: Of each slice, one of :data:`KINDS`.
    """

    ranges: tuple[Size, ...]
    kinds: tuple[str, ...]
    joins: ClassVar[bool] = True

    @property
    def sizes(self) -> tuple[Size, ...]:
        return self.ranges

    @property
    def words(self) -> tuple[int, ...]:
        return tuple(KINDS.index(kind) for kind in self.kinds)

    @classmethod
    def made(cls, words: tuple[int, ...], sizes: tuple[Size, ...]) -> Self:
        return cls(sizes, tuple(KINDS[word] for word in words))

    def check(self) -> None:
        sizes = self.ranges
        if len(sizes) != 4 * len(self.kinds) or not set(self.kinds) <= set(KINDS):
            what = f"{len(sizes)} bounds of slices of the kinds {', '.join(map(str, self.kinds))}"
            fix = f"give four per slice, and kinds of {', '.join(KINDS)}"
            raise HetuError(what, op="mask", where=caller(), fix=fix)
        for place, size in enumerate(sizes):
            _demand(f"slice {place // 4}: a range's bound", size, 0, "count positions of the pack, from 0")
        for number in range(len(self.kinds)):
            q0, q1, k0, k1 = sizes[4 * number : 4 * number + 4]
            for name, start, stop in (("queries", q0, q1), ("keys", k0, k1)):
                if isinstance(start, int) and isinstance(stop, int) and stop < start:
                    what = f"slice {number}: its {name} end at {stop}, before they begin at {start}"
                    raise HetuError(what, op="mask", where=caller(), fix="give (start, stop) with start <= stop")
        if all(isinstance(size, int) for size in sizes) and (shared := self._bands().first_shared()):
            numbers = self._bands(np.arange(len(self.kinds))).sequence[list(shared)].tolist()
            what = f"two slices let one query see one key: slices {numbers[0]} and {numbers[1]}"
            raise HetuError(what, op="mask", where=caller(), fix="cut one of them so that no pair is in both")

    def bands(self, q_len: IntArray, k_len: IntArray) -> Bands:
        made = self._bands()
        for name, stop, tokens in (("queries", made.q_stop, q_len.sum()), ("keys", made.k_stop, k_len.sum())):
            if stop.max(initial=0) > tokens:
                what = f"the mask's slices reach to position {stop.max()} of the {name}, but there are {tokens}"
                raise BindingError(what, op="mask", where=caller(), fix="count positions of the whole pack")
        return made

    def _bands(self, sequence: IntArray | None = None) -> Bands:
        """The bands of one sequence, or each of its own."""
        q0, q1, k0, k1 = np.array(_ints(self), np.int64).reshape(-1, 4).T
        has_upper, has_lower = (np.isin(self.kinds, [kind, "bicausal"]) for kind in ("causal", "inverse_causal"))
        lower, upper = np.where(has_lower, k0 - q0, k0 - q1), np.where(has_upper, k1 - q1, k1 - q0)
        return Bands.of(np.zeros_like(q0) if sequence is None else sequence, (q0, q1), (k0, k1), lower, upper)

    @property
    def typical_lengths(self) -> tuple[int, ...]:
        return (max(_ints(self), default=1),)

    def __str__(self) -> str:
        rows = [self.ranges[i : i + 4] for i in range(0, len(self.ranges), 4)]
        q, k = (", ".join(f"({row[i]}, {row[i + 1]})" for row in rows) for i in (0, 2))
        return f"slices([{q}], [{k}], {list(self.kinds)})"


RULES: tuple[type[Rule], ...] = (Window, Chunked, Prefix, Slices)
"""All kinds; a mask's code counts them."""


def bound(rule: Rule, value: Callable[[IntSymbol], int]) -> Rule:
    """A rule with its symbols' values, checked."""
    made = rule.made(rule.words, tuple(size if isinstance(size, int) else value(size) for size in rule.sizes))
    made.check()
    return made


def _ints(rule: Rule) -> tuple[int, ...]:
    sizes = rule.sizes
    for size in sizes:
        if not isinstance(size, int):
            what = f"the mask {rule} has no value for {size}"
            raise HetuError(what, op="mask", where=caller(), fix="ask a mask of ints, or run the graph that binds it")
    return sizes  # type: ignore[return-value]


def _demand(what: str, size: Size, least: int, fix: str) -> None:
    if isinstance(size, int) and not least <= size <= MOST:
        wanted = f"at least {least}" if size < least else f"at most {MOST}"
        raise HetuError(f"{what} is {size}, expected {wanted}", op="mask", where=caller(), fix=fix)


def _listed(sizes: tuple[Size, ...]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
