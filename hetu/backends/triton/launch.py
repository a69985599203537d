"""From segment tables to kernel launches: what is kept on the device, and the forward's launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Generic, TypeVar

import numpy as np
import torch

from hetu.backends.attention.contract import AttentionState, with_positive_scale
from hetu.backends.attention.dropout import Dropout
from hetu.backends.attention.records import WorkList
from hetu.backends.attention.work import query_work
from hetu.backends.memory import copied_to
from hetu.backends.triton import autotune, running_max
from hetu.backends.triton.kernels import forward_kernel
from hetu.backends.triton.launcher import Constants, Launcher
from hetu.backends.triton.variants import (
    INTERPRETER,
    Heads,
    Tile,
    Variant,
    compiler_options,
    named_strides,
    rounded_keys,
    row_strides,
    tile,
)
from hetu.backends.triton.variants_backward import BackwardTiles, BackwardVariant
from hetu.parallel.mask.segments import QuerySpans, SegmentTable, Turn

AnyVariant = TypeVar("AnyVariant", Variant, BackwardVariant)
AnyTile = TypeVar("AnyTile", Tile, BackwardTiles)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: QuerySpans,
    table: SegmentTable,
    state: AttentionState,
    *,
    softmax_scale: float,
    turn: Turn | None = None,
    dropout: Dropout | None = None,
    key_position: np.ndarray | None = None,
) -> None:
    """One step of attention in Triton; see :class:`hetu.backends.attention.contract.Attend`.

    float16, bfloat16 and float32; head_dim 8 to 256, a multiple of 8.
    """
    _, num_q, head_dim = q.shape
    call = (q.device, q.dtype, num_q, head_dim, k.shape[1], dropout is not None, state.scores is not None)
    if softmax_scale <= 0:
        q, softmax_scale = with_positive_scale(q, softmax_scale)
    data = (q, k, v, table, state, softmax_scale, dropout, key_position)
    memo = table.memo if turn is None else turn.memo
    launch = memo.get(call)
    if launch is None:
        launch = memo[call] = _prepared(lambda launch: _run(launch, *data), spans, table, turn, *call)
    _run(launch, *data)


_forward = Launcher(forward_kernel, running_max.check)


@dataclass(frozen=True, slots=True)
class Kind(Generic[AnyVariant, AnyTile]):
    """What launches have in common that differ in their lengths alone: chosen once for all of them.

    Attributes:
        heads: Of the calls.
        shape: The tile, or the tiles.
        variants: For a segment a block, and for several.
        others: What else the compiled kernel depends on.
        keys: A number for each variant, with all of the above.
    """

    heads: Heads
    shape: AnyTile
    variants: tuple[AnyVariant, AnyVariant]
    others: Hashable
    keys: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        keys = tuple(interned((variant, self.heads, self.shape, self.others)) for variant in self.variants)
        object.__setattr__(self, "keys", keys)


@dataclass(slots=True)  # not frozen: each new set of lengths makes one
class Launch(Generic[AnyVariant, AnyTile]):
    """What a step's launches have in common, whoever's data they compute."""

    kind: Kind[AnyVariant, AnyTile]
    variant: AnyVariant
    key: int
    records: torch.Tensor
    programs: int

    @classmethod
    def of(cls, kind: Kind[AnyVariant, AnyTile], work: WorkList, device: torch.device) -> Launch[AnyVariant, AnyTile]:
        """A work list's; copies it to the device."""
        more, programs = work.has_more, len(work.items) * kind.heads.num_q // kind.heads.pack
        return cls(kind, kind.variants[more], kind.keys[more], copied_to(work.records(), device), programs)


def searched(
    kind: Kind[AnyVariant, AnyTile],
    keys_per_row: float,
    candidates: Iterable[AnyTile],
    made: Callable[[Kind[AnyVariant, AnyTile]], Launch[AnyVariant, AnyTile]],
    run: Callable[[Launch[AnyVariant, AnyTile]], None],
    device: torch.device,
) -> Kind[AnyVariant, AnyTile]:
    """A kind with the fastest shape that is known or found on the device; see :func:`autotune.tuned`."""

    def trial(shape: AnyTile) -> float:
        launch = made(replace(kind, shape=shape))
        return autotune.milliseconds(lambda: run(launch))

    variant = kind.variants[0]
    name = autotune.kind_of(variant, kind.heads, keys_per_row)
    return replace(kind, shape=autotune.tuned(name, kind.shape, candidates, None if variant.runs_on else trial, device))


