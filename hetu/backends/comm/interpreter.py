"""The interpreter of plans: one loop for every method, over any communicator; one for the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from hetu.backends.attention.contract import compute_dtype
from hetu.backends.comm.recorder import watched
from hetu.backends.memory import copied_to, device_copies
from hetu.parallel.mask.segments import Turn
from hetu.parallel.plan.instructions import Accumulate, Attend, Receive, Runs, Send, Wait
from hetu.parallel.plan.own_gradients import own_gradients
from hetu.parallel.plan.parts import PipelinePlan, batches, turns

AttendStep = Callable[[Attend, torch.Tensor, Turn | None], None]
"""Attends to a buffer ``(rows, 2, H_kv, head_dim)``, in its turn."""

AttendBackwardStep = Callable[[Attend, torch.Tensor, torch.Tensor, Turn | None, bool], None]
"""Computes the gradients of a step, in its turn: of the queries, and of the keys and values of a buffer ``(rows, 2,
H_kv, head_dim)``, which it writes into a tensor of the same shape. The last argument says whether rows of it that no
segment names keep what they hold; else they become 0."""


class Communicator(Protocol):
    """What carries rows between pipelines. Sending and receiving are started, and later waited for.

    A transfer carries keys and values in the user's dtype or, if its instructions say ``grads``, gradients in float32:
    rows come as what is sent, and places have the same dtype. Messages from one pipeline to another are posted in the
    same order at both ends.
    """

    def send(self, pipeline: int, instruction: Send, rows: torch.Tensor) -> None:
        """Starts sending packed rows; they are not touched again by the caller."""

    def receive(self, pipeline: int, instruction: Receive, place: torch.Tensor) -> None:
        """Starts receiving into ``place``."""

    def done(self, pipeline: int, transfer: int) -> bool:
        """Whether this pipeline's end of a transfer is done; it may block instead, if that holds up no other."""

    def stuck(self, pipelines: Sequence[int]) -> None:
        """Called when all pipelines of this process wait: waits until one may go on, or refuses."""


Buffers = Mapping[int, torch.Tensor]


def follow(plan: PipelinePlan, kv: torch.Tensor, comm: Communicator, attend: AttendStep) -> Iterator[bool]:
    """Follows one pipeline's plan; a coroutine, so that several pipelines can take turns in one thread.

    Args:
        plan: The pipeline's part of the plan.
        kv: Keys and values of its shard, ``(rows, 2, H_kv, head_dim)``.
        comm: What carries rows.
        attend: What computes a step.

    Yields:
        True when it comes to a wait, and then False as long as it has to wait there; ends when the plan is done.
    """
    instructions, comm = watched(plan, comm, kv.device)
    buffers, sends = _new_buffers(plan, kv), Sends(plan, lambda item: pack(buffers[item.buffer], item.runs))
    for number, item in enumerate(instructions):
        sends.come_to(number)
        match item:
            case Attend(buffer=buffer):
                attend(item, buffers[buffer], turns(plan)[number])
            case Send():
                comm.send(plan.pipeline, item, sends.packed(item))
            case Receive():
                comm.receive(plan.pipeline, item, _place(buffers, item))
            case Wait(transfer=transfer):
                yield from wait_for(plan.pipeline, transfer, comm)


def follow_backward(
    plan: PipelinePlan, kv: torch.Tensor, dkv: torch.Tensor, comm: Communicator, attend: AttendBackwardStep
) -> Iterator[bool]:
    """Follows one pipeline's part of a backward plan; a coroutine as :func:`follow`.

    Args:
        plan: The part.
        kv: Keys and values of its shard, ``(rows, 2, H_kv, head_dim)``.
        dkv: Their gradients, of the same shape; every row is written, whatever it held. float32 (float64 for float64
            inputs) where several parts are summed up, see
            :attr:`~hetu.parallel.plan.parts.PipelinePlan.sums_gradients`; else that or kv's dtype.
        comm: What carries rows.
        attend: What computes a step.

    Yields:
        As :func:`follow`.
    """
    instructions, comm = watched(plan, comm, kv.device)
    buffers, grads = _new_buffers(plan, kv), _Gradients(plan, kv, dkv)
    last_reads = plan.last_reads()

    def packed(item: Send) -> torch.Tensor:
        return pack((grads.scratch if item.grads else buffers)[item.buffer], item.runs)

    sends = Sends(plan, packed)
    for number, item in enumerate(instructions):
        sends.come_to(number)
        match item:
            case Attend(buffer=buffer):
                rows = item.rows if buffer else plan.rows
                is_aside = number in own_gradients(plan).aside
                place = grads.aside(buffer, rows) if buffer or is_aside else grads.started()
                # Of foreign rows only those are sent that a segment names.
                attend(item, buffers[buffer][:rows], place, turns(plan)[number], not is_aside)
                if is_aside:
                    grads.add_aside()
            case Accumulate():
                grads.add(grads.landing[item.buffer][item.offset : item.offset + item.runs.rows], item.runs)
            case Send():
                comm.send(plan.pipeline, item, sends.packed(item))
            case Receive():
                comm.receive(plan.pipeline, item, _place(grads.landing if item.grads else buffers, item))
            case Wait(transfer=transfer):
                yield from wait_for(plan.pipeline, transfer, comm)
        if number in last_reads and isinstance(item, (Attend, Send)):
            grads.scratch.pop(item.buffer, None)
    grads.started()


