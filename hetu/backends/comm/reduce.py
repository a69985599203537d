"""Sums over the pipelines of a strategy that run in several processes: in buckets, and in the order of the pipelines.

A bucket is cut into a piece for each process. Pieces are exchanged, each process adds up its own in the order of the
pipelines, and the sums are gathered: as many bytes as a ring takes, and the same bits as in one process, for any number
of pipelines. A bucket is on its way as soon as it is full, while gradients of earlier layers are still computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from hetu.backends.comm.connect import Connection
from hetu.backends.comm.world import reduce_in_order

BUCKET_BYTES = 25 * 2**20
"""Large enough for the network's full speed, small enough that the first is full early in the backward."""


@dataclass(slots=True, eq=False)
class Bucket:
    """Tensors that are reduced together.

    Attributes:
        parts: For each tensor its values on the pipelines that run here.
        result: Gives all sums, one after the other, once it was launched.
    """

    parts: list[Sequence[torch.Tensor]] = field(default_factory=list)
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
    key: Hashable


class Reducer:
    """Collects what is to be reduced in buckets, and launches them without waiting.

    Args:
        reduce: Reduces a flat tensor, ``(own, op, count) -> sum``, with one row of ``own`` per pipeline that runs here;
            all processes that run pipelines call it in the same order.
    """

    def __init__(self, reduce: Callable[[torch.Tensor, str, int], torch.Tensor]) -> None:
        self.reduce = reduce
        self._open: dict[Hashable, Bucket] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, parts: Sequence[torch.Tensor], op: str, count: int) -> Started:
        """Puts a tensor into a bucket, which is launched once it is full."""
        key = (op, count, parts[0].dtype, parts[0].device)
        bucket = self._open.setdefault(key, Bucket())
        bucket.parts.append(parts)
        started = Started(bucket, len(bucket.parts) - 1, key)
        if bucket.bytes >= BUCKET_BYTES:
            self._launch(key)
        return started

    def finish(self, started: Started) -> torch.Tensor:
        """The sum; waits for its bucket, and launches all that are open if it is one of them."""
        if started.bucket.result is None:
            for key in list(self._open):
                self._launch(key)
        assert started.bucket.result is not None
        flat, parts = started.bucket.result(), started.bucket.parts
        sizes = [own[0].numel() for own in parts]
        begin = sum(sizes[: started.index])
        return flat[begin : begin + sizes[started.index]].view(parts[started.index][0].shape)

    def forget(self) -> None:
        """Drops what was not launched, after a failure."""
        self._open.clear()

    def _launch(self, key: Any) -> None:
        op, count, _, device = key
        bucket = self._open.pop(key)
        rows = zip(*bucket.parts, strict=True)
        own = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
        run = self._on_stream if device.type == "cuda" else self._in_thread
        bucket.result = run(lambda: self.reduce(own, op, count), own)

    def _in_thread(self, work: Callable[[], torch.Tensor], own: torch.Tensor) -> Callable[[], torch.Tensor]:
        """On the CPU one thread beside the one that computes; a single one, so that the order stays."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="hetu-reduce")
        future: Future[torch.Tensor] = self._thread.submit(work)
        return future.result

    def _on_stream(self, work: Callable[[], torch.Tensor], own: torch.Tensor) -> Callable[[], torch.Tensor]:
        """On a GPU a stream beside the one that computes; the host waits for neither."""
        device = own.device
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            total = work()
            done = stream.record_event()
        own.record_stream(stream)  # nobody else may get its memory before that stream has read it

        def result() -> torch.Tensor:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            total.record_stream(current)
            return total

        return result


def reduce_over(
    own: torch.Tensor,
    op: str,
    held: Sequence[Sequence[int]],
    connection: Connection,
    landing: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """Adds up, or averages, a flat tensor over pipelines in several processes.

    Args:
        own: ``(P, n)``, contiguous: the values of the P pipelines that run here.
        op: ``"sum"`` or ``"mean"``.
        held: For each process of the group the pipelines that it runs.
        connection: Between the processes; all of them call this.
        landing: Told of each tensor that others' values land in.

    Returns:
        ``(n,)``: with the pipelines' values added in their order, half precision in float32.
    """
    (mine, n), ranks = own.shape, len(held)
    piece = -(-n // ranks)
    sent = own.new_zeros((mine, ranks * piece))
    sent[:, :n] = own
    sent = sent.view(mine, ranks, piece).transpose(0, 1).contiguous()
    # As bytes: the network moves them whatever the type, bfloat16 and half too.
    size = piece * own.itemsize
    rows = [len(pipelines) for pipelines in held]
    received = own.new_empty((sum(rows), piece))
    splits = [k * size for k in rows], [mine * size] * ranks
    connection.alltoall_base(_bytes(received), _bytes(sent), *splits).wait()
    landing(received)
    by_pipeline = dict(zip([r for pipelines in held for r in pipelines], received, strict=True))
    total = reduce_in_order([by_pipeline[r] for r in sorted(by_pipeline)], op).contiguous()
    whole = own.new_empty(ranks * piece)
    connection._allgather_base(_bytes(whole), _bytes(total)).wait()
    landing(whole)
    return whole[:n]


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).view(torch.uint8)
