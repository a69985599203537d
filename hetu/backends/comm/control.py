"""The control plane: small messages between all ranks on the CPU, and saying who is missing when one fails.

It has a connection of its own, so that nothing here meets keys and values on their way. Every exchange is numbered;
ranks that are at different exchanges are an error and not a mix-up. When an exchange or a transfer fails, a rank
writes why it stopped into the store that all of them reach, and hangs up, so that whoever waits for it stops as well.
Then it reads what the others wrote, and names those whose fault it is.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from hetu.backends.comm.connect import Connection
from hetu.backends.comm.notes import Kind, Note, Notes, Store, Verdict
from hetu.backends.comm.wire import decode, encode
from hetu.errors import CommunicationError, caller, in_words, ranks_in_words

FIRST_BYTES = 2048
"""What a rank says is sent in one message up to this size, in two beyond it."""

GRACE = 3.0
"""Seconds of the timeout in which the others may say why they stopped, too; at most a quarter of it."""

LATE = "see why these ranks did not start, or give a longer timeout"
"""What to do about ranks that didn't come."""

_HEAD = struct.Struct("<qq32s")
"""Of a message: the number of the exchange, bytes of what is said, and what the exchange is for."""


class Control:
    """The control plane of one rank.

    Args:
        store: Reached by all ranks; keys are this plane's own, and other threads look into it while one waits.
        rank: This process's number.
        size: How many processes there are.
        timeout: Seconds that a rank waits for another, until it raises the error.
        holder: The rank in which the store lives, and with which it ends; None if it outlives them all.

    Attributes:
        notes: Why ranks stopped.
        grace: The part of the timeout in which ranks tell each other why they stopped.
        patience: The part of it before that.
        is_broken: True once something failed, here or elsewhere.
        hang_up: Ends, in any thread, all that is under way over the network; given by who made the connections.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float, holder: int | None = None) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.notes = Notes(store, rank, size, holder)
        self.grace = min(GRACE, timeout / 4)
        self.patience = timeout - self.grace
        self.group: Connection = None
        self.number = 0
        self.is_broken = False
        self.hang_up: Callable[[], None] = lambda: None
        self._judging = threading.Lock()
        self._verdict: Verdict | None = None

    def check(self) -> None:
        """Refuses to go on once something failed.

        Raises:
            CommunicationError: If it did.
        """
        if self.is_broken:
            verdict = self.verdict()
            raise CommunicationError(
                f"the ranks can't go on after an earlier failure: {verdict.cause}",
                where=caller(),
                bound=verdict.reasons,
                fix="start all ranks again, from the last checkpoint",
            )

    def meet(self, what: str, said: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Waits until all ranks are here, and gives what each says; works before there are connections.

        Args:
            what: Where they meet: ``"init_distributed"``.
            said: What this rank says, of plain values.

        Raises:
            CommunicationError: If some don't come in time, naming them, or two have the same number.
        """
        keys, verdict = [f"{what}/{rank}" for rank in range(self.size)], f"{what}/given up"
        until = time.monotonic() + self.patience
        try:
            if self.store.add(f"{what}/came/{self.rank}", 1) > 1:
                fix = "give each process its own rank, and start all of them together"
                self._refuse(f"rank {self.rank} came twice", fix, what)
            self.store.set(keys[self.rank], json.dumps(said))
            while not self.store.check(keys):
                if self.store.check([verdict]):
                    self._refuse(self.store.get(verdict).decode(), LATE, what)
                if time.monotonic() > until:
                    missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                    words = f"{ranks_in_words(missing)} did not come to {what} within {self.timeout:g} s"
                    self.store.set(verdict, words)
                    time.sleep(self.grace)  # the store ends with this process, if it is the one that holds it
                    self._refuse(words, LATE, what)
                time.sleep(0.02)
            return [json.loads(self.store.get(key)) for key in keys]
        except RuntimeError as error:
            self._refuse(f"the store of {what} can't be reached: {_first_line(error)}", LATE, what)

    def exchange(self, payload: bytes, what: str) -> list[bytes]:
        """What every rank says; all ranks have to call it.

        Args:
            payload: What this rank says.
            what: What for, for the error: ``"run 7"``.

        Raises:
            CommunicationError: If a rank doesn't come in time, has died, or is at another exchange.
        """
        self.check()
        self.number += 1
        first = torch.zeros(_HEAD.size + FIRST_BYTES, dtype=torch.uint8, device="cpu")
        self._fill(first, _HEAD.pack(self.number, len(payload), what.encode()) + payload[:FIRST_BYTES])
        said = [bytes(row.numpy()) for row in self._gather(first, what)]
        heads = [_HEAD.unpack_from(row) for row in said]
        lengths = [length for _, length, _ in heads]
        places = [f"{name.rstrip(bytes(1)).decode()} (message {number})" for number, _, name in heads]
        if len(set(places)) > 1:
            self._refuse_places(places)
        bodies = [row[_HEAD.size : _HEAD.size + length] for row, length in zip(said, lengths, strict=True)]
        longest = max(lengths) - FIRST_BYTES
        if longest > 0:
            rest = torch.zeros(longest, dtype=torch.uint8, device="cpu")
            self._fill(rest, payload[FIRST_BYTES:])
            more = [bytes(row.numpy()) for row in self._gather(rest, what)]
            bodies = [(a + b)[:length] for a, b, length in zip(bodies, more, lengths, strict=True)]
        return bodies

    def tell(self, message: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
        """The same for messages of plain values; see :mod:`hetu.backends.comm.wire`.

        Args:
            message: What this rank says; every rank says the same keys, or ``{"error": text}``.
            what: What for, for the error.

        Raises:
            CommunicationError: As :meth:`exchange`, or if a rank says what can't be read.
        """
        keys = () if "error" in message else message.keys()
        return [decode(body, rank, keys) for rank, body in enumerate(self.exchange(encode(message), what))]

    def _refuse_places(self, places: Sequence[str]) -> NoReturn:
        what = "the ranks are at different places of the script"
        sides = [f"rank {rank}: at {place}" for rank, place in enumerate(places)]
        self.end(Verdict(what, tuple(sides)))
        fix = "call the same functions of hetu in the same order on all ranks; then start them again"
        raise CommunicationError(what, where=caller(), bound=sides, fix=fix)

    @staticmethod
    def _fill(place: torch.Tensor, data: bytes) -> None:
        if data:
            place[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _gather(self, own: torch.Tensor, what: str) -> list[torch.Tensor]:
        places = [torch.empty_like(own) for _ in range(self.size)]
        self._reach(lambda connection: connection.allgather([places], [own]), what)
        return places

    def is_any(self, is_so: bool, what: str) -> bool:
        """Whether something is so on any rank; all ranks have to call it. It takes a third of an exchange's time.

        Args:
            is_so: Whether it is so here.
            what: What for, for the error.

        Raises:
            CommunicationError: If a rank doesn't come in time, or has died.
        """
        self.check()
        flag = torch.tensor((is_so,), dtype=torch.int32, device="cpu")
        self._reach(lambda connection: connection.allreduce([flag], dist.ReduceOp.MAX), what)
        return bool(flag.item())

    def is_same(self, said: bytes, what: str) -> bool:
        """Whether all ranks say the same; all ranks have to call it. It takes a third of an exchange's time.

        Digests are compared, and with them at which exchange each rank is.

        Args:
            said: What this rank says.
            what: What for, for the error.

        Raises:
            CommunicationError: If a rank doesn't come in time, or has died.
        """
        self.check()
        self.number += 1
        digest = hashlib.blake2b(b"%d %s %s" % (self.number, what.encode(), said), digest_size=16).digest()
        words = np.frombuffer(digest, np.int64) >> 1  # whose negatives fit
        largest = torch.from_numpy(np.concatenate([words, -words]))  # and the smallest, negated
        self._reach(lambda connection: connection.allreduce([largest], dist.ReduceOp.MAX), what)
        high, low = largest.view(2, -1)
        return bool((high == -low).all())

    def _reach(self, call: Callable[[Connection], Any], what: str) -> None:
        try:
            self.check()  # it may be left already
            call(self.group).wait()
        except (RuntimeError, ValueError) as error:
            self.lost(f"waiting for all ranks to come to {what}", error)
        except BaseException as error:  # Ctrl-C, say: the others wait for what will not come
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Breaks this world for an error of this rank alone, of which the others are told."""
        if not self.is_broken:
            why = in_words(error)
            self._stop(Note(Kind.RAISED, why))
            self.end(Verdict(f"{ranks_in_words([self.rank])} stopped", (f"rank {self.rank}: {why}",)))

    def hear(self) -> None:
        """Breaks this world, for another rank died or stopped while this one may have been somewhere else."""
        self._stop(Note(Kind.HEARD, "heard of the failure"))
        self.verdict()

    def lost(self, doing: str, error: BaseException, peers: Sequence[int] = ()) -> NoReturn:
        """Turns a failure of the network into an error that names the ranks whose fault it is, and breaks this world.

        Args:
            doing: What this rank was doing: ``"receiving rows"``.
            error: What torch raised.
            peers: Whom it was waiting for; none for all.
        """
        waited_for = tuple(peers) or tuple(rank for rank in range(self.size) if rank != self.rank)
        self._stop(Note(Kind.LOST, f"was {doing}", waited_for))
        verdict = self.verdict()
        of = f", and waited for {ranks_in_words(peers)}" if peers else ""
        raise CommunicationError(
            f"{verdict.cause}; this rank was {doing}",
            where=caller(),
            bound=[*verdict.reasons, f"rank {self.rank}: was {doing}{of}", _first_line(error)],
            fix="see the first error of the ranks that are named; then start all ranks again, from the last checkpoint",
        ) from error

    def _stop(self, note: Note) -> None:
        self.notes.write(note)  # first: who sees the connections end looks for it
        self.is_broken = True
        self.hang_up()

    def verdict(self) -> Verdict:
        """Whose fault it is that this world is broken; the first who asks finds it out for all threads."""
        with self._judging:
            if self._verdict is None:
                self._verdict = self.notes.verdict(self.grace, self.timeout)
            return self._verdict

    def end(self, verdict: Verdict) -> None:
        """Breaks this world for a reason that needs no finding out."""
        self._verdict, self.is_broken = verdict, True

    def _refuse(self, what: str, fix: str, op: str) -> NoReturn:
        self.end(Verdict(what, ()))
        raise CommunicationError(what, op=op, where=caller(), fix=fix)


def _first_line(error: BaseException) -> str:
    return f"torch: {str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__}"
