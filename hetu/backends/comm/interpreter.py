"""The interpreter of plans: one loop for every method, over any communicator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from hetu.parallel.plan import Attend, PipelinePlan, Receive, Runs, Send, Wait

AttendStep = Callable[[Attend, torch.Tensor, bool, bool], None]
"""Attends to a buffer ``(rows, 2, H_kv, head_dim)``; says whether it is the first and the last step."""


class Communicator(Protocol):
    """What carries rows between pipelines. Sending and receiving are started, and later waited for."""

    def send(self, pipeline: int, instruction: Send, rows: torch.Tensor) -> None:
        """Starts sending packed rows; they are not touched again by the caller."""

    def receive(self, pipeline: int, instruction: Receive, place: torch.Tensor) -> None:
        """Starts receiving into ``place``."""

    def done(self, pipeline: int, transfer: int) -> bool:
        """Whether this pipeline's end of a transfer is done; a communicator of several processes blocks instead."""


def follow(plan: PipelinePlan, kv: torch.Tensor, comm: Communicator, attend: AttendStep) -> Iterator[bool]:
    """Follows one pipeline's plan; a coroutine, so that several pipelines can take turns in one thread.

    Args:
        plan: The pipeline's part of the plan.
        kv: Keys and values of its shard, ``(rows, 2, H_kv, head_dim)``.
        comm: What carries rows.
        attend: What computes a step.

    Yields:
        False while it waits for another pipeline and True after it got on; ends when the plan is done.
    """
    buffers = [kv, *(kv.new_empty((rows, *kv.shape[1:])) for rows in plan.buffers[1:])]
    steps = [item for item in plan.instructions if isinstance(item, Attend)]
    for item in plan.instructions:
        match item:
            case Send(buffer=buffer, runs=runs):
                comm.send(plan.pipeline, item, pack(buffers[buffer], runs))
            case Receive(buffer=buffer, offset=offset, rows=rows):
                comm.receive(plan.pipeline, item, buffers[buffer][offset : offset + rows])
            case Wait(transfer=transfer):
                while not comm.done(plan.pipeline, transfer):
                    yield False
                yield True
            case Attend(buffer=buffer):
                attend(item, buffers[buffer], item is steps[0], item is steps[-1])


def pack(buffer: torch.Tensor, runs: Runs) -> torch.Tensor:
    """The rows that the wire needs, one after the other: the only copy of keys and values that is made."""
    if len(runs.start) == 1:
        start, length = int(runs.start[0]), int(runs.length[0])
        return buffer[start : start + length].clone(memory_format=torch.contiguous_format)
    return buffer.index_select(0, torch.from_numpy(runs.indices()).to(buffer.device))
