"""All pipelines in one process: a mailbox, and pipelines that take turns in lock step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch

from hetu.errors import CommunicationError
from hetu.parallel.plan.instructions import Receive, Send


class LocalComm:
    """A mailbox: what is sent lies there until its receiver waits for it."""

    def __init__(self) -> None:
        self._mail: dict[int, torch.Tensor] = {}
        self._places: dict[tuple[int, int], torch.Tensor] = {}

    def send(self, pipeline: int, instruction: Send, rows: torch.Tensor) -> None:
        """Puts rows into the mailbox."""
        if instruction.transfer in self._mail:
            raise CommunicationError(f"transfer {instruction.transfer} of pipeline {pipeline} was sent twice")
        self._mail[instruction.transfer] = rows

    def receive(self, pipeline: int, instruction: Receive, place: torch.Tensor) -> None:
        """Notes where the rows shall land."""
        self._places[pipeline, instruction.transfer] = place

    def done(self, pipeline: int, transfer: int) -> bool:
        """Lands the rows, if they were sent; a sender's end is done at once, for rows are packed when they are sent."""
        place = self._places.get((pipeline, transfer))
        if place is None:
            return True
        rows = self._mail.pop(transfer, None)
        if rows is None:
            return False
        if rows.shape != place.shape:
            raise CommunicationError(
                f"transfer {transfer} to pipeline {pipeline} brings {len(rows)} rows, expected {len(place)}"
            )
        if rows.dtype != place.dtype:
            raise CommunicationError(
                f"transfer {transfer} to pipeline {pipeline} brings {rows.dtype}, expected {place.dtype}"
            )
        place.copy_(rows)
        del self._places[pipeline, transfer]  # its memory may be needed
        return True

    def stuck(self, pipelines: Sequence[int]) -> None:
        """Nothing comes from elsewhere: they wait for each other.

        Raises:
            CommunicationError: Always.
        """
        refuse_deadlock(pipelines)


def refuse_deadlock(pipelines: Sequence[int]) -> NoReturn:
    """Says that pipelines wait for each other for ever."""
    names = ", ".join(map(str, pipelines))
    raise CommunicationError(f"pipelines {names} wait for each other", fix="verify the plan: plan.verify()")


def run_lock_step(
    pipelines: Sequence[Iterator[bool]], stuck: Callable[[Sequence[int]], None] = refuse_deadlock
) -> None:
    """Runs coroutines of :func:`~hetu.backends.comm.interpreter.follow` in turns until all are done.

    Args:
        pipelines: The coroutines.
        stuck: Called when all that are left have to wait: waits for something to come, or refuses.

    Raises:
        CommunicationError: If all that are left wait for each other.
    """
    waiting = dict(enumerate(pipelines))
    while waiting:
        got_on = False
        for number, pipeline in list(waiting.items()):
            state = next(pipeline, None)
            if state is None:
                del waiting[number]
            got_on = got_on or state is not False
        if not got_on:
            stuck(list(waiting))
