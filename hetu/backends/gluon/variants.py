"""The variants that the Gluon kernels are compiled in: compile-time constants and how to compile without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from hetu.backends.triton.variants import PackedHeads, Variant
from hetu.backends.triton.variants import source as portable_source

ROWS = 64
"""Rows of a consumer: what one product of four warps takes."""

HEAD_DIMS = (64, 128, 256)
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
"""The element types that the kernels take, by Triton's names."""


def options(consumers: int) -> dict[str, Any]:
    """The compiler's options: 65,536 registers for all warps, which ``gl.warp_specialize`` deals out."""
    return {"num_warps": 4, "maxnreg": {2: 168, 3: 128}[consumers]}


@dataclass(frozen=True)
class Constants:
    """What a forward kernel is compiled for. The names are in capitals, as those of Triton's constants are.

    Attributes:
        HEAD_DIM: 64, 128 or 256.
        HEADS: Query heads.
        GROUP: Query heads that share a key head.
        PACK: Heads of a tile.
        CONSUMERS: Groups of warps that compute; each has 64 of the rows of a tile.
        BLOCK_N: Keys of a block.
        STAGES: Buffers for blocks of keys and of values.
        Q_BUFFERS: Buffers for the queries of a consumer.
        CHUNK: Items that programs take for some heads before they take them for the next ones.
        OUT_STRIDE_T: Elements between tokens of the output.
        OUT_STRIDE_H: Elements between its heads.
        RUNS_ON: Whether there are running results, of earlier steps or for later ones.
        MORE: Whether a block of rows sees several segments.
        LOWER: Whether segments have a lower diagonal.
        SOFTCAP: Whether scores are capped.
        SINKS: Whether each head has a sink.
    """

    HEAD_DIM: int
    HEADS: int
    GROUP: int
    PACK: int
    CONSUMERS: int
    BLOCK_N: int
    STAGES: int
    Q_BUFFERS: int
    CHUNK: int
    OUT_STRIDE_T: int
    OUT_STRIDE_H: int
    RUNS_ON: bool
    MORE: bool
    LOWER: bool
    SOFTCAP: bool
    SINKS: bool

    @property
    def SETS(self) -> int:  # noqa: N802 - a constant of kernels
        """Sets of heads that an item of the work list is computed for, one after the other."""
        return self.HEADS // self.PACK

    @property
    def PREFETCHES(self) -> bool:  # noqa: N802
        """Whether a tile's first scores are computed while the tile before is stored."""
        return self.Q_BUFFERS == 2


@dataclass(frozen=True)
class Tile:
    """How the forward kernel cuts its work.

    Attributes:
        consumers: As of :attr:`Constants.CONSUMERS`.
        block_n: Keys of a block.
        stages: Buffers for blocks of keys and of values.
        q_buffers: Buffers for the queries of a consumer.
        chunk: As of :attr:`Constants.CHUNK`.
    """

    consumers: int = 2
    block_n: int = 128
    stages: int = 2
    q_buffers: int = 2
    chunk: int = 16

    @property
    def block_m(self) -> int:
        """Query rows of a program: tokens times packed heads."""
        return self.consumers * ROWS


LONG = 8192
"""Keys that a row sees on average from which on the kernel is ahead of the portable one at head_dim 64.

It is bound by exponentials there, of which two consumers cannot compute more than the portable one's four programs.
"""


def tile(variant: Variant, is_long: bool) -> Tile | None:
    """The tile of a variant, the fastest of those measured on an H200; None where the portable kernels are faster.

    Args:
        variant: What the kernel is specialised for.
        is_long: Whether a query row sees :data:`LONG` keys or more on average.
    """
    if variant.head_dim == 64:
        return Tile(consumers=3) if is_long else None
    if variant.head_dim == 256:  # 192 KB of shared memory already with one buffer for queries
        return Tile(block_n=64, q_buffers=1)
    return Tile()


def constants(variant: Variant, heads: PackedHeads, tile: Tile, out_strides: tuple[int, int]) -> Constants:
    """The kernel's constants; ``out_strides`` are those of the output over tokens and heads."""
    return Constants(
        HEAD_DIM=variant.head_dim,
        HEADS=heads.num_q,
        GROUP=heads.group,
        PACK=heads.pack,
        CONSUMERS=tile.consumers,
        BLOCK_N=tile.block_n,
        STAGES=tile.stages,
        Q_BUFFERS=tile.q_buffers,
        CHUNK=tile.chunk,
        OUT_STRIDE_T=out_strides[0],
        OUT_STRIDE_H=out_strides[1],
        RUNS_ON=variant.runs_on,
        MORE=variant.more,
        LOWER=variant.lower,
        SOFTCAP=variant.softcap,
        SINKS=variant.sinks,
    )


def boxes(of: Constants) -> tuple[list[int], list[int]]:
    """The boxes that TMA copies: of queries and outputs, and of keys and values."""
    return [ROWS // of.PACK, of.PACK, of.HEAD_DIM], [of.BLOCK_N, 1, of.HEAD_DIM]


def types(variant: Variant) -> dict[str, str]:
    """Triton's names of the types of a forward's arguments, but for descriptors."""
    numbers = {"items": "i32", "stride_lb": "i32", "stride_lh": "i32", "scale": "fp32", "softcap": "fp32"}
    pointers = {"out": f"*{DTYPES[variant.dtype]}", "lse": "*fp32", "records": "*i32"}
    pointers |= {"acc_state": "*fp32"} if variant.runs_on else {}
    return {**pointers, **({"sinks": "*fp32"} if variant.sinks else {}), **numbers}


def source(kernel: Any, types: dict[str, str], of: Constants, dtype: torch.dtype) -> Any:
    """What ``triton.compile`` compiles, without a GPU, as a launch would.

    Args:
        kernel: The kernel.
        types: Triton's names of its arguments' types, but for descriptors; what isn't there is None.
        of: Its constants.
        dtype: Of queries, keys, values and the output.
    """
    from triton.experimental.gluon._runtime import GluonASTSource

    queries, keys = (descriptor_type(box, dtype) for box in boxes(of))
    described = {"q_desc": queries, "o_desc": queries, "k_desc": keys, "v_desc": keys}
    return GluonASTSource(**portable_source(kernel, {**types, **described}, {"C": of}))


def descriptor_type(box: list[int], dtype: torch.dtype) -> str:
    """Triton's name of the type of a tensor's descriptor."""
    return f"tensordesc<{DTYPES[dtype]}{box},{layout(tuple(box))!r}>"


@cache  # every launch asks for it
def layout(box: tuple[int, ...]) -> Any:
    """How a box lies in shared memory: in swizzled rows of 128 bytes, as tensor cores read them."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(list(box), gl.float16)
