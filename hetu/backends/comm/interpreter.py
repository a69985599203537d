"""The interpreter of plans: one loop for every method, forward and backward, over any communicator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from hetu.backends.comm.buffers import AttendStep, Buffers
from hetu.backends.comm.recorder import watched
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Send, Wait
from hetu.parallel.plan.parts import PipelinePlan


class Communicator(Protocol):
    """What carries rows between pipelines. Sending and receiving are started, and later waited for.

    A row is ``(heads, numbers)``: the values of a transfer's payload one after the other, of its heads. It has the
    user's dtype, or float32 (float64 for float64 inputs) if the payload is wide; places have the same dtype. Messages
    from one pipeline to another are posted in the same order at both ends.
    """

    def send(self, pipeline: int, instruction: Send, rows: torch.Tensor) -> None:
        """Starts sending packed rows; they are not touched again by the caller."""

    def receive(self, pipeline: int, instruction: Receive, place: torch.Tensor) -> None:
        """Starts receiving into ``place``."""

    def done(self, pipeline: int, transfer: int) -> bool:
        """Whether this pipeline's end of a transfer is done; it may block instead, if that holds up no other."""

    def stuck(self, pipelines: Sequence[int]) -> None:
        """Called when all pipelines of this process wait: waits until one may go on, or refuses."""


def follow(plan: PipelinePlan, held: Buffers, comm: Communicator, attend: AttendStep) -> Iterator[bool]:
    """Follows one pipeline's part of a plan; a coroutine, so that several pipelines can take turns in one thread.

    Args:
        plan: The pipeline's part of the plan.
        held: What the pipeline holds.
        comm: What carries rows.
        attend: Computes a step.

    Yields:
        True when it comes to a wait, and then False as long as it has to wait there; ends when the plan is done.
    """
    steps, comm = watched(plan, comm, held.device)
    for step in steps:
        if step.batch is not None:
            held.start(step.batch, step.number)
        elif step.makes:
            held.make(step.number)
        match item := step.item:
            case Attend():
                held.attend(item, step.number, step.turn, attend)
            case Send(transfer=transfer):
                comm.send(plan.pipeline, item, held.packed.pop(transfer))
            case Receive(transfer=transfer):
                comm.receive(plan.pipeline, item, held.places.pop(transfer))
            case Wait(transfer=transfer):
                yield True  # it got here: what it sent on the way may be what others wait for
                while not comm.done(plan.pipeline, transfer):
                    yield False
                if transfer in held.aside:
                    held.put(transfer)
            case Copy():
                held.copy(item)
            case Accumulate():
                held.add(item)
        if step.freed:
            held.free(step.freed)
