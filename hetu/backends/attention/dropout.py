"""The dropout mask of attention: a function of who attends to what, and of nothing else.

The definition, which every backend computes bit for bit:

- A call of an op draws ``(seed, offset)``, and each group of pipelines that shares a sequence has a number
  ``group``. :func:`dropout_key` hashes the three into a 64-bit key, on the host.
- The query at position ``i`` and the key at position ``j`` of document ``b`` meet in query head ``h`` with the
  32-bit random that is word ``j % 4`` of ``Philox4x32-7(counter=(j // 4, i, b, h), key=(low half, high half))``.
- The entry is kept if that random is at least ``floor(p * 2**32)``; kept entries are scaled by ``1 / (1 - p)``.

Positions count in the whole document, so a mask depends neither on tiles nor on how the document is cut into
pipelines. Seven rounds are the fewest that pass BigCrush (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), which is also where the generator and its constants come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ROUNDS = 7

_MASK32 = 2**32 - 1
_MASK64 = 2**64 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout of attention probabilities.

    Attributes:
        p: Probability that an entry is dropped, in ``[0, 1)``.
        key: 64-bit key of the mask, from :func:`dropout_key`.
        first_head: Number of the first query head at hand, where these are not all that there are.
    """

    p: float
    key: int
    first_head: int = 0

    @property
    def threshold(self) -> int:
        """The smallest 32-bit random that keeps its entry."""
        return math.floor(self.p * 2**32)

    @property
    def scale(self) -> float:
        """What kept entries are multiplied by."""
        return 1.0 / (1.0 - self.p)

    @property
    def key_words(self) -> tuple[int, int]:
        """The key's low and high 32 bits."""
        return self.key & _MASK32, self.key >> 32


def dropout_key(seed: int, offset: int, group: int) -> int:
    """Hashes what a call of an op draws from into the 64-bit key of its mask.

    Folds the three numbers in one after another, each through the finaliser of SplitMix64 (Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).

    Args:
        seed: Of the generator.
        offset: How far the generator had advanced.
        group: The number of the group of pipelines, so that groups draw from different streams.

    Example:
        >>> dropout_key(7, 0, 0) != dropout_key(7, 0, 1)
        True
    """
    state = 0
    for word in (seed, offset, group):
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def philox(counter: Words, key: tuple[int, int], rounds: int = ROUNDS) -> Words:
    """Philox4x32: four 32-bit randoms from a 128-bit counter and a 64-bit key.

    Args:
        counter: Four int64 tensors with values in ``[0, 2**32)`` and shapes that broadcast.
        key: Two 32-bit ints.
        rounds: Of the generator; 7 in hetu's definition.

    Returns:
        Four int64 tensors of 32-bit values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The product of 32-bit words wraps in int64; its bits are still those of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def keep_mask(
    dropout: Dropout, document: torch.Tensor | int, heads: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Which entries dropout keeps, for every head, query and key at hand.

    Args:
        dropout: Probability and key.
        document: The documents' numbers: an int, or int64 ``(Q,)``, one a query.
        heads: int64 ``(H,)``, query heads, counted from ``dropout.first_head``.
        queries: int64 ``(Q,)``, positions in the document.
        keys: int64 ``(K,)``, positions in the document.

    Returns:
        bool ``(H, Q, K)``.

    Example:
        >>> rows = torch.arange(100)
        >>> round(keep_mask(Dropout(0.25, key=1), 0, torch.arange(2), rows, rows).float().mean().item(), 1)
        0.8
    """
    # Four neighbouring keys share one evaluation: evaluate each quad once, then pick every key's word.
    quads, quad_of_key = torch.unique(keys >> 2, return_inverse=True)
    documents = torch.as_tensor(document, dtype=torch.int64, device=keys.device).reshape(1, -1, 1)
    counter = (
        quads.reshape(1, 1, -1),
        queries.reshape(1, -1, 1),
        documents,
        (heads + dropout.first_head).reshape(-1, 1, 1),
    )
    words = torch.stack(philox(counter, dropout.key_words), dim=-1)
    return words.flatten(-2)[..., quad_of_key * 4 + (keys & 3)] >= dropout.threshold
