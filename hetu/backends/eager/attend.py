"""Attention over segment tables in torch: its own flash attention on the CPU, plain matrix products otherwise.

The flash attention knows no lower diagonal, no softcap and no dropout.
"""

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

_MOST_ROWS = 256
"""Rows of a block under a lower diagonal. With each row more it sees a key more, of which a row hides most: of few rows
that costs little, and what the block holds stays in the cache."""

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
    plain = dropout is not None or state.scores is not None or table.lower is not None or call.softcap > 0
    plain = plain or not has_flash
    sinks = None if call.sinks is None else call.sinks.view(*heads, 1)
    limit = torch.finfo(dtype).max / 2
    is_ordinary = plain or _largest_score(q, k, call.softmax_scale) < limit

    def parts(
        span: int, own: torch.Tensor, k_start: int, k_len: int, diagonal: int, lower: int | None
    ) -> Iterable[Part]:
        seen = slice(k_start, k_start + k_len)
        operands = own, keys[:, :, seen], values[:, :, seen]
        if plain:
            extras = _Extras(call, span, state.scores, k_start)
            return _plain(*operands, diagonal, call.softmax_scale, lower, call.softcap, extras)
        if is_ordinary or _largest_score(own, k[seen], call.softmax_scale) < limit:
            return _flash(*operands, diagonal, call.softmax_scale)
        return _mended(*operands, diagonal, call.softmax_scale)

    lower = [None] * len(table) if table.lower is None else table.lower.tolist()
    segments = list(zip(table.k_start.tolist(), table.k_len.tolist(), table.diagonal.tolist(), lower, strict=True))
    bounds = np.searchsorted(table.query, np.arange(len(spans) + 1)).tolist()
    places = zip(spans.start.tolist(), spans.length.tolist(), spans.slot.tolist(), spans.slot_row.tolist(), strict=True)
    for span, (start, length, slot, slot_row) in enumerate(places):
        if turn is not None and not turn.attends[span]:
            continue
        own_segments = segments[bounds[span] : bounds[span + 1]]
        rows = slice(start, start + length)
        own_lse = lse[slot, :, :, slot_row : slot_row + length] if slot >= 0 else None
        own_parts = (parts(span, queries[:, :, rows], *segment) for segment in own_segments)
        empty = turn is None or not turn.merges[span]
        if empty and sinks is not None:
            _clear(out[:, :, rows], own_lse, sinks)
            empty = False
        _fold(chain.from_iterable(own_parts), out[:, :, rows], own_lse, empty)
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


def _clear(out: torch.Tensor, lse: torch.Tensor | None, sinks: torch.Tensor | None = None) -> None:
    """The attention over no keys; ``sinks``: ``(H_kv, group, 1)``."""
    out.zero_()
    if lse is not None:
        lse.copy_(sinks) if sinks is not None else lse.fill_(-torch.inf)


