"""The quick proof of pairs: where keys of a query span are runs of neighbouring tokens, it looks at a run at once.

The mask shows each query span the keys of an interval. Row i of the span sees key k of it where ``lower <= k - first -
i <= upper``; *first* is the position of the span's first row. So the rows ``max(k - first - upper, 0)`` see key k, up
to ``min(k - first - lower, rows - 1)``. A run of keys of a segment says the same with other bounds. Where the runs
of a span tile its interval, and each one's bounds are the mask's or hide nothing, as the mask's do there, every allowed
pair is there once and no other.

What can't be shown so is left to the proof key by key, as is all that is wrong: tokens that are dealt, and spans that
several bands share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.mask.bands import Bands, cut_spans
from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable, count_up
from hetu.parallel.proof.transfers import Tokens


class _Tiles(NamedTuple):
    """Runs of keys that query spans see; struct of arrays.

    Attributes:
        span: The query span.
        start: Number of the first token.
        stop: Number of the token after the last.
        upper: Row i of the span sees no token after number ``i + upper``.
        lower: Row i sees no token before number ``i + lower``; that of the whole run where nothing is hidden so.
    """

    span: IntArray
    start: IntArray
    stop: IntArray
    upper: IntArray
    lower: IntArray


def are_tiled(
    bands: Bands,
    spans: QuerySpans,
    attends: Sequence[tuple[SegmentTable, IntArray]],
    tokens: Tokens,
    group: GroupLayout,
) -> bool:
    """Whether what attends see is quickly shown to be what bands allow; if not, nothing is known."""
    wanted = _wanted(bands, spans, tokens, group)
    return wanted is not None and _agree(_said(spans, attends), wanted, spans.length)


def _wanted(bands: Bands, spans: QuerySpans, tokens: Tokens, group: GroupLayout) -> _Tiles | None:
    """The interval of keys that bands show each query span that sees any; None where there are several."""
    if (spans.step != 1).any():
        return None
    cut, of, span, band = cut_spans(spans, spans.document, bands)
    if len(cut) != len(spans) or (span[1:] == span[:-1]).any():
        return None
    assert np.array_equal(of, np.arange(len(spans))), "none was cut"
    position = spans.position[span]
    # Tokens are numbered one document after the other: this is the number of position 0.
    base = tokens.first_of(group)[spans.document[span]]
    upper, lower = position + bands.upper[band], position + bands.lower[band]
    start = np.maximum(bands.k_start[band], lower)
    stop = np.minimum(bands.k_stop[band], upper + spans.length[span])
    return _Tiles(span, start + base, stop + base, upper + base, lower + base)


def _said(spans: QuerySpans, attends: Sequence[tuple[SegmentTable, IntArray]]) -> _Tiles:
    """What segments see, cut into runs of neighbouring tokens; ordered by query span and first token."""
    tables = [table for table, _ in attends]
    held = np.concatenate([said for _, said in attends])
    sizes = [len(said) for _, said in attends]
    count = [len(table) for table in tables]
    first = (np.cumsum(sizes) - sizes).repeat(count) + np.concatenate([table.k_start for table in tables])
    query, k_len, diagonal, lower = (
        np.concatenate(columns)
        for columns in zip(
            *((table.query, table.k_len, table.diagonal, table.lower_over(spans)) for table in tables), strict=True
        )
    )
    begins = np.ones(len(held), bool)
    np.not_equal(held[1:], held[:-1] + 1, out=begins[1:])
    run = begins.cumsum() - 1
    edges = np.append(begins.nonzero()[0], len(held))
    begin, end = run.take(first), run.take(first + k_len - 1)
    times = end - begin + 1
    segment = np.arange(len(query)).repeat(times)
    run = count_up(times) + begin.take(segment)
    skipped = np.maximum(edges.take(run) - first.take(segment), 0)  # keys of the segment before the run
    start = held.take(first.take(segment) + skipped)
    stop = start + np.minimum(edges.take(run + 1) - first.take(segment), k_len.take(segment)) - skipped
    span, shift = query.take(segment), start - skipped
    order = (span * (1 + int(stop.max(initial=0))) + start).argsort(kind="stable")
    tiles = span, start, stop, diagonal.take(segment) + shift, lower.take(segment) + shift
    return _Tiles(*(column.take(order) for column in tiles))


def _agree(said: _Tiles, wanted: _Tiles, rows: IntArray) -> bool:
    """Whether runs tile the intervals, and hide from each row what these hide."""
    is_first = np.append(True, said.span[1:] != said.span[:-1])[: len(said.span)]
    first = is_first.nonzero()[0]
    last = np.append(first[1:], len(said.span))[: len(first)] - 1
    touches = is_first[1:] | (said.start[1:] == said.stop[:-1])
    ends = (said.span[first], wanted.span), (said.start[first], wanted.start), (said.stop[last], wanted.stop)
    if not touches.all() or not all(np.array_equal(one, other) for one, other in ends):
        return False
    of = is_first.cumsum() - 1
    upper, lower, most = wanted.upper.take(of), wanted.lower.take(of), rows.take(said.span) - 1
    # The first row that sees a key: that of the bound, or row 0 where both bounds lie behind all keys.
    hides_later = (said.upper != upper) & (np.minimum(said.upper, upper) < said.stop - 1)
    hides_earlier = (said.lower != lower) & (said.start - np.maximum(said.lower, lower) < most)
    return not (hides_later | hides_earlier).any()
