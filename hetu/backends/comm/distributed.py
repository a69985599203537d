"""Pipelines in several processes: the world over ``torch.distributed``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from hetu.backends.comm.compare import in_words, named, refuse_errors
from hetu.backends.comm.control import Control, seconds
from hetu.backends.comm.interpreter import Communicator
from hetu.backends.comm.lifeline import Lifeline, hang_up
from hetu.backends.comm.reduce import Reducer, Started, reduce_over
from hetu.backends.comm.transfers import DistributedComm
from hetu.backends.comm.watch import Awaited, Gpu, Watch
from hetu.backends.comm.world import Spec
from hetu.backends.torch_private import abort_process_group
from hetu.errors import CommunicationError, caller
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.plan.instructions import Send

_PERIOD = 0.05
"""Seconds between two looks for a failure."""

FILLING = 1.0
"""Seconds in which what never came is filled with NaN; a host that hangs in CUDA may hold that up."""


class DistributedWorld:
    """This process and the others that torchrun started.

    Pipeline r of a strategy runs on rank ``r % size``: on the rank of its number, as long as there are enough.

    Attributes:
        rank: This process's number.
        size: How many processes there are.
        device: The device of this process.
        backend: ``"gloo"`` or ``"nccl"``.
        control: The control plane.
        agreed: What the ranks agreed on so far; see :mod:`hetu.runtime.agreement`.
        runs: How many runs were asked for.
        lock: Held while a run takes place: runs of several threads would mix up their messages.
    """

    is_distributed = True

    def __init__(self, control: Control, device: torch.device, backend: str) -> None:
        self.rank, self.size, self.device, self.backend, self.control = (
            control.rank,
            control.size,
            device,
            backend,
            control,
        )
        self.agreed: set[bytes] = set()
        self.lock = threading.RLock()
        self.runs = self.launches = self.calls = 0
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._connected: set[tuple[int, int]] = set()
        self._comms: list[DistributedComm] = []
        self._reducer = Reducer(self._reduce)
        self._leaving = threading.Lock()
        self.watch: Watch | None = None
        if backend == "nccl":
            self.watch = Watch(Gpu(device), control.patience, control.notes.any, self._lose)
        self.up: dist.ProcessGroup | None = None
        self.down: dist.ProcessGroup | None = None
        self.host: dist.ProcessGroup | None = None
        self.lifeline: Lifeline | None = None
        control.hang_up = self._hang_up
        everyone = range(self.size)
        self.lifeline = Lifeline(self._on_hosts(), control.notes, control.hear)
        control.group = self._on_hosts()
        # One queue for messages to higher ranks and one for messages to lower ones. NCCL keeps the order of the
        # messages between two ranks whichever way they go, and a plan only proves it for each way by itself.
        self.up = self.host = self._new_group(everyone)
        self.down = self.up if backend == "gloo" else self._new_group(everyone)
        if backend == "nccl":
            self.host = self._on_hosts()
        self._groups[tuple(everyone)] = self._new_group(everyone)

    def _on_hosts(self) -> dist.ProcessGroup:
        return self._made(lambda: dist.new_group(backend="gloo", timeout=seconds(self.control.patience)))

    def _made(self, make: Callable[[], dist.ProcessGroup]) -> dist.ProcessGroup:
        """Makes a process group in a thread, for it waits for ranks that may have died, and nothing ends that wait."""
        found: Future[dist.ProcessGroup] = Future()

        def work() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                found.set_result(make())
            except BaseException as error:
                found.set_exception(error)

        threading.Thread(target=work, name="hetu-connect", daemon=True).start()
        while not found.done():
            wait([found], _PERIOD)
            self.control.check()
        return found.result()

    def _new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        options, timeout = None, seconds(self.control.patience)
        if self.backend == "nccl":  # messages get multiprocessors before the kernels that wait in line
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            timeout += seconds(self.control.timeout)  # our own watch is to be first
            options._timeout = timeout  # else torch warns that it has another one
        return self._made(
            lambda: dist.new_group(list(ranks), backend=self.backend, timeout=timeout, pg_options=options)
        )

    def _group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        self.control.check()  # the watch may have left them
        return self._groups[tuple(ranks)]

    def _lose(self, item: Awaited) -> None:
        """In the watch's thread: breaks the world, for nobody is there to be told."""
        with suppress(CommunicationError):
            self.control.lost(item.doing, RuntimeError("a message did not come through NCCL"), item.peers)
        self._leave_all()

    def expect(
        self, into: Sequence[torch.Tensor], doing: str, peers: Sequence[int] = (), name: Hashable = None
    ) -> None:
        """The current stream was made to wait for a message: NCCL's are watched, gloo's have come."""
        if self.watch is not None:
            self.watch.expect(into, doing, peers, name)
            self.control.check()  # after noting it: what the watch ended before that was not filled

    def prepare(self, count: int, plans: Iterable[AttnPlan]) -> None:
        """Makes the process groups of a strategy of ``count`` pipelines, and opens the connections that plans use.

        All ranks call it, with plans of the same strategies in the same order, before they follow one.
        """
        try:
            for ranks in (self._active(count), self._with_idle(count)):
                if tuple(ranks) not in self._groups and len(ranks) > 1:
                    self._groups[tuple(ranks)] = self._new_group(ranks)
            if self.backend == "nccl" and count <= self.size:
                self._connect({link for plan in plans for link in self._links(plan)})
        except RuntimeError as error:
            self.control.lost("connecting to the other ranks", error)

    def _links(self, plan: AttnPlan) -> Iterator[tuple[int, int]]:
        for part in plan.pipelines:
            for item in part.instructions:
                if isinstance(item, Send) and part.pipeline % self.size != item.peer % self.size:
                    yield part.pipeline % self.size, item.peer % self.size

    def _connect(self, links: set[tuple[int, int]]) -> None:
        """Sends a byte over each link, in an order that all ranks share.

        The first message between two ranks blocks both until NCCL has connected them. In the order of a plan rank 0
        could so wait for 2, 2 for 1, and 1 for 0.
        """
        for source, target in sorted(links - self._connected, key=lambda link: (min(link), max(link), link)):
            group, byte = self.up if target > source else self.down, torch.zeros(1, dtype=torch.uint8, device="cpu")
            if self.rank == source:
                dist.send(byte.to(self.device), group=group, group_dst=target)
            elif self.rank == target:
                dist.recv(byte.to(self.device), group=group, group_src=source)
            self._connected.add((source, target))

    def _active(self, count: int) -> range:
        return range(min(count, self.size))

    def _with_idle(self, count: int) -> list[int]:
        """Rank 0 and those without a pipeline."""
        return [0, *range(max(count, 1), self.size)]

    def pipelines(self, count: int) -> Sequence[int]:
        """Those whose number is this rank's, modulo the number of processes."""
        return self._pipelines_of(self.rank, count)

    def _pipelines_of(self, rank: int, count: int) -> range:
        return range(rank, count, self.size)

    def begin(self) -> None:
        """Messages of a launch are told from those of others, also by ranks that took no part in some."""
        self.launches, self.calls = self.launches + 1, 0
        self._comms.clear()

    def communicator(self, count: int) -> Communicator:
        """One for each attention."""
        self.calls += 1
        self._comms.append(DistributedComm(self, count))
        return self._comms[-1]

    def start_reduce(self, parts: Sequence[torch.Tensor], op: str, count: int) -> Started | torch.Tensor:
        """Puts the tensor into a bucket, which travels once it is full."""
        if count == 1:
            return parts[0]
        try:
            return self._reducer.start(parts, op, count)
        except RuntimeError as error:
            self.control.lost("adding up gradients", error)

    def finish_reduce(self, started: Started | torch.Tensor) -> torch.Tensor:
        """Waits for its bucket."""
        if isinstance(started, torch.Tensor):
            return started
        try:
            return self._reducer.finish(started)
        except RuntimeError as error:
            self.control.lost("adding up gradients", error)

    def _reduce(self, own: torch.Tensor, op: str, count: int) -> torch.Tensor:
        active = self._active(count)
        held = [range(rank, count, self.size) for rank in active]
        return reduce_over(own, op, held, self._group(active), lambda x: self.expect([x], "adding up gradients"))

    def gather(
        self, own: Sequence[torch.Tensor], counts: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> list[torch.Tensor]:
        """Every rank sends as many numbers as the one with the most has."""
        held = [[len(range(rank, count, self.size)) for count in counts] for rank in range(self.size)]
        sent = torch.zeros(max(map(sum, held)), dtype=dtype, device=device)
        if own:
            sent[: len(own)] = torch.stack(list(own))
        received = [torch.empty_like(sent) for _ in held]
        try:  # as bytes, for gloo doesn't know all types
            places = [x.view(torch.uint8) for x in received]
            dist.all_gather(places, sent.view(torch.uint8), group=self._group(range(self.size)))
            self.expect(received, "gathering losses")
        except RuntimeError as error:
            self.control.lost("gathering losses", error)
        queues = [iter(row) for row in received]
        return [next(queues[r % self.size]) for count in counts for r in range(count)]

    def share(
        self, tensors: Sequence[torch.Tensor] | None, like: Sequence[Spec], count: int, device: torch.device
    ) -> list[torch.Tensor]:
        """Rank 0 sends them to the ranks past the last pipeline, those of a dtype together."""
        ranks = self._with_idle(count)
        if len(ranks) == 1 or self.rank not in ranks:
            return list(tensors or ())
        made = list(tensors) if tensors is not None else [torch.empty(s, dtype=t, device=device) for s, t in like]
        for dtype in dict.fromkeys(x.dtype for x in made):
            own = [x for x in made if x.dtype == dtype]
            flat = torch.cat([x.reshape(-1) for x in own])
            self._broadcast(flat, 0, self._group(ranks))
            if tensors is None:
                for x, values in zip(own, flat.split([x.numel() for x in own]), strict=True):
                    x.copy_(values.view(x.shape))
        return made

    def total(self, numbers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """An all-reduce: integers give the same sum in any order."""
        summed = torch.stack(list(numbers))
        try:
            dist.all_reduce(summed, group=self._group(range(self.size)))
            self.expect([summed], "adding up what the step's batches count")
        except RuntimeError as error:
            self.control.lost("adding up what the step's batches count", error)
        return list(summed)

    def gather_values(self, read: Callable[[], Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Tensors of any shapes, those of all pipelines in order, on every rank.

        Args:
            read: Gives those of the pipelines that run here; may raise, of which all ranks are told.

        Raises:
            CommunicationError: If another rank refuses, or the ranks don't hold the values of a strategy's pipelines.
        """
        what, failure, own = "gather_shards", None, list[torch.Tensor]()
        with self.lock:
            try:
                own = list(read())
                message: dict[str, Any] = {"values": [[list(x.shape), str(x.dtype), x.device.type] for x in own]}
            except Exception as error:
                failure, message = error, {"error": in_words(error)}
            with self.hanging_up():
                said = self.control.tell(message, what)
            if failure is not None:
                raise failure
            refuse_errors(said, what, what, "nothing was gathered")
            kinds = [one["values"] for one in said]
            total = sum(map(len, kinds))
            if any(len(theirs) != len(self._pipelines_of(rank, total)) for rank, theirs in enumerate(kinds)):
                _refuse_counts(list(map(len, kinds)))
            with self.hanging_up():
                return self._gather_values(own, kinds)

    def _gather_values(self, own: Sequence[torch.Tensor], kinds: Sequence[Any]) -> list[torch.Tensor]:
        """The same, once the shape, the dtype and the kind of device of each rank's values are known."""
        found: dict[int, torch.Tensor] = {}
        for rank, theirs in enumerate(kinds):
            for i, (shape, dtype, kind) in enumerate(theirs):
                is_own, dtype = rank == self.rank, getattr(torch, dtype.removeprefix("torch."))
                place = own[i].detach().contiguous() if is_own else torch.empty(shape, dtype=dtype, device=self.device)
                there = place.to(self.device)  # rng_state lies on the CPU, there and here
                self._broadcast(there, rank, self._group(range(self.size)))
                found[rank + i * self.size] = own[i] if is_own else there.cpu() if kind == "cpu" else there
        return [found[r] for r in sorted(found)]

    def _broadcast(self, x: torch.Tensor, source: int, group: Any) -> None:
        if x.numel() == 0:
            return
        try:
            dist.broadcast(x.view(-1).view(torch.uint8), source, group=group)
            self.expect([] if source == self.rank else [x], "getting tensors", [source])
        except RuntimeError as error:
            self.control.lost("getting tensors", error, [source])

    @contextmanager
    def hanging_up(self) -> Iterator[None]:
        """Tells the others of an error that only this rank has, and hangs up so that they need not wait for long."""
        try:
            yield
        except BaseException as error:
            self.control.fail(error)
            self._reducer.forget()
            self.close()
            raise

    def _hang_up(self) -> None:
        """In any thread: what is under way over gloo fails at once, here and elsewhere. The watch ends NCCL's."""
        groups = [self.control.group, self.host]
        groups += [self.up, *self._groups.copy().values()] if self.backend == "gloo" else []
        for group in {id(group): group for group in groups}.values():
            if isinstance(group, dist.ProcessGroup):  # one that this rank is in
                hang_up(group)
        if self.lifeline is not None:
            self.lifeline.hang_up()

    def confirm(self, failure: BaseException | None) -> None:
        """A message of a bit over the hosts, which no device is waited for; what failed follows if anything did."""
        if failure is not None and not isinstance(failure, Exception):
            return self.control.fail(failure)  # Ctrl-C, say: this rank won't go on
        if not self.control.is_any(failure is not None, f"the end of run {self.runs}"):
            return None
        message = {} if failure is None else {"error": in_words(failure)}
        said = self.control.tell(message, f"the end of run {self.runs}")
        failed = {rank: one["error"] for rank, one in enumerate(said) if "error" in one}
        if failed and failure is None:
            raise CommunicationError(
                f"run {self.runs} failed on {named(list(failed))}, so no rank has changed anything",
                op="run",
                where=caller(),
                bound=[f"rank {rank}: {text}" for rank, text in failed.items()],
                fix="mend what these ranks say; all ranks are ready to run again",
            )

    def leave(self) -> None:
        """Tells the others that this rank leaves in good order."""
        if self.lifeline is not None:
            self.lifeline.leave()

    def finish(self) -> None:
        """Waits until all that is under way has come, here and at the others; NCCL's messages outlast the run."""
        if self.backend == "nccl" and not self.control.is_broken:
            torch.cuda.synchronize(self.device)
            with suppress(CommunicationError):  # whoever left without a word needs nothing any more
                self.control.exchange(b"", "shutdown_distributed")

    def close(self) -> None:
        """Leaves all process groups that were made here, without waiting for anybody."""
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
            # Destroying one of NCCL's waits for its kernels, which may wait for a rank that is gone.
            leave = abort_process_group if self.backend == "nccl" else dist.destroy_process_group
            groups = {id(group): (leave, group) for group in (self.up, self.down, *self._groups.values())}
            lines = None if self.lifeline is None else self.lifeline.group
            groups |= {id(g): (dist.destroy_process_group, g) for g in (self.control.group, self.host, lines)}
            # Whoever still held a group would hold its connections open.
            self.control.group = self.up = self.down = self.host = self.lifeline = None
            self._groups.clear()
            if self.backend == "nccl":  # ending one frees memory, for which CUDA waits for the kernels of all others
                with ThreadPoolExecutor(len(groups), thread_name_prefix="hetu-leave") as threads:
                    while groups:
                        threads.submit(_leave, *groups.popitem()[1])
            while groups:
                _leave(*groups.popitem()[1])


def _refuse_counts(counts: Sequence[int]) -> NoReturn:
    raise CommunicationError(
        "the ranks hold values of different things: pipeline r runs on the rank of its number modulo their count",
        op="gather_shards",
        where=caller(),
        bound=[f"rank {rank}: {count} value{'s' * (count != 1)}" for rank, count in enumerate(counts)],
        fix="give what one run gave of one tensor, on all ranks; None where it gave None",
    )


def _leave(leave: Callable[[dist.ProcessGroup], None], group: dist.ProcessGroup | None) -> None:
    with suppress(RuntimeError, ValueError, AssertionError, KeyError):  # it may be gone already
        if group is not None:
            leave(group)
