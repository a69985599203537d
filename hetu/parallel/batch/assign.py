"""Who holds which tokens of a batch's documents, and in which micro-batch."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import accumulate

from hetu.parallel.batch.cost import BatchCost, Documents
from hetu.parallel.batch.finish import Place, finish
from hetu.parallel.batch.pour import pour, whole_tokens

SLACK = 1 / 64
"""How much longer than the least time a pipeline may take before a document is cut, as a part of that time."""

MORE = 1, 1.25, 1.5, 2, 3
"""How many times as many micro-batches as are needed at least are tried."""

MOST_SLACK = 64
"""From which slack on there is no limit."""


def assign(
    documents: Documents, pipelines: int, max_tokens: int, cost: BatchCost, least: float
) -> tuple[int, list[Place]]:
    """Places documents such that the slowest pipeline is done early.

    First no pipeline may take more than :data:`SLACK` longer than the least time. Where that can't be, with as few
    micro-batches as there is room in or with a few more, twice as much longer is tried, and so on.

    Args:
        documents: Each of at most ``pipelines * max_tokens`` tokens.
        pipelines: How many there are.
        max_tokens: The most tokens of each in a micro-batch.
        cost: What documents cost.
        least: Seconds that any plan takes at least.

    Returns:
        The number of micro-batches, and each document's place.
    """
    best, soonest = None, float("inf")
    for limit, micro_batches in _tries(documents, pipelines, max_tokens, least):
        if soonest <= limit:
            break
        places = Greedy(documents, pipelines, micro_batches, max_tokens, cost, limit).place_all()
        if places is not None:
            done = max(finish(documents, places, pipelines, micro_batches, cost))
            if done < soonest:
                best, soonest = (micro_batches, places), done
    assert best is not None  # a micro-batch per document is enough
    return best


def _tries(documents: Documents, pipelines: int, max_tokens: int, least: float) -> Iterator[tuple[float, int]]:
    """Limits, and numbers of micro-batches, in the order in which they are tried."""
    whole = pipelines * max_tokens
    fewest = max(-(-sum(documents.lengths) // whole), sum(2 * length > whole for length in documents.lengths), 1)
    counts, slack = sorted({math.ceil(fewest * more) for more in MORE}), SLACK
    # A pipeline that holds nothing but short documents is full before the others are done if this is below 1.
    mean = sum(documents.work) / pipelines
    reach = max_tokens * documents.lighter_half / mean if mean else 1.0
    while slack < MOST_SLACK:
        for count in counts:
            if reach * count >= 1 - 6 * slack:
                yield least * (1 + slack), count
        slack *= 2
    while True:
        yield float("inf"), counts[-1]
        counts.append(counts[-1] * 2)


class Greedy:
    """Places documents one by one, those with most work first, each on the pipeline that has least to do.

    Where that would take longer than the limit, the document is cut over just enough of the pipelines that have least
    to do. What is cut comes in early micro-batches and what is whole in late ones, as far as there is room: pipelines
    that share a document begin and end its micro-batch together, and then nobody has anything to wait for before.

    Attributes:
        limit: Seconds that no pipeline may take.
        rooms: Tokens that each pipeline still takes in each micro-batch.
        heap: ``(seconds, pipeline)``: what each takes.
    """

    def __init__(
        self, documents: Documents, pipelines: int, micro_batches: int, max_tokens: int, cost: BatchCost, limit: float
    ) -> None:
        self.documents, self.cost, self.limit = documents, cost, limit
        self.rooms = [[max_tokens] * pipelines for _ in range(micro_batches)]
        self.heap = [(0.0, r) for r in range(pipelines)]

    def place_all(self) -> list[Place] | None:
        """The place of every document; None if some pipeline would take too long, or there is no room."""
        places = []
        for number, (length, work) in enumerate(zip(self.documents.lengths, self.documents.work, strict=True)):
            place = self._whole(length, work) or self._cut(length, work, self.documents.attention[number])
            if place is None:
                return None
            places.append(place)
        return places

    def _whole(self, length: int, work: float) -> Place | None:
        """Puts a document on the pipeline with least to do that has room for it, if that stays below the limit."""
        heap, passed, found = self.heap, [], None
        while heap and heap[0][0] + work <= self.limit:
            seconds, r = heap[0]
            micro_batch = len(self.rooms) - 1
            while micro_batch >= 0 and self.rooms[micro_batch][r] < length:
                micro_batch -= 1
            if micro_batch >= 0:
                self.rooms[micro_batch][r] -= length
                heapq.heapreplace(heap, (seconds + work, r))
                found = Place(micro_batch, ((r, length),))
                break
            passed.append(heapq.heappop(heap))
        for item in passed:
            heapq.heappush(heap, item)
        return found

    def _cut(self, length: int, work: float, attention: float) -> Place | None:
        """Cuts a document over the fewest of the pipelines with least to do that stay below the limit."""
        self.heap.sort()  # a sorted list is a heap
        for micro_batch, rooms in enumerate(self.rooms):
            free = [(seconds, r) for seconds, r in self.heap if rooms[r]]
            levels, sizes = [seconds for seconds, _ in free], [rooms[r] for _, r in free]
            for parts, (room, level) in enumerate(zip(accumulate(sizes), accumulate(levels), strict=True), 1):
                overhead = self.cost.overhead(length, attention, parts)
                if room < length or (work + level) / parts + overhead > self.limit:
                    continue
                top, tokens = pour(length, levels[:parts], sizes[:parts], work / length)
                if top + overhead <= self.limit:
                    pieces = whole_tokens(tokens, length, sizes[:parts])
                    held = [(r, x) for (_, r), x in zip(free, pieces, strict=False) if x]
                    return self._take(
                        micro_batch, held, work / length, self.cost.overhead(length, attention, len(held))
                    )
        return None

    def _take(self, micro_batch: int, held: list[tuple[int, int]], density: float, overhead: float) -> Place:
        """Gives pipelines the pieces of a document."""
        more, rooms = dict(held), self.rooms[micro_batch]
        for r, tokens in held:
            rooms[r] -= tokens
        self.heap = [(s + more[r] * density + overhead, r) if r in more else (s, r) for s, r in self.heap]
        heapq.heapify(self.heap)
        return Place(micro_batch, tuple(held))
