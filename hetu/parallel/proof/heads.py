"""Proves parts that exchange heads for tokens: follows every head of every token to who attends for it, and home.

Every value of a token (q, k, v, ...) of every head has a number, :meth:`Shares.numbers`; what an attend computes of it
has the same. The plan is proven if every attend finds the numbers that its rows and heads should have, every query head
is attended for once, and every result comes to its own row and head, once. Gradients of a key head are computed by
whoever has query heads of it: each such part has a number of its own, :meth:`Shares.part`, and all have to come home.
Where several do, they are to be added and not written over each other.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from hetu.parallel.mask.segments import IntArray
from hetu.parallel.plan.heads import HeadRange, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Runs, Send
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.proof.follow import Follower
from hetu.parallel.proof.heads_structure import GATHERED
from hetu.parallel.proof.pairs import prove_pairs, seen_by
from hetu.parallel.proof.structure import LANDING, UNWRITTEN, Tokens, Transfer, instruction_name, refuse

_PARTS = ("dk", "dv")
"""Values that several pipelines may compute a part of."""


class Shares:
    """What all pipelines of a plan know: the numbers, and which heads and which parts of gradients were computed."""

    def __init__(self, plan: PlanData, tokens: Tokens) -> None:
        self.plan, self.tokens, self.heads = plan, tokens, plan.heads
        self.times = {group.index: np.zeros(self.heads.num_q, np.int64) for group in plan.layout.groups}
        self.parts: list[tuple[int, Attend]] = []
        for r, part in enumerate(plan.pipelines):
            if part.heads is None:
                self.times[plan.layout.group_index(r)][:] = 1
                continue
            for item in part.instructions:
                if isinstance(item, Attend) and item.heads is not None:
                    self.times[plan.layout.group_index(r)][item.heads.of("q")] += 1
                    self.parts.append((r, item))
        # By value, part, token and key head.
        shape = 2, len(self.parts) if plan.is_backward else 0, len(tokens.group), self.heads.num_kv
        self.is_home = np.zeros(shape, bool)

    def numbers(self, name: str, tokens: IntArray, heads: HeadRange) -> IntArray:
        """A value of some heads of tokens, ``(tokens, heads)``."""
        own = heads.of(name)
        return tokens[:, None] * self.heads.num_q + np.arange(own.start, own.stop)

    def part(self, item: Attend, tokens: IntArray, heads: HeadRange) -> IntArray:
        """The part of a key head's gradients that an attend computes, ``(tokens, heads)``."""
        number = next(i for i, (_, other) in enumerate(self.parts) if other is item)
        shape = self.is_home.shape[1:]
        own = heads.of("dk")
        return (number * shape[1] + tokens[:, None]) * shape[2] + np.arange(own.start, own.stop)

    def name(self, name: str, number: int) -> str:
        """A number, as messages call it."""
        if number < 0:
            return f"{name} of " + self.tokens.name(number)
        if name in _PARTS:
            part, token, head = map(int, np.unravel_index(number, self.is_home.shape[1:]))
            by = f" that pipeline {self.parts[part][0]} computes"
            return f"{name} of {self.tokens.name(token)}, key head {head},{by}"
        token, head = divmod(number, self.heads.num_q)
        return f"{name} of {self.tokens.name(token)}, head {head}"

    def bring_home(self, name: str, parts: IntArray, what: str) -> None:
        """Notes that parts of gradients have come where they belong."""
        is_home = self.is_home[_PARTS.index(name)].reshape(-1)
        twice = is_home[parts]
        if twice.any():
            refuse(f"{what} brings a second time {self.name(name, int(parts[twice][0]))}")
        is_home[parts] = True

    def check_home(self) -> None:
        """Every query head was attended for once, and all parts of gradients are home."""
        for group, times in self.times.items():
            if self.plan.layout.groups[group].tokens and (times != 1).any():
                head = int((times != 1).argmax())
                refuse(f"group {group}: query head {head} is attended for {times[head]} times, expected once")
        for number, (r, item) in enumerate(self.parts if self.plan.is_backward else ()):
            assert item.heads is not None
            rows = np.flatnonzero(self.tokens.group == self.plan.layout.group_index(r))
            away = np.argwhere(~self.is_home[:, number][:, rows][:, :, item.heads.of("dk")])
            if len(away):
                value, row, head = away[0]
                part = (number, int(rows[row]), head + item.heads.first_kv)
                lost = int(np.ravel_multi_index(part, self.is_home.shape[1:]))
                refuse(f"{self.name(_PARTS[value], lost)} never comes home")


