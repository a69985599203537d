"""What processes need to send each other rows: connections of hetu's own, what watches them, and how they end.

Nothing here touches torch's table of process groups. Connections are torch's backends, made straight from a store: only
their members take part in making them, so that several groups can do so side by side, and a user's groups are neither
used nor changed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from hetu.backends.comm.control import Control, seconds
from hetu.backends.comm.transfers import DistributedComm
from hetu.backends.comm.watch import Awaited, Gpu, Watch
from hetu.errors import CommunicationError
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.plan.instructions import Send

Connection = Any
"""One of torch's backends, ``ProcessGroupGloo`` or ``ProcessGroupNCCL``: torch's types don't know what they do."""

FILLING = 1.0
"""Seconds in which what never came is filled with NaN; a host that hangs in CUDA may hold that up."""

NCCL_ENVIRONMENT = {
    # Our own watch stops messages that nobody answers. torch's would end the process, or go on with what was in memory.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}
"""What a connection over NCCL is made with; torch reads it then."""


class Peers:
    """This process and those that it exchanges rows with, each of which runs the pipelines of its number.

    Attributes:
        rank: This process's number.
        size: How many processes there are.
        device: Where rows lie; over gloo they may lie anywhere.
        backend: ``"gloo"`` or ``"nccl"``.
        control: The control plane.
        up: Carries messages to higher ranks, and ``down`` those to lower ones. NCCL keeps the order of the messages
            between two ranks whichever way they go, and a plan only proves it for each way by itself.
        everyone: Carries what all of them say to all.
        host: Carries what lies on the host.
        watch: Watches what streams wait for; None over gloo, where the host waits.
    """

    is_distributed = True

    def __init__(self, control: Control, device: torch.device, backend: str) -> None:
        self.rank, self.size, self.control = control.rank, control.size, control
        self.device, self.backend = device, backend
        self.launches = self.calls = 0
        self._connected: set[tuple[int, int]] = set()
        self._comms: list[DistributedComm] = []
        self._connections: list[Connection] = []
        self._leaving = threading.Lock()
        self.watch: Watch | None = None
        control.group = self._connect_all("control", "gloo")
        self.up: Connection = self._connect_all("up", backend)
        self.down: Connection = self.up if backend == "gloo" else self._connect_all("down", backend)
        self.everyone: Connection = self.up if backend == "gloo" else self._connect_all("everyone", backend)
        self.host: Connection = self.up if backend == "gloo" else self._connect_all("host", "gloo")
        if backend == "nccl":
            self.watch = Watch(Gpu(device), control.patience, control.has_stopped, self._lose)

    def _connect_all(self, name: str, backend: str) -> Connection:
        """A connection between all of them."""
        store, patience = PrefixStore(name, self.control.store), self.control.patience
        if backend == "nccl":
            patience += self.control.timeout  # our own watch is to be the first to say that a message is lost
        self._connections.append(connect(store, self.rank, self.size, backend, patience))
        return self._connections[-1]

    def pipelines(self, count: int) -> Sequence[int]:
        """Those whose number is this rank's, modulo the number of processes."""
        return range(self.rank, count, self.size)

    def begin(self) -> None:
        """Messages of a launch are told from those of others, also by ranks that took no part in some."""
        self.launches, self.calls = self.launches + 1, 0
        self._comms.clear()

    def communicator(self, count: int) -> DistributedComm:
        """One for each attention."""
        self.calls += 1
        self._comms.append(DistributedComm(self, count))
        return self._comms[-1]

    def expect(
        self, into: Sequence[torch.Tensor], doing: str, peers: Sequence[int] = (), name: Hashable = None
    ) -> None:
        """The current stream was made to wait for a message: NCCL's are watched, gloo's have come."""
        if self.watch is not None:
            self.watch.expect(into, doing, peers, name)
            self.control.check()  # after noting it: what the watch ended before that was not filled

    def open_links(self, count: int, plans: Iterable[AttnPlan]) -> None:
        """Opens the connections that plans use; all ranks call it with the same ones before they follow them.

        The first message between two ranks blocks both until NCCL has connected them. In the order of a plan rank 0
        could so wait for 2, 2 for 1, and 1 for 0. So a byte goes over each link, in an order that all ranks share.
        """
        if self.backend != "nccl" or count > self.size:
            return
        links = {link for plan in plans for link in self._links(plan)} - self._connected
        try:
            for source, target in sorted(links, key=lambda link: (min(link), max(link), link)):
                connection = self.up if target > source else self.down
                byte = torch.zeros(1, dtype=torch.uint8, device="cpu")
                if self.rank == source:
                    connection.send([byte.to(self.device)], target, 0).wait()
                elif self.rank == target:
                    connection.recv([byte.to(self.device)], source, 0).wait()
                self._connected.add((source, target))
        except RuntimeError as error:
            self.control.lost("connecting to the other ranks", error)

    def _links(self, plan: AttnPlan) -> Iterator[tuple[int, int]]:
        for part in plan.pipelines:
            for item in part.instructions:
                if isinstance(item, Send) and part.pipeline % self.size != item.peer % self.size:
                    yield part.pipeline % self.size, item.peer % self.size

    # Leaving

    def _lose(self, item: Awaited) -> None:
        """In the watch's thread: breaks the world, for nobody is there to be told."""
        with suppress(CommunicationError):
            self.control.lost(item.doing, RuntimeError("a message did not come through NCCL"), item.peers)
        self._leave_all()

    @contextmanager
    def hanging_up(self) -> Iterator[None]:
        """Tells the others of an error that only this rank has, and hangs up so that they need not wait for long."""
        try:
            yield
        except BaseException as error:
            if self.control.broken is None:
                self.control.stop(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
            self.close()
            raise

    def close(self) -> None:
        """Leaves all connections, without waiting for anybody."""
        for comm in self._comms:  # gloo keeps a connection open as long as something is under way on it
            comm.forget()
        self._leave_all()

    def _leave_all(self) -> None:
        with self._leaving:
            if self.watch is not None:
                self.watch.end()
                filling = threading.Thread(target=self.watch.fill, name="hetu-fill", daemon=True)
                filling.start()
                filling.join(FILLING)
            leaving, self._connections = self._connections, []
            # Whoever still held one would hold its sockets open.
            self.control.group = self.up = self.down = self.everyone = self.host = None
            # Ending one of NCCL's frees memory, for which CUDA waits for the kernels of all others.
            threads = [threading.Thread(target=_leave, args=(leaving.pop(),)) for _ in range(len(leaving))]
            for thread in threads:
                try:
                    thread.start()
                except RuntimeError:  # the interpreter ends: nothing is under way any more
                    thread.run()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()


def connect(store: Any, rank: int, size: int, backend: str, timeout: float) -> Connection:
    """One of torch's backends over the members of a store.

    Args:
        store: Reached by all members, and used for nothing else.
        rank: This process's number among them.
        size: How many members there are.
        backend: ``"gloo"`` or ``"nccl"``.
        timeout: Seconds after which torch gives up a message.
    """
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, seconds(timeout))
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # before kernels that wait in line
    options._timeout = seconds(timeout)
    with _environment(NCCL_ENVIRONMENT):
        return dist.ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """Sets variables where the user set nothing, and takes them back."""
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _leave(connection: Connection) -> None:
    with suppress(RuntimeError):  # it may be gone already
        connection.abort()
