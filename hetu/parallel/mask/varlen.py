"""Plain variable-length attention as segments: one for each sequence, or for each band of a sequence's mask."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from hetu.parallel.mask.bands import cut_spans
from hetu.parallel.mask.joining import Runs, join_runs, only_if_needed
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable, least


def varlen_tables(
    cu_seqlens_q: IntArray, cu_seqlens_k: IntArray, rows: int, mask: Mask, packed_lse: bool = False
) -> tuple[QuerySpans, SegmentTable]:
    """The table of plain variable-length attention: one segment per sequence.

    Args:
        cu_seqlens_q: ``(B + 1,)`` cumulative query lengths, from 0, never decreasing. What is made may be a view of it.
        cu_seqlens_k: ``(B + 1,)`` cumulative key lengths; likewise.
        rows: Rows of q; those past ``cu_seqlens_q[-1]`` become a span that attends to nothing.
        mask: Which keys a query sees, aligned to the bottom right: row i of n queries stands at key ``i + m - n`` of m.
        packed_lse: Whether lse is ``(1, H_q, rows)``, every row of q at its own index, the tail too, instead of
            ``(B, H_q, longest)``, a slot per sequence.
    """
    is_same = cu_seqlens_k is cu_seqlens_q
    q_cu = np.asarray(cu_seqlens_q, np.int64)
    tokens = q_cu.item(-1)
    k_cu = q_cu if is_same else np.asarray(cu_seqlens_k, np.int64)
    has_tail = rows > tokens
    if has_tail:  # a sequence without keys
        is_same, q_cu, k_cu = False, np.append(q_cu, rows), np.append(k_cu, k_cu[-1])
    q_len = q_cu[1:] - q_cu[:-1]
    k_len = q_len if is_same else k_cu[1:] - k_cu[:-1]
    start, k_start, document = q_cu[:-1], k_cu[:-1], q_len.nonzero()[0]
    if len(document) < len(q_len):  # the others have no span
        start, k_start, q_len, k_len = start[document], k_start[document], q_len[document], k_len[document]
    zeros, ones, live = _constants(len(document))
    if has_tail:
        document[-1] = -1
    spans = QuerySpans(
        start=start,
        length=q_len,
        document=document,
        position=zeros,
        step=ones,
        slot=zeros if packed_lse else document,
        slot_row=start if packed_lse else zeros,
        column=zeros,
        lse_rows=rows if packed_lse else tokens,
    )
    if not mask.is_plain:
        return _banded_tables(spans, q_cu, k_cu, mask)
    # All keys of a sequence are seen by its last row, so that the table is in normal form.
    diagonal = k_len - q_len if mask.hides_later else k_len - 1
    if not is_same:
        live = k_len.nonzero()[0]
    if len(live) < len(k_len):
        k_start, k_len, diagonal = k_start[live], k_len[live], diagonal[live]
        is_plain = False
    else:
        is_plain = is_same or not mask.hides_later or least(diagonal) >= 0
    return spans, SegmentTable(live, k_start, k_len, diagonal, plain_over=spans if is_plain else None)


def _banded_tables(
    spans: QuerySpans, cu_seqlens_q: IntArray, cu_seqlens_k: IntArray, mask: Mask
) -> tuple[QuerySpans, SegmentTable]:
    """The table of a mask that is neither causal nor full."""
    q_len, k_len = np.diff(cu_seqlens_q), np.diff(cu_seqlens_k)
    if spans.document[-1:].tolist() == [-1]:  # the tail is no sequence of the mask's
        q_len, k_len = q_len[:-1], k_len[:-1]
    bands = mask.bands(q_len, k_len)
    if mask.joins:
        sequence = np.where(spans.document < 0, -1, 0)
        spans = replace(spans, document=sequence, position=np.where(sequence < 0, 0, spans.start))
        first_key, keys = np.zeros(1, np.int64), cu_seqlens_k[-1:] - cu_seqlens_k[:1]
    else:
        sequence, first_key, keys = spans.document, cu_seqlens_k[:-1], k_len
    spans, _, span, band = cut_spans(spans, sequence, bands)
    owner = bands.sequence[band]
    queries = Runs(spans.position[span], spans.step[span], spans.length[span])
    zeros = np.zeros_like(owner)
    seen = join_runs(queries, Runs(zeros, zeros + 1, keys[owner]), bands, band)
    query = span[seen.item]
    lower = only_if_needed(seen.lower, spans.length[query])
    return spans, SegmentTable(query, first_key[owner[seen.item]] + seen.offset, seen.k_len, seen.diagonal, lower)


@lru_cache(maxsize=64)
def _constants(count: int) -> tuple[IntArray, IntArray, IntArray]:
    """So many zeros, as many ones, and 0, 1, 2, ...: columns of most tables, shared by them and never written to."""
    found = np.zeros(count, np.int64), np.ones(count, np.int64), np.arange(count)
    for column in found:
        column.setflags(write=False)
    return found
