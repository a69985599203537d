"""The masks that MagiAttention's tests attend under, built from slices: one for each of its drawings."""

from __future__ import annotations

from hetu.parallel import Mask

Slice = tuple[tuple[int, int], tuple[int, int], str]

TOKENS = 24
"""Of each shape's pack."""


def _mask(*slices: Slice) -> Mask:
    return Mask.slices(*zip(*slices, strict=True))  # type: ignore[arg-type]


def _documents(kind: str) -> list[Slice]:
    return [((a, b), (a, b), kind) for a, b in ((0, 10), (10, 16), (16, 24))]


def _blocks(start: int, stop: int, size: int, first_key: int) -> list[Slice]:
    """Blocks of queries: each sees all keys up to the end of its own block."""
    ends = range(start, stop, size)
    return [((a, min(a + size, stop)), (first_key, min(a + size, stop)), "full") for a in ends]


SHAPES: dict[str, Mask] = {
    "full": _mask(((0, 24), (0, 24), "full")),
    "causal": _mask(((0, 24), (0, 24), "causal")),
    "inverse causal": _mask(((0, 24), (0, 24), "inverse_causal")),
    "bi-causal": _mask(((0, 16), (0, 24), "bicausal")),
    "varlen full": _mask(*_documents("full")),
    "varlen causal": _mask(*_documents("causal")),
    "varlen inverse causal": _mask(*_documents("inverse_causal")),
    "block causal": _mask(*_blocks(0, 24, 6, 0)),
    "varlen block causal": _mask(*_blocks(0, 12, 4, 0), *_blocks(12, 24, 4, 12)),
    "block causal whose queries overlap": _mask(
        ((0, 8), (0, 8), "full"), ((4, 16), (8, 14), "causal"), ((8, 24), (0, 8), "full"),
        ((16, 24), (14, 24), "causal"),
    ),
    "shared question": _mask(
        ((0, 6), (0, 6), "causal"),
        *[((a, b), (0, 6), "full") for a, b in ((6, 12), (12, 18), (18, 24))],
        *[((a, b), (a, b), "causal") for a, b in ((6, 12), (12, 18), (18, 24))],
    ),
    "sliding window": _mask(((0, 5), (0, 5), "causal"), ((5, 24), (1, 24), "bicausal")),
    "sliding window with a global token in front": _mask(
        ((0, 24), (0, 1), "full"), ((1, 6), (1, 6), "causal"), ((6, 24), (2, 24), "bicausal")
    ),
    "two-sided window with global tokens": _mask(
        ((0, 2), (0, 24), "full"),
        ((2, 24), (0, 2), "full"),
        ((2, 5), (2, 8), "causal"),
        ((5, 21), (2, 24), "bicausal"),
        ((21, 24), (18, 24), "inverse_causal"),
    ),
    "prefix": _mask(((0, 8), (0, 8), "full"), ((8, 24), (0, 24), "causal")),
    "causal blocks of windows": _mask(
        ((0, 8), (0, 8), "causal"), ((8, 16), (0, 8), "inverse_causal"), ((8, 16), (8, 16), "causal"),
        ((16, 24), (8, 16), "inverse_causal"), ((16, 24), (16, 24), "causal"),
    ),
    "uneven slices and queries that see nothing": _mask(
        ((3, 9), (0, 13), "causal"), ((12, 20), (10, 13), "full"), ((9, 12), (5, 24), "inverse_causal"),
        ((20, 21), (0, 24), "full"),
    ),
}  # fmt: skip
"""By name: 17 of them."""
