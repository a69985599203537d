"""The backward of attention over segment tables in torch: matrix products over blocks of queries and keys.

Blocks that stay in the cache make this as fast on a CPU as torch's own flash backward (measured at 1,024 and 2,048
tokens), which knows neither dropout nor gradients of the log-sum-exps; so there is one path for all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hetu.backends.attention.contract import BackwardState, compute_dtype
from hetu.backends.attention.dropout import Dropout, keep_mask
from hetu.backends.attention.family import AttendCall
from hetu.backends.memory import copied_to
from hetu.backends.precision import in_own_precision
from hetu.parallel.mask.segments import QuerySpans, SegmentTable

CPU_BLOCK, GPU_BLOCK = (128, 256), (2048, 4096)
"""Queries and keys of a block: what a core's cache holds, and what keeps a GPU busy."""

LARGE = {dtype: 2.0**-7 / torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
"""From this size on a log-sum-exp is rounded so much that e to the power of a score less it may be far from the
probability. The scores of such rows are rounded as the forward rounds them: then the largest is the log-sum-exp itself,
where its digits hold no more than that. What is above it by another order of a sum counts as it; and so does what is
below it by that, where a last digit is more than 1: a CPU's products add up in another order than its flash attention,
and the largest score of a row must not weigh nothing."""


@in_own_precision
def attend_backward(
    call: AttendCall, state: BackwardState, dk: torch.Tensor, dv: torch.Tensor, keeps: bool = False
) -> None:
    """Gradients of one step in torch; see :meth:`hetu.backends.attention.family.KernelFamily.attend_backward`.

    Computes in float32, or in float64 for float64 inputs.
    """
    q, k, v, spans, table, dropout = call.q, call.k, call.v, call.spans, call.table, call.dropout
    dtype, num_kv, group = compute_dtype(q.dtype), k.shape[1], q.shape[1] // k.shape[1]
    # Everything below is (H_kv, rows, D), the query heads that share a key head one after the other in the rows, so
    # that one matrix product a key head serves them all and adds their gradients up.
    keys, values = (x.to(dtype).transpose(0, 1) for x in (k, v))
    sums = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (keys, values)]
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    size_q, size_k = GPU_BLOCK if q.is_cuda else CPU_BLOCK
    for block in _blocks(spans, table, size_q):
        rows, own_keys = block.rows, block.keys
        own_q, own_dout = (block.by_key_head(x[rows].to(dtype), num_kv) for x in (q, state.dout))
        lse = state.lse[block.slot, :, block.lse_rows].reshape(num_kv, -1, 1)
        raw_q = own_q
        own_q = own_q * call.softmax_scale
        is_large = (lse.abs() >= LARGE[dtype]) & lse.isfinite()
        large = None
        if q.is_cuda or is_large.any():  # a GPU isn't asked: it would be waited for
            large = is_large, _slack(lse, q.shape[2])
        delta = state.delta[rows].T.reshape(num_kv, -1, 1)
        own_dq = torch.zeros_like(own_q)
        for begin in range(own_keys.start, own_keys.stop, size_k):
            part = slice(begin, min(begin + size_k, own_keys.stop))
            slope = None
            if call.softcap > 0:
                capped = (raw_q @ keys[:, part].mT).mul_(call.softmax_scale).div_(call.softcap).tanh_()
                slope = 1.0 - capped.square()
                p = capped.mul_(call.softcap).sub_(lse)
                if large is not None:
                    p = torch.where(large[0], p.clamp(max=0.0), p)
            else:
                p = torch.baddbmm(lse, own_q, keys[:, part].mT, beta=-1)
                if large is not None:
                    exact, slack = large
                    rounded = (raw_q @ keys[:, part].mT).mul_(call.softmax_scale).sub_(lse).clamp_(max=0.0)
                    p = torch.where(exact, rounded.masked_fill_(rounded > slack, 0.0), p)
            p.exp_()
            block.hide(p, part, group)
            dp = own_dout @ values[:, part].mT
            kept = p
            if dropout is not None:
                mask = block.mask(dropout, call.key_position, part, q.shape[1], q.device).view(p.shape)
                kept, dp = p * mask * dropout.scale, dp * mask * dropout.scale
            ds = dp.sub_(delta).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            sums[1][:, part].baddbmm_(kept.mT, own_dout)
            sums[0][:, part].baddbmm_(ds.mT, own_q)
            own_dq.baddbmm_(ds, keys[:, part])
        dq[rows] += block.by_row(own_dq * call.softmax_scale, group)
    state.add_queries(dq, spans, call.turn)
    named = zip(*(ends.tolist() for ends in table.stretches()), strict=True) if keeps else [(0, len(k))]
    for begin, end in named:
        dk[begin:end] = sums[0][:, begin:end].transpose(0, 1)
        dv[begin:end] = sums[1][:, begin:end].transpose(0, 1)


