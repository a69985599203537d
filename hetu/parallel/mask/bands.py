"""Bands: what every mask turns into, rectangles of queries and keys that two diagonals cut off.

A band lies in one sequence. Of its queries, number i sees those of its keys j for which ``lower <= j - i <= upper``.
Causal attention is one band per sequence, and a chunked or a prefix mask is several. Bands of a mask share no pair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hetu.parallel.mask.segments import IntArray, QuerySpans, count_up


@dataclass(frozen=True, slots=True, eq=False)
class Bands:
    """Rectangles with two diagonals. Struct of arrays, one entry per band, ordered by sequence.

    Attributes:
        sequence: The sequence's number.
        q_start: First query.
        q_stop: The query after the last one.
        k_start: First key.
        k_stop: The key after the last one.
        lower: Query i sees no key before ``i + lower``.
        upper: Query i sees no key after ``i + upper``.
    """

    sequence: IntArray
    q_start: IntArray
    q_stop: IntArray
    k_start: IntArray
    k_stop: IntArray
    lower: IntArray
    upper: IntArray

    def __len__(self) -> int:
        return len(self.sequence)

    @classmethod
    def of(
        cls,
        sequence: IntArray,
        queries: tuple[IntArray, IntArray],
        keys: tuple[IntArray, IntArray],
        lower: IntArray | None,
        upper: IntArray | None,
    ) -> Bands:
        """Bands in normal form: every query sees a key, every key is seen, and no diagonal is further off than needed.

        Args:
            sequence: As the attribute.
            queries: First queries, and those after the last ones.
            keys: First keys, and those after the last ones.
            lower: As the attribute; None for no bound.
            upper: As the attribute; None for no bound.

        Example:
            >>> one, none = np.array([0]), np.array([0])
            >>> band = Bands.of(none, (none, np.array([4])), (none, np.array([9])), None, np.array([-1]))
            >>> [x.item() for x in (band.q_start, band.q_stop, band.k_start, band.k_stop, band.lower, band.upper)]
            [1, 4, 0, 3, -3, -1]
        """
        (q0, q1), (k0, k1) = queries, keys
        low = k0 - q1 + 1 if lower is None else np.maximum(lower, k0 - q1 + 1)
        high = k1 - 1 - q0 if upper is None else np.minimum(upper, k1 - 1 - q0)
        # What is left of the queries for the keys, and then of the keys for these queries.
        q0, q1 = np.maximum(q0, k0 - high), np.minimum(q1, k1 - low)
        k0, k1 = np.maximum(k0, q0 + low), np.minimum(k1, q1 + high)
        low, high = np.maximum(low, k0 - q1 + 1), np.minimum(high, k1 - 1 - q0)
        live = ((low <= high) & (q0 < q1) & (k0 < k1)).nonzero()[0]
        live = live[sequence[live].argsort(kind="stable")]
        return cls(*(x[live] for x in (sequence, q0, q1, k0, k1, low, high)))

    def pairs(self) -> IntArray:
        """Allowed (query, key) pairs of each band."""
        rows, keys = self.q_stop - self.q_start, self.k_stop - self.k_start
        shift = self.q_start - self.k_start
        return _up_to(rows, keys, self.upper + shift) - _up_to(rows, keys, self.lower + shift - 1)

    def joined(self, offsets: IntArray) -> Bands:
        """The bands of sequences that lie one after the other as those of one sequence.

        Args:
            offsets: Where each sequence begins, its queries and its keys.
        """
        shift = offsets[self.sequence]
        q_start, q_stop, k_start, k_stop = (x + shift for x in (self.q_start, self.q_stop, self.k_start, self.k_stop))
        return Bands(np.zeros_like(shift), q_start, q_stop, k_start, k_stop, self.lower, self.upper)

    def cut_at(self, ends: IntArray) -> Bands:
        """The same pairs in more bands: each has queries between two neighbouring ends only, whose number it gets.

        Args:
            ends: Of stretches of queries that begin at 0 and cover all of them; bands are of one sequence.
        """
        begin, end = ends.searchsorted(self.q_start, "right"), ends.searchsorted(self.q_stop - 1, "right")
        count = end - begin + 1
        of = np.arange(len(self)).repeat(count)
        stretch = begin.repeat(count) + count_up(count)
        stop = ends[stretch]
        start = np.where(stretch > 0, ends[np.maximum(stretch - 1, 0)], 0)
        queries = np.maximum(self.q_start[of], start), np.minimum(self.q_stop[of], stop)
        return Bands.of(stretch, queries, (self.k_start[of], self.k_stop[of]), self.lower[of], self.upper[of])

    def pairs_in(self, q_edges: IntArray, k_edges: IntArray) -> IntArray:
        """``(Q, K)``, the allowed pairs in each cell of a grid of queries and keys; for bands of one sequence."""
        cells = len(q_edges) - 1, len(k_edges) - 1
        pairs: IntArray = np.zeros(cells[0] * cells[1], np.int64)
        if len(self) == 0 or len(pairs) == 0:
            return pairs.reshape(cells)
        # Only the cells that a band's rectangle meets: of many small bands these are few.
        q_first, q_count = _met(q_edges, self.q_start, self.q_stop)
        k_first, k_count = _met(k_edges, self.k_start, self.k_stop)
        count = q_count * k_count
        band = np.arange(len(self)).repeat(count)
        number = count_up(count)
        q, k = q_first[band] + number // k_count[band], k_first[band] + number % k_count[band]
        inside = Bands.of(
            q * cells[1] + k,
            (np.maximum(self.q_start[band], q_edges[q]), np.minimum(self.q_stop[band], q_edges[q + 1])),
            (np.maximum(self.k_start[band], k_edges[k]), np.minimum(self.k_stop[band], k_edges[k + 1])),
            self.lower[band],
            self.upper[band],
        )
        np.add.at(pairs, inside.sequence, inside.pairs())  # bincount would round large sums
        return pairs.reshape(cells)

    def matrix(self, queries: int, keys: int) -> NDArray[np.bool_]:
        """``(queries, keys)``, which queries see which keys; for bands of one sequence."""
        seen = np.zeros((queries, keys), bool)
        columns = (self.q_start, self.q_stop, self.k_start, self.k_stop, self.lower, self.upper)
        for q0, q1, k0, k1, lower, upper in zip(*(x.tolist() for x in columns), strict=True):
            apart = np.arange(k0, k1) - np.arange(q0, q1)[:, None]
            seen[q0:q1, k0:k1] |= (lower <= apart) & (apart <= upper)
        return seen

    def first_shared(self) -> tuple[int, int] | None:
        """Two bands that share a (query, key) pair; None if none do."""
        for one in range(len(self) - 1):
            rest = slice(one + 1, None)
            q0, k0 = (np.maximum(x[one], x[rest]) for x in (self.q_start, self.k_start))
            q1, k1 = (np.minimum(x[one], x[rest]) for x in (self.q_stop, self.k_stop))
            lower = np.maximum(np.maximum(self.lower[one], self.lower[rest]), k0 - q1 + 1)
            upper = np.minimum(np.minimum(self.upper[one], self.upper[rest]), k1 - 1 - q0)
            shared = (self.sequence[one] == self.sequence[rest]) & (q0 < q1) & (k0 < k1) & (lower <= upper)
            if shared.any():
                return one, one + 1 + int(shared.argmax())
        return None


def _met(edges: IntArray, start: IntArray, stop: IntArray) -> tuple[IntArray, IntArray]:
    """The first cell between edges that each interval meets, and how many it meets."""
    first = edges.searchsorted(start, "right") - 1
    return first, edges.searchsorted(stop - 1, "right") - first


def _up_to(rows: IntArray, keys: IntArray, diagonal: IntArray) -> IntArray:
    """Pairs of a rectangle with ``j <= i + diagonal``: the sum over its rows of ``clip(i + diagonal + 1, 0, keys)``."""

    def total(end: IntArray) -> IntArray:  # of clip(x, 0, keys) over all x up to end
        side: IntArray = np.clip(end, 0, keys)
        found: IntArray = side * (side + 1) // 2 + np.maximum(end - side, 0) * keys
        return found

    return total(rows + diagonal) - total(diagonal)


def cut_spans(spans: QuerySpans, sequence: IntArray, bands: Bands) -> tuple[QuerySpans, IntArray, IntArray, IntArray]:
    """Cuts query spans where bands begin and end, so that each band has all rows of a span or none.

    Args:
        spans: The spans; their positions count the queries of the bands.
        sequence: ``(spans,)`` each one's sequence, -1 if it has none.
        bands: What they may see.

    Returns:
        The cut spans, ordered as the spans were; of which span each is a part; and the pairs of a cut span and a band
        that has its rows, ``(pairs,)`` indices each, ordered by span.
    """
    if len(bands) == 0:
        return spans, np.arange(len(spans)), np.empty(0, np.int64), np.empty(0, np.int64)
    edge, interval, band = _intervals(bands)
    # The edges of its sequence that lie behind a span's first query and before or at its last one cut it.
    last = spans.position + (spans.length - 1) * spans.step
    begin, end = (_place(edge, sequence, position) for position in (spans.position, last))
    count = end - begin + 1
    of = np.arange(len(spans)).repeat(count)
    number = count_up(count)
    place = begin[of] + number - 1  # the edge at which each part begins, but for the first part of a span
    first: IntArray = np.where(
        number == 0, 0, -((spans.position[of] - edge[1].take(place, mode="clip")) // spans.step[of])
    )
    stop = np.append(first[1:], 0)
    is_last = np.append(of[1:] != of[:-1], True)[: len(of)]
    stop = np.where(is_last, spans.length[of], stop)
    kept = (stop > first).nonzero()[0]
    of, first, length, place = of[kept], first[kept], (stop - first)[kept], place[kept]
    position: IntArray = spans.position[of] + first * spans.step[of]
    cut = replace(
        spans,
        start=spans.start[of] + first,
        length=length,
        document=spans.document[of],
        position=position,
        step=spans.step[of],
        slot=spans.slot[of],
        slot_row=spans.slot_row[of] + first,
        column=spans.column[of],
        records=None,
        copies={},
    )
    low, high = interval.searchsorted(place), interval.searchsorted(place, "right")
    has_own = sequence[of] >= 0
    times = np.where(has_own, high - low, 0)
    span = np.arange(len(of)).repeat(times)
    pick = count_up(times) + low.repeat(times)
    return cut, of, span, band[pick]


def _intervals(bands: Bands) -> tuple[tuple[IntArray, IntArray], IntArray, IntArray]:
    """The edges of bands, and which bands have the queries from an edge to the next one.

    Returns:
        ``(sequence, query)`` of each edge, in order; and pairs of an edge's number and a band, ordered by edge.
    """
    both = np.concatenate([bands.sequence, bands.sequence]), np.concatenate([bands.q_start, bands.q_stop])
    order = np.lexsort(both[::-1])
    sequence, query = both[0][order], both[1][order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (sequence[1:] != sequence[:-1]) | (query[1:] != query[:-1])
    number = np.empty(len(order), np.int64)
    number[order] = is_new.cumsum() - 1
    begin, end = number[: len(bands)], number[len(bands) :]
    count = end - begin
    band = np.arange(len(bands)).repeat(count)
    interval = begin.repeat(count) + count_up(count)
    by_interval = interval.argsort(kind="stable")
    return (sequence[is_new], query[is_new]), interval[by_interval], band[by_interval]


def _place(edge: tuple[IntArray, IntArray], sequence: IntArray, query: IntArray) -> IntArray:
    """How many edges lie before queries of sequences or at them."""
    sequences, queries = edge
    wide = 1 + max(int(queries.max(initial=0)), int(query.max(initial=0)))
    return (sequences * wide + queries).searchsorted(sequence * wide + query, "right")
