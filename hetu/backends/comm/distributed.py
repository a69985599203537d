"""Pipelines in several processes: the world over ``torch.distributed``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from hetu.backends.comm.boxes import flat, flat_boxes
from hetu.backends.comm.compare import refuse_errors
from hetu.backends.comm.connect import Connection
from hetu.backends.comm.control import Control
from hetu.backends.comm.peers import Peers
from hetu.backends.comm.reduce import Reducer, Started, reduce_over, scatter_over
from hetu.backends.comm.world import Named, Spec
from hetu.errors import CommunicationError, caller, in_words, ranks_in_words
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.placement import Placement

GATHERING = "getting parameters"
"""What a rank does that waits for parameters, for errors."""

ALIGNMENT = 16
"""What ranks send begins at multiples of so many bytes, where it lands."""


class FlatGather(NamedTuple):
    """Flat tensors of all ranks that are on their way.

    Attributes:
        work: What torch gave for the message.
        sent: This rank's. It must last until the end.
        whole: ``(ranks, bytes)``, where they land.
        sizes: The bytes of each rank.
    """

    work: Any
    sent: torch.Tensor
    whole: torch.Tensor
    sizes: Sequence[int]


class DistributedWorld(Peers):
    """This process and the others of ``hetu.init_distributed``, which run graphs together.

    Attributes:
        agreed: What the ranks agreed on so far; see :mod:`hetu.runtime.ranks.agreement`.
        runs: How many runs were asked for.
        lock: Held while a run takes place: runs of several threads would mix up their messages.
    """

    def __init__(self, control: Control, device: torch.device, backend: str) -> None:
        super().__init__(control, device, backend)
        self.agreed: set[bytes] = set()
        self.lock = threading.RLock()
        self.runs = 0
        self._some: dict[tuple[int, ...], Connection] = {}
        self._reducer = Reducer(self._reduce, self._scatter, self.rank)
        self._gathering: Connection = None

    def _between(self, ranks: Sequence[int]) -> Connection:
        """The connection between some of them."""
        self.control.check()  # the watch may have left them
        return self.everyone if len(ranks) == self.size else self._some[tuple(ranks)]

    def prepare(self, count: int, plans: Iterable[AttnPlan]) -> None:
        """Makes the connections of a strategy of ``count`` pipelines, and opens the links that plans use.

        All ranks call it, with plans of the same strategies in the same order, before they follow one.
        """
        try:
            for ranks in (self._active(count), self._with_idle(count)):
                key = tuple(ranks)
                if key not in self._some and 1 < len(key) < self.size and self.rank in key:
                    self._some[key] = self._connect(f"ranks {key}", self.backend, key)
        except RuntimeError as error:
            self.control.lost("connecting to the other ranks", error)
        self.open_links(count, plans)

    def prepare_gathers(self) -> None:
        """Makes and opens the connection over which parameters are gathered; all ranks call it before they gather."""
        if self._gathering is None:
            try:
                self._gathering = self._connect("gathers", self.backend)
            except RuntimeError as error:
                self.control.lost("connecting to the other ranks", error)
            byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
            self.finish_gather(self.start_gather(byte, [1] * self.size))

    def _active(self, count: int) -> range:
        return range(min(count, self.size))

    def _with_idle(self, count: int) -> list[int]:
        """Rank 0 and those without a pipeline."""
        return [0, *range(max(count, 1), self.size)]

    def start_reduce(
        self, parts: Sequence[torch.Tensor], op: str, count: int, home: Placement | None = None
    ) -> Started | torch.Tensor:
        """Puts the tensor into a bucket, which travels once it is full.

        What is at home on a rank without a pipeline is added up by one of the others.
        """
        if count == 1:
            return parts[0] if home is None else flat_boxes(parts[0], home.over(1))
        try:
            return self._reducer.start(parts, op, count, home and home.over(len(self._active(count))))
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
        return reduce_over(own, op, *self._among(count))

    def _scatter(self, pieces: Sequence[torch.Tensor], op: str, count: int) -> torch.Tensor:
        return scatter_over(pieces, op, *self._among(count))

    def _among(self, count: int) -> tuple[Any, ...]:
        """Who takes part in a sum over a strategy's pipelines, for :func:`reduce_over`."""
        active = self._active(count)
        held = [range(rank, count, self.size) for rank in active]
        return held, self.rank, self._between(active), lambda x: self.expect([x], "adding up gradients")

    def deliver(
        self,
        sums: Sequence[torch.Tensor] | None,
        homes: Sequence[Placement],
        dtypes: Sequence[torch.dtype],
        count: int,
        device: torch.device,
    ) -> list[torch.Tensor]:
        """Rank r has what ranks r + n, r + 2n, ... are to get, where n ranks have pipelines."""
        ranks = len(self._active(count))
        if ranks == self.size:
            return list(sums or ())
        found: dict[int, torch.Tensor] = {}
        for dtype in dict.fromkeys(dtypes):
            indices = [i for i, one in enumerate(dtypes) if one == dtype]
            own = None if sums is None else [sums[i] for i in indices]
            delivered = self._deliver(
                own, [homes[i] for i in indices], ranks, torch.empty(0, dtype=dtype, device=device)
            )
            found.update(zip(indices, delivered, strict=True))
        return [found[i] for i in range(len(dtypes))]

    def _deliver(
        self, sums: Sequence[torch.Tensor] | None, homes: Sequence[Placement], ranks: int, like: torch.Tensor
    ) -> list[torch.Tensor]:
        """The same for tensors of the dtype and the device of ``like``, where so many ranks have pipelines."""
        sizes = [[home.numel_of(rank) for home in homes] for rank in range(self.size)]
        kept, gone = list[torch.Tensor](), dict.fromkeys(range(self.size), like)
        if sums is not None:
            served = range(self.rank, self.size, ranks)
            parts = [x.split([sizes[rank][i] for rank in served]) for i, x in enumerate(sums)]
            kept = [part[0].clone() for part in parts]  # what goes away shall leave no memory behind
            for k, rank in enumerate(served):
                gone[rank] = flat([part[k] for part in parts], like) if k else like
        mine = sizes[self.rank] if sums is None else []
        landed = like.new_empty(sum(mine))
        splits = [landed.nbytes if rank == self.rank % ranks else 0 for rank in range(self.size)]
        sent = torch.cat([x.view(torch.uint8) for x in gone.values()])

        def message() -> None:
            bytes_sent = [x.nbytes for x in gone.values()]
            self.everyone.alltoall_base(landed.view(torch.uint8), sent, splits, bytes_sent).wait()

        self.say("getting gradients", message, [landed])
        return kept if sums is not None else list(landed.split(mine))

    def start_gather(self, own: torch.Tensor, sizes: Sequence[int]) -> FlatGather:
        """Every rank sends as many bytes as the one with the most has, over a connection of these messages' own."""
        row = (max(sizes) // ALIGNMENT + 1) * ALIGNMENT
        sent = own.new_zeros(row)
        sent[: len(own)] = own
        whole = own.new_empty((self.size, row))
        self.control.check()  # the watch may have left the connection
        try:
            work = self._gathering._allgather_base(whole.view(-1), sent)
        except RuntimeError as error:
            self.control.lost(GATHERING, error)
        return FlatGather(work, sent, whole, sizes)

    def finish_gather(self, started: FlatGather) -> list[torch.Tensor]:
        """Waits for it: over gloo the host, over NCCL the stream that computes."""
        self.say(GATHERING, started.work.wait, [started.whole])
        return [row[:size] for row, size in zip(started.whole, started.sizes, strict=True)]

    def gather(
        self, own: Sequence[torch.Tensor], counts: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> list[torch.Tensor]:
        """Every rank sends as many numbers as the one with the most has."""
        held = [[len(range(rank, count, self.size)) for count in counts] for rank in range(self.size)]
        sent = torch.zeros(max(map(sum, held)), dtype=dtype, device=device)
        if own:
            sent[: len(own)] = torch.stack(list(own))
        received = [torch.empty_like(sent) for _ in held]
        places = [x.view(torch.uint8) for x in received]  # as bytes, for gloo doesn't know all types

        def message() -> None:
            self.everyone.allgather([places], [sent.view(torch.uint8)]).wait()

        self.say("gathering losses", message, received)
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
            self._broadcast(flat, 0, ranks)
            if tensors is None:
                for x, values in zip(own, flat.split([x.numel() for x in own]), strict=True):
                    x.copy_(values.view(x.shape))
        return made

    def total(self, numbers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """An all-reduce: integers give the same sum in any order."""
        summed, doing = torch.stack(list(numbers)), "adding up what the step's batches count"
        self.say(doing, lambda: self.everyone.allreduce([summed]).wait(), [summed])
        return list(summed)

    def gather_values(
        self, read: Callable[[], Sequence[Named]], what: str, check: Callable[[Sequence[int]], None] | None = None
    ) -> list[Sequence[Named]]:
        """The ranks tell each other what they have; then each sends it to all."""
        failure, own = None, list[Named]()
        with self.lock:
            try:
                own = list(read())
                kinds = [[name, list(x.shape), str(x.dtype), x.device.type] for name, x in own]
                message: dict[str, Any] = {"values": kinds}
            except Exception as error:
                failure, message = error, {"error": in_words(error)}
            with self.hanging_up():
                said = self.control.tell(message, what)
            if failure is not None:
                raise failure
            refuse_errors(said, what, what, "nothing was gathered")
            if check is not None:
                check([len(one["values"]) for one in said])
            with self.hanging_up():
                return [self._values_of(rank, one["values"], own) for rank, one in enumerate(said)]

    def _values_of(self, rank: int, kinds: Sequence[Any], own: Sequence[Named]) -> Sequence[Named]:
        """A rank's values, whose names, shapes, dtypes and kinds of device are known."""
        found = list[Named]()
        for i, (name, shape, dtype, kind) in enumerate(kinds):
            is_own, dtype = rank == self.rank, getattr(torch, dtype.removeprefix("torch."))
            place = own[i][1].detach().contiguous() if is_own else torch.empty(shape, dtype=dtype, device=self.device)
            there = place.to(self.device)  # rng_state lies on the CPU, there and here
            self._broadcast(there, rank, range(self.size))
            found.append(own[i] if is_own else (name, there.cpu() if kind == "cpu" else there))
        return found

    def _broadcast(self, x: torch.Tensor, source: int, ranks: Sequence[int]) -> None:
        if x.numel() == 0:
            return
        options = dist.BroadcastOptions()
        options.rootRank = ranks.index(source)
        flat, connection = x.view(-1).view(torch.uint8), self._between(ranks)
        landing = [] if source == self.rank else [x]
        self.say("getting tensors", lambda: connection.broadcast([flat], options).wait(), landing, [source])

    def failed(self, error: BaseException) -> None:
        """Lets go of sums that are under way, too."""
        self._reducer.forget()
        super().failed(error)

    def confirm(self, failure: BaseException | None) -> None:
        """A message of a bit over the hosts, which no device is waited for; what failed follows if anything did."""
        if failure is not None and not isinstance(failure, Exception):
            return self.control.fail(failure)  # Ctrl-C, say: this rank won't go on
        if not self.control.is_any(failure is not None, f"the end of run {self.runs}"):
            return None
        text = "" if failure is None else in_words(failure)
        said = self.control.exchange(text.encode(), f"the end of run {self.runs}")
        failed = {rank: text.decode() for rank, text in enumerate(said) if text}
        if failed and failure is None:
            raise CommunicationError(
                f"run {self.runs} failed on {ranks_in_words(failed)}, so no rank has changed anything",
                op="run",
                where=caller(),
                bound=[f"rank {rank}: {text}" for rank, text in failed.items()],
                fix="mend what these ranks say; all ranks are ready to run again",
            )

    def finish(self) -> None:
        """Waits until all that is under way has come, here and at the others; NCCL's messages outlast the run."""
        if self.backend == "nccl" and not self.control.is_broken:
            torch.cuda.synchronize(self.device)
            with suppress(CommunicationError):  # whoever left without a word needs nothing any more
                self.control.exchange(b"", "shutdown_distributed")
