"""The variants that the backward's kernels for Hopper are compiled in: compile-time constants, tiles and types."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from hetu.backends.gluon.variants import DTYPES, ROWS, descriptor_type
from hetu.backends.triton.variants import PackedHeads
from hetu.backends.triton.variants import source as portable_source
from hetu.backends.triton.variants_backward import BackwardVariant

HEAD_DIMS = (128,)
"""At 64 the portable kernels are faster, as exponentials bound both; at 256 the gradients of 64 keys and of their
values would take all registers of a consumer."""

LONG = 512
"""Keys that a row sees on average from which on these kernels are ahead of the portable ones."""

CONSUMERS = 2
BLOCK_KEYS = CONSUMERS * ROWS
"""Keys of a tile of the kernel of keys."""


@dataclass(frozen=True)
class _Constants:
    """What both kernels are compiled for; see :class:`hetu.backends.gluon.variants.Constants`.

    Attributes:
        HEAD_DIM: 64 (in tests) or 128.
        HEADS: Query heads.
        GROUP: Query heads that share a key head.
        PACK: Heads of a block of query rows.
        STAGES: Buffers of the ring.
        CHUNK: Items that programs take for some heads before they take them for the next ones.
        MORE: Whether an item has several segments.
        LOWER: Whether segments have a lower diagonal.
        SOFTCAP: Whether scores are capped.
    """

    HEAD_DIM: int
    HEADS: int
    GROUP: int
    PACK: int
    STAGES: int
    CHUNK: int
    MORE: bool
    LOWER: bool
    SOFTCAP: bool

    @property
    def CONSUMERS(self) -> int:  # noqa: N802 - a constant of kernels
        """Groups of warps that compute."""
        return CONSUMERS

    @property
    def Q_BUFFERS(self) -> int:  # noqa: N802
        """Buffers for the rows of a consumer."""
        return 1


@dataclass(frozen=True)
class KeyConstants(_Constants):
    """Of the kernel of keys.

    Attributes:
        BLOCK_M: Query rows of an iteration.
        DK_STRIDE_T: Elements between rows of dk; the others likewise.
    """

    BLOCK_M: int
    DK_STRIDE_T: int
    DK_STRIDE_H: int
    DV_STRIDE_T: int
    DV_STRIDE_H: int

    @property
    def SETS(self) -> int:  # noqa: N802
        """Key heads, for each of which an item is computed."""
        return self.HEADS // self.GROUP

    def boxes(self) -> tuple[list[int], list[int]]:
        """Those of queries and of keys."""
        return [self.BLOCK_M // self.PACK, self.PACK, self.HEAD_DIM], [BLOCK_KEYS, 1, self.HEAD_DIM]


@dataclass(frozen=True)
class QueryConstants(_Constants):
    """Of the kernel of queries.

    Attributes:
        BLOCK_N: Keys of an iteration.
        RUNS_ON: Whether there are running results, of earlier steps or for later ones.
        DQ_STRIDE_T: Elements between rows of dq; the others likewise.
    """

    BLOCK_N: int
    RUNS_ON: bool
    DQ_STRIDE_T: int
    DQ_STRIDE_H: int
    STATE_STRIDE_T: int
    STATE_STRIDE_H: int

    @property
    def SETS(self) -> int:  # noqa: N802
        """Sets of PACK heads, for each of which an item is computed."""
        return self.HEADS // self.PACK

    def boxes(self) -> tuple[list[int], list[int]]:
        """Those of queries and of keys."""
        return [ROWS // self.PACK, self.PACK, self.HEAD_DIM], [self.BLOCK_N, 1, self.HEAD_DIM]


@dataclass(frozen=True)
class BackwardTile:
    """How the kernels cut their work.

    Attributes:
        block_m: Query rows of an iteration of the kernel of keys.
        row_stages: Its buffers for them.
        block_n: Keys of an iteration of the kernel of queries.
        key_stages: Its buffers for them.
        chunk: As of the constants.
    """

    block_m: int = 64
    row_stages: int = 3
    block_n: int = 64
    key_stages: int = 4
    chunk: int = 16


def tile(variant: BackwardVariant) -> BackwardTile:
    """The tile of a variant."""
    return BackwardTile()


def _shared(variant: BackwardVariant, heads: PackedHeads, tile: BackwardTile, stages: int) -> dict[str, Any]:
    return {
        "HEAD_DIM": variant.head_dim,
        "HEADS": heads.num_q,
        "GROUP": heads.group,
        "PACK": heads.pack,
        "STAGES": stages,
        "CHUNK": tile.chunk,
        "LOWER": variant.lower,
        "SOFTCAP": variant.softcap,
    }


Strides = tuple[int, int]


@cache  # every launch asks for it
def key_constants(
    variant: BackwardVariant,
    heads: PackedHeads,
    tile: BackwardTile,
    has_more: bool,
    dk: Strides,
    dv: Strides,
) -> KeyConstants:
    """Those of the kernel of keys; the strides are those over rows and heads."""
    shared = _shared(variant, heads, tile, tile.row_stages)
    return KeyConstants(
        **shared,
        MORE=has_more,
        BLOCK_M=tile.block_m,
        DK_STRIDE_T=dk[0],
        DK_STRIDE_H=dk[1],
        DV_STRIDE_T=dv[0],
        DV_STRIDE_H=dv[1],
    )


@cache
def query_constants(
    variant: BackwardVariant, heads: PackedHeads, tile: BackwardTile, has_more: bool, dq: Strides, state: Strides
) -> QueryConstants:
    """Those of the kernel of queries, likewise."""
    shared = _shared(variant, heads, tile, tile.key_stages)
    return QueryConstants(
        **shared,
        MORE=has_more,
        BLOCK_N=tile.block_n,
        RUNS_ON=variant.runs_on,
        DQ_STRIDE_T=dq[0],
        DQ_STRIDE_H=dq[1],
        STATE_STRIDE_T=state[0],
        STATE_STRIDE_H=state[1],
    )


def source(kernel: Any, of: KeyConstants | QueryConstants, variant: BackwardVariant) -> Any:
    """What ``triton.compile`` compiles, without a GPU, as a launch would."""
    from triton.experimental.gluon._runtime import GluonASTSource

    element = f"*{DTYPES[variant.dtype]}"
    queries, keys = (descriptor_type(box, variant.dtype) for box in of.boxes())
    types = {"q_desc": queries, "dout_desc": queries, "k_desc": keys, "v_desc": keys}
    types |= {"lse": "*fp32", "delta": "*fp32", "records": "*i32", "scale": "fp32", "softcap": "fp32"}
    grads = "*fp32" if variant.runs_on else element  # of several steps they are summed up
    types |= {"dk": grads, "dv": grads} if isinstance(of, KeyConstants) else {"dq": element}
    if isinstance(of, KeyConstants):
        types |= {"counter": "*i32"}
    if variant.runs_on and isinstance(of, QueryConstants):
        types |= {"dq_state": "*fp32"}
    return GluonASTSource(**portable_source(kernel, types, {"C": of}))
