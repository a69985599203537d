"""What processes need to send each other rows: their connections, what watches these, and how they end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, suppress
from types import TracebackType

import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from hetu.backends.comm.connect import Connection, connect
from hetu.backends.comm.control import Control
from hetu.backends.comm.lifeline import Lifeline, hang_up
from hetu.backends.comm.transfers import DistributedComm
from hetu.backends.comm.watch import Awaited, Gpu, Watch
from hetu.errors import CommunicationError
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.plan.instructions import Receive, Send

PERIOD = 0.05
"""Seconds between two looks for a failure."""

FILLING = 1.0
"""Seconds in which what never came is filled with NaN; a host that hangs in CUDA may hold that up."""


class Peers:
    """This process and those that it exchanges rows with.

    Pipeline r of a strategy runs on rank ``r % size``: on the rank of its number, as long as there are enough.

    Attributes:
        rank: This process's number.
        size: How many processes there are.
        device: Where rows lie. Over gloo they may lie anywhere.
        backend: ``"gloo"`` or ``"nccl"``.
        control: The control plane.
        up: Carries rows to higher ranks.
        down: Carries rows to lower ones. NCCL keeps the order of the messages between two ranks whichever way they go,
            and a plan only proves it for each way by itself.
        everyone: Carries what all of them say to all.
        host: Carries what lies on the host.
        watch: Watches what streams wait for; None over gloo, where the host waits.
    """

    is_distributed = True

    def __init__(self, control: Control, device: torch.device, backend: str) -> None:
        self.rank, self.size, self.control = control.rank, control.size, control
        self.device, self.backend = device, backend
        self.launches = self.calls = 0
        self._links: set[tuple[int, int]] = set()
        self._comms: list[DistributedComm] = []
        self._connections: list[tuple[str, Connection]] = []
        self._leaving = threading.Lock()
        # Not the control plane's: torch blocks all threads that use a store while one of them waits.
        self._store = control.store.clone()
        self.watch: Watch | None = None
        self.lifeline: Lifeline | None = None
        self.up: Connection = None
        self.down: Connection = None
        self.host: Connection = None
        self.everyone: Connection = None
        control.hang_up = self._hang_up
        if backend == "nccl":
            self.watch = Watch(Gpu(device), control.patience, control.notes.any, self._lose)
        self.lifeline = Lifeline(self._connect("lifeline", "gloo"), control.notes, control.hear)
        control.group = self._connect("control", "gloo")
        self.up = self._connect("up", backend)
        self.down = self.up if backend == "gloo" else self._connect("down", backend)
        self.host = self.up if backend == "gloo" else self._connect("host", "gloo")
        self.everyone = self._connect("everyone", backend)

    def _connect(self, name: str, backend: str, ranks: Sequence[int] | None = None) -> Connection:
        """A connection between some of them, or all; only these call it, with the same name.

        It is made in a thread, for it waits for ranks that may have died, and nothing ends that wait.
        """
        store, patience = PrefixStore(name, self._store), self.control.patience
        if backend == "nccl":
            patience += self.control.timeout  # our own watch is to be the first to say that a message is lost
        members = range(self.size) if ranks is None else ranks
        found: Future[Connection] = Future()

        def work() -> None:
            try:
                if backend == "nccl":
                    torch.cuda.set_device(self.device)
                found.set_result(connect(store, members.index(self.rank), len(members), backend, patience))
            except BaseException as error:
                found.set_exception(error)

        threading.Thread(target=work, name="hetu-connect", daemon=True).start()
        while not found.done():
            wait([found], PERIOD)
            self.control.check()
        made = found.result()
        if name != "lifeline":  # which ends by itself
            self._connections.append((backend, made))
        return made

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

    def expect(self, into: Sequence[torch.Tensor], doing: str, peers: Sequence[int] = ()) -> None:
        """The current stream was made to wait for a message: NCCL's are watched, gloo's have come."""
        if self.watch is not None:
            self.watch.expect(into, doing, peers)
            self.control.check()  # after noting it: what the watch ended before that was not filled

    def waited(self, noted: Awaited) -> None:
        """The same of a message that the watch was told of when it was started."""
        assert self.watch is not None, "nobody else noted it"
        self.watch.waited(noted)
        if self.control.is_broken:  # after noting it, as above
            self.control.check()

    def say(
        self, doing: str, message: Callable[[], None], into: Sequence[torch.Tensor], peers: Sequence[int] = ()
    ) -> None:
        """Sends or receives by a call of torch's; if it fails, the ranks whose fault it is are named.

        Args:
            doing: What it does, for the error: ``"gathering losses"``.
            message: The call.
            into: Where it lands.
            peers: Whom it depends on; none for all.
        """
        self.control.check()  # the watch may have left the connections
        try:
            message()
            self.expect(into, doing, peers)
        except RuntimeError as error:
            self.control.lost(doing, error, peers)

    def open_links(self, count: int, plans: Iterable[AttnPlan]) -> None:
        """Opens the links that plans use; all ranks call it with the same ones before they follow them.

        The first message between two ranks blocks both until NCCL has connected them. In the order of a plan rank 0
        could so wait for 2, 2 for 1, and 1 for 0. So a byte goes over each link, in an order that all ranks share.
        """
        if self.backend != "nccl" or count > self.size:
            return
        links = {link for plan in plans for link in self._links_of(plan)} - self._links
        try:
            for source, target in sorted(links, key=lambda link: (min(link), max(link), link)):
                connection = self.up if target > source else self.down
                byte = torch.zeros(1, dtype=torch.uint8, device="cpu")
                if self.rank == source:
                    connection.send([byte.to(self.device)], target, 0).wait()
                else:
                    connection.recv([byte.to(self.device)], source, 0).wait()
                self._links.add((source, target))
        except RuntimeError as error:
            self.control.lost("connecting to the other ranks", error)

    def _links_of(self, plan: AttnPlan) -> Iterator[tuple[int, int]]:
        """Those that begin or end here, as (source, target)."""
        for r in self.pipelines(len(plan.pipelines)):
            for item in plan.part(r).instructions:
                if isinstance(item, (Send, Receive)) and item.peer % self.size != self.rank:
                    ends = self.rank, item.peer % self.size
                    yield ends if isinstance(item, Send) else ends[::-1]

    # Leaving

    def _lose(self, item: Awaited) -> None:
        """In the watch's thread: breaks the world, for nobody is there to be told."""
        with suppress(CommunicationError):
            self.control.lost(item.doing, RuntimeError("a message did not come through NCCL"), item.peers)
        self._leave_all()

    def hanging_up(self) -> AbstractContextManager[None]:
        """Tells the others of an error that only this rank has, and hangs up so that they need not wait for long."""
        return _HangingUp(self)

    def failed(self, error: BaseException) -> None:
        """What is done of an error in such a block."""
        self.control.fail(error)
        self.close()

    def _hang_up(self) -> None:
        """In any thread: what is under way over gloo fails at once, here and elsewhere. The watch ends NCCL's."""
        for backend, connection in self._connections.copy():
            if backend == "gloo":
                hang_up(connection)
        if self.lifeline is not None:
            self.lifeline.hang_up()

    def leave(self) -> None:
        """Tells the others that this rank leaves in good order."""
        if self.lifeline is not None:
            self.lifeline.leave()

    def close(self) -> None:
        """Leaves all connections, without waiting for anybody."""
        for comm in self._comms:  # gloo keeps a connection open as long as something is under way on it
            comm.forget()
        self._leave_all()

    def _leave_all(self) -> None:
        with self._leaving:
            if self.watch is not None:
                self.watch.end()
                _at_once_or_in_threads([self.watch.fill], FILLING)
            # Whoever still held a connection would hold its sockets open.
            self.control.group = self.up = self.down = self.everyone = self.host = self.lifeline = None
            leaving, self._connections = [connection.abort for _, connection in self._connections], []
            # Ending one of NCCL's frees memory, for which CUDA waits for the kernels of all others.
            _at_once_or_in_threads(leaving)


class _HangingUp:
    """A block of :meth:`Peers.hanging_up`; a generator would take five times as long, and each layer enters two."""

    __slots__ = ("_peers",)

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._peers.failed(error)


def _at_once_or_in_threads(jobs: list[Callable[[], None]], timeout: float | None = None) -> None:
    """Runs jobs side by side; one after the other where the interpreter ends and starts no threads any more."""

    def run(job: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # it may be gone already
            job()

    threads = []
    while jobs:
        thread = threading.Thread(target=run, args=(jobs.pop(),), name="hetu-leave", daemon=True)
        try:
            thread.start()
            threads.append(thread)
        except RuntimeError:
            thread.run()
    for thread in threads:
        thread.join(timeout)
