"""Proves that every gradient comes home: follows a backward plan's gradients of foreign rows from row to row.

Each row of a foreign buffer that some segment of an attend names is one gradient, with a number. Numbers stand in for
the gradients in what an attend computed and in landing buffers. The plan is proven if each of them is sent once and
added once, to the row of its owner's shard that holds its token.

Gradients of own rows stay where they are computed. Of these it is proven that each attend to the own shard which writes
them where they belong, see :mod:`hetu.parallel.plan.own_gradients`, overwrites nothing, and that nothing is added to a
row that holds neither 0 nor a gradient.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from hetu.parallel.mask.segments import IntArray
from hetu.parallel.plan.instructions import Accumulate, Attend, Receive, Send
from hetu.parallel.plan.own_gradients import own_gradients
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.proof.structure import LANDING, UNWRITTEN, Tokens, instruction_name, refuse

NOT_COMPUTED = -3
"""A row of a foreign buffer that no segment of the last attend names."""


class Contributions:
    """All gradients of foreign rows that the pipelines of a backward plan compute.

    Attributes:
        tokens: The plan's tokens.
        rows: By pipeline and number of the attend: the rows of the buffer that segments name.
        first: Likewise, the number of the first one's gradient; the others' follow.
        token: Of which token each gradient is.
        pipeline: Who computes it.
        attend: By which of its attends, from 0.
        is_sent: Whether it is on its way home.
        is_added: Whether it is home.
    """

    def __init__(self, plan: PlanData, tokens: Tokens) -> None:
        self.tokens = tokens
        self.rows: dict[tuple[int, int], IntArray] = {}
        self.first: dict[tuple[int, int], int] = {}
        token: list[IntArray] = [np.empty(0, np.int64)]
        places: list[tuple[int, int]] = []
        for r, part in enumerate(plan.pipelines):
            # Where heads are exchanged all gradients come home that way; see verify_heads.
            attends = [item for item in part.instructions if isinstance(item, Attend) and part.heads is None]
            for number, item in enumerate(attends):
                if item.buffer == 0:
                    continue
                rows = named_rows(item)
                held = [tokens.shards[source.owner][source.runs.indices()] for source in item.sources]
                self.rows[r, number], self.first[r, number] = rows, len(places)
                token += [np.concatenate(held)[rows]] if held else []
                places += [(r, number)] * len(rows)
        self.token = np.concatenate(token)
        self.pipeline, self.attend = np.array(places, np.int64).reshape(-1, 2).T
        self.is_sent, self.is_added = np.zeros((2, len(places)), bool)

    def name(self, gradient: int) -> str:
        """A gradient, as messages call it."""
        token, by = self.tokens.name(int(self.token[gradient])), f"pipeline {self.pipeline[gradient]}"
        return f"the gradient of {token} that {by} computes by attend {self.attend[gradient]}"

    def check_home(self) -> None:
        """That none is still away."""
        away = ~self.is_added
        if away.any():
            i = int(away.argmax())
            what = "is sent home, but never added to its owner's" if self.is_sent[i] else "is never sent home"
            refuse(f"{self.name(i)} {what}")


class Gradients:
    """The gradients that one pipeline holds while it follows its instructions.

    Attributes:
        computed: By buffer, what the last attend to it computed; foreign buffers only.
        landing: Its landing buffers.
        holds: Whether each own row holds 0 or a gradient, and not what was in memory.
        has_part: Whether it holds a gradient.
    """

    def __init__(self, r: int, plan: PlanData, all_of_them: Contributions) -> None:
        self.r, self.part, self.all = r, plan.pipelines[r], all_of_them
        self.computed: dict[int, IntArray] = {}
        self.landing = [np.full(size, UNWRITTEN) for size in self.part.landing]
        self.attends = 0
        own = own_gradients(self.part)
        steps = [n for n, item in enumerate(self.part.instructions) if isinstance(item, Attend)]
        self.aside = {number for number, step in enumerate(steps) if step in own.aside}
        self.holds = np.full(self.part.rows, own.has_gaps)
        self.has_part = np.zeros(self.part.rows, bool)

    def attend(self, item: Attend, pending: list[Send | Receive]) -> None:
        """Computes the gradients of a buffer, in place of what was computed of it before."""
        number, buffer = self.attends, item.buffer
        self.attends += 1
        if buffer == 0:
            self._attend_to_own(named_rows(item), number)
            return
        for other in pending:
            if isinstance(other, Send) and other.grads and other.buffer == buffer:
                self._refuse(f"attend {number} to buffer {buffer} while {instruction_name(other)} reads its gradients")
        lost = self.computed.get(buffer, np.empty(0, np.int64))
        lost = lost[lost >= 0]
        lost = lost[~self.all.is_sent[lost]]
        if len(lost):
            self._refuse(f"{self.all.name(int(lost[0]))} is overwritten by attend {number} before it is sent home")
        rows = self.all.rows[self.r, number]
        self.computed[buffer] = np.full(self.part.buffers[buffer], NOT_COMPUTED)
        self.computed[buffer][rows] = self.all.first[self.r, number] + np.arange(len(rows))

    def _attend_to_own(self, rows: IntArray, number: int) -> None:
        if number in self.aside:
            self._check_holds(rows, f"attend {number} adds to")
        elif self.has_part[rows].any():
            row = int(rows[self.has_part[rows].argmax()])
            self._refuse(f"attend {number} overwrites what there is of the gradient of own row {row}")
        self.holds[rows] = self.has_part[rows] = True

    def _check_holds(self, rows: IntArray, what: str) -> None:
        if not self.holds[rows].all():
            row = int(rows[self.holds[rows].argmin()])
            self._refuse(f"{what} the gradient of own row {row}, to which nothing was written")

    def check_end(self) -> None:
        """That every own row got a gradient, if only 0."""
        self._check_holds(np.arange(self.part.rows), "the plan leaves")

    def send(self, item: Send) -> IntArray:
        """What a send packs."""
        rows = item.runs.indices()
        if item.buffer not in self.computed:
            self._refuse(f"{instruction_name(item)} comes before any attend to buffer {item.buffer}")
        content = self.computed[item.buffer][rows]
        if (content < 0).any():
            row = rows[(content < 0).argmax()]
            self._refuse(f"{instruction_name(item)} sends row {row} of buffer {item.buffer}, which no segment names")
        twice = self.all.is_sent[content] | (np.bincount(content)[content] > 1)
        if twice.any():
            self._refuse(f"{instruction_name(item)} sends a second time {self.all.name(int(content[twice.argmax()]))}")
        self.all.is_sent[content] = True
        return content

    def receive(self, item: Receive) -> None:
        """Gives rows of a landing buffer to what will land there."""
        rows = self.landing[item.buffer][item.offset : item.offset + item.rows]
        kept = rows[rows >= 0]
        kept = kept[~self.all.is_added[kept]]
        if len(kept):
            what = f"{instruction_name(item)} fills landing buffer {item.buffer}"
            self._refuse(f"{what} before it was added: {self.all.name(int(kept[0]))}")
        rows[:] = LANDING

    def add(self, item: Accumulate) -> None:
        """Adds what has landed to the pipeline's own gradients."""
        what = f"{instruction_name(item)} from landing buffer {item.buffer}"
        landed = self.landing[item.buffer][item.offset : item.offset + item.runs.rows]
        if (landed < 0).any():
            row = int((landed < 0).argmax())
            self._refuse(f"{what} adds row {item.offset + row}: {self.all.tokens.name(int(landed[row]))}")
        if self.all.is_added[landed].any():
            gradient = int(landed[self.all.is_added[landed].argmax()])
            self._refuse(f"{what} adds a second time {self.all.name(gradient)}")
        own = item.runs.indices()
        tokens = self.all.tokens.shards[self.r][own]
        wrong = tokens != self.all.token[landed]
        if wrong.any():
            i = int(wrong.argmax())
            there = self.all.tokens.name(int(tokens[i]))
            self._refuse(f"{what} adds to own row {own[i]}, {there}: {self.all.name(int(landed[i]))}")
        self.all.is_added[landed] = True
        self._check_holds(own, f"{what} adds to")
        self.has_part[own] = True

    def _refuse(self, what: str) -> NoReturn:
        refuse(f"pipeline {self.r}: {what}")


def named_rows(item: Attend) -> IntArray:
    """The rows of a buffer that segments name, in order."""
    begins = np.bincount(item.table.k_start, minlength=item.rows + 1)
    ends = np.bincount(item.table.k_start + item.table.k_len, minlength=item.rows + 1)
    return np.flatnonzero((begins - ends).cumsum() > 0)