class _Gradients:
    """One pipeline's gradients of keys and values.

    Attributes:
        own: Those of its shard.
        scratch: Those that the last attend to a buffer computed aside.
        landing: Where those of own rows land that others computed.
        is_started: Whether rows of ``own`` that none of its attends writes are 0.
    """

    def __init__(self, plan: PipelinePlan, kv: torch.Tensor, own: torch.Tensor) -> None:
        self.own, self.shape, self.dtype = own, kv.shape[1:], compute_dtype(kv.dtype)
        self.is_started = not own_gradients(plan).has_gaps
        self.scratch: dict[int, torch.Tensor] = {}
        self.landing = {i: self._new(rows) for i, rows in enumerate(plan.landing)}

    def _new(self, rows: int) -> torch.Tensor:
        return self.own.new_empty((rows, *self.shape), dtype=self.dtype)

    def started(self) -> torch.Tensor:
        """The gradients of the shard; clears them the first time, if some rows are not written otherwise."""
        if not self.is_started:
            self.own.zero_()
            self.is_started = True
        return self.own

    def aside(self, buffer: int, rows: int) -> torch.Tensor:
        """Where an attend writes its gradients that are sent home, or added to those of the shard."""
        self.scratch[buffer] = self._new(rows)
        return self.scratch[buffer]

    def add_aside(self) -> None:
        """Adds what an attend to the own shard wrote aside."""
        own = self.started()
        own += self.scratch[0]

    def add(self, rows: torch.Tensor, runs: Runs) -> None:
        """Adds to rows of the shard, no row twice."""
        own = self.started()
        if len(runs.start) == 1:
            start, length = int(runs.start[0]), int(runs.length[0])
            own[start : start + length] += rows
        else:
            own.index_add_(0, indices(runs, rows.device), rows)


def _new_buffers(plan: PipelinePlan, kv: torch.Tensor) -> dict[int, torch.Tensor]:
    return {i: kv.new_empty((rows, *kv.shape[1:])) if i else kv for i, rows in enumerate(plan.buffers)}


def _place(buffers: Buffers, item: Receive) -> torch.Tensor:
    return buffers[item.buffer][item.offset : item.offset + item.rows]


class Sends:
    """Packs what is sent together before any of it is sent; see :func:`hetu.parallel.plan.parts.batches`.

    Args:
        plan: The pipeline's part of the plan.
        pack: Packs what one of its sends sends.
    """

    def __init__(self, plan: PipelinePlan, pack: Callable[[Send], torch.Tensor]) -> None:
        self._batches, self._pack = batches(plan), pack
        self._packed: dict[int, torch.Tensor] = {}

    def come_to(self, number: int) -> None:
        """Packs the batch that begins with an instruction, if one does."""
        for item in self._batches.get(number, ()):
            self._packed[item.transfer] = self._pack(item)

    def packed(self, item: Send) -> torch.Tensor:
        """What a send sends."""
        return self._packed.pop(item.transfer)


def wait_for(pipeline: int, transfer: int, comm: Communicator) -> Iterator[bool]:
    """Waits for a pipeline's end of a transfer."""
    yield True  # it got here: what it sent on the way may be what others wait for
    while not comm.done(pipeline, transfer):
        yield False


def pack(buffer: torch.Tensor, runs: Runs) -> torch.Tensor:
    """The rows that the wire needs, one after the other: the only copy of them that is made."""
    # Also where rows follow each other: to gather them is more than twice as fast on a GPU as to copy a strided part.
    return buffer.index_select(0, indices(runs, buffer.device))


def indices(runs: Runs, device: torch.device) -> torch.Tensor:
    """The rows' numbers on the device, copied there once a plan."""
    kept: torch.Tensor | None = runs.copies.get(device)
    if kept is None:
        part = runs.as_slice
        if part is None:
            kept = copied_to(runs.indices().astype(np.int32), device)
        else:
            kept = torch.arange(part.start, part.stop, part.step, dtype=torch.int32, device=device)
        device_copies.keep(runs, device, kept, kept.nbytes)
    return kept