def _run(
    launch: Launch[Variant, Tile],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: SegmentTable,
    state: AttentionState,
    softmax_scale: float,
    dropout: Dropout | None,
    key_position: np.ndarray | None,
) -> None:
    if launch.programs == 0:
        return
    variant = launch.variant
    out, lse = state.out, state.lse
    over_slots, over_heads, _ = lse.stride()
    scores_strides = (0, 0, 0) if state.scores is None else state.scores.stride()[:3]
    _forward(
        q.device,
        (launch.key, q.shape[0] == 1, k.shape[0] == 1, q.stride(), k.stride(), v.stride(), out.stride()),
        launch.programs,
        (
            q,
            k,
            v,
            out,
            lse,
            state.acc if variant.runs_on else None,
            state.scores,
            key_position_on(key_position, table, q.device) if variant.dropout or variant.scores else None,
            launch.records,
        ),
        (over_slots, over_heads, *scores_strides, softmax_scale, *dropout_arguments(dropout)),
        partial(_constants, launch, (q, k, v, out)),
    )


def _prepared(
    run: Callable[[Launch[Variant, Tile]], None],
    spans: QuerySpans,
    table: SegmentTable,
    turn: Turn | None,
    device: torch.device,
    dtype: torch.dtype,
    num_q: int,
    head_dim: int,
    num_kv: int,
    dropout: bool,
    scores: bool,
) -> Launch[Variant, Tile]:
    """Chooses the tile, and puts the work list on the device."""
    runs_on = turn is not None and turn.runs_on
    keys = keys_per_row(spans, table)
    call = (num_q, num_kv, head_dim, dtype, runs_on, dropout, scores, device)
    kind = _kind(*call, capability(device), rounded_keys(keys))

    def made(kind: Kind[Variant, Tile]) -> Launch[Variant, Tile]:
        return Launch.of(kind, query_work(spans, table, kind.shape.block_m // kind.heads.pack, turn), device)

    if autotune.is_wanted(device):
        kind = searched(kind, keys, autotune.forward_candidates(kind.shape), made, run, device)
    return made(kind)


@cache  # they take longer to make and to compare than to find
def _kind(
    num_q: int,
    num_kv: int,
    head_dim: int,
    dtype: torch.dtype,
    runs_on: bool,
    dropout: bool,
    scores: bool,
    device: torch.device,
    capability: int,
    keys: int,
) -> Kind[Variant, Tile]:
    variant = Variant(head_dim, dtype, runs_on, False, dropout, scores)
    heads = Heads(num_q, num_kv)
    shape = tile(variant, capability, keys, heads.pack)
    return Kind(heads, shape, (variant, replace(variant, more=True)), device)


def _constants(launch: Launch[Variant, Tile], tensors: Sequence[torch.Tensor]) -> Constants:
    """What a launch's key has to decide: a single row's stride is not its own, see :func:`row_strides`."""
    named = named_strides("QKVO", map(row_strides, tensors))
    heads, shape = launch.kind.heads, launch.kind.shape
    return launch.variant.constants(heads, shape, named), compiler_options(shape)


_keys: dict[Hashable, int] = {}


def interned(key: Hashable) -> int:
    """A number for a key that takes long to hash."""
    return _keys.setdefault(key, len(_keys))


def keys_per_row(spans: QuerySpans, table: SegmentTable) -> float:
    """Keys that a row sees on average, over the rows of spans that see any: a step may attend for few of them."""
    keys: float | None = table.memo.get("keys_per_row")
    if keys is None:
        if table.is_plain_over(spans):
            rows = spans.rows_with_lse  # all see keys, and have a place
        else:
            sees = np.zeros(len(spans), np.int64)
            sees[table.query] = 1
            rows = int(spans.length.dot(sees))
        keys = table.memo["keys_per_row"] = table.pairs(spans) / max(rows, 1)
    return keys


def key_position_on(positions: np.ndarray | None, table: SegmentTable, device: torch.device) -> torch.Tensor:
    """Positions of a buffer's keys on a device, copied there once."""
    assert positions is not None, "dropout and scores need the keys' positions"
    key = ("triton.key_position", device)
    kept = table.memo.get(key)
    if kept is None or kept[0] is not positions:
        kept = table.memo[key] = (positions, copied_to(positions.astype(np.int32), device))
    return kept[1]


def dropout_arguments(dropout: Dropout | None) -> tuple[int, int, int, float, int]:
    """What the kernels take of dropout: the key's words, the threshold, the scale of what is kept, the first head."""
    if dropout is None:
        return 0, 0, 0, 1.0, 0
    low, high = dropout.key_words
    return int32_bits(low), int32_bits(high), int32_bits(dropout.threshold), dropout.scale, dropout.first_head


def int32_bits(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


@cache
def capability(device: torch.device) -> int:
    """Compute capability of a device, 80 for sm_80."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
