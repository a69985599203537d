"""A mask as a value: which keys a query may see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetu.arguments import choice, flag, integer, integers, items, refuse, shown
from hetu.errors import HetuError, caller
from hetu.parallel.mask import codes, rules, svg
from hetu.parallel.mask.bands import Bands
from hetu.parallel.mask.drawing import draw_pairs
from hetu.parallel.mask.rules import Chunked, Prefix, Rule, Size, Slices, Window
from hetu.parallel.mask.segments import IntArray
from hetu.symbols import IntSymbol, as_size

_OP = "mask"

_MOST_DRAWN = 2**31
"""The most tokens of a drawing: the pairs of one that is a single character still fit into 64 bits."""

_MOST_IN_FULL = 2**20
"""The most rows and columns of a matrix of pairs."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query may see. Masks compare, hash and print by value; ``print(mask)`` draws one.

    The methods :meth:`causal`, :meth:`full`, :meth:`window`, :meth:`chunked`, :meth:`prefix` and :meth:`slices` make
    one. Every number may be an :class:`~hetu.IntSymbol`: in a graph it is bound when the graph runs. The rest of the
    house asks a mask what it needs to know and never which kind it is.

    Attributes:
        rule: The kind and its numbers; see :mod:`hetu.parallel.mask.rules`.
        code: The same in int64 numbers, by which a compiled model takes masks; empty if one is a symbol. See
            :mod:`hetu.parallel.mask.codes`.

    Example:
        >>> Mask.window(-1, 0) == Mask.causal(), Mask.window(4, 0)
        (True, Mask.window(4, 0))
        >>> print(Mask.window(2, 0).draw(5))
        █····
        ██···
        ███··
        ·███·
        ··███
    """

    rule: Rule
    code: IntArray = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            refuse(
                self.rule, "rule", "a rule", op=_OP, fix="make masks by hetu.Mask.causal(), hetu.Mask.window(...), ..."
            )
        object.__setattr__(self, "code", codes.encode(self.rule))

    # Kinds

    @classmethod
    def causal(cls) -> Mask:
        """A query sees the keys up to its own position."""
        return CAUSAL

    @classmethod
    def full(cls) -> Mask:
        """A query sees all keys of its document."""
        return FULL

    @classmethod
    def window(cls, left: Size, right: Size) -> Mask:
        """A query at position i sees the keys ``i - left .. i + right`` of its document.

        Where a document has more keys than queries, or fewer, the last query stands at the last key, as in
        FlashAttention.

        Args:
            left: How many keys before its own a query sees; -1 for all of them.
            right: How many keys after its own a query sees; -1 for all of them.

        Raises:
            HetuError: If a bound is less than -1.
        """
        sizes = _sizes((left, right), ("left", "right"))
        return cls._checked(Window(*sizes))

    @classmethod
    def chunked(cls, size: Size) -> Mask:
        """A query sees the keys up to its own position that are in the same chunk of ``size`` tokens of its document.

        Raises:
            HetuError: If the size is not positive.
        """
        sizes = _sizes((size,), ("size",))
        return cls._checked(Chunked(*sizes))

    @classmethod
    def prefix(cls, lengths: Size | Sequence[Size]) -> Mask:
        """The first tokens of each document see each other; all later ones see the keys up to their own position.

        Args:
            lengths: How many these are: one number per document, or one for all. A document that is shorter is all
                prefix.

        Raises:
            HetuError: If a length is negative.
        """
        is_shared = isinstance(lengths, IntSymbol) or not _is_listed(lengths)
        listed = [lengths] if is_shared else items(lengths, "lengths", "a number, or one per document", op=_OP)
        sizes = _sizes(listed, [f"lengths[{i}]" for i in range(len(listed))])
        return cls._checked(Prefix(sizes, is_shared))

    @classmethod
    def slices(
        cls, q_ranges: Sequence[Sequence[Size]], k_ranges: Sequence[Sequence[Size]], kinds: Sequence[str]
    ) -> Mask:
        """Slices of the pack: the queries of a range see the keys of another range.

        Positions count the tokens of the whole pack, document after document, so a slice may cross documents.

        Args:
            q_ranges: ``(start, stop)`` of the queries of each slice.
            k_ranges: ``(start, stop)`` of the keys of each slice.
            kinds: Of each slice, by MagiAttention's names: ``"full"``; ``"causal"``, whose last query sees up to the
                last key, and each query before it one key less; ``"inverse_causal"``, whose first query sees from the
                first key on, and each query after it one key less; or ``"bicausal"``, both.

        Raises:
            HetuError: If two slices share a (query, key) pair, a range ends before it begins, or the lists differ in
                length.

        Example:
            Two answers to one question, which don't see each other:

            >>> q_ranges, k_ranges = [(0, 4), (4, 6), (4, 6)], [(0, 4), (0, 2), (4, 6)]
            >>> print(Mask.slices(q_ranges, k_ranges, ["causal", "full", "causal"]).draw(6))
            █·····
            ██····
            ███···
            ████··
            ██··█·
            ██··██
        """
        queries, keys = _ranges(q_ranges, "q_ranges"), _ranges(k_ranges, "k_ranges")
        given = enumerate(items(kinds, "kinds", "a list of names", op=_OP))
        named = tuple(choice(kind, f"kinds[{i}]", rules.KINDS, op=_OP) for i, kind in given)
        if not len(queries) == len(keys) == len(named):
            what = f"there are {len(queries)} q_ranges, {len(keys)} k_ranges and {len(named)} kinds"
            raise HetuError(what, op=_OP, where=caller(), fix="give as many of each, one per slice")
        sizes = tuple(size for q, k in zip(queries, keys, strict=True) for size in (*q, *k))
        return cls._checked(Slices(sizes, named))

    @classmethod
    def _checked(cls, rule: Rule) -> Mask:
        rule.check()
        return cls(rule)

    @classmethod
    def of(cls, is_causal: bool, window_size: tuple[Size, Size] = (-1, -1)) -> Mask:
        """The mask that the short forms ``is_causal`` and ``window_size`` stand for: causal makes the right bound 0.

        Example:
            >>> Mask.of(True, (8, 4)), Mask.of(False)
            (Mask.window(8, 0), Mask.full())
        """
        left, right = window_size
        made = cls.window(left, 0 if is_causal else right)
        return CAUSAL if made == CAUSAL else FULL if made == FULL else made

    @classmethod
    def given(cls, is_causal: Any, window_size: Any, mask: Any, op: str) -> Mask:
        """The mask that an attention's arguments say, checked.

        Args:
            is_causal: A flag.
            window_size: ``(left, right)``; :data:`NO_WINDOW` bounds nothing.
            mask: A mask, which replaces ``is_causal``, or None.
            op: Who was given them, for errors.

        Raises:
            DTypeError: If a bound of the window is neither an int nor a symbol.
            HetuError: If another argument is none of these, a bound is less than -1, or both a mask and a window came.

        Example:
            >>> Mask.given(True, (8, 4), None, op="attn"), Mask.given(True, (-1, -1), FULL, op="attn")
            (Mask.window(8, 0), Mask.full())
        """
        causal = flag(is_causal, "is_causal", op=op)
        if window_size is NO_WINDOW and mask is None:
            return CAUSAL if causal else FULL
        window = _window(window_size, op)
        if mask is None:
            return cls.of(causal, window)
        if not isinstance(mask, cls):
            refuse(mask, "mask", "a hetu.Mask", op=op, fix="give hetu.Mask.window(...), say, or None")
        if window != NO_WINDOW:
            what = f"mask and window_size were both given: {mask!r} and {shown(window_size)}"
            raise HetuError(what, op=op, where=caller(), fix="give one of them: a window is a mask, Mask.window(...)")
        return mask

    @classmethod
    def decoded(cls, code: IntArray) -> Mask:
        """The mask that has this :attr:`code`.

        Example:
            >>> Mask.decoded(Mask.chunked(3).code)
            Mask.chunked(3)
        """
        return cls(codes.decode(code))

    # What others ask

    @property
    def is_plain(self) -> bool:
        """Whether it is causal or full: a query sees all keys of its document up to some key."""
        return self.rule in (CAUSAL.rule, FULL.rule)

    @property
    def hides_later(self) -> bool:
        """Of a plain mask: whether a query sees no key behind its own position."""
        return self.rule == CAUSAL.rule

    @property
    def joins(self) -> bool:
        """Whether positions count the whole pack, as if its documents were one."""
        return self.rule.joins

    @property
    def name(self) -> str:
        """Its kind and numbers, in one line."""
        return str(self.rule).removesuffix("()")

    @property
    def symbols(self) -> tuple[IntSymbol, ...]:
        """The leaves of its symbols, each once."""
        given = (size for size in self.rule.sizes if isinstance(size, IntSymbol))
        return tuple(dict.fromkeys(leaf for size in given for leaf in size.leaves))

    def bound(self, value: Callable[[IntSymbol], int]) -> Mask:
        """The mask with a value for each symbol."""
        return Mask(rules.bound(self.rule, value)) if self.symbols else self

    def bands(self, q_len: IntArray, k_len: IntArray) -> Bands:
        """The bands that it is for sequences of these lengths, which say what every query sees: the definition.

        Args:
            q_len: ``(B,)`` queries of each sequence.
            k_len: ``(B,)`` keys of each sequence.

        Returns:
            The bands. If :attr:`joins`, they count the queries and keys of all sequences as those of sequence 0.

        Raises:
            BindingError: If the mask doesn't fit the lengths.
        """
        return self.rule.bands(q_len, k_len)

    def pairs(self, lengths: IntArray) -> IntArray:
        """``(B,)`` allowed pairs of documents, by the document of the query."""
        if not isinstance(lengths, np.ndarray) or lengths.dtype != np.int64 or lengths.ndim != 1:
            lengths = np.array(integers(lengths, "lengths", least=0, op=_OP), np.int64)
        bands = self.bands(lengths, lengths)
        if self.joins:
            bands = bands.cut_at(lengths.cumsum())
        return np.bincount(bands.sequence, bands.pairs(), minlength=len(lengths)).astype(np.int64)

    def matrix(self, queries: int, keys: int) -> NDArray[np.bool_]:
        """``(queries, keys)``: which queries of one sequence see which keys."""
        queries, keys = (
            integer(count, name, least=0, most=_MOST_IN_FULL, op=_OP)
            for name, count in (("queries", queries), ("keys", keys))
        )
        return self.bands(np.array([queries]), np.array([keys])).matrix(queries, keys)

    # Printing

    def draw(self, lengths: int | Sequence[int] | None = None, width: int = 24) -> str:
        """The mask in characters: a line per query, a column per key.

        Args:
            lengths: Of a document, or of several one after the other; None takes lengths that show what kind of mask it
                is.
            width: Most columns. In longer documents a character stands for a square of pairs: █ for all of them, ▒ for
                some, · for none.

        Example:
            >>> print(Mask.chunked(3).draw([5, 2]))
            █······
            ██·····
            ███····
            ···█···
            ···██··
            ·····█·
            ·····██
        """
        if lengths is None:
            lengths = self.rule.typical_lengths
        listed = items(lengths, "lengths", op=_OP) if _is_listed(lengths) else [lengths]
        tokens = np.array([integer(item, "lengths", least=0, most=_MOST_DRAWN, op=_OP) for item in listed], np.int64)
        total = integer(int(tokens.sum()), "the sum of lengths", least=0, most=_MOST_DRAWN, op=_OP)
        return draw_pairs(self.over_pack(tokens), total, integer(width, "width", least=1, op=_OP))

    def over_pack(self, lengths: IntArray) -> Bands:
        """The bands of documents that lie one after the other, as bands of one sequence."""
        bands = self.bands(lengths, lengths)
        return bands if self.joins else bands.joined(lengths.cumsum() - lengths)

    @property
    def _is_drawn(self) -> bool:
        return not self.symbols and sum(self.rule.typical_lengths) <= _MOST_DRAWN

    def __str__(self) -> str:
        return f"{self!r}\n{self.draw()}" if self._is_drawn else repr(self)

    def _repr_svg_(self) -> str | None:
        if not self._is_drawn:
            return None
        tokens = np.array(self.rule.typical_lengths, np.int64)
        side = 180.0
        boxes = svg.pairs(self.over_pack(tokens), np.zeros(tokens.sum(), np.int64), 10, 26, side)
        name = repr(self)
        return svg.picture(max(side + 20, 12 + 7 * len(name)), side + 36, boxes, [(10, 18, name)])

    def __repr__(self) -> str:
        return f"Mask.{self.rule}"


CAUSAL, FULL = Mask(Window(-1, 0)), Mask(Window(-1, -1))
"""One object per mask: comparing an object with itself costs nothing."""


NO_WINDOW: tuple[int, int] = (-1, -1)
"""The ``window_size`` that bounds nothing."""


def _window(given: Any, op: str) -> tuple[Size, Size]:
    """A ``window_size``, checked."""
    name, wanted = "window_size", "(left, right)"
    fix = "give how many keys before its own a query sees, and how many after it; -1 for all"
    listed = items(given, name, wanted, op=op, fix=fix)
    if len(listed) != 2:
        refuse(given, name, wanted, op=op, fix=fix)
    left, right = (as_size(size, f"{name}[{i}]", op=op) for i, size in enumerate(listed))
    for i, size in enumerate((left, right)):
        if isinstance(size, int) and size < -1:
            fix = "give the number of keys, or -1 for no bound"
            raise HetuError(f"{name}[{i}] is {shown(size)}, expected at least -1", op=op, where=caller(), fix=fix)
    return left, right


def _sizes(given: Sequence[Any], names: Sequence[str]) -> tuple[Size, ...]:
    return tuple(as_size(size, name, op=_OP, error=HetuError) for size, name in zip(given, names, strict=True))


def _ranges(given: Sequence[Sequence[Size]], name: str) -> list[tuple[Size, ...]]:
    """Pairs of a start and a stop."""
    listed, ranges = items(given, name, "a list of (start, stop)", op=_OP), []
    for number, item in enumerate(listed):
        what = f"{name}[{number}]"
        fix = "give the first position and the one after the last"
        ends = items(item, what, "(start, stop)", op=_OP, fix=fix)
        if len(ends) != 2:
            refuse(item, what, "(start, stop)", op=_OP, fix=fix)
        ranges.append(_sizes(ends, (f"{what}[0]", f"{what}[1]")))
    return ranges


def _is_listed(value: object) -> bool:
    """Whether something is given as a list rather than as one number."""
    return isinstance(value, (list, tuple)) or bool(getattr(value, "ndim", 0))
