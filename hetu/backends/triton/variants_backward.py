"""The variants that the backward's kernels are compiled in, and their tiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from hetu.backends.triton.backward import backward_kernel
from hetu.backends.triton.variants import (
    DTYPES,
    FLAGGED_DTYPES,
    FLAGGED_HEAD_DIMS,
    HEAD_DIMS,
    INTERPRETER,
    PackedHeads,
    Tile,
    block_columns,
    compiler_options,
    is_small,
    source,
    whole_strides,
)


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """How the backward's programs cut their work; all kinds have as many warps.

    Attributes:
        keys: Of those for keys: ``block_n`` keys, and ``block_m`` query rows of one iteration.
        queries: Of those for queries: ``block_m`` query rows, and ``block_n`` keys of one iteration.
        is_split: Whether keys and values have programs of their own.
        own_values: Of those for values, if they have programs of their own and another tile than keys.
        chunk: Records that programs take for some heads before they take them for the next ones.
    """

    keys: Tile
    queries: Tile
    is_split: bool = False
    own_values: Tile | None = None
    chunk: int = 64

    @property
    def values(self) -> Tile:
        """Of programs for values."""
        return self.own_values or self.keys


@dataclass(frozen=True, slots=True)
class BackwardVariant:
    """What the kernel is specialised for.

    Attributes:
        head_dim: 8 to 256, a multiple of 8.
        dtype: Of q, k, v and dout.
        runs_on: Whether there are running gradients of queries, of earlier steps or for later ones.
        more: Whether a block of rows sees several segments, or a block of keys is seen through several.
        dropout: Whether entries are dropped.
        lower: Whether segments have a lower diagonal.
        softcap: Whether scores are capped.
    """

    head_dim: int
    dtype: torch.dtype
    runs_on: bool = False
    more: bool = False
    dropout: bool = False
    lower: bool = False
    softcap: bool = False

    def of_work(self, has_more: bool) -> BackwardVariant:
        """The variant that computes a work list.

        With dropout a step of several always takes the one for several segments: of the other, Triton 3.9 makes code in
        which each product on tensor cores waits for the one before, a third slower.
        """
        return replace(self, more=has_more or (self.runs_on and self.dropout))

    def constants(self, heads: PackedHeads, tiles: BackwardTiles, strides: dict[str, int]) -> dict[str, Any]:
        """The kernel's compile-time arguments. ``strides``: those of q, k, v, dout, dq, dq_state, dk and dv."""
        return {
            **strides,
            "HEADS": heads.num_q,
            "GROUP": heads.group,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": block_columns(self.head_dim),
            "KEY_M": tiles.keys.block_m,
            "KEY_N": tiles.keys.block_n,
            "KEY_STAGES": tiles.keys.num_stages,
            "VALUE_M": tiles.values.block_m,
            "VALUE_N": tiles.values.block_n,
            "VALUE_STAGES": tiles.values.num_stages,
            "PACK": heads.pack,
            "CHUNK": tiles.chunk,
            "THREADS": max(32 * tiles.keys.num_warps, 2 * max(tiles.keys.block_m, tiles.values.block_m)),
            "QUERY_M": tiles.queries.block_m,
            "QUERY_N": tiles.queries.block_n,
            "QUERY_STAGES": tiles.queries.num_stages,
            "SPLIT": tiles.is_split,
            "MASKS_ALL": tiles.keys.masks_all,
            "LOWER": self.lower,
            "SOFTCAP": self.softcap,
            "RUNS_ON": self.runs_on,
            "MORE": self.more,
            "DROPOUT": self.dropout,
            "PRECISION": tiles.keys.precision,
            "KEY_OWN": _own(tiles.keys, tiles.keys.block_n),
            "VALUE_OWN": _own(tiles.values, tiles.values.block_n),
            "QUERY_OWN": _own(tiles.queries, tiles.queries.block_m),
        }

    def source(self, heads: PackedHeads, tiles: BackwardTiles) -> dict[str, Any]:
        """Arguments of ``triton.compiler.ASTSource`` that compile what a launch would, without a GPU."""
        element = "*" + DTYPES[self.dtype]
        types: dict[str, str] = dict.fromkeys(("q", "k", "v", "dout", "dq"), element)
        types |= dict.fromkeys(
            ("dk", "dv"), "*fp32" if self.runs_on else element
        )  # of several steps they are summed up
        types |= dict.fromkeys(("lse", "delta"), "*fp32")
        types |= {"records": "*i32", "scale": "fp32", "keep_scale": "fp32", "softcap": "fp32"}
        types |= {"dq_state": "*fp32"} if self.runs_on else {}
        types |= {"key_position": "*i32"} if self.dropout else {}
        q, kv = heads.num_q, heads.num_kv
        strides = whole_strides(self.head_dim, {"Q": q, "K": kv, "V": kv, "D": q, "DQ": q, "DS": q, "DK": kv, "DV": kv})
        return source(backward_kernel, types, self.constants(heads, tiles, strides))


def _own(tile: Tile, rows: int) -> int:
    """Scores of a thread, where the kernel knows which: where a warp has whole ones of the ``rows`` of its tile."""
    knows = tile.knows_threads and rows >= 16 * tile.num_warps
    return tile.block_m * tile.block_n // (32 * tile.num_warps) if knows else 0


