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
from hetu.backends.memory import HasCopies, copied_to, device_copies
from hetu.backends.triton import autotune, running_max
from hetu.backends.triton.bound import BoundLaunch
from hetu.backends.triton.kernels import forward_kernel
from hetu.backends.triton.launcher import Arguments, Constants, Launcher
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
    if call.softmax_scale <= 0:
        call = call.with_positive_scale()
    owner = call.table if call.turn is None else call.turn
    like = ("triton", *forward_key(call, state))
    bound: Bound[ForwardWork] | None = owner.copies.get(like)
    if bound is not None and bound(_arguments(bound.work, call, state)):
        return
    q = call.q
    _, num_q, head_dim = q.shape
    key = (
        q.device, q.dtype, num_q, head_dim, call.k.shape[1],
        call.dropout is not None, state.scores is not None, call.softcap > 0, call.sinks is not None,
    )  # fmt: skip
    work = owner.copies.get(key)
    if work is None:
        work = _prepared(call, state, *key)
        device_copies.keep(owner, key, work, work.records.nbytes)
    keep_bound(owner, like, bind(work, _forward, _run(work, call, state), q.device, work.programs))


def forward_key(call: AttendCall, state: AttentionState) -> tuple[Hashable, ...]:
    """What calls of a step have in common that differ in their numbers and in their tensors' memory alone."""
    q, k, out = call.q, call.k, state.out
    return (
        *("forward", q.device, q.dtype, q.shape, k.shape, q.stride(), k.stride(), call.v.stride(), out.stride()),
        *(call.dropout is None, state.scores is None, call.softcap > 0, call.sinks is None),
    )


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


Work = TypeVar("Work")


@dataclass(frozen=True, slots=True)
class Bound(Generic[Work]):
    """A launch that was made once, kept to be made again for other tensors; see :class:`BoundLaunch`.

    Attributes:
        work: What it does, on the device.
        programs: Size of its grid.
        launch: Launches it.
    """

    work: Work
    programs: int
    launch: BoundLaunch

    def __call__(self, arguments: Arguments) -> bool:
        """Launches it, if it can be; see :meth:`BoundLaunch.__call__`."""
        return self.launch(self.programs, *arguments)


def bind(
    work: Work,
    launcher: Launcher,
    key: Hashable,
    device: torch.device,
    programs: int,
    boxes: Sequence[Any] = (),
) -> Bound[Work] | None:
    """What makes a launch again that was just made; None if it can't be made again so.

    Args:
        work: What it does.
        launcher: Who launched it.
        key: Under which key.
        device: Of the tensors.
        programs: Size of the grid.
        boxes: Descriptors of its first tensors.
    """
    found = launcher.kept(key)
    if found is None:
        return None
    launch = BoundLaunch.of(found[0], device, found[1], boxes)
    return None if launch is None else Bound(work, programs, launch)


def keep_bound(owner: HasCopies, like: Hashable, bound: Any) -> None:
    """Keeps what makes a step's launches again with the step, under what all of these calls have in common."""
    if bound is not None and like not in owner.copies:
        device_copies.keep(owner, like, bound, 0)


ForwardKind = LaunchKind[Variant, Tile]
ForwardWork = DeviceWork[Variant, Tile]


def searched(
    kind: LaunchKind[AnyVariant, FoundTile],
    keys_per_row: float,
    candidates: Iterable[FoundTile],
    made: Callable[[LaunchKind[AnyVariant, FoundTile]], DeviceWork[AnyVariant, FoundTile]],
    run: Callable[[DeviceWork[AnyVariant, FoundTile]], object],
    device: torch.device,
) -> LaunchKind[AnyVariant, FoundTile]:
    """A kind with the fastest shape that is known or found on the device; see :func:`autotune.tuned`."""

    def trial(shape: FoundTile) -> float:
        work = made(replace(kind, shape=shape))
        return autotune.milliseconds(lambda: run(work))

    variant = kind.variants[0]
    name = autotune.kind_of(variant, kind.heads, keys_per_row)
    return replace(kind, shape=autotune.tuned(name, kind.shape, candidates, None if variant.runs_on else trial, device))


def _run(work: ForwardWork, call: AttendCall, state: AttentionState) -> Hashable:
    """Launches a step, unless it has nothing to do; gives the launch's key."""
    if work.programs == 0:
        return None
    q, k, v, out = call.q, call.k, call.v, state.out
    key = (work.key, q.shape[0] > 1, k.shape[0] > 1, q.stride(), k.stride(), v.stride(), out.stride())
    _forward(q.device, key, work.programs, _arguments(work, call, state), _constants, work, (q, k, v, out))
    return key


def _arguments(work: ForwardWork, call: AttendCall, state: AttentionState) -> Arguments:
    q, variant, scores = call.q, work.variant, state.scores
    over_slots, over_heads, _ = state.lse.stride()
    over_scores = (0, 0, 0) if scores is None else scores.stride()
    drop = NO_DROPOUT if call.dropout is None else DropoutNumbers.of(call.dropout)
    return _forward.arguments(
        q=q,
        k=call.k,
        v=call.v,
        out=state.out,
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
