"""Random strategies for the tests of layouts and plans, and the rules of the splits, one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from hetu.parallel import SPLITS, Heads, Layout, Mask, groups_of
from hetu.parallel.layout.pieces import balance

DEFINITIONS: dict[Mask, Callable[[Any, Any], Any]] = {
    Mask.causal(): lambda query, key: query >= key,
    Mask.full(): lambda query, key: (query >= key) | True,
    Mask.window(2, 0): lambda query, key: (query - 2 <= key) & (key <= query),
    Mask.window(1, 3): lambda query, key: (query - 1 <= key) & (key <= query + 3),
    Mask.window(-1, 2): lambda query, key: key <= query + 2,
    Mask.chunked(4): lambda query, key: (query // 4 == key // 4) & (key <= query),
    Mask.prefix(3): lambda query, key: (query >= 0) & ((key <= query) | ((query < 3) & (key < 3))),
}
"""Which positions of keys a query at a position sees: written here once more, apart from hetu."""

MASKS = tuple(DEFINITIONS)
"""One of every kind."""

HEADS = Heads(num_q=2, num_kv=1, head_dim=8, itemsize=4)
Tokens = list[tuple[int, int]]
"""(document, position) of every local row."""


@dataclass
class Case:
    """A strategy with what was fed: batches, or cumulative lengths of one or two dimensions."""

    lens: list[int]
    cp_groups: list[int]
    split: str
    batches: list[int]
    cu_seqlens: list[np.ndarray] | None

    def layout(self) -> Layout:
        return Layout.build(self.lens, self.cp_groups, split=self.split, batch=self.batches, cu_seqlens=self.cu_seqlens)

    def expected(self) -> dict[int, Tokens]:
        """What every pipeline holds, by the rules as the specification has them."""
        held: dict[int, Tokens] = {}
        for g, members in enumerate(groups_of(self.cp_groups).values()):
            for r in members:
                held[r] = []
            for document, pieces in enumerate(self.pieces(g, [self.lens[r] for r in members])):
                for r, positions in zip(members, SPLITS_BY_DEFINITION[self.split][1](pieces), strict=True):
                    held[r] += [(document, position) for position in positions]
        return held

    def pieces(self, g: int, lens: list[int]) -> list[list[int]]:
        """Tokens of each document on each member."""
        if self.cu_seqlens is None:
            return [lens] * self.batches[g]
        cu = self.cu_seqlens[g]
        if cu.ndim == 2:
            return np.diff(cu).T.tolist()
        return SPLITS_BY_DEFINITION[self.split][0](cu, lens)


def in_runs(cu: np.ndarray, lens: list[int]) -> list[list[int]]:
    """The concatenation of all documents is cut into one run per member."""
    owner = [r for r, length in enumerate(lens) for _ in range(length)]
    documents = [owner[cu[d] : cu[d + 1]] for d in range(len(cu) - 1)]
    return [[document.count(r) for r in range(len(lens))] for document in documents]


def in_proportion(cu: np.ndarray, lens: list[int]) -> list[list[int]]:
    """Each document is dealt out in proportion to what the members hold."""
    totals = [share(total, lens) for total in cu.tolist()]
    return [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(totals)]


def chosen(cu: np.ndarray, lens: list[int]) -> list[list[int]]:
    """By hetu itself: test_pieces.py says what is right."""
    return np.diff(balance(cu.astype(np.int64), np.array(lens))).T.tolist()


def share(total: int, lens: list[int]) -> list[int]:
    """The documented rule of two-way splits, as a recursion over exact ints."""
    if len(lens) == 1:
        return [total]
    first = total * lens[0] // sum(lens) if sum(lens) else 0
    return [first, *share(total - first, lens[1:])]


def in_order(pieces: list[int]) -> list[list[int]]:
    """Positions of one document on each member: contiguous, in the order of the members."""
    ends = np.cumsum(pieces).tolist()
    return [list(range(end - n, end)) for n, end in zip(pieces, ends, strict=True)]


def front_and_back(pieces: list[int]) -> list[list[int]]:
    """Front pieces in the order of the members, then back pieces in the other order."""
    fronts = in_order([n // 2 for n in pieces])
    backs = in_order([n - n // 2 for n in reversed(pieces)])
    behind = sum(n // 2 for n in pieces)
    return [front + [behind + i for i in back] for front, back in zip(fronts, reversed(backs), strict=True)]


def dealt(pieces: list[int]) -> list[list[int]]:
    """One token at a time, in the order of the members, to those that still have room."""
    held: list[list[int]] = [[] for _ in pieces]
    r = 0
    for position in range(sum(pieces)):
        while len(held[r % len(pieces)]) == pieces[r % len(pieces)]:
            r += 1
        held[r % len(pieces)].append(position)
        r += 1
    return held


SPLITS_BY_DEFINITION = {
    "normal": (in_runs, in_order),
    "sym": (in_proportion, front_and_back),
    "stripe": (in_proportion, dealt),
    "balanced": (chosen, front_and_back),
}
"""Each split once more, token by token: the pieces of each document, and which tokens they are."""


def random_case(rng: np.random.Generator, longest: int = 50, most: int = 9) -> Case:
    """Up to ``most`` pipelines of 0 to ``longest`` tokens; every split, packed in both ways and not."""
    count = int(rng.integers(1, most + 1))
    lens = (rng.integers(0, longest + 1, count) * (rng.random(count) < 0.85)).tolist()
    cp_groups = rng.choice([3, 3, 3, 0, 5], count).tolist()
    members = list(groups_of(cp_groups).values())
    split = str(rng.choice(list(SPLITS)))
    kind = rng.integers(3)
    if kind == 0:
        return Case(lens, cp_groups, split, rng.integers(1, 4, len(members)).tolist(), None)
    cus = []
    for own in members:
        documents = int(rng.integers(0, 6))
        totals = [sum(lens[r] for r in own)] if kind == 1 else [lens[r] for r in own]
        rows = [[0, *sorted(rng.integers(0, total + 1, documents).tolist()), total] for total in totals]
        cus.append(np.array(rows[0] if kind == 1 else rows, np.int32))
    return Case(lens, cp_groups, split, [1] * len(members), cus)


def sparse_layout(rng: np.random.Generator, most: int = 12) -> Layout:
    """Short documents, each on up to three of up to ``most`` pipelines of one group, wherever these stand in it."""
    count, documents = int(rng.integers(2, most + 1)), int(rng.integers(1, 9))
    pieces = np.zeros((count, documents), np.int64)
    for document in range(documents):
        who = rng.choice(count, min(count, int(rng.integers(1, 4))), replace=False)
        pieces[who, document] = rng.integers(1, 4, len(who))
    cu = np.concatenate([np.zeros((count, 1), np.int64), pieces.cumsum(1)], axis=1)
    return Layout.build(pieces.sum(1).tolist(), [0] * count, split=str(rng.choice(list(SPLITS))), cu_seqlens=[cu])


def random_custom_layout(rng: np.random.Generator, longest: int = 16) -> Layout:
    """Each token of each document on any pipeline: all steps there are, meeting each other in every way."""
    count = int(rng.integers(1, 5))
    cp_groups = rng.choice([0, 0, 1], count).tolist()
    lengths, spans = [], []
    for members in groups_of(cp_groups).values():
        lengths.append(rng.integers(0, longest + 1, rng.integers(1, 4)).tolist())
        rows: list[tuple[int, ...]] = []
        for r_document, length in enumerate(lengths[-1]):
            # Pieces of a pattern, so that long spans of unequal steps come up as well as lone tokens.
            period = int(rng.integers(1, 7))
            owner = np.resize(rng.choice(members, period), length)
            noise = rng.random(length) < rng.choice([0.0, 0.1, 1.0])
            owner = np.where(noise, rng.choice(members, length), owner)
            for r in members:
                rows += [(r, r_document, *run) for run in runs_of(np.flatnonzero(owner == r).tolist())]
        spans.append(rows)
    return Layout.from_spans(cp_groups, lengths, spans)


def runs_of(positions: list[int]) -> list[tuple[int, int, int]]:
    """Cuts rising positions into evenly spaced runs (start, length, step), greedily."""
    runs: list[tuple[int, int, int]] = []
    while positions:
        step, n = (positions[1] - positions[0] if len(positions) > 1 else 1), 1
        while n < len(positions) and positions[n] - positions[n - 1] == step:
            n += 1
        runs.append((positions[0], n, step))
        positions = positions[n:]
    return runs
