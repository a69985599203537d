"""The rows of an attention on their way between processes: the communicator over ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hetu.backends.comm.connect import seconds
from hetu.backends.comm.local import LocalComm
from hetu.parallel.plan.instructions import Receive, Send

if TYPE_CHECKING:
    from hetu.backends.comm.peers import Peers
    from hetu.backends.comm.watch import Awaited

_TAGS = 2**31


_SENDING, _RECEIVING = "sending rows", "receiving rows"
"""What a rank does, for errors."""


@dataclass(slots=True, eq=False)  # not frozen: every transfer makes two
class _End:
    """One end of a transfer that was started.

    Attributes:
        work: torch's handle.
        memory: What it reads or fills.
        place: Where what comes belongs; None for what is sent.
        peer: The rank at the other end.
        noted: What the watch was told of it; None where the host waits.
        landed: A thread that waits for it, if one does.
    """

    work: Any
    memory: torch.Tensor
    place: torch.Tensor | None
    peer: int
    noted: Awaited | None
    landed: Future[Any] | None

    @property
    def doing(self) -> str:
        """For errors."""
        return _SENDING if self.place is None else _RECEIVING


class DistributedComm:
    """Carries the rows of one attention between processes, and between pipelines of this process.

    Where a strategy has more pipelines than there are processes, rows travel over gloo: NCCL matches the messages of
    two ranks by their order alone, and which of its pipelines a rank comes to first is not in the plan. Where several
    run here, none may block while another can go on: threads wait in their place.

    Args:
        world: The processes.
        count: How many pipelines the strategy has.
    """

    def __init__(self, world: Peers, count: int) -> None:
        self.world, self.base = world, world.launches * 4096 + world.calls
        self.pipelines = 1 if count <= world.size else len(world.pipelines(count))
        self.over_gloo = world.backend == "gloo" or count > world.size
        self._ends: dict[tuple[int, int], _End] = {}
        self._local = LocalComm()
        self._threads: ThreadPoolExecutor | None = None

    def send(self, pipeline: int, instruction: Send, rows: torch.Tensor) -> None:
        """Starts sending packed rows."""
        peer = instruction.peer % self.world.size
        if peer == self.world.rank:
            self._local.send(pipeline, instruction, rows)
        else:
            self._start(pipeline, instruction, peer, rows.cpu() if self.over_gloo else rows, None)

    def receive(self, pipeline: int, instruction: Receive, place: torch.Tensor) -> None:
        """Starts receiving into ``place``."""
        peer = instruction.peer % self.world.size
        if peer == self.world.rank:
            self._local.receive(pipeline, instruction, place)
        else:
            is_direct = not self.over_gloo or place.device.type == "cpu"
            memory = place if is_direct else torch.empty(place.shape, dtype=place.dtype, device="cpu")
            self._start(pipeline, instruction, peer, memory, place)

    def _start(
        self, pipeline: int, item: Send | Receive, peer: int, memory: torch.Tensor, place: torch.Tensor | None
    ) -> None:
        world = self.world
        if world.control.is_broken:  # the watch may have left the group
            world.control.check()
        # Both ends name a transfer alike; where two share a tag all the same, their order is the same at both ends.
        tag = (self.base * 2**20 + item.transfer) % _TAGS
        is_up = (peer > world.rank) is (place is None)
        group = world.host if self.over_gloo else world.up if is_up else world.down
        try:
            work = group.send([memory], peer, tag) if place is None else group.recv([memory], peer, tag)
        except RuntimeError as error:
            world.control.lost(_SENDING if place is None else _RECEIVING, error, [peer])
        noted = None
        if world.watch is not None and not self.over_gloo:
            noted = (
                world.watch.started((), _SENDING, (peer,))
                if place is None
                else world.watch.started((place,), _RECEIVING, (peer,))
            )
        landed = self._wait_aside(work) if self.pipelines > 1 else None
        self._ends[pipeline, item.transfer] = _End(work, memory, place, peer, noted, landed)

    def _wait_aside(self, work: Any) -> Future[Any]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(256, thread_name_prefix="hetu-transfer")
        return self._threads.submit(work.wait, seconds(self.world.control.patience))

    def done(self, pipeline: int, transfer: int) -> bool:
        """Blocks until this end of the transfer is done, if no other pipeline of this process could go on meanwhile."""
        key = pipeline, transfer
        end = self._ends.get(key)
        if end is None:
            return self._local.done(pipeline, transfer)
        landed, place = end.landed, end.place
        if landed is not None and not landed.done():
            return False
        del self._ends[key]
        try:
            if landed is not None:
                landed.result()
            elif end.noted is None:
                end.work.wait(seconds(self.world.control.patience))
            else:
                end.work.wait()  # the stream waits, not the host
                self.world.waited(end.noted)
        except RuntimeError as error:
            self.world.control.lost(end.doing, error, [end.peer])
        if place is not None and end.memory is not place:
            place.copy_(end.memory)
        return True

    def forget(self) -> None:
        """Lets go of all transfers that are under way."""
        self._ends.clear()

    def stuck(self, pipelines: Sequence[int]) -> None:
        """Waits until a transfer of one of the pipelines is done, all of which wait."""
        if not self._ends:
            self._local.stuck(pipelines)
        if aside := [end.landed for end in self._ends.values() if end.landed is not None]:
            wait(aside, self.world.control.patience, FIRST_COMPLETED)
