"""Who holds which tokens of a batch's documents, and in which micro-batch."""

from __future__ import annotations

import heapq
import math
from itertools import accumulate
from math import inf

from hetu.parallel.batch.cost import BatchCost, Documents
from hetu.parallel.batch.finish import Placed, finish
from hetu.parallel.batch.pour import pour, whole_tokens

SLACKS = tuple(x / 128 for x in (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512))
"""How much longer than the least time pipelines may take, as a part of it: what is tried, one after the other.

Below that no document is cut which fits whole.
"""

MORE = 1, 1.25, 1.5, 2, 3
"""How many times as many micro-batches as are needed at least are tried."""


def assign(
    documents: Documents, pipelines: int, max_tokens: int, cost: BatchCost, least: float
) -> tuple[int, list[Placed], list[float]]:
    """Places documents such that the slowest pipeline is done early.

    First no pipeline may take much longer than the least time. Where that can't be, with as few micro-batches as there
    is room in or with a few more, a longer time is tried, and so on, until every document over all pipelines is better.

    Args:
        documents: Each of at most ``pipelines * max_tokens`` tokens.
        pipelines: How many there are.
        max_tokens: The most tokens of each in a micro-batch.
        cost: What documents cost.
        least: Seconds that any plan takes at least.

    Returns:
        The number of micro-batches, each document's place, and when each pipeline is done.
    """
    best: tuple[int, list[Placed], list[float]] | None = None
    soonest, spread = inf, inf
    for slack in SLACKS:
        limit = least * (1 + slack)
        if min(soonest, spread) <= limit:
            break
        for micro_batches in _counts(documents, pipelines, max_tokens, slack):
            greedy = Greedy(documents, pipelines, micro_batches, max_tokens, cost, limit)
            places = greedy.place_all()
            if places is None and greedy.lacks_time:
                break  # more room would not help
            if places is not None:
                ends = finish(documents, places, pipelines, micro_batches, cost)
                if max(ends) < soonest:
                    best, soonest = (micro_batches, places, ends), max(ends)
            if soonest <= limit:
                break
        if spread == inf and soonest > limit:  # the first limit is mostly enough
            spread = over_all_seconds(documents, pipelines, max_tokens, cost)
    if best is None or soonest > spread:
        micro_batches, places = _over_all(documents, pipelines, max_tokens)
        best = micro_batches, places, finish(documents, places, pipelines, micro_batches, cost)
    _, places, ends = best
    return *_without_empty(places), ends


def _without_empty(places: list[Placed]) -> tuple[int, list[Placed]]:
    """How many micro-batches have tokens, one at least, and the places if only these are counted."""
    # A document without tokens has one piece, and cut ones have none that are empty.
    used = sorted({micro_batch for micro_batch, pieces in places if pieces[0][1]}) or [0]
    if len(used) == used[-1] + 1:
        return len(used), places
    number = {micro_batch: i for i, micro_batch in enumerate(used)}
    return len(used), [(number.get(micro_batch, 0), pieces) for micro_batch, pieces in places]


