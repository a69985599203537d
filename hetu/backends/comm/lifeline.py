"""Lines that hold as long as the processes live: by them a rank learns at once that another died, or hung up.

Every rank keeps a connection of its own for this, on which nothing travels but a last byte of who leaves in good
order. A thread listens to the next rank. If that one's line ends, it died, or something failed and it has written so
into the store before. Either way this rank ends its own lines, so that the one before it learns it too, and all others
in turn: nobody has to ask.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from hetu.backends.comm.connect import Connection
from hetu.backends.comm.notes import Notes

FOREVER = timedelta(days=3650)
"""How long a rank listens to the next one."""

BRIEFLY = timedelta(milliseconds=100)
"""The end of a process that is gone is heard within this time; the line of one that lives is silent for as long."""

AT_ONCE = timedelta(milliseconds=1)
"""The shortest time that gloo waits."""

_LAST_BYTE, _NO_MESSAGE = 1, 2**31 - 1
"""Tags: of the last byte of who leaves, and one that nobody sends."""


class Lifeline:
    """The lines of one rank.

    Args:
        connection: To all ranks over gloo, for this alone.
        notes: Where ranks write why they stopped, and who died.
        hear: Called in the thread when another rank died or stopped. It calls :meth:`hang_up` in its turn.

    """

    def __init__(self, connection: Connection, notes: Notes, hear: Callable[[], None]) -> None:
        self._connection, self._notes, self._hear = connection, notes, hear
        self._lock, self._is_over = threading.Lock(), False
        rank, size = notes.rank, notes.size
        self._others = [(rank + i) % size for i in range(1, size)]  # the next one first
        # A last byte must not be lost when its sender ends, so that all are received at any time.
        self._bytes = torch.zeros(size, dtype=torch.uint8, device="cpu")
        self._ends: dict[int, Any] = {
            peer: connection.recv([self._bytes[peer : peer + 1]], peer, _LAST_BYTE) for peer in self._others
        }
        threading.Thread(target=self._listen, name="hetu-lifeline", daemon=True).start()

    def _listen(self) -> None:
        for peer in self._others:
            if not self._has_left(peer, FOREVER):
                if not self._is_over:
                    self._hear()
                return

    def _has_left(self, peer: int, patience: timedelta) -> bool:
        """Waits for a rank's last byte: False if it doesn't come in this time, or can't come any more."""
        try:
            self._ends[peer].wait(patience)
        except RuntimeError:
            return False
        self._notes.left.add(peer)
        return True

    def leave(self) -> None:
        """Tells the others that this rank leaves, and that nothing is wrong with that."""
        with self._lock:
            self._is_over = True
        last, sent = torch.ones(1, dtype=torch.uint8, device="cpu"), list[Any]()
        for peer in self._others:
            with suppress(RuntimeError, ValueError):  # it is gone itself
                sent.append(self._connection.send([last], peer, _LAST_BYTE))
        for work in sent:
            with suppress(RuntimeError):
                work.wait(BRIEFLY)
        hang_up(self._connection)

    def hang_up(self) -> None:
        """Ends the lines, after noting which ranks have died or left; to be called in any thread, once a note says why.

        The next ranks are asked in turn, until one is found alive. That one's silence ends all lines of this rank.
        """
        with self._lock:
            if self._is_over:
                return
            self._is_over, found_alive = True, False
            for peer in self._others:
                since = time.monotonic()
                if self._has_left(peer, AT_ONCE if found_alive else BRIEFLY) or found_alive:
                    continue
                found_alive = time.monotonic() - since >= BRIEFLY.total_seconds()
                if not found_alive:
                    self._notes.ended(peer)


def hang_up(connection: Connection) -> None:
    """Ends a connection over gloo from any thread: what is under way on it fails at once, here and on the other ranks.

    gloo has no call for that, but it gives up a connection on which a message doesn't come in the time that it was
    given.
    """
    byte, own = torch.empty(1, dtype=torch.uint8, device="cpu"), connection.rank()
    for peer in range(connection.size()):
        if peer != own:
            # The connection stays if this line was broken before: then another one's silence ends it.
            with suppress(RuntimeError, ValueError):
                connection.recv([byte], peer, _NO_MESSAGE).wait(AT_ONCE)
