"""A mask as a value: which keys of its document a query may see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetu.parallel.mask.segments import IntArray


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys of its document a query may see. Masks compare, hash and print by value.

    The rest of the house asks a mask what it needs to know and never which kind it is, so a new kind is written here.

    Attributes:
        name: What it is called in print.
        hides_later: Whether a query sees no key behind its own position, and all keys before it. If not, it sees all
            keys of its document.

    Example:
        >>> Mask.causal() == Mask.of(is_causal=True), str(Mask.full())
        (True, 'full')
    """

    name: str
    hides_later: bool

    @classmethod
    def causal(cls) -> Mask:
        """A query sees the keys up to its own position."""
        return CAUSAL

    @classmethod
    def full(cls) -> Mask:
        """A query sees all keys of its document."""
        return FULL

    @classmethod
    def of(cls, is_causal: bool) -> Mask:
        """The mask that the short form ``is_causal`` stands for."""
        return CAUSAL if is_causal else FULL

    def allows(self, query: IntArray, key: IntArray) -> NDArray[np.bool_]:
        """Whether queries at some positions see keys at some positions of the same document: the definition.

        Example:
            >>> Mask.causal().allows(np.arange(2)[:, None], np.arange(3)).astype(int).tolist()
            [[1, 0, 0], [1, 1, 0]]
        """
        hidden = self.hides_later & (key > query)
        return np.logical_not(hidden)

    def keys_seen(self, query: IntArray, length: IntArray) -> IntArray:
        """Number of keys that queries see: those at positions ``0 .. keys_seen - 1``.

        Args:
            query: Positions of the queries.
            length: Tokens of their documents.
        """
        return query + 1 if self.hides_later else length

    def first_row(self, key: IntArray, start: IntArray, step: IntArray) -> IntArray:
        """First row of evenly spaced queries, at positions ``start + i * step``, that sees a key; all later ones do."""
        return np.maximum(-((start - key) // step), 0) if self.hides_later else np.zeros_like(key)

    def diagonal(self, q_len: IntArray, k_len: IntArray) -> IntArray:
        """Diagonals of sequences whose last query stands at the last key; see :class:`SegmentTable`.

        Where lengths differ, masks are aligned to the bottom right, as in FlashAttention: row i of n queries stands at
        key ``i + m - n`` of m.

        Example:
            >>> Mask.causal().diagonal(np.array([2]), np.array([5])).tolist()
            [3]
        """
        return k_len - q_len if self.hides_later else k_len - 1

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Mask.{self.name}()"


CAUSAL, FULL = Mask("causal", hides_later=True), Mask("full", hides_later=False)
"""One object per mask: comparing an object with itself costs nothing."""
