"""Attention over segment tables in torch: its own flash attention on the CPU, plain matrix products otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
import torch

from hetu.backends.attention.contract import AttentionState, compute_dtype
from hetu.backends.attention.dropout import keep_mask
from hetu.backends.attention.family import AttendCall
from hetu.backends.memory import copied_to
from hetu.backends.precision import in_own_precision
from hetu.backends.torch_private import flash_attention_cpu

_BLOCK_ENTRIES = 2**22
"""Scores that the plain path holds at a time, so that memory stays linear in the lengths."""

Part = tuple[int, torch.Tensor, torch.Tensor]
"""Attention of the rows of a span from some row on over some keys: that row, out ``(H_kv, group, n, D)`` and lse
``(H_kv, group, n)``."""


@in_own_precision
def attend(call: AttendCall, state: AttentionState) -> None:
    """One step of attention in torch; see :meth:`hetu.backends.attention.family.KernelFamily.attend`.

    Computes in float32, or in float64 for float64 inputs.
    """
    call = call.with_positive_scale()
    q, k, v, spans, table, turn, dropout = call.q, call.k, call.v, call.spans, call.table, call.turn, call.dropout
    dtype = compute_dtype(q.dtype)
    acc = state.acc
    if acc is None:  # nothing runs on: build it up in the output itself if its type allows
        acc = state.out if q.dtype == dtype else torch.empty_like(state.out, dtype=dtype)
    # Everything below is (H_kv, group, T, D): keys stand beside the query heads that share them, as views with
    # stride 0, and nothing is repeated in memory.
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    out, queries = (x.unflatten(1, heads).permute(1, 2, 0, 3) for x in (acc, q.to(dtype)))
    keys, values = (x.to(dtype).permute(1, 0, 2).unsqueeze(1).expand(-1, heads[1], -1, -1) for x in (k, v))
    lse = state.lse.unflatten(1, heads)
    has_flash = q.device.type == "cpu" and flash_attention_cpu is not None
    plain = dropout is not None or state.scores is not None or not has_flash

    def parts(span: int, own: torch.Tensor, k_start: int, k_len: int, diagonal: int) -> Iterable[Part]:
        seen = slice(k_start, k_start + k_len)
        if not plain:
            return _flash(own, keys[:, :, seen], values[:, :, seen], diagonal, call.softmax_scale)
        extras = _Extras(call, span, state.scores, k_start)
        return _plain(own, keys[:, :, seen], values[:, :, seen], diagonal, call.softmax_scale, extras)

    segments = list(zip(table.k_start.tolist(), table.k_len.tolist(), table.diagonal.tolist(), strict=True))
    bounds = np.searchsorted(table.query, np.arange(len(spans) + 1)).tolist()
    places = zip(spans.start.tolist(), spans.length.tolist(), spans.slot.tolist(), spans.slot_row.tolist(), strict=True)
    for span, (start, length, slot, slot_row) in enumerate(places):
        if turn is not None and not turn.attends[span]:
            continue
        own_segments = segments[bounds[span] : bounds[span + 1]]
        rows = slice(start, start + length)
        own_lse = lse[slot, :, :, slot_row : slot_row + length] if slot >= 0 else None
        own_parts = (parts(span, queries[:, :, rows], *segment) for segment in own_segments)
        _fold(chain.from_iterable(own_parts), out[:, :, rows], own_lse, turn is None or not turn.merges[span])
        if acc is not state.out and (turn is None or not turn.continues[span]):
            state.out[rows] = acc[rows]


def _fold(parts: Iterable[Part], out: torch.Tensor, lse: torch.Tensor | None, empty: bool) -> None:
    """Merges parts into the running out and lse of a span, or begins them if ``empty``."""
    for row, part_out, part_lse in parts:
        assert lse is not None, "rows with keys have a slot"
        if empty and part_lse.shape == lse.shape:
            out.copy_(part_out)
            lse.copy_(part_lse)
        else:
            if empty:
                _clear(out, lse)
            end = row + part_lse.shape[-1]
            _merge(out[:, :, row:end], lse[:, :, row:end], part_out, part_lse)
        empty = False
    if empty:
        _clear(out, lse)


def _clear(out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """The attention over no keys."""
    out.zero_()
    if lse is not None:
        lse.fill_(-torch.inf)


def _merge(out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merges the attention over other keys into ``out (..., n, D)`` and ``lse (..., n)``, in place."""
    total = torch.logaddexp(lse, part_lse)
    shift = torch.where(total == -torch.inf, 0.0, total)  # -inf - -inf would be NaN
    out.mul_((lse - shift).exp_().unsqueeze(-1))
    out.addcmul_(part_out, (part_lse - shift).exp_().unsqueeze(-1))
    lse.copy_(total)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, diagonal: int, softmax_scale: float) -> Iterator[Part]:
    """One segment by torch's CPU flash attention, whose causal mask is aligned to the top left.

    A segment is a rectangle of keys that all rows see, and a triangle whose first row sees one key::

        diagonal = 2     x x x . .          diagonal = -1    . . .
                         x x x x .                           x . .
                         x x x x x                           x x .
    """
    flash = flash_attention_cpu
    assert flash is not None
    rows, keys = q.shape[2], k.shape[2]
    if diagonal >= keys - 1:
        yield 0, *flash(q, k, v, 0.0, False, scale=softmax_scale)
        return
    if diagonal > 0:
        yield 0, *flash(q, k[:, :, :diagonal], v[:, :, :diagonal], 0.0, False, scale=softmax_scale)
        k, v, diagonal = k[:, :, diagonal:], v[:, :, diagonal:], 0
    if -diagonal < rows:
        yield -diagonal, *flash(q[:, :, -diagonal:], k, v, 0.0, True, scale=softmax_scale)