def _slack(lse: torch.Tensor, head_dim: int) -> torch.Tensor:
    """How far below a log-sum-exp a score still counts as it, negative: where a last digit is more than 1."""
    digit = lse.abs() * torch.finfo(lse.dtype).eps
    return torch.where(digit > 1.0, digit * -head_dim, 0.0)


class _Block:
    """Some rows of a query span, and the keys of one segment that they see."""

    def __init__(self, spans: QuerySpans, table: SegmentTable, segment: int, begin: int, size: int) -> None:
        span = int(table.query[segment])
        end = min(begin + size, int(spans.length[span]))
        start, slot_row, k_start = int(spans.start[span]), int(spans.slot_row[span]), int(table.k_start[segment])
        k_len, self.diagonal = int(table.k_len[segment]), int(table.diagonal[segment]) + begin
        self.lower = begin - end + 1 if table.lower is None else int(table.lower[segment]) + begin
        self.count, self.k_start, self.slot = end - begin, k_start, int(spans.slot[span])
        self.rows, self.lse_rows = slice(start + begin, start + end), slice(slot_row + begin, slot_row + end)
        self.keys = slice(k_start + max(self.lower, 0), k_start + min(k_len, self.count + self.diagonal))
        self.document, self.step = int(spans.document[span]), int(spans.step[span])
        self.position = int(spans.position[span]) + begin * self.step

    def by_key_head(self, x: torch.Tensor, num_kv: int) -> torch.Tensor:
        """``(n, H_q, D)`` as ``(H_kv, group * n, D)``."""
        return x.transpose(0, 1).reshape(num_kv, -1, x.shape[-1])

    def by_row(self, x: torch.Tensor, group: int) -> torch.Tensor:
        """``(H_kv, group * n, D)`` as ``(n, H_q, D)``."""
        heads: torch.Tensor = x.unflatten(1, (group, -1))
        return heads.flatten(0, 1).transpose(0, 1)

    def hide(self, p: torch.Tensor, keys: slice, group: int) -> None:
        """Writes 0 where a row does not see a key."""
        first, last = keys.start - self.k_start, keys.stop - 1 - self.k_start
        hides_later, hides_earlier = last > self.diagonal, first < self.count - 1 + self.lower
        if not (hides_later or hides_earlier):
            return
        i = torch.arange(self.count, device=p.device).unsqueeze(1)
        j = torch.arange(first, last + 1, device=p.device)
        by_head = p.unflatten(1, (group, -1))
        if hides_later:
            by_head.masked_fill_(i + self.diagonal < j, 0.0)
        if hides_earlier:
            by_head.masked_fill_(i + self.lower > j, 0.0)

    def mask(
        self, dropout: Dropout, key_position: np.ndarray | None, keys: slice, heads: int, device: torch.device
    ) -> torch.Tensor:
        """Which entries dropout keeps, ``(H_q, n, keys)``."""
        assert key_position is not None, "dropout needs the keys' positions"
        queries = self.position + self.step * torch.arange(self.count, device=device)
        positions = copied_to(np.asarray(key_position[keys], np.int64), device)
        return keep_mask(dropout, self.document, torch.arange(heads, device=device), queries, positions)


def _blocks(spans: QuerySpans, table: SegmentTable, size: int) -> Iterator[_Block]:
    """The blocks of all segments that see anything."""
    for segment, (span, diagonal) in enumerate(zip(table.query.tolist(), table.diagonal.tolist(), strict=True)):
        length = int(spans.length[span])
        if table.lower is not None:  # rows behind the last one that sees a key
            length = min(length, int(table.k_len[segment] - table.lower[segment]))
        for begin in range(0, length, size):
            if min(begin + size, length) + diagonal > 0:
                yield _Block(spans, table, segment, begin, size)
