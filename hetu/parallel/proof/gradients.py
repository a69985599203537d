"""Proves that every gradient of keys and values comes home: gives each one a number, and notes where it went.

What an attend computes of one atom of heads of one row of a buffer other than the shard is one gradient. Of the
queries' buffer an attend computes those of all rows, for rows that no segment names get 0; of other buffers those that
segments name. Numbers stand in for them in buffers. A pipeline may add gradients of foreign rows to those that it
computed of them itself: what it holds then are sums, gradients of their own, which have to come home in turn. The plan
is proven if each is sent or copied once, and added once to the row of its owner's shard that holds its token, or to a
sum, or put there if it is the only one.

Gradients of own rows may also stay where they are computed. Of these it is proven that each attend to the own shard
which writes them where they belong, see :mod:`hetu.parallel.plan.own_gradients`, overwrites nothing, and that nothing
is added to a row that holds neither 0 nor a gradient.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NoReturn

import numpy as np

from hetu.parallel.mask.segments import IntArray
from hetu.parallel.plan.instructions import Attend
from hetu.parallel.plan.own_gradients import own_gradients
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.proof.contents import KEY_GRADS, Contents
from hetu.parallel.proof.transfers import refuse

NOT_COMPUTED = -3
"""A row of a foreign buffer that no segment of the last attend names."""


class Contributions:
    """All gradients that the pipelines of a backward plan compute in buffers other than their shards.

    Attributes:
        rows: By pipeline and number of the attend: the rows of the buffer of which it computes gradients.
        first: Likewise, the number of the first one's gradient; the others' follow, row after row and atom after atom.
        home: The number of the key head's atom of the token that each gradient is of.
        is_sent: Whether it is on its way home.
        is_added: Whether it is home.
    """

    def __init__(self, plan: PlanData, contents: Contents) -> None:
        self.contents = contents
        self.rows: dict[tuple[int, int], IntArray] = {}
        self.first: dict[tuple[int, int], int] = {}
        self._places: list[tuple[int, int]] = []
        self._summed: list[tuple[int, int]] = []  # the first number of some sums, and the pipeline that holds them
        home: list[IntArray] = [np.empty(0, np.int64)]
        total = 0
        for r, part in enumerate(plan.pipelines):
            attends = [item for item in part.instructions if isinstance(item, Attend)]
            for number, item in enumerate(attends):
                if item.buffer == 0:
                    continue
                rows = np.arange(item.rows) if item.buffer == part.queries else named_rows(item)
                atoms = contents.atoms(KEY_GRADS, item.heads)
                home.append(contents.numbers(KEY_GRADS, contents.tokens.of_sources(item)[rows], atoms).reshape(-1))
                self.rows[r, number], self.first[r, number] = rows, total
                self._places.append((r, number))
                total += len(home[-1])
        self.home = np.concatenate(home)
        self.is_sent, self.is_added = np.zeros((2, total), bool)

    def numbers(self, r: int, number: int, atoms: int) -> IntArray:
        """The gradients that an attend computes, ``(rows, atoms)``."""
        rows = self.rows[r, number]
        return self.first[r, number] + np.arange(len(rows) * atoms).reshape(len(rows), atoms)

    def add_up(self, held: IntArray, came: IntArray, r: int, what: str) -> IntArray:
        """Notes that a pipeline adds gradients to those that it holds of the same foreign rows, if it holds any.

        Returns:
            The numbers of the sums.
        """
        there = held >= 0
        wrong = there & (self.home[np.maximum(held, 0)] != self.home[came])
        if wrong.any():
            one, other = (self.name(int(numbers[wrong][0])) for numbers in (came, held))
            refuse(f"{what} adds {one} to {other}")
        for numbers in (came.reshape(-1), held[there]):
            twice = self.is_added[numbers] | (np.bincount(numbers)[numbers] > 1 if len(numbers) else False)
            if twice.any():
                refuse(f"{what} adds a second time {self.name(int(numbers[twice.argmax()]))}")
            self.is_sent[numbers] = self.is_added[numbers] = True
        first = len(self.home)
        self.home = np.concatenate([self.home, self.home[came].reshape(-1)])
        self.is_sent, self.is_added = (
            np.concatenate([flags, np.zeros(came.size, bool)]) for flags in (self.is_sent, self.is_added)
        )
        self._summed.append((first, r))
        return first + np.arange(came.size).reshape(came.shape)

    def name(self, gradient: int) -> str:
        """A gradient, as messages call it."""
        if self._summed and gradient >= self._summed[0][0]:
            r = self._summed[bisect_right([first for first, _ in self._summed], gradient) - 1][1]
            return f"the sum of gradients of {self.contents.name(KEY_GRADS, int(self.home[gradient]))} on pipeline {r}"
        r, number = self._places[bisect_right([self.first[place] for place in self._places], gradient) - 1]
        what = self.contents.name(KEY_GRADS, int(self.home[gradient]))
        return f"the gradient of {what} that pipeline {r} computes by attend {number}"

    def send(self, gradients: IntArray, what: str) -> None:
        """Notes that gradients leave the pipeline that computed them."""
        twice = self.is_sent[gradients] | (np.bincount(gradients)[gradients] > 1)
        if twice.any():
            refuse(f"{what} sends a second time {self.name(int(gradients[twice.argmax()]))}")
        self.is_sent[gradients] = True

    def check_home(self) -> None:
        """That none is still away."""
        away = ~self.is_added
        if away.any():
            i = int(away.argmax())
            what = "is sent home, but never added to its owner's" if self.is_sent[i] else "is never sent home"
            refuse(f"{self.name(i)} {what}")


class OwnSums:
    """The gradients of one pipeline's own keys and values, ``(rows, atoms)``.

    Attributes:
        holds: Whether there is 0 or a gradient, and not what was in memory.
        has_part: Whether there is a gradient.
    """

    def __init__(self, r: int, plan: PlanData, contents: Contents, contributions: Contributions) -> None:
        self.r, self.part, self.contents, self.all = r, plan.pipelines[r], contents, contributions
        own = own_gradients(self.part)
        steps = [n for n, item in enumerate(self.part.instructions) if isinstance(item, Attend)]
        self.aside = {number for number, step in enumerate(steps) if step in own.aside}
        size = self.part.rows, contents.number_of_atoms(KEY_GRADS)
        self.holds = np.full(size, 0 in own.gaps)
        self.has_part = np.zeros(size, bool)

    def attend(self, item: Attend, number: int) -> None:
        """Computes gradients of own rows: where they belong, or aside to be added."""
        rows, atoms = named_rows(item), self.contents.atoms(KEY_GRADS, item.heads)
        if number in self.aside:
            self._check_holds(rows, atoms, f"attend {number} adds to")
        elif self.has_part[rows, atoms].any():
            self._refuse(
                f"attend {number} overwrites what there is of the gradient of own row {self._taken(rows, atoms)}"
            )
        self.holds[rows, atoms] = self.has_part[rows, atoms] = True

    def bring(self, rows: IntArray, atoms: slice, gradients: IntArray, what: str, is_finished: bool) -> None:
        """Adds gradients to those of own rows, or puts finished ones there."""
        flat = gradients.reshape(-1)
        if self.all.is_added[flat].any():
            self._refuse(f"{what} adds a second time {self.all.name(int(flat[self.all.is_added[flat].argmax()]))}")
        wanted = self.contents.numbers(KEY_GRADS, self.contents.tokens.shards[self.r][rows], atoms)
        wrong = wanted != self.all.home[gradients]
        if wrong.any():
            i, atom = np.argwhere(wrong)[0]
            there = self.contents.name(KEY_GRADS, int(wanted[i, atom]))
            self._refuse(f"{what} adds to own row {rows[i]}, {there}: {self.all.name(int(gradients[i, atom]))}")
        self.all.is_added[flat] = True
        if not is_finished:
            self._check_holds(rows, atoms, f"{what} adds to")
        elif self.has_part[rows, atoms].any():
            self._refuse(f"{what} overwrites what there is of the gradient of own row {self._taken(rows, atoms)}")
        self.holds[rows, atoms] = self.has_part[rows, atoms] = True

    def _taken(self, rows: IntArray, atoms: slice) -> int:
        return int(rows[self.has_part[rows, atoms].any(1).argmax()])

    def _check_holds(self, rows: IntArray, atoms: slice, what: str) -> None:
        held = self.holds[rows, atoms]
        if not held.all():
            row = int(rows[held.all(1).argmin()])
            self._refuse(f"{what} the gradient of own row {row}, to which nothing was written")

    def check_end(self) -> None:
        """That every own row got a gradient, if only 0."""
        self._check_holds(np.arange(self.part.rows), slice(None), "the plan leaves")

    def _refuse(self, what: str) -> NoReturn:
        refuse(f"pipeline {self.r}: {what}")


def named_rows(item: Attend) -> IntArray:
    """The rows of a buffer that segments name, in order."""
    begins = np.bincount(item.table.k_start, minlength=item.rows + 1)
    ends = np.bincount(item.table.k_start + item.table.k_len, minlength=item.rows + 1)
    return np.flatnonzero((begins - ends).cumsum() > 0)
