"""The variants and tiles of the backward's kernels; see :mod:`hetu.backends.triton.variants`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from hetu.backends.triton.backward import key_gradient_kernel, query_gradient_kernel
from hetu.backends.triton.variants import DTYPES, HEAD_DIMS, INTERPRETER, Tile, block_columns, compiler_options, source


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """How both kernels cut their work."""

    keys: Tile
    queries: Tile


@dataclass(frozen=True, slots=True)
class BackwardVariant:
    """What the backward's kernels are specialised for.

    Attributes:
        head_dim: 8 to 256, a multiple of 8.
        dtype: Of q, k, v and dout.
        first: Whether the gradient of q holds nothing yet.
        dropout: Whether entries were dropped.
    """

    head_dim: int
    dtype: torch.dtype
    first: bool = True
    dropout: bool = False

    def key_constants(self, num_q: int, num_kv: int, tile: Tile) -> dict[str, Any]:
        """Compile-time arguments of the kernel for keys and values."""
        return {
            "HEADS": num_q,
            "GROUP": num_q // num_kv,
            "HEAD_DIM": self.head_dim,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_D": block_columns(self.head_dim),
            "DROPOUT": self.dropout,
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
        }

    def query_constants(self, num_q: int, num_kv: int, tile: Tile) -> dict[str, Any]:
        """Compile-time arguments of the kernel for queries."""
        return {**self.key_constants(num_q, num_kv, tile), "FIRST": self.first}

    def options(self, tile: Tile) -> dict[str, Any]:
        """The compiler's options."""
        return compiler_options(self.dtype, tile)

    def sources(self, num_q: int, num_kv: int, tiles: BackwardTiles) -> list[tuple[dict[str, Any], Tile]]:
        """Arguments of ``triton.compiler.ASTSource`` for both kernels, each with its tile."""
        element = "*" + DTYPES[self.dtype]
        types: dict[str, str] = dict.fromkeys(("q", "k", "v", "dout"), element)
        types |= dict.fromkeys(("lse", "delta", "dq", "dk", "dv"), "*fp32")
        types |= dict.fromkeys(("items", "visits", "spans", "segments"), "*i32")
        types |= {"scale": "fp32", "keep_scale": "fp32"} | ({"key_position": "*i32"} if self.dropout else {})
        keys = source(key_gradient_kernel, types, self.key_constants(num_q, num_kv, tiles.keys))
        queries = source(query_gradient_kernel, types, self.query_constants(num_q, num_kv, tiles.queries))
        return [(keys, tiles.keys), (queries, tiles.queries)]


def backward_tile(variant: BackwardVariant, capability: int) -> BackwardTiles:
    """The tiles of a variant.

    From sm_90 on the fastest of those measured on an H100 over 32,768 tokens of real document lengths (8,192 in
    float32). The larger ones keep some values in local memory, mostly where blocks are masked, and are still up to four
    times faster than the largest that keep none. Below sm_90 the same as far as 99 KB of shared memory allow.

    Args:
        variant: What the kernels are specialised for.
        capability: Compute capability, 80 for sm_80; :data:`INTERPRETER` for the interpreter.

    Example:
        >>> backward_tile(BackwardVariant(128, torch.bfloat16), 90).keys
        Tile(block_m=32, block_n=128, num_warps=8, num_stages=2)
    """
    width = block_columns(variant.head_dim)
    if capability == INTERPRETER:
        return BackwardTiles(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1))
    is_hopper = capability >= 90
    if variant.dtype == torch.float32:  # no tensor cores: operands live in registers
        if width <= 64:
            return BackwardTiles(Tile(32, 64, 8, 1), Tile(64, 64 if is_hopper else 32, 8, 1))
        if width == 128:
            return BackwardTiles(Tile(32, 64 if is_hopper else 32, 8, 1), Tile(64 if is_hopper else 32, 32, 8, 1))
        return BackwardTiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))
    if width <= 64:
        return BackwardTiles(Tile(32, 128, 4, 2), Tile(128, 64, 4, 3 if is_hopper else 2))
    if width == 128:
        return BackwardTiles(Tile(32, 128, 8, 2), Tile(128, 64, 8, 3 if is_hopper else 2))
    if is_hopper:
        return BackwardTiles(Tile(32, 64, 8, 2), Tile(128, 32, 8, 2))
    return BackwardTiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))


def backward_variants(
    head_dims: Iterable[int] = HEAD_DIMS, dtypes: Iterable[torch.dtype] = tuple(DTYPES)
) -> Iterator[BackwardVariant]:
    """Every variant of the backward that a run may ask for."""
    for head_dim, dtype, first, dropout in product(head_dims, dtypes, (False, True), (False, True)):
        yield BackwardVariant(head_dim, dtype, first, dropout)
