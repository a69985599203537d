"""Sums over the pipelines of a strategy that run in several processes: in buckets, and in the order of the pipelines.

A bucket is cut into a piece for each process. Pieces are exchanged, each process adds up its own in the order of the
pipelines, and the sums are gathered: as many bytes as a ring takes, and the same bits as in one process, for any number
of pipelines. Where each process is to have a part of the sums, as a placement says, that part is its piece, and nothing
is gathered. A bucket is on its way as soon as it is full, while gradients of earlier layers are still computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from hetu.backends.comm.boxes import flat
from hetu.backends.comm.connect import Connection
from hetu.backends.comm.world import reduce_in_order
from hetu.parallel.placement import Box, Placement

Reduce = Callable[[torch.Tensor, str, int], torch.Tensor]
Scatter = Callable[[Sequence[torch.Tensor], str, int], torch.Tensor]
"""See :class:`Reducer`."""

BUCKET_BYTES = 25 * 2**20
"""Large enough for the network's full speed, small enough that the first is full early in the backward."""


@dataclass(slots=True, eq=False)
class Bucket:
    """Tensors that are reduced together.

    Attributes:
        homes: Which boxes of each tensor each process gets; None for tensors that all of them get whole.
        parts: For each tensor its values on the pipelines that run here, until it is launched.
        shapes: What of each tensor comes back here.
        result: Gives all sums, one after the other, once it was launched.
    """

    homes: list[Placement | None] = field(default_factory=list)
    parts: list[Sequence[torch.Tensor]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    result: Callable[[], torch.Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of one pipeline's values."""
        return sum(parts[0].nbytes for parts in self.parts)


@dataclass(frozen=True, slots=True, eq=False)
class Started:
    """A tensor whose reduction was asked for: its place in a bucket."""

    bucket: Bucket
    index: int


class Reducer:
    """Collects what is to be reduced in buckets, and launches them without waiting.

    Args:
        reduce: Reduces a flat tensor, ``(own, op, count) -> sum``, with one row of ``own`` per pipeline that runs here;
            all processes that run pipelines call it in the same order.
        scatter: Reduces one such tensor for each of these processes, ``(pieces, op, count) -> sum``, and gives the sum
            of this process's.
        rank: This process's number.
    """

    def __init__(self, reduce: Reduce, scatter: Scatter | None = None, rank: int = 0) -> None:
        self.reduce, self.scatter, self.rank = reduce, scatter, rank
        self._open: dict[Hashable, Bucket] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, parts: Sequence[torch.Tensor], op: str, count: int, home: Placement | None = None) -> Started:
        """Puts a tensor into a bucket, which is launched once it is full.

        Args:
            parts: Its values on the pipelines that run here.
            op: ``"sum"`` or ``"mean"``.
            count: Pipelines of the strategy.
            home: Which boxes each process that runs pipelines gets, one after the other; None if each gets the whole.
        """
        key = (op, count, home is None, parts[0].dtype, parts[0].device)
        bucket = self._open.setdefault(key, Bucket())
        bucket.homes.append(home)
        bucket.parts.append(parts)
        bucket.shapes.append(tuple(parts[0].shape) if home is None else (home.numel_of(self.rank),))
        started = Started(bucket, len(bucket.shapes) - 1)
        if bucket.bytes >= BUCKET_BYTES:
            self._launch(key)
        return started

    def finish(self, started: Started) -> torch.Tensor:
        """The sum; waits for its bucket, and launches all that are open if it is one of them."""
        if started.bucket.result is None:
            for key in list(self._open):
                self._launch(key)
        assert started.bucket.result is not None
        sums, shapes = started.bucket.result(), started.bucket.shapes
        sizes = [prod(shape) for shape in shapes]
        begin = sum(sizes[: started.index])
        return sums[begin : begin + sizes[started.index]].view(shapes[started.index])

    def forget(self) -> None:
        """Drops what was not launched, after a failure."""
        self._open.clear()

    def _launch(self, key: Any) -> None:
        op, count, _, _, device = key
        bucket = self._open.pop(key)
        work, packed = self._packed(bucket, op, count)
        bucket.parts = []  # the memory of these gradients is free for those of the layers before
        run = self._on_stream if device.type == "cuda" else self._in_thread
        bucket.result = run(work, packed)

    def _packed(self, bucket: Bucket, op: str, count: int) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
        """What reduces a bucket, and the tensors that it reads."""
        homes = [home for home in bucket.homes if home is not None]
        rows = list(zip(*bucket.parts, strict=True))
        if not homes:
            own = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
            return lambda: self.reduce(own, op, count), [own]
        scatter, processes = self.scatter, range(len(homes[0].boxes))
        assert scatter is not None
        pieces = [torch.stack([_piece(row, homes, process) for row in rows]) for process in processes]
        return lambda: scatter(pieces, op, count), pieces

    def _in_thread(self, work: Callable[[], torch.Tensor], read: Sequence[torch.Tensor]) -> Callable[[], torch.Tensor]:
        """On the CPU one thread beside the one that computes; a single one, so that the order stays."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="hetu-reduce")
        future: Future[torch.Tensor] = self._thread.submit(work)
        return future.result

    def _on_stream(self, work: Callable[[], torch.Tensor], read: Sequence[torch.Tensor]) -> Callable[[], torch.Tensor]:
        """On a GPU a stream beside the one that computes; the host waits for neither."""
        device = read[0].device
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            total = work()
            done = stream.record_event()
        for tensor in read:  # nobody else may get its memory before that stream has read it
            tensor.record_stream(stream)

        def result() -> torch.Tensor:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            total.record_stream(current)
            return total

        return result


def _piece(values: Sequence[torch.Tensor], homes: Sequence[Placement], process: int) -> torch.Tensor:
    """What a process gets of some tensors of a pipeline, one after the other."""
    pairs = zip(values, homes, strict=True)
    return flat([x[box.slices_in(Box.whole(x.shape))] for x, home in pairs for box in home.held_by(process)], values[0])


def reduce_over(
    own: torch.Tensor,
    op: str,
    held: Sequence[Sequence[int]],
    rank: int,
    connection: Connection,
    landing: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """Adds up, or averages, a flat tensor over pipelines in several processes.

    Args:
        own: ``(P, n)``: the values of the P pipelines that run here.
        op: ``"sum"`` or ``"mean"``.
        held: For each process of the group the pipelines that it runs.
        rank: This process's number in the group.
        connection: Between the processes; all of them call this.
        landing: Told of each tensor that others' values land in.

    Returns:
        ``(n,)``: with the pipelines' values added in their order, half precision in float32.
    """
    (mine, n), ranks = own.shape, len(held)
    piece = -(-n // ranks)
    padded = own.new_zeros((mine, ranks * piece))
    padded[:, :n] = own
    total = scatter_over(padded.view(mine, ranks, piece).unbind(1), op, held, rank, connection, landing)
    whole = own.new_empty(ranks * piece)
    connection._allgather_base(_bytes(whole), _bytes(total)).wait()
    landing(whole)
    return whole[:n]


def scatter_over(
    pieces: Sequence[torch.Tensor],
    op: str,
    held: Sequence[Sequence[int]],
    rank: int,
    connection: Connection,
    landing: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """The same of one piece per process, of any lengths: each process gets the sum of its own.

    Args:
        pieces: ``(P, n)`` each, with another n for each process: the values of the P pipelines that run here.
        op: ``"sum"`` or ``"mean"``.
        held: For each process of the group the pipelines that it runs.
        rank: This process's number in the group.
        connection: Between the processes; all of them call this.
        landing: Told of each tensor that others' values land in.

    Returns:
        ``(n,)``, of this process's piece.
    """
    own = pieces[rank]
    # As bytes: the network moves them whatever the type, bfloat16 and half too.
    sent = _bytes(torch.cat([piece.reshape(-1) for piece in pieces]))
    size = own.shape[1] * own.itemsize
    rows = [len(pipelines) for pipelines in held]
    received = own.new_empty((sum(rows), own.shape[1]))
    splits = [k * size for k in rows], [piece.nbytes for piece in pieces]
    connection.alltoall_base(_bytes(received), sent, *splits).wait()
    landing(received)
    by_pipeline = dict(zip([r for pipelines in held for r in pipelines], received, strict=True))
    return reduce_in_order([by_pipeline[r] for r in sorted(by_pipeline)], op).contiguous()


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).view(torch.uint8)
