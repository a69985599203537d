"""Why ranks stopped: what they write for each other when something fails, and whose fault it is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hetu.errors import ranks_in_words

Store = Any
"""``torch.distributed.Store``, which torch's types don't know."""

SETTLE = 0.25
"""Seconds in which more ranks may be found to have died, once one was: those of a host die together."""

_PERIOD = 0.02
"""Seconds between two looks into the store."""


class Kind(StrEnum):
    """Why a rank stopped."""

    RAISED = "raised"
    """It failed by itself."""

    LOST = "lost"
    """A message to or from another rank failed."""

    HEARD = "heard"
    """It was somewhere else, and heard of the failure."""


@dataclass(frozen=True, slots=True)
class Note:
    """What a rank writes when it stops.

    Attributes:
        kind: Why.
        why: The same in words, for the others' errors.
        waited_for: The ranks that it waited for.
    """

    kind: Kind
    why: str
    waited_for: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whose fault a failure is.

    Attributes:
        cause: It names the ranks: ``"rank 1 died"``.
        reasons: What each rank said of itself.
    """

    cause: str
    reasons: tuple[str, ...]


class Notes:
    """The notes of all ranks, in a store that they share.

    Args:
        store: Reached by all ranks, with keys for this alone. Another thread may look into it while one waits.
        rank: This process's number.
        size: How many processes there are.
        holder: The rank in which the store lives, and with which it ends; None if it outlives them all.

    Attributes:
        own: What this rank wrote.
        dead: Ranks that are known to have died.
        left: Ranks that have left in good order.
    """

    def __init__(self, store: Store, rank: int, size: int, holder: int | None) -> None:
        self.store, self.rank, self.size, self.holder = store, rank, size, holder
        self.own: Note | None = None
        self.dead: set[int] = set()
        self.left: set[int] = set()
        self._writing, self._is_store_gone = threading.Lock(), False

    def write(self, note: Note) -> None:
        """Notes that this rank stopped. The first note stands, but a reason of its own replaces what it only heard."""
        with self._writing:
            if self.own is not None and (self.own.kind is not Kind.HEARD or note.kind is Kind.HEARD):
                return
            self.own = note
            self._ask("set", f"stopped/{self.rank}", json.dumps([note.kind, note.why, note.waited_for]))
            self._ask("set", "stopped", "")

    def any(self) -> bool:
        """Whether any rank has noted that it stopped, or the store is gone with the process that held it."""
        return self._ask("check", ["stopped"]) is not False

    def ended(self, peer: int) -> None:
        """A rank's process has ended, or it hung up: that it would have noted before."""
        if self._ask("check", [f"stopped/{peer}"]) is False:
            self.dead.add(peer)
            self._ask("set", f"died/{peer}", "")

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Calls the store, which may be gone with the process that held it: None then, and never again.

        torch reports each attempt at length.
        """
        if not self._is_store_gone:
            try:
                return getattr(self.store, method)(*arguments)
            except RuntimeError:
                self._is_store_gone = True
        return None

    def verdict(self, grace: float, timeout: float) -> Verdict:
        """Finds out whose fault it is.

        Args:
            grace: Seconds in which the others may write what they know.
            timeout: Seconds that ranks wait for each other, for the words.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        until, said, known_since = time.monotonic() + grace, dict[int, Note](), None
        while True:
            self._read(others, said)
            now = time.monotonic()
            if known_since is None and (self.dead or self.left or any(n.kind is Kind.RAISED for n in said.values())):
                known_since = now
            accounted = self.dead | self.left | {r for r, note in said.items() if note.kind is not Kind.HEARD}
            is_settled = known_since is not None and now > known_since + SETTLE
            if self._is_store_gone or is_settled or now > until or accounted.issuperset(others):
                break
            time.sleep(_PERIOD)
        if self._is_store_gone and known_since is None and self.holder is not None and self.holder != self.rank:
            self.dead.add(self.holder)
        return self._judge(said, timeout)

    def _read(self, others: Sequence[int], said: dict[int, Note]) -> None:
        """Reads what is new."""
        for rank in others:
            if rank not in said or said[rank].kind is Kind.HEARD:
                if self._ask("check", [f"stopped/{rank}"]):
                    text = self._ask("get", f"stopped/{rank}")
                    if text is not None:
                        kind, why, waited_for = json.loads(text)
                        said[rank] = Note(Kind(kind), why, tuple(waited_for))
                elif rank not in self.dead and self._ask("check", [f"died/{rank}"]):
                    self.dead.add(rank)

    def _judge(self, said: dict[int, Note], timeout: float) -> Verdict:
        raised = sorted(rank for rank, note in said.items() if note.kind is Kind.RAISED)
        causes = [
            f"{ranks_in_words(ranks)} {what}"
            for ranks, what in [(sorted(self.dead), "died"), (raised, "stopped"), (sorted(self.left), "left")]
            if ranks
        ]
        if not causes:
            notes = [*said.values(), *([self.own] if self.own is not None else [])]
            waited_for = {rank for note in notes for rank in note.waited_for}
            late = waited_for - {rank for rank, note in said.items() if note.kind is Kind.LOST}
            if here := late - {self.rank}:
                causes.append(f"{ranks_in_words(sorted(here))} did not come within {timeout:g} s")
            elif late and self.own is not None and self.own.kind is Kind.HEARD:
                causes.append("the other ranks waited for this rank, and gave up")
            else:
                causes.append("the ranks lost each other")
        heard = {rank for rank, note in said.items() if note.kind is Kind.HEARD}
        reasons = tuple(f"rank {rank}: {note.why}" for rank, note in sorted(said.items()) if rank not in heard)
        return Verdict(", ".join(causes), reasons)
