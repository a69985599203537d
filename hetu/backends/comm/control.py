"""The control plane: small messages between all ranks on the CPU, and saying who is missing when one fails.

It has a process group of its own, so that nothing here meets keys and values on their way. Every exchange is numbered;
ranks that are at different exchanges are an error and not a mix-up. When an exchange or a transfer fails, each rank
writes why it stopped, and whom it waited for, into the store that all of them reach, waits a moment for the others to
do so, and names those who were waited for and said nothing: they died, or never came.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from hetu.backends.comm.compare import named as _ranks
from hetu.backends.comm.wire import decode, encode
from hetu.errors import CommunicationError, caller

Store = Any
"""``torch.distributed.Store``, which torch's types don't know."""

FIRST_BYTES = 2048
"""What a rank says is sent in one message up to this size, in two beyond it."""

GRACE = 3.0
"""Seconds of the timeout in which the others may say why they stopped, too; at most a quarter of it."""

_HEAD = struct.Struct("<qq32s")
"""Of a message: the number of the exchange, bytes of what is said, and what the exchange is for."""


class Control:
    """The control plane of one rank.

    Args:
        store: Reached by all ranks; keys are this plane's own.
        rank: This process's number.
        size: How many processes there are.
        timeout: Seconds that a rank waits for another, until it raises the error.

    Attributes:
        grace: The part of it in which ranks tell each other why they stopped.
        patience: The part of it before that.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.grace = min(GRACE, timeout / 4)
        self.patience = timeout - self.grace
        self.group: dist.ProcessGroup | None = None
        self.number = 0
        self.broken: str | None = None
        self.reasons: list[str] = []

    def check(self) -> None:
        """Refuses to go on once something failed.

        Raises:
            CommunicationError: If it did.
        """
        if self.broken is not None:
            raise CommunicationError(
                f"the ranks can't go on after an earlier failure: {self.broken}",
                where=caller(),
                bound=self.reasons,
                fix="start all ranks again, from the last checkpoint",
            )

    def meet(self, what: str) -> None:
        """Waits until all ranks are here; works before there is a process group.

        Raises:
            CommunicationError: If some don't come in time, naming them.
        """
        keys, verdict = [f"{what}/{rank}" for rank in range(self.size)], f"{what}/given up"
        until = time.monotonic() + self.patience
        try:
            self.store.set(keys[self.rank], "here")
            while not self.store.check(keys):
                if self.store.check([verdict]):
                    self._refuse(self.store.get(verdict).decode())
                if time.monotonic() > until:
                    missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                    what = f"{_ranks(missing)} did not come to {what} within {self.timeout:g} s"
                    self.store.set(verdict, what)
                    time.sleep(self.grace)  # the store ends with this process, if it is the one that holds it
                    self._refuse(what)
                time.sleep(0.02)
        except RuntimeError as error:
            self._refuse(f"the store of {what} can't be reached: {error}")

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
        self.stop(what)
        raise CommunicationError(
            what,
            where=caller(),
            bound=[f"rank {rank}: at {place}" for rank, place in enumerate(places)],
            fix="call the same functions of hetu in the same order on all ranks; then start them again",
        )

    @staticmethod
    def _fill(place: torch.Tensor, data: bytes) -> None:
        if data:
            place[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _gather(self, own: torch.Tensor, what: str) -> list[torch.Tensor]:
        places = [torch.empty_like(own) for _ in range(self.size)]
        try:
            dist.all_gather(places, own, group=self.group)
        except RuntimeError as error:
            self.lost(f"waiting for all ranks to come to {what}", error)
        except BaseException:  # Ctrl-C, say: the others wait for what will not come
            self.stop(f"rank {self.rank} was interrupted at {what}")
            raise
        return places

    def stop(self, why: str, waited_for: Iterable[int] = ()) -> None:
        """Breaks this world: notes for the others why, and for whom it waited; refuses whatever comes after."""
        if self.broken is None:
            self.broken = why
            with suppress(RuntimeError):  # the store may be gone as well; whoever asks is told so
                self.store.set(f"stopped/{self.rank}", json.dumps([why, list(waited_for)]))
                self.store.set("stopped", "")

    def has_stopped(self) -> bool:
        """Whether any rank has noted that it stopped, or the store is gone with the process that held it."""
        try:
            return bool(self.store.check(["stopped"]))
        except RuntimeError:
            return True

    def lost(self, doing: str, error: BaseException, peers: Sequence[int] = ()) -> NoReturn:
        """Turns a failure of the network into an error that names the ranks to blame.

        Args:
            doing: What this rank was doing, to be followed by the peers: ``"sending rows to"``.
            error: What torch raised.
            peers: Whom it was waiting for; none for all.
        """
        what = " ".join(["failed", doing, *([_ranks(peers)] if peers else [])])
        self.stop(what, peers or range(self.size))
        said = self._what_others_say()
        waited_for = {*(peers or range(self.size)), *(rank for _, ranks in said.values() for rank in ranks)}
        if missing := sorted(waited_for - said.keys() - {self.rank}):
            what += f"; {_ranks(missing)} died, or did not come within {self.timeout:g} s"
        self.broken = what
        self.reasons = [f"rank {rank}: {why}" for rank, (why, _) in said.items()] + [_first_line(error)]
        raise CommunicationError(
            what,
            where=caller(),
            bound=self.reasons,
            fix="see the first error of the ranks that are named; then start all ranks again, from the last checkpoint",
        ) from error

    def _what_others_say(self) -> dict[int, tuple[str, list[int]]]:
        """Why other ranks stopped, and for whom they waited, as far as they say so within the grace period."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        until, said = time.monotonic() + self.grace, dict[int, tuple[str, list[int]]]()
        with suppress(RuntimeError):  # the process that holds the store is gone, mostly that of rank 0
            while len(said) < len(others) and time.monotonic() < until:
                for rank in others:
                    if rank not in said and self.store.check([f"stopped/{rank}"]):
                        why, waited_for = json.loads(self.store.get(f"stopped/{rank}"))
                        said[rank] = why, waited_for
                time.sleep(0.02)
        return dict(sorted(said.items()))

    def _refuse(self, what: str) -> NoReturn:
        self.broken = what
        raise CommunicationError(
            what,
            op="init_distributed",
            where=caller(),
            fix="see why these ranks did not start, or give a longer timeout",
        )


def seconds(timeout: float) -> timedelta:
    """A timeout as torch takes it."""
    return timedelta(seconds=timeout)


def _first_line(error: BaseException) -> str:
    return f"torch: {str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__}"