def _merge(out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merges the attention over other keys into ``out (..., n, D)`` and ``lse (..., n)``, in place.

    What has a lse of -inf weighs nothing: of no keys its out is 0, of keys with scores of -inf it is NaN, which stays
    only where there is nothing else.
    """
    total = torch.logaddexp(lse, part_lse)
    for own_out, own_lse in ((out, lse), (part_out, part_lse)):
        weightless = own_lse == -torch.inf
        if out.is_cuda or weightless.any():  # asking a GPU would wait for it
            own_out.masked_fill_((weightless & (total != -torch.inf)).unsqueeze(-1), 0.0)
    shift = torch.where(total == -torch.inf, 0.0, total)  # -inf - -inf would be NaN
    out.mul_((lse - shift).exp_().unsqueeze(-1))
    out.addcmul_(part_out, (part_lse - shift).exp_().unsqueeze(-1))
    lse.copy_(total)


def _largest_score(q: torch.Tensor, k: torch.Tensor, softmax_scale: float) -> float:
    """A bound on all scores and all sums on the way to one: the product of norms. NaN or infinite if an entry is."""
    dtype = compute_dtype(q.dtype)
    norm_q, norm_k = (float(torch.linalg.vector_norm(x, dtype=dtype)) for x in (q, k))
    return norm_q * norm_k * max(softmax_scale, 1.0)


_Cut = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, bool]
"""Rows of a segment from some row on, keys and values, and whether the mask is causal, aligned to the top left."""


def _cuts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, diagonal: int) -> Iterator[_Cut]:
    """Cuts a segment into what torch's CPU flash attention computes, whose causal mask is aligned to the top left.

    A segment is a rectangle of keys that all rows see, and a triangle whose first row sees one key::

        diagonal = 2     x x x . .          diagonal = -1    . . .
                         x x x x .                           x . .
                         x x x x x                           x x .
    """
    rows, keys = q.shape[2], k.shape[2]
    if diagonal >= keys - 1:
        yield 0, q, k, v, False
        return
    if diagonal > 0:
        yield 0, q, k[:, :, :diagonal], v[:, :, :diagonal], False
        k, v, diagonal = k[:, :, diagonal:], v[:, :, diagonal:], 0
    if -diagonal < rows:
        yield -diagonal, q[:, :, -diagonal:], k, v, True


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, diagonal: int, softmax_scale: float) -> Iterator[Part]:
    """One segment by torch's CPU flash attention."""
    assert flash_attention_cpu is not None
    for row, *operands, is_causal in _cuts(q, k, v, diagonal):
        yield row, *flash_attention_cpu(*operands, 0.0, is_causal, scale=softmax_scale)


def _mended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, diagonal: int, softmax_scale: float) -> Iterator[Part]:
    """One segment by torch's CPU flash attention, and by matrix products the rows that see NaN or only infinities.

    The flash attention leaves out blocks of keys without a score above -inf, of NaN too; a row of which nothing is left
    gets out 0 and lse 0.
    """
    assert flash_attention_cpu is not None
    for row, own_q, own_k, own_v, is_causal in _cuts(q, k, v, diagonal):
        out, lse = flash_attention_cpu(own_q, own_k, own_v, 0.0, is_causal, scale=softmax_scale)
        own_diagonal = 0 if is_causal else own_k.shape[2] - 1
        for begin, other_out, other_lse in _plain(own_q, own_k, own_v, own_diagonal, softmax_scale):
            rows = slice(begin, begin + other_lse.shape[-1])
            is_right = other_lse.isfinite() & lse[:, :, rows].isfinite()
            out[:, :, rows] = torch.where(is_right.unsqueeze(-1), out[:, :, rows], other_out)
            lse[:, :, rows] = torch.where(is_right, lse[:, :, rows], other_lse)
        yield row, out, lse


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

    def keys(self, first: int, number: int, device: torch.device) -> torch.Tensor:
        """Positions of ``number`` keys of the segment, from ``first`` on."""
        assert self.key_position is not None, "dropout and scores need the keys' positions"
        begin = self.k_start + first
        return copied_to(np.asarray(self.key_position[begin : begin + number], np.int64), device)

    def write_scores(self, scores: torch.Tensor, begin: int, first: int) -> None:
        """Writes ``(H, n, keys)`` from the span's row ``begin`` and the segment's key ``first`` on.

        Segments of a span may share keys, and share no pair.
        """
        if self.scores is not None:
            columns = self.column + self.keys(first, scores.shape[2], scores.device)
            held = self.scores[:, begin : begin + scores.shape[1]]
            # Hidden pairs are -inf here, and another segment may have written them; what none wrote is -inf too.
            held[:, :, columns] = torch.maximum(held[:, :, columns], scores)

    def drop(self, weights: torch.Tensor, begin: int, first: int) -> torch.Tensor:
        """Applies dropout to ``(H, n, keys)`` from the span's row ``begin`` and the segment's key ``first`` on."""
        if self.dropout is None:
            return weights
        device = weights.device
        heads, rows, keys = (torch.arange(size, device=device) for size in weights.shape)
        queries = self.position + (begin + rows) * self.step
        keep = keep_mask(self.dropout, self.document, heads, queries, self.keys(first, len(keys), device))
        return weights * keep * self.dropout.scale


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    diagonal: int,
    softmax_scale: float,
    lower: int | None = None,
    softcap: float = 0.0,
    extras: _Extras | None = None,
) -> Iterator[Part]:
    """One segment by matrix products, a block of rows after the other; ``extras`` for dropout and scores."""
    (num_kv, group, rows, _), keys = q.shape, k.shape[2]
    most = keys if lower is None else min(keys, diagonal - lower + 1)  # keys that a row sees
    block = max(16, _BLOCK_ENTRIES // (num_kv * group * most))
    if lower is not None:
        rows = min(rows, keys - lower)  # those behind see nothing
        block = min(block, _MOST_ROWS)
    j = torch.arange(keys, device=q.device)
    for begin in range(0, rows, block):
        end = min(begin + block, rows)
        first, seen = 0 if lower is None else max(0, begin + lower), min(keys, end + diagonal)
        if seen <= 0:
            continue
        # (H_kv, group * n, D): one matrix product a kv head, for all query heads that share it.
        s = q[:, :, begin:end].flatten(1, 2) @ k[:, 0, first:seen].mT
        s = s.mul_(softmax_scale).unflatten(1, (group, -1))
        if softcap > 0:
            s.div_(softcap).tanh_().mul_(softcap)
        i = torch.arange(begin, end, device=q.device).unsqueeze(1)
        if begin + diagonal < seen - 1:
            s.masked_fill_(i + diagonal < j[first:seen], -torch.inf)
        if lower is not None and first < end - 1 + lower:
            s.masked_fill_(i + lower > j[first:seen], -torch.inf)
        top = s.amax(-1)  # of scores of -inf alone the weights are NaN, as -inf - -inf is
        if begin + diagonal < 0:  # but of no keys 0
            top[..., : -diagonal - begin] = 0.0
        weights = (s - top.unsqueeze(-1)).exp_()
        # By their own sum and not by the lse, which large scores round.
        total = weights.sum(-1)
        weights = weights.flatten(0, 1)
        if extras is not None:
            extras.write_scores(s.flatten(0, 1), begin, first)
            weights = extras.drop(weights, begin, first)
        out = (weights.view(num_kv, -1, seen - first) @ v[:, 0, first:seen]).unflatten(1, (group, -1))
        lse = torch.where(top == -torch.inf, top, total.log() + top)
        if begin + diagonal < 0:
            total[..., : -diagonal - begin] = 1.0
        yield begin, out.div_(total.unsqueeze(-1)), lse
