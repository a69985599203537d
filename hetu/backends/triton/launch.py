"""From segment tables to kernel launches: what is kept on the device, and the forward's launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from hetu.backends.attention.contract import AttentionState
from hetu.backends.attention.dropout import Dropout
from hetu.backends.attention.family import AttendCall
from hetu.backends.attention.records import WorkList
from hetu.backends.attention.work import query_work
from hetu.backends.memory import copied_to, device_copies
from hetu.backends.triton import autotune, running_max
from hetu.backends.triton.kernels import forward_kernel
from hetu.backends.triton.launcher import Constants, Launcher
from hetu.backends.triton.variants import (
    INTERPRETER,
    PackedHeads,
    Tile,
    Variant,
    compiler_options,
    named_strides,
    rounded_keys,
    row_strides,
    tile,
)
from hetu.backends.triton.variants_backward import BackwardTiles, BackwardVariant
from hetu.parallel.mask.segments import QuerySpans, SegmentTable

AnyVariant = TypeVar("AnyVariant", Variant, BackwardVariant)
AnyTile = TypeVar("AnyTile")
FoundTile = TypeVar("FoundTile", Tile, BackwardTiles)


def attend(call: AttendCall, state: AttentionState) -> None:
    """One step of attention in Triton; see :meth:`hetu.backends.attention.family.KernelFamily.attend`.

    float16, bfloat16 and float32; head_dim 8 to 256, a multiple of 8.
    """
    q, turn = call.q, call.turn
    _, num_q, head_dim = q.shape
    key = (
        q.device, q.dtype, num_q, head_dim, call.k.shape[1],
        call.dropout is not None, state.scores is not None, call.softcap > 0, call.sinks is not None,
    )  # fmt: skip
    if call.softmax_scale <= 0:
        call = call.with_positive_scale()
    owner = call.table if turn is None else turn
    work = owner.copies.get(key)
    if work is None:
        work = _prepared(call, state, *key)
        device_copies.keep(owner, key, work, work.records.nbytes)
    _run(work, call, state)


_forward = Launcher(forward_kernel, "stride_lb", running_max.check)


@dataclass(frozen=True, slots=True)
class LaunchKind(Generic[AnyVariant, AnyTile]):
    """What launches have in common that differ in their lengths alone: chosen once for all of them.

    Attributes:
        heads: The heads of the calls.
        shape: The tile, or the tiles.
        variants: For a segment per block, and for several.
        others: What else the compiled kernel depends on.
        keys: A number for each variant, with all of the above.
    """

    heads: PackedHeads
    shape: AnyTile
    variants: tuple[AnyVariant, AnyVariant]
    others: Hashable
    keys: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        keys = tuple(interned((variant, self.heads, self.shape, self.others)) for variant in self.variants)
        object.__setattr__(self, "keys", keys)


@dataclass(slots=True)  # not frozen: each new set of lengths makes one
class DeviceWork(Generic[AnyVariant, AnyTile]):
    """A step's work list on a device, and which compiled kernel does it, whatever the data.

    Attributes:
        kind: What was chosen for it.
        variant: The variant that fits the list.
        key: The number of the variant.
        records: int32, the list; see ``hetu/backends/attention/records.py``.
        programs: Size of the grid.
    """

    kind: LaunchKind[AnyVariant, AnyTile]
    variant: AnyVariant
    key: int
    records: torch.Tensor
    programs: int

    @classmethod
    def of(
        cls, kind: LaunchKind[AnyVariant, AnyTile], work: WorkList, device: torch.device
    ) -> DeviceWork[AnyVariant, AnyTile]:
        """Copies a work list to a device."""
        more, programs = work.has_more, len(work.items) * kind.heads.num_q // kind.heads.pack
        return cls(kind, kind.variants[more], kind.keys[more], copied_to(work.records(), device), programs)


ForwardKind = LaunchKind[Variant, Tile]
ForwardWork = DeviceWork[Variant, Tile]


def searched(
    kind: LaunchKind[AnyVariant, FoundTile],
    keys_per_row: float,
    candidates: Iterable[FoundTile],
    made: Callable[[LaunchKind[AnyVariant, FoundTile]], DeviceWork[AnyVariant, FoundTile]],
    run: Callable[[DeviceWork[AnyVariant, FoundTile]], None],
    device: torch.device,
) -> LaunchKind[AnyVariant, FoundTile]:
    """A kind with the fastest shape that is known or found on the device; see :func:`autotune.tuned`."""

    def trial(shape: FoundTile) -> float:
        work = made(replace(kind, shape=shape))
        return autotune.milliseconds(lambda: run(work))

    variant = kind.variants[0]
    name = autotune.kind_of(variant, kind.heads, keys_per_row)
    return replace(kind, shape=autotune.tuned(name, kind.shape, candidates, None if variant.runs_on else trial, device))


def _run(work: ForwardWork, call: AttendCall, state: AttentionState) -> None:
    if work.programs == 0:
        return
    q, k, v, out, variant, scores = call.q, call.k, call.v, state.out, work.variant, state.scores
    over_slots, over_heads, _ = state.lse.stride()
    over_scores = (0, 0, 0) if scores is None else scores.stride()
    drop = NO_DROPOUT if call.dropout is None else DropoutNumbers.of(call.dropout)
    _forward(
        q.device,
        (work.key, q.shape[0] == 1, k.shape[0] == 1, q.stride(), k.stride(), v.stride(), out.stride()),
        work.programs,
        _forward.arguments(
            q=q,
            k=k,
            v=v,
            out=out,
            lse=state.lse,
            acc_state=state.acc if variant.runs_on else None,
            scores=scores,
            sinks=call.sinks,
            key_position=key_position_on(call, q.device) if variant.dropout or variant.scores else None,
            records=work.records,
            stride_lb=over_slots,
            stride_lh=over_heads,
            stride_sb=over_scores[0],
            stride_sh=over_scores[1],
            stride_sm=over_scores[2],
            scale=call.softmax_scale,
            key_low=drop.key_low,
            key_high=drop.key_high,
            threshold=drop.threshold,
            keep_scale=drop.keep_scale,
            head_start=drop.head_start,
            softcap=call.softcap,
        ),
        _constants,
        work,
        (q, k, v, out),
    )


def _prepared(
    call: AttendCall,
    state: AttentionState,
    device: torch.device,
    dtype: torch.dtype,
    num_q: int,
    head_dim: int,
    num_kv: int,
    *extras: bool,
) -> ForwardWork:
    """Chooses the tile, and puts the work list on the device; ``extras``: dropout, scores, a softcap and sinks."""
    spans, table, turn = call.spans, call.table, call.turn
    runs_on = turn is not None and turn.runs_on
    keys = keys_per_row(spans, table)
    flags = (runs_on, table.lower is not None, *extras)
    kind = _kind(num_q, num_kv, head_dim, dtype, flags, device, capability(device), rounded_keys(keys))

    def made(kind: ForwardKind) -> ForwardWork:
        return DeviceWork.of(kind, query_work(spans, table, kind.shape.block_m // kind.heads.pack, turn), device)

    if autotune.is_wanted(device):
        candidates = autotune.forward_candidates(kind.shape)
        kind = searched(kind, keys, candidates, made, lambda work: _run(work, call, state), device)
    return made(kind)


@cache  # they take longer to make and to compare than to find
def _kind(
    num_q: int,
    num_kv: int,
    head_dim: int,
    dtype: torch.dtype,
    flags: tuple[bool, ...],
    device: torch.device,
    capability: int,
    keys: int,
) -> ForwardKind:
    runs_on, lower, dropout, scores, softcap, sinks = flags
    variant = Variant(head_dim, dtype, runs_on, False, dropout, scores, lower, softcap, sinks)
    heads = PackedHeads(num_q, num_kv)
    shape = tile(variant, capability, keys, heads.pack)
    return LaunchKind(heads, shape, (variant, replace(variant, more=True)), device)


def _constants(work: ForwardWork, tensors: Sequence[torch.Tensor]) -> Constants:
    """What a launch's key has to decide: a single row's stride is not its own, see :func:`row_strides`."""
    named = named_strides("QKVO", map(row_strides, tensors))
    heads, shape = work.kind.heads, work.kind.shape
    return work.variant.constants(heads, shape, named), compiler_options(shape)


_keys: dict[Hashable, int] = {}


def interned(key: Hashable) -> int:
    """A number for a key that takes long to hash."""
    return _keys.setdefault(key, len(_keys))


def keys_per_row(spans: QuerySpans, table: SegmentTable) -> float:
    """Keys that a row sees on average, over the rows of spans that see any: a step may attend for few of them."""
    if table.keys_per_row is None:
        if table.is_plain_over(spans):
            rows = spans.rows_with_lse  # all see keys, and have a place
        else:
            sees = np.zeros(len(spans), np.int64)
            sees[table.query] = 1
            rows = int(spans.length.dot(sees))
        table.keys_per_row = table.pairs(spans) / max(rows, 1)
    return table.keys_per_row


def key_position_on(call: AttendCall, device: torch.device) -> torch.Tensor:
    """Positions of a buffer's keys on a device, copied there once."""
    positions, table = call.key_position, call.table
    assert positions is not None, "dropout and scores need the keys' positions"
    key = ("key_position", device)
    kept: tuple[np.ndarray[Any, Any], torch.Tensor] | None = table.copies.get(key)
    if kept is None or kept[0] is not positions:
        copy = copied_to(positions.astype(np.int32), device)
        kept = device_copies.keep(table, key, (positions, copy), copy.nbytes)
    return kept[1]


class DropoutNumbers(NamedTuple):
    """What the kernels take of dropout.

    Attributes:
        key_low: The key's low word, as an int32.
        key_high: The key's high word, as an int32.
        threshold: The smallest random that keeps its entry, as an int32.
        keep_scale: What kept entries are multiplied by.
        head_start: The number of the first head.
    """

    key_low: int = 0
    key_high: int = 0
    threshold: int = 0
    keep_scale: float = 1.0
    head_start: int = 0

    @classmethod
    def of(cls, dropout: Dropout) -> DropoutNumbers:
        """The numbers of a dropout."""
        low, high = dropout.key_words
        return cls(
            key_low=int32_bits(low),
            key_high=int32_bits(high),
            threshold=int32_bits(dropout.threshold),
            keep_scale=dropout.scale,
            head_start=dropout.first_head,
        )


NO_DROPOUT = DropoutNumbers()


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
