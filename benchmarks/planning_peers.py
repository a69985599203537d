"""Other ways to spread a batch over pipelines, restated by what is published of them, and priced as hetu's plans are.

Each is a function of a :class:`Batch` that gives :class:`Spread`. Where a way has groups of powers of two, pipelines
that form one are neighbours, and the first one's number is a multiple of the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

import hetu
from hetu.parallel.batch.cost import BatchCost, Documents
from hetu.parallel.batch.finish import Place, finish


@dataclass(frozen=True)
class Batch:
    """What is spread.

    Attributes:
        lengths: Tokens of each document, in the order in which they were drawn.
        pipelines: How many there are, a power of two.
        max_tokens: The most tokens of each in a micro-batch.
        hardware: What each of them can do.
        cost: The same for documents, of the model that ``hetu.plan_batch`` takes by default.
    """

    lengths: tuple[int, ...]
    pipelines: int
    max_tokens: int
    hardware: hetu.Hardware
    cost: BatchCost

    @cached_property
    def longest_first(self) -> Documents:
        return self.documents(sorted(self.lengths, reverse=True))

    def documents(self, lengths: Sequence[int]) -> Documents:
        """What documents of some lengths cost."""
        tokens = np.array(lengths, np.int64)
        attention = self.cost.pair * (tokens * (tokens + 1) // 2)
        return Documents(tokens.tolist(), attention.tolist(), (self.cost.token * tokens + attention).tolist())

    def needed(self, length: int) -> int:
        """The smallest power of two of pipelines that have room for a document."""
        return 1 << (-(-length // self.max_tokens) - 1).bit_length() if length > self.max_tokens else 1

    def alone(self, documents: Documents, d: int, parts: int) -> float:
        """Seconds that a document takes evenly over some pipelines that hold nothing else."""
        length, attention = documents.lengths[d], documents.attention[d]
        return documents.work[d] / parts + self.cost.overhead(length, attention, parts)


@dataclass(frozen=True)
class Spread:
    """A batch on pipelines.

    Attributes:
        documents: The documents, as long as they are computed.
        places: Where each of them is.
        micro_batches: How many there are.
    """

    documents: Documents
    places: list[Place]
    micro_batches: int

    def seconds(self, batch: Batch) -> float:
        """When the slowest pipeline is done."""
        return max(finish(self.documents, self.places, batch.pipelines, self.micro_batches, batch.cost))


def evenly(length: int, members: Sequence[int], turn: int = 0) -> tuple[tuple[int, int], ...]:
    """Pieces of as many tokens each; who gets one more than others takes turns."""
    each, more = divmod(length, len(members))
    pieces = ((r, each + ((i + turn) % len(members) < more)) for i, r in enumerate(members))
    return tuple((r, tokens) for r, tokens in pieces if tokens) or ((members[0], 0),)


def static_groups(batch: Batch, lengths: Sequence[int]) -> Spread:
    """First fit into groups of one size, a power of two that has room for the longest document."""
    size = batch.needed(max(lengths))
    rooms: list[int] = []
    places, groups = [], batch.pipelines // size
    for number, length in enumerate(lengths):
        pack = next((i for i, room in enumerate(rooms) if room >= length), len(rooms))
        if pack == len(rooms):
            rooms.append(size * batch.max_tokens)
        rooms[pack] -= length
        first = pack % groups * size
        places.append(Place(pack // groups, evenly(length, range(first, first + size), number)))
    return Spread(batch.documents(lengths), places, -(-len(rooms) // groups))


def padding(batch: Batch) -> Spread:
    """Every document as long as the longest, in groups of one size."""
    return static_groups(batch, [max(batch.lengths)] * len(batch.lengths))


def first_fit(batch: Batch) -> Spread:
    """Documents as they come, in groups of one size."""
    return static_groups(batch, batch.lengths)


def zigzag(batch: Batch) -> Spread:
    """Every document over all pipelines."""
    documents = batch.longest_first
    places = [Place(0, evenly(n, range(batch.pipelines), i * 7)) for i, n in enumerate(documents.lengths)]
    return Spread(documents, places, 1)


def powers_of_two(batch: Batch) -> Spread:
    """Longest first, each to the group with least to do, of the smallest size at which nobody does over the mean."""
    documents = batch.longest_first
    mean = sum(documents.work) / batch.pipelines
    levels, rooms = [0.0] * batch.pipelines, [[batch.max_tokens] * batch.pipelines]
    places = []
    for d, length in enumerate(documents.lengths):
        size = batch.needed(length)
        while size < batch.pipelines and documents.work[d] / size > mean:
            size *= 2
        first = min(range(0, batch.pipelines, size), key=lambda r: max(levels[r : r + size]))
        pieces = evenly(length, range(first, first + size), d)
        fits = (all(room[r] >= tokens for r, tokens in pieces) for room in rooms)
        number = next((m for m, has_room in enumerate(fits) if has_room), len(rooms))
        if number == len(rooms):
            rooms.append([batch.max_tokens] * batch.pipelines)
        level = max(levels[first : first + size]) + batch.alone(documents, d, size)
        for r, tokens in pieces:
            levels[r], rooms[number][r] = level, rooms[number][r] - tokens
        places.append(Place(number, pieces))
    return Spread(documents, places, len(rooms))


def megatron(batch: Batch) -> Spread:
    """Balanced hybrid context parallelism, as Megatron-LM schedules it since 2025.

    A document's group is the smallest power of two that has room for it. In rounds, the longest document that can be
    placed goes to the group of its size that has least to do, or to pipelines that have no group yet. A round ends when
    nothing can be placed, or when, after a change to smaller groups, all pipelines are within 5 % of the busiest. Then
    the last document of the busiest group is left for later if that evens out the load, and while there are pipelines
    without a group the smallest group is doubled. It counts L² per document; here it is given the same cost as hetu.
    """
    documents = batch.longest_first
    left, places, rounds = list(range(len(documents.lengths))), [Place(0, ())] * len(documents.lengths), 0
    while left:
        groups = _round(batch, documents, left)
        first = 0
        for size, own in sorted(groups, key=lambda group: -group[0]):
            for d in own:
                places[d] = Place(rounds, evenly(documents.lengths[d], range(first, first + size), d))
            first += size
        placed = {d for _, own in groups for d in own}
        left, rounds = [d for d in left if d not in placed], rounds + 1
    return Spread(documents, places, rounds)


def _round(batch: Batch, documents: Documents, left: Sequence[int]) -> list[tuple[int, list[int]]]:
    """The groups of one of Megatron's rounds: ``(size, documents)``."""
    groups: list[tuple[int, list[int]]] = []

    def load(group: tuple[int, list[int]]) -> float:
        return sum(batch.alone(documents, d, group[0]) for d in group[1])

    def is_even() -> bool:
        loads = [load(group) for group in groups] + [0.0] * (free() > 0)
        return max(loads) - min(loads) <= 0.05 * max(loads)

    def free() -> int:
        return batch.pipelines - sum(size for size, _ in groups)

    largest = None
    for d in left:
        size = batch.needed(documents.lengths[d])
        same = [group for group in groups if group[0] == size]
        if free() >= size:
            groups.append((size, [d]))
        elif same:
            min(same, key=load)[1].append(d)
        else:
            continue
        largest = largest or size
        if size < largest and is_even():
            break
    while not is_even() and not free():
        busiest = max(groups, key=load)
        slack = load(busiest) - min(map(load, groups))
        if len(busiest[1]) < 2:
            break
        last = busiest[1].pop()
        if max(map(load, groups)) - min(map(load, groups)) >= slack:
            busiest[1].append(last)
            break
    while free():
        smallest = min(groups, key=lambda group: group[0])
        groups.remove(smallest)
        groups.append((2 * smallest[0], smallest[1]))
    return groups


def planned(batch: Batch) -> Spread:
    """As ``hetu.plan_batch`` does."""
    plan = hetu.plan_batch(batch.lengths, batch.pipelines, batch.hardware, max_tokens=batch.max_tokens)
    return Spread(batch.documents(batch.lengths), list(plan.places), plan.num_micro_batches)


PEERS = {
    "padding": padding,
    "zigzag": zigzag,
    "first fit": first_fit,
    "powers of two": powers_of_two,
    "Megatron": megatron,
    "hetu": planned,
}
"""The ways by their names in tables."""
