"""What kernels hide: which scores of a block are none, and whether there are any, so that most blocks aren't asked.

LOWER says that segments have a lower diagonal. Without it nothing here costs more than the upper one alone.
"""

# mypy: disable-error-code=no-untyped-def
# (what a kernel takes has types of the GPU, which its docstring gives)

from __future__ import annotations

import triton.language as tl

from hetu.backends.triton.interpreter import jit


@jit
def is_cut(n, whole, hidden, LOWER: tl.constexpr):
    """Whether a row does not see all of the block of keys from n on: one before ``hidden``, or one past ``whole``."""
    cut = n >= whole
    if LOWER:
        cut = cut | (n < hidden)
    return cut


@jit
def is_visible(j, token, reach, left, low, LOWER: tl.constexpr):
    """Which of ``left`` keys j the row of a token sees: ``(tokens, keys)``.

    Those up to ``reach + token``, and with LOWER from ``low + token`` on.
    """
    visible = j[None, :] <= tl.minimum(token + reach, left - 1)[:, None]
    if LOWER:
        visible = visible & (j[None, :] >= (token + low)[:, None])
    return visible


@jit
def is_blind(token, rows, reach, k_len, low, LOWER: tl.constexpr):
    """Which of a block's rows see no key of a segment: ``(tokens,)``."""
    last = tl.minimum(token + reach, tl.minimum(k_len, reach + rows) - 1)
    blind = last < 0
    if LOWER:
        blind = blind | (last < token + low)
    return blind


@jit
def is_partly_seen(i, whole, since, LOWER: tl.constexpr):
    """Whether rows from i on see only some keys of a block: before ``whole``, and with LOWER past ``since``."""
    cut = i < whole
    if LOWER:
        cut = cut | (i > since)
    return cut


@jit
def is_seen(place, last_key, row, diagonal, lower, LOWER: tl.constexpr):
    """Which keys at ``place`` of a segment, before and past which there are others, rows of its span see.

    Row i sees those up to ``i + diagonal``, and with LOWER from ``i + lower`` on.
    """
    seen = ((place >= 0) & (place <= last_key))[:, None] & (place[:, None] <= (row + diagonal)[None, :])
    if LOWER:
        seen = seen & (place[:, None] >= (row + lower)[None, :])
    return seen
