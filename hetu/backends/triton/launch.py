"""From segment tables to kernel launches: what is kept on the device, and the forward's launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from hetu.backends.attention import AttentionState, with_positive_scale
from hetu.backends.dropout import Dropout
from hetu.backends.triton.kernels import forward_kernel
from hetu.backends.triton.variants import INTERPRETER, Heads, Variant, compiler_options, row_strides, tile
from hetu.backends.triton.work import WorkList, query_work
from hetu.parallel.segments import QuerySpans, SegmentTable


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: QuerySpans,
    table: SegmentTable,
    state: AttentionState,
    *,
    softmax_scale: float,
    first: bool,
    last: bool,
    dropout: Dropout | None = None,
    key_position: np.ndarray | None = None,
) -> None:
    """One step of attention in Triton; see :class:`hetu.backends.attention.Attend`.

    float16, bfloat16 and float32; head_dim 8 to 256, a multiple of 8.
    """
    heads, device = Heads(q.shape[1], k.shape[1]), q.device
    variant = Variant(q.shape[2], q.dtype, first, last, False, dropout is not None, state.scores is not None)
    shape = tile(variant, capability(device), keys_per_row(spans, table))
    tokens, cover = shape.block_m // heads.pack, first or last
    work = work_on(table, ("queries", tokens, cover), lambda: query_work(spans, table, tokens, cover), device)
    if work.items == 0:
        return
    variant = replace(variant, more=work.has_more)
    q, softmax_scale = with_positive_scale(q, softmax_scale)
    scores_strides = (0, 0, 0) if state.scores is None else state.scores.stride()[:3]
    with on_device(device):
        forward_kernel[(work.items * heads.num_q // heads.pack,)](
            q,
            k,
            v,
            state.out,
            state.lse,
            None if first and last else state.acc,
            state.scores,
            key_position_on(key_position, table, device) if variant.dropout or variant.scores else None,
            work.records,
            *state.lse.stride()[:2],
            *scores_strides,
            softmax_scale,
            *dropout_arguments(dropout),
            **variant.constants(heads, shape, row_strides(Q=q, K=k, V=v, O=state.out)),
            **compiler_options(shape),
        )


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """A work list on a device: int32 ``(rows, 16)``, how many rows are items, and if some have several segments."""

    records: torch.Tensor
    items: int
    has_more: bool


def work_on(
    table: SegmentTable, name: tuple[object, ...], build: Callable[[], WorkList], device: torch.device
) -> DeviceWork:
    """A work list on a device, made and copied there once a table."""
    key = ("triton.work", device, name)
    if key not in table.memo:
        work = build()
        records = torch.from_numpy(work.records()).to(device)
        table.memo[key] = DeviceWork(records, len(work.items), len(work.further) > 0)
    work_there: DeviceWork = table.memo[key]
    return work_there


def keys_per_row(spans: QuerySpans, table: SegmentTable) -> float:
    """Keys that a row sees on average, over the rows of q."""
    if "keys_per_row" not in table.memo:
        table.memo["keys_per_row"] = table.pairs(spans) / max(int(spans.length.sum()), 1)
    keys: float = table.memo["keys_per_row"]
    return keys


def key_position_on(positions: np.ndarray | None, table: SegmentTable, device: torch.device) -> torch.Tensor:
    """Positions of a buffer's keys on a device, copied there once."""
    assert positions is not None, "dropout and scores need the keys' positions"
    key = ("triton.key_position", device)
    kept = table.memo.get(key)
    if kept is None or kept[0] is not positions:
        kept = table.memo[key] = (positions, torch.from_numpy(positions.astype(np.int32)).to(device))
    return kept[1]


def dropout_arguments(dropout: Dropout | None) -> tuple[int, int, int, float]:
    """What the kernels take of dropout: the words of its key, the threshold, the scale of what is kept."""
    if dropout is None:
        return 0, 0, 0, 1.0
    low, high = dropout.key_words
    return int32_bits(low), int32_bits(high), int32_bits(dropout.threshold), dropout.scale


def int32_bits(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


def on_device(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """Triton launches on the current device: this makes it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def capability(device: torch.device) -> int:
    """Compute capability of a device, 80 for sm_80."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
