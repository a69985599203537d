"""Follows instructions without running them: what every pipeline of a plan that is proven has in common.

A pipeline may have to wait for all transfers that it has started before anything is computed. On a GPU a transfer
occupies the device until the other end has started, too, and to load a kernel, or to allocate memory, waits for the
device. So what computes is followed as if it waited, packing rows to be sent as well; what is sent together is packed
before any of it is sent. A plan that passes doesn't hang whichever of its computations wait.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NoReturn

from hetu.parallel.mask.segments import IntArray
from hetu.parallel.plan.buffers import batches
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Send, Wait
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.proof.transfers import Transfer, instruction_name, refuse


class Follower(ABC):
    """One pipeline that follows its instructions, with numbers for what it computes with.

    Attributes:
        r: The pipeline.
        pending: Its ends of transfers that it has started and not waited for.
    """

    def __init__(self, r: int, plan: PlanData, transfers: dict[int, Transfer]) -> None:
        self.r, self.part, self.transfers = r, plan.pipelines[r], transfers
        self.next, self.packs = 0, {number for number, batch in batches(self.part).items() if batch.sends}
        self.pending: dict[int, Send | Receive] = {}

    @abstractmethod
    def pack(self, item: Send) -> dict[str, IntArray]:
        """What a send carries: numbers by kind of value."""

    @abstractmethod
    def expect(self, item: Receive) -> None:
        """Gives what a receive fills to it."""

    @abstractmethod
    def land(self, item: Receive, content: dict[str, IntArray]) -> None:
        """Puts what has come where a receive wants it."""

    @abstractmethod
    def compute(self, item: Attend | Accumulate | Copy) -> None:
        """Does what concerns no other pipeline."""

    @abstractmethod
    def followed(self, number: int) -> None:
        """Lets go of what nobody needs after an instruction."""

    @property
    def is_done(self) -> bool:
        return self.next == len(self.part.instructions)

    def advance(self) -> bool:
        """Follows instructions until one has to wait; says whether any was followed."""
        begin = self.next
        while not self.is_done and self._step():
            self.followed(self.next)
            self.next += 1
        return self.next > begin

    def waits_for(self) -> Transfer | None:
        """The first transfer of which the other end has to be started before this pipeline surely goes on."""
        item = None if self.is_done else self.part.instructions[self.next]
        if isinstance(item, Wait):
            return self.transfers[item.transfer]
        computes = isinstance(item, (Attend, Accumulate, Copy)) or self.next in self.packs
        transfers = [self.transfers[number] for number in self.pending] if computes else []
        return next((t for t in transfers if not t.is_expected or t.content is None), None)

    def _step(self) -> bool:
        if not isinstance(self.part.instructions[self.next], Wait) and self.waits_for():
            return False
        match self.part.instructions[self.next]:
            case Wait() as item:
                return self._wait(item)
            case Send() as item:
                self.transfers[item.transfer].content = self.pack(item)
                self.pending[item.transfer] = item
            case Receive() as item:
                self.expect(item)
                self.transfers[item.transfer].is_expected = True
                self.pending[item.transfer] = item
            case item:
                self.compute(item)
        return True

    def _wait(self, item: Wait) -> bool:
        own = self.pending.get(item.transfer)
        if own is None:
            refuse(f"pipeline {self.r} waits for transfer {item.transfer}, which it has not started, or twice")
        transfer = self.transfers[item.transfer]
        if isinstance(own, Send):
            if not transfer.is_expected:
                return False
        else:
            if transfer.content is None:
                return False
            self.land(own, transfer.content)
        del self.pending[item.transfer]
        return True

    def refuse(self, what: str) -> NoReturn:
        """Refuses the plan for what this pipeline does."""
        refuse(f"pipeline {self.r}: {what}")

    def check_end(self) -> None:
        """Every end of every transfer was waited for: else its rows never land, or its buffer dies too early."""
        for item in self.pending.values():
            self.refuse(f"{instruction_name(item)} is never waited for")


def follow_all(runs: Sequence[Follower]) -> None:
    """Follows all pipelines until they are done, or none can go on."""
    while not all(run.is_done for run in runs):
        if max([run.advance() for run in runs]):  # every one of them, not only the first that can
            continue
        waiting = []
        for run in runs:
            if transfer := run.waits_for():
                other = transfer.source if transfer.target == run.r else transfer.target
                waiting.append(f"pipeline {run.r} for pipeline {other} to start transfer {transfer.send.transfer}")
        refuse(f"deadlock: these wait for each other: {'; '.join(waiting)}")
