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

_TAGS = 2**31


@dataclass(frozen=True, slots=True, eq=False)
class _End:
    """One end of a transfer that was started.

    Attributes:
        work: torch's handle.
        memory: What it reads or fills.
        place: Where what comes belongs; None for what is sent.
        peer: The rank at the other end.
        landed: A thread that waits for it, if one does.
    """

    work: Any
    memory: torch.Tensor
    place: torch.Tensor | None
    peer: int
    landed: Future[Any] | None

    @property
    def landing(self) -> list[torch.Tensor]:
        """What it fills."""
        return [] if self.place is None else [self.place]

    @property
    def doing(self) -> str:
        """For errors."""
        return "sending rows" if self.place is None else "receiving rows"


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
        self.pipelines = len(world.pipelines(count))
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
            is_direct = place.device.type == "cpu" or not self.over_gloo
            memory = place if is_direct else torch.empty(place.shape, dtype=place.dtype, device="cpu")
            self._start(pipeline, instruction, peer, memory, place)

    def _start(
        self, pipeline: int, item: Send | Receive, peer: int, memory: torch.Tensor, place: torch.Tensor | None
    ) -> None:
        control, world = self.world.control, self.world
        control.check()  # the watch may have left the group
        # Both ends name a transfer alike; where two share a tag all the same, their order is the same at both ends.
        tag, is_up = (self.base * 2**20 + item.transfer) % _TAGS, (peer > world.rank) is (place is None)
        group = world.host if self.over_gloo else world.up if is_up else world.down
        try:
            if place is None:
                work = group.send([memory], peer, tag)
            else:
                work = group.recv([memory], peer, tag)
        except RuntimeError as error:
            control.lost("sending rows" if place is None else "receiving rows", error, [peer])
        end = self._ends[pipeline, item.transfer] = _End(work, memory, place, peer, self._wait_aside(work))
        if world.watch is not None and not self.over_gloo:
            world.watch.started((id(self), pipeline, item.transfer), end.landing, end.doing, [peer])

    def _wait_aside(self, work: Any) -> Future[Any] | None:
        if self.pipelines <= 1:
            return None
        if self._threads is None:
            self._threads = ThreadPoolExecutor(256, thread_name_prefix="hetu-transfer")
        return self._threads.submit(work.wait, seconds(self.world.control.patience))

    def done(self, pipeline: int, transfer: int) -> bool:
        """Blocks until this end of the transfer is done, if no other pipeline of this process could go on meanwhile."""
        end = self._ends.get((pipeline, transfer))
        if end is None:
            return self._local.done(pipeline, transfer)
        if end.landed is not None and not end.landed.done():
            return False
        del self._ends[pipeline, transfer]
        try:
            if end.landed is not None:
                end.landed.result()
            elif self.over_gloo:
                end.work.wait(seconds(self.world.control.patience))
            else:
                end.work.wait()  # the stream waits, not the host
                self.world.expect(end.landing, end.doing, [end.peer], (id(self), pipeline, transfer))
        except RuntimeError as error:
            self.world.control.lost(end.doing, error, [end.peer])
        if end.place is not None and end.memory is not end.place:
            end.place.copy_(end.memory)
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