class HeadsRun(Follower):
    """One pipeline that follows its instructions; see the module.

    Attributes:
        own: By value: of all heads of the own rows, what is there.
        gathered: By kind: of the pipeline's heads of all rows, value beside value.
    """

    def __init__(self, r: int, plan: PlanData, tokens: Tokens, transfers: dict[int, Transfer], shares: Shares) -> None:
        super().__init__(r, plan, transfers)
        assert self.part.heads is not None
        self.plan, self.shares, self.mine = plan, shares, self.part.heads
        self.group, _ = plan.layout.place(r)
        self.all = np.flatnonzero(tokens.group == self.group.index)
        self.rows, everything = tokens.shards[r], plan.heads.all
        came = (Payload.QKV_DOUT, Payload.LSE_DELTA) if plan.is_backward else (Payload.QKV,)
        self.inputs = {name: kind for kind in came for name in kind.values}
        self.own = {name: shares.numbers(name, self.rows, everything) for name in self.inputs}
        outputs = ("dq", *_PARTS) if plan.is_backward else ("out", "lse", *(["p"] if plan.heads.columns else []))
        self.results = {name: np.full((len(self.rows), everything.count(name)), UNWRITTEN) for name in outputs}
        self.is_added = {name: np.zeros(self.results[name].shape, bool) for name in _PARTS if plan.is_backward}
        self.gathered: dict[Payload, IntArray] = {}
        self.landing = [np.empty((size, 0), np.int64) for size in self.part.landing]

    # Transfers and copies

    def pack(self, item: Send) -> IntArray:
        if item.buffer and item.heads != self.mine:
            self.refuse(f"{instruction_name(item)} sends {item.heads}, but only all that it has: {self.mine}")
        return self._read(item, item.runs)

    def _read(self, item: Send | Copy, runs: Runs) -> IntArray:
        assert item.heads is not None
        if item.buffer:
            if item.payload not in self.gathered:
                self.refuse(f"{instruction_name(item)} takes {item.payload.label} before any were computed")
            rows = self.gathered[item.payload][runs.indices()]
        else:
            values = [self.own[name][:, item.heads.of(name)] for name in item.payload.values]
            rows = np.concatenate(values, 1)[runs.indices()]
        if (rows < 0).any():
            self.refuse(f"{instruction_name(item)} takes {item.payload.label} before all were computed")
        return rows

    def expect(self, item: Receive) -> None:
        assert item.heads is not None
        what = instruction_name(item)
        if item.grads:
            if (self.landing[item.buffer] == LANDING).any():
                self.refuse(f"{what} fills landing buffer {item.buffer} while it is landing")
            if (self.landing[item.buffer] >= 0).any():
                self.refuse(f"{what} fills landing buffer {item.buffer} before it was added")
            rows, width = self.part.landing[item.buffer], item.heads.width(item.payload)
            self.landing[item.buffer] = np.full((rows, width), UNWRITTEN)
            self.landing[item.buffer][item.offset : item.offset + item.rows] = LANDING
            return
        for name in item.payload.values:
            self._write(name, item, item.indices(), np.full((item.rows, item.heads.count(name)), LANDING))

    def land(self, item: Receive, content: IntArray) -> None:
        assert item.heads is not None
        if item.grads:
            self.landing[item.buffer][item.offset : item.offset + item.rows] = content
            return
        for name in item.payload.values:
            part = content[:, item.heads.columns(item.payload, name, item.heads)]
            self._write(name, item, item.indices(), part)

    def compute(self, item: Attend | Accumulate | Copy) -> None:
        match item:
            case Attend():
                self._attend(item)
            case Accumulate():
                self._add(item)
            case Copy():
                rows, place = self._read(item, item.runs), item.place.indices()
                row = item.heads if item.buffer == 0 else self.mine
                for name in item.payload.values:
                    part = rows[:, item.heads.columns(item.payload, name, row)]
                    if item.payload is Payload.KV_GRADS:
                        self._sum(name, instruction_name(item), item.heads, place, part)
                    else:
                        self._write(name, item, place, part)

    def _write(self, name: str, item: Receive | Copy, rows: IntArray, values: IntArray) -> None:
        """Puts numbers, or that they are landing, where nothing was."""
        assert item.heads is not None
        if item.payload.is_result:
            target = self.results[name][:, item.heads.of(name)]
        else:
            size = self.part.buffers[GATHERED], self.mine.width(item.payload)
            whole = self.gathered.setdefault(item.payload, np.full(size, UNWRITTEN))
            target = whole[:, item.heads.columns(item.payload, name, self.mine)]
        is_landing = isinstance(item, Receive) and (values >= 0).all()
        if (target[rows] != (LANDING if is_landing else UNWRITTEN)).any():
            self.refuse(
                f"{instruction_name(item)} writes {item.payload.label} where others were written, or are landing"
            )
        target[rows] = values
        if item.payload.is_result and (values >= 0).all():
            self._check_home(name, instruction_name(item), item.heads, rows, values)

    def _check_home(self, name: str, what: str, heads: HeadRange, rows: IntArray, values: IntArray) -> None:
        """Results came to the rows and heads that they are of."""
        wanted = self.shares.numbers(name, self.rows[rows], heads)
        if name in _PARTS:
            _, token, head = np.unravel_index(values, self.shares.is_home.shape[1:])
            wrong = token * self.plan.heads.num_q + head != wanted
            self.shares.bring_home(name, values.ravel(), f"pipeline {self.r}: {what}")
        else:
            wrong = values != wanted
        if wrong.any():
            self.refuse(f"{what} brings to another place {self.shares.name(name, int(values[wrong][0]))}")

    def _add(self, item: Accumulate) -> None:
        assert item.heads is not None
        what, rows = f"an accumulate from landing buffer {item.buffer}", item.runs.indices()
        if self.landing[item.buffer].shape[1] != item.heads.width(Payload.KV_GRADS):
            self.refuse(f"{what} adds {item.heads}, which are not those that came")
        landed = self.landing[item.buffer][item.offset : item.offset + len(rows)]
        if (landed < 0).any():
            self.refuse(f"{what} adds nothing that has landed")
        for name in _PARTS:
            columns = item.heads.columns(Payload.KV_GRADS, name, item.heads)
            self._sum(name, what, item.heads, rows, landed[:, columns])
        self.landing[item.buffer] = np.full_like(self.landing[item.buffer], UNWRITTEN)

    def _sum(self, name: str, what: str, heads: HeadRange, rows: IntArray, parts: IntArray) -> None:
        """Adds parts to gradients that begin as 0."""
        if (self.results[name][:, heads.of(name)][rows] != UNWRITTEN).any():
            self.refuse(f"{what} adds to gradients that were finished")
        self.is_added[name][:, heads.of(name)][rows] = True
        self._check_home(name, what, heads, rows, parts)

    # Attends

    def _attend(self, item: Attend) -> None:
        heads = item.heads
        assert heads is not None
        for name, kind in self.inputs.items():
            held = self.gathered.get(kind)
            if held is None:
                self.refuse(f"attending for {heads} before any {kind.label} came")
            there = held[:, heads.columns(kind, name, self.mine)]
            wrong = there != self.shares.numbers(name, self.all, heads)
            if wrong.any():
                row = int(wrong.any(1).argmax())
                found = self.shares.name(name, int(there[row][wrong[row]][0]))
                self.refuse(f"attending for {heads}: row {row} holds {found}")
        self._check_sources(item)
        prove_pairs(self.plan, self.r, self.group, self.part.spans, [seen_by(item.table, self.all)], self.shares.tokens)
        kinds = (
            (Payload.Q_GRADS, Payload.KV_GRADS, Payload.QKV_GRADS)
            if self.plan.is_backward
            else (Payload.OUT, Payload.LSE, Payload.P)
        )
        for kind in kinds:
            size = len(self.all), self.mine.width(kind)
            held = self.gathered.setdefault(kind, np.full(size, UNWRITTEN))
            for name in kind.values:
                numbers = self.shares.part(item, self.all, heads) if name in _PARTS else None
                numbers = self.shares.numbers(name, self.all, heads) if numbers is None else numbers
                held[:, heads.columns(kind, name, self.mine)] = numbers

    def _check_sources(self, item: Attend) -> None:
        """They say of every row, once, which token it is: kernels are told the keys' positions by them."""
        said = np.full(len(self.all), UNWRITTEN)
        for source in item.sources:
            assert source.place is not None
            said[source.place.indices()] = self.shares.tokens.shards[source.owner][source.runs.indices()]
        if item.rows != len(self.all) or not np.array_equal(said, self.all):
            self.refuse(f"attending for {item.heads}: its sources are not the tokens of the group in order")

    def check_end(self) -> None:
        super().check_end()
        for name, values in self.results.items():
            missing = (values < 0) & ~self.is_added.get(name, np.zeros(values.shape, bool))
            if missing.any():
                row, head = np.argwhere(missing)[0]
                token = self.shares.tokens.name(int(self.rows[row]))
                self._never(f"{name} of {token}, head {head}")

    def _never(self, what: str) -> NoReturn:
        self.refuse(f"{what} never comes home")