class _Extras:
    """What a segment's keys and queries are in their document, for dropout and scores."""

    def __init__(self, call: AttendCall, span: int, scores: torch.Tensor | None, k_start: int) -> None:
        spans = call.spans
        self.dropout, self.document = call.dropout, int(spans.document[span])
        self.position, self.step = int(spans.position[span]), int(spans.step[span])
        self.column = int(spans.column[span])
        self.key_position, self.k_start = call.key_position, k_start
        self.scores = None
        if scores is not None:
            row, length = int(spans.slot_row[span]), int(spans.length[span])
            self.scores = scores[int(spans.slot[span]), :, row : row + length]

    def keys(self, number: int, device: torch.device) -> torch.Tensor:
        """Positions of the segment's first ``number`` keys."""
        assert self.key_position is not None, "dropout and scores need the keys' positions"
        part = self.key_position[self.k_start : self.k_start + number]
        return copied_to(np.asarray(part, np.int64), device)

    def write_scores(self, scores: torch.Tensor, begin: int) -> None:
        """Writes ``(H, n, keys)`` from the span's row ``begin`` on; no other segment of the span has these keys."""
        if self.scores is not None:
            columns = self.column + self.keys(scores.shape[2], scores.device)
            self.scores[:, begin : begin + scores.shape[1], columns] = scores

    def drop(self, weights: torch.Tensor, begin: int) -> torch.Tensor:
        """Applies dropout to ``(H, n, keys)`` from the span's row ``begin`` on."""
        if self.dropout is None:
            return weights
        device = weights.device
        heads, rows, keys = (torch.arange(size, device=device) for size in weights.shape)
        queries = self.position + (begin + rows) * self.step
        keep = keep_mask(self.dropout, self.document, heads, queries, self.keys(len(keys), device))
        return weights * keep * self.dropout.scale


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, diagonal: int, softmax_scale: float, extras: _Extras
) -> Iterator[Part]:
    """One segment by matrix products, a block of rows after the other."""
    (num_kv, group, rows, _), keys = q.shape, k.shape[2]
    block = max(16, _BLOCK_ENTRIES // (num_kv * group * keys))
    j = torch.arange(keys, device=q.device)
    for begin in range(0, rows, block):
        end = min(begin + block, rows)
        seen = min(keys, end + diagonal)
        if seen <= 0:
            continue
        # (H_kv, group * n, D): one matrix product a kv head, for all query heads that share it.
        s = q[:, :, begin:end].flatten(1, 2) @ k[:, 0, :seen].mT
        s = s.mul_(softmax_scale).unflatten(1, (group, -1))
        if begin + diagonal < seen - 1:
            i = torch.arange(begin, end, device=q.device).unsqueeze(1)
            s.masked_fill_(i + diagonal < j[:seen], -torch.inf)
        extras.write_scores(s.flatten(0, 1), begin)
        lse = s.logsumexp(-1)
        shift = torch.where(lse == -torch.inf, 0.0, lse)  # -inf - -inf would be NaN
        weights = extras.drop((s - shift.unsqueeze(-1)).exp_().flatten(0, 1), begin)
        yield begin, (weights.view(num_kv, -1, seen) @ v[:, 0, :seen]).unflatten(1, (group, -1)), lse
