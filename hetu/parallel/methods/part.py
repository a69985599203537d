"""Collects the instructions of one member, for the methods that move keys and values."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable
from hetu.parallel.methods.method import AttnSpec
from hetu.parallel.methods.peers import transfer_number
from hetu.parallel.plan.buffers import Buffer, shard
from hetu.parallel.plan.heads import Payload
from hetu.parallel.plan.instructions import Attend, Instruction, Receive, Runs, Send, Source, Wait
from hetu.parallel.plan.parts import PipelinePlan

_FOREIGN = (Payload.KV,)


class PartBuilder:
    """Collects one member's instructions; knows transfers by their ends, and waits before a buffer is reused."""

    def __init__(self, group: GroupLayout, member: int, spec: AttnSpec, spans: QuerySpans) -> None:
        self.group, self.member, self.spec, self.spans = group, member, spec, spans
        self.pipeline, self.heads, self.members = group.members[member], spec.heads.all, group.members
        self.num_pipelines = spec.num_pipelines
        self.sizes: list[int] = []  # rows of the buffers behind the shard
        self.instructions: list[Instruction] = []
        self.sending: dict[int, list[int]] = {}  # buffer: transfers that may still read it

    def _transfer(self, hop: int, source: int, target: int) -> int:
        return transfer_number(hop, source, target, self.num_pipelines)

    def receive(self, owner: int, buffer: int, rows: int, offset: int = 0, hop: int = 0) -> None:
        self.instructions += [Wait(transfer) for transfer in self.sending.pop(buffer, ())]
        peer = self.members[owner]
        transfer = self._transfer(hop, peer, self.pipeline)
        self.instructions.append(Receive(transfer, peer, buffer, offset, rows, Payload.KV, self.heads))
        self.sizes += [0] * (buffer - len(self.sizes))
        self.sizes[buffer - 1] = max(self.sizes[buffer - 1], offset + rows)

    def send(self, target: int, buffer: int, runs: Runs, hop: int = 0) -> None:
        peer = self.members[target]
        transfer = self._transfer(hop, self.pipeline, peer)
        self.instructions.append(Send(transfer, peer, buffer, runs, Payload.KV, self.heads))
        self.sending.setdefault(buffer, []).append(transfer)

    def send_all(self, sends: list[tuple[int, Runs]]) -> None:
        for target, runs in sends:
            self.send(target, 0, runs)

    def wait_for(self, owner: int, hop: int = 0) -> None:
        self.instructions.append(Wait(self._transfer(hop, self.members[owner], self.pipeline)))

    def attend(self, buffer: int, table: SegmentTable, held: list[tuple[int, Runs]]) -> None:
        sources = tuple([Source(self.members[owner], runs) for owner, runs in held])
        self.instructions.append(Attend(buffer, table, sources, self.heads))

    def finish(self) -> PipelinePlan:
        """The part, after waiting for all that is still being sent."""
        self.instructions += [Wait(transfer) for transfers in self.sending.values() for transfer in transfers]
        buffers = [shard(self.group.rows[self.member], self.spec.heads)]
        buffers += [Buffer(rows, self.heads, _FOREIGN) for rows in self.sizes]
        return PipelinePlan(self.pipeline, self.spans, tuple(buffers), tuple(self.instructions))


def cut_runs(start: IntArray, length: IntArray) -> list[list[Runs]]:
    """Runs of ``(n, m, B)`` starts and lengths, one set for each of ``(n, m)``; runs that touch are joined.

    Starts of ``(m, B)`` hold for every n.
    """
    n, m, B = length.shape
    cell = (length.reshape(-1) != 0).nonzero()[0]
    ends = (start + length).reshape(-1).take(cell)
    starts = ends - length.reshape(-1).take(cell)
    bounds = cell.searchsorted(np.arange(n * m + 1) * B)
    is_first = np.ones(len(cell) + 1, bool)
    np.not_equal(starts[1:], ends[:-1], out=is_first[1:-1])
    is_first[bounds] = True
    firsts = is_first.nonzero()[0]
    starts, ends = starts.take(firsts[:-1]).astype(np.int64), ends.take(firsts[1:] - 1)
    lengths = ends - starts
    runs = []
    sizes = length.sum(2, dtype=length.dtype).reshape(-1).tolist()
    for (i, j), rows in zip(pairwise(firsts.searchsorted(bounds).tolist()), sizes, strict=True):
        runs.append(Runs.of(starts[i:j], lengths[i:j], rows))
    return [runs[i : i + m] for i in range(0, n * m, max(m, 1))]