def backward_options(tiles: BackwardTiles) -> dict[str, Any]:
    """The compiler's options."""
    every = (tiles.keys, tiles.values, tiles.queries)
    assert len({tile.num_warps for tile in every}) == 1, "all kinds of programs are of one launch"
    assert len({tile.precision for tile in every}) == 1
    assert len({tile.masks_all for tile in every}) == 1
    assert tiles.is_split or tiles.own_values is None, "values have no programs of their own"
    return compiler_options(tiles.keys)


def backward_tile(variant: BackwardVariant, capability: int, keys_per_row: float = 0.0) -> BackwardTiles:
    """The tiles of a variant. From sm_90 on the fastest of those measured on an H100; see ``docs/kernels.md``.

    Args:
        variant: What the kernel is specialised for.
        capability: Compute capability, 80 for sm_80; :data:`INTERPRETER` for the interpreter.
        keys_per_row: Keys that a query row sees on average.

    Example:
        >>> backward_tile(BackwardVariant(128, torch.bfloat16), 90).queries.block_m
        64
        >>> backward_tile(BackwardVariant(256, torch.bfloat16), 90).queries.block_m
        128
    """
    width = block_columns(variant.head_dim)
    if capability == INTERPRETER:
        tile = Tile(64, 64, 4, 1, precision="ieee" if variant.dtype == torch.float32 else "tf32")
        return BackwardTiles(tile, tile)
    if variant.dtype == torch.float32:
        return _float32_tile(width, capability)
    if is_small(capability):  # what 99 KB of shared memory allow; not measured
        if width <= 64:
            return BackwardTiles(Tile(32, 64, 4, 2, masks_all=True), Tile(64, 64, 4, 2, masks_all=True))
        if width == 128:
            return BackwardTiles(Tile(32, 64, 8, 1), Tile(64, 32, 8, 2))
        return BackwardTiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
    tiles = _half_tiles(width, variant.softcap, keys_per_row)
    if capability > 90:  # the elements of a thread are known of the tensor cores of sm_90
        return tiles
    values = replace(tiles.own_values, knows_threads=True) if tiles.own_values else None
    keys, queries = (replace(tile, knows_threads=True) for tile in (tiles.keys, tiles.queries))
    return replace(tiles, keys=keys, queries=queries, own_values=values)


def _half_tiles(width: int, has_softcap: bool, keys_per_row: float) -> BackwardTiles:
    """For the tensor cores of sm_90 and later; see :func:`backward_tile`."""
    if width <= 64:
        # Registers for three programs a multiprocessor. A cap needs some, which larger blocks would spill.
        if keys_per_row < 1536 or has_softcap:
            return BackwardTiles(Tile(32, 64, 4, 3, max_registers=168), Tile(64, 64, 4, 3))
        return BackwardTiles(Tile(32, 128, 4, 3), Tile(128, 64, 4, 3))
    if width == 128:
        return BackwardTiles(Tile(32, 64, 4, 3), Tile(64, 64, 4, 2))
    # The accumulators of keys and values together would leave blocks of 64 keys, and twice the reads.
    values = Tile(64, 128, 8, 2)  # they hold no tile of v, which leaves memory for twice the rows
    return BackwardTiles(Tile(32, 128, 8, 3), Tile(128, 32, 8, 3), is_split=True, own_values=values)


def _float32_tile(width: int, capability: int) -> BackwardTiles:
    """See ``variants._float32_tile``."""
    if width > 128:
        return BackwardTiles(Tile(16, 16, 8, 1, precision="ieee"), Tile(16, 16, 8, 1, precision="ieee"))
    if is_small(capability):
        keys = Tile(32, 64 if width <= 64 else 32, 8, 1, precision="ieee")
        return BackwardTiles(keys, replace(keys, block_n=32))
    if width <= 64:
        return BackwardTiles(Tile(32, 64, 4, 1, precision="tf32x3"), Tile(64, 32, 4, 2, precision="tf32x3"))
    return BackwardTiles(Tile(32, 32, 4, 1, precision="tf32x3"), Tile(64, 32, 4, 1, precision="tf32x3"))


def backward_variants(
    head_dims: Iterable[int] = HEAD_DIMS, dtypes: Iterable[torch.dtype] = tuple(DTYPES)
) -> Iterator[BackwardVariant]:
    """Every variant of the backward that a run may ask for; a mask's and a softcap's as of the forward's."""
    head_dims, dtypes, flags = list(head_dims), list(dtypes), (False, True)
    for head_dim, dtype, runs_on, more, dropout in product(head_dims, dtypes, flags, flags, flags):
        variant = BackwardVariant(head_dim, dtype, runs_on, dropout=dropout).of_work(more)
        if variant.more == more:
            yield variant
    for head_dim, dtype, flag in product(
        FLAGGED_HEAD_DIMS.intersection(head_dims), FLAGGED_DTYPES.intersection(dtypes), ("lower", "softcap")
    ):
        flagged: dict[str, Any] = {flag: True}
        yield BackwardVariant(head_dim, dtype, **flagged)