def _counts(documents: Documents, pipelines: int, max_tokens: int, slack: float) -> list[int]:
    """The numbers of micro-batches that are worth a try if pipelines may take so much longer than the mean."""
    fewest = -(-sum(documents.lengths) // (pipelines * max_tokens))
    counts = sorted({max(math.ceil(fewest * more), 1) for more in MORE})
    # A pipeline that holds nothing but short documents is full before the others are done if this is below 1.
    mean = sum(documents.work) / pipelines
    reach = max_tokens * documents.lighter_half / mean if mean else 1.0
    return [count for count in counts if reach * count >= 1 - 6 * slack]


def _packs(documents: Documents, room: int) -> list[list[int]]:
    """The numbers of the documents of micro-batches that are filled one after the other."""
    packs: list[list[int]] = [[]]
    rooms = [room]
    for d, length in enumerate(documents.lengths):
        number = 0
        while number < len(rooms) and rooms[number] < length:
            number += 1
        if number == len(rooms):
            rooms.append(room)
            packs.append([])
        rooms[number] -= length
        packs[number].append(d)
    return packs


def _over_all(documents: Documents, pipelines: int, max_tokens: int) -> tuple[int, list[Placed]]:
    """Every document over all pipelines, evenly."""
    packs = _packs(documents, pipelines * max_tokens)
    places: list[Placed] = [(0, ())] * len(documents.lengths)
    for number, pack in enumerate(packs):
        dealt = 0
        for d in pack:
            each, more = divmod(documents.lengths[d], pipelines)
            pieces = ((r, each + ((r - dealt) % pipelines < more)) for r in range(pipelines))  # the rest in turns
            places[d] = number, tuple((r, tokens) for r, tokens in pieces if tokens) or ((0, 0),)
            dealt += more
    return len(packs), places


def over_all_seconds(documents: Documents, pipelines: int, max_tokens: int, cost: BatchCost) -> float:
    """When every document over all pipelines is done, but for the tokens that don't divide."""
    total = 0.0
    for pack in _packs(documents, pipelines * max_tokens):
        own = [(documents.lengths[d], documents.attention[d]) for d in pack]
        tokens, is_cut = sum(length for length, _ in own), pipelines > 1
        attention = sum([x / pipelines + (cost.edge(length, x) if is_cut else 0.0) for length, x in own])
        rows = tokens * (pipelines - 1) // pipelines
        total += cost.seconds(tokens / pipelines, attention, rows, is_cut)
    return total


class Greedy:
    """Places documents one by one, those with most work first, each on the pipeline that has least to do.

    Where that would take longer than the limit, the document is cut over just enough of the pipelines that have least
    to do. What is cut comes in early micro-batches and what is whole in late ones, as far as there is room: pipelines
    that share a document begin and end its micro-batch together, and then nobody has anything to wait for before.

    Attributes:
        limit: Seconds that no pipeline may take.
        rooms: Tokens that each pipeline still takes in each micro-batch.
        heap: ``(seconds, pipeline)``: what each takes.
        lacks_time: Whether a document could not be placed because of the limit, however much room there were.
    """

    def __init__(
        self, documents: Documents, pipelines: int, micro_batches: int, max_tokens: int, cost: BatchCost, limit: float
    ) -> None:
        self.documents, self.cost, self.limit = documents, cost, limit
        self.rooms = [[max_tokens] * pipelines for _ in range(micro_batches)]
        self.heap = [(0.0, r) for r in range(pipelines)]
        self.lacks_time = False

    def place_all(self) -> list[Placed] | None:
        """The place of every document; None if some pipeline would take too long, or there is no room."""
        places, limit, late, last = list[Placed](), self.limit, self.rooms[-1], len(self.rooms) - 1
        for number, (length, work) in enumerate(zip(self.documents.lengths, self.documents.work, strict=True)):
            seconds, r = self.heap[0]
            if late[r] >= length and seconds + work <= limit:  # as nearly all go, which need not be looked for
                late[r] -= length
                heapq.heapreplace(self.heap, (seconds + work, r))
                places.append((last, ((r, length),)))
                continue
            place = self._whole(length, work) or self._cut(length, work, self.documents.attention[number])
            if place is None:
                return None
            places.append(place)
        return places

    def _whole(self, length: int, work: float) -> Placed | None:
        """Puts a document on the pipeline with least to do that has room for it, if that stays below the limit."""
        heap, rooms, limit, passed, found = self.heap, self.rooms, self.limit, [], None
        last = len(rooms) - 1
        while heap and heap[0][0] + work <= limit:
            seconds, r = heap[0]
            micro_batch = last
            while micro_batch >= 0 and rooms[micro_batch][r] < length:
                micro_batch -= 1
            if micro_batch >= 0:
                rooms[micro_batch][r] -= length
                heapq.heapreplace(heap, (seconds + work, r))
                found = micro_batch, ((r, length),)
                break
            passed.append(heapq.heappop(heap))
        for item in passed:
            heapq.heappush(heap, item)
        return found

    def _cut(self, length: int, work: float, attention: float) -> Placed | None:
        """Cuts a document over the fewest of the pipelines with least to do that stay below the limit."""
        limit = self.limit
        self.heap.sort()  # a sorted list is a heap
        for micro_batch, rooms in enumerate(self.rooms):
            members, levels, sizes = list[int](), list[float](), list[int]()
            parts, room, filled = 0, 0, 0.0
            for seconds, r in self.heap:
                if not (size := rooms[r]):
                    continue
                members.append(r)
                levels.append(seconds)
                sizes.append(size)
                parts, room, filled = parts + 1, room + size, filled + seconds
                if room < length or parts * limit < work or (work + filled) / parts > limit:
                    continue
                overhead = self.cost.overhead(length, attention, parts)
                if (work + filled) / parts + overhead > limit:
                    continue
                top, tokens = pour(length, levels, sizes, work / length)
                if top + overhead <= limit:
                    held = [(r, x) for r, x in zip(members, whole_tokens(tokens, length, sizes), strict=True) if x]
                    overhead = self.cost.overhead(length, attention, len(held))
                    return self._take(micro_batch, held, work / length, overhead)
        self.lacks_time = not any(
            (work + level) / parts + self.cost.overhead(length, attention, parts) <= self.limit
            for parts, level in enumerate(accumulate(seconds for seconds, _ in self.heap), 1)
        )
        return None

    def _take(self, micro_batch: int, held: list[tuple[int, int]], density: float, overhead: float) -> Placed:
        """Gives pipelines the pieces of a document."""
        more, rooms = dict(held), self.rooms[micro_batch]
        for r, tokens in held:
            rooms[r] -= tokens
        self.heap = [(s + more[r] * density + overhead, r) if r in more else (s, r) for s, r in self.heap]
        heapq.heapify(self.heap)
        return micro_batch, tuple(held)
