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
        self.pipeline, self.heads = group.members[member], spec.heads.all
        self.sizes: list[int] = []  # rows of the buffers behind the shard
        self.instructions: list[Instruction] = []
        self.sending: dict[int, list[int]] = {}  # buffer: transfers that may still read it

    def _transfer(self, hop: int, source: int, target: int) -> int:
        return transfer_number(hop, source, target, self.spec.num_pipelines)

    def receive(self, owner: int, buffer: int, rows: int, offset: int = 0, hop: int = 0) -> None:
        self.instructions += [Wait(transfer) for transfer in self.sending.pop(buffer, ())]
        peer = self.group.members[owner]
        transfer = self._transfer(hop, peer, self.pipeline)
        self.instructions.append(Receive(transfer, peer, buffer, offset, rows, Payload.KV, self.heads))
        self.sizes += [0] * (buffer - len(self.sizes))
        self.sizes[buffer - 1] = max(self.sizes[buffer - 1], offset + rows)

    def send(self, target: int, buffer: int, runs: Runs, hop: int = 0) -> None:
        peer = self.group.members[target]
        transfer = self._transfer(hop, self.pipeline, peer)
        self.instructions.append(Send(transfer, peer, buffer, runs, Payload.KV, self.heads))
        self.sending.setdefault(buffer, []).append(transfer)

    def send_all(self, sends: list[tuple[int, Runs]]) -> None:
        for target, runs in sends:
            self.send(target, 0, runs)

    def wait_for(self, owner: int, hop: int = 0) -> None:
        self.instructions.append(Wait(self._transfer(hop, self.group.members[owner], self.pipeline)))

    def attend(self, buffer: int, table: SegmentTable, held: list[tuple[int, Runs]]) -> None:
        sources = tuple([Source(self.group.members[owner], runs) for owner, runs in held])
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
    starts = start.reshape(-1).take(cell if start.size == length.size else cell % start.size)
    lengths = length.reshape(-1).take(cell).astype(np.int64)
    bounds = cell.searchsorted(np.arange(n * m + 1) * B)
    is_first = np.ones(len(cell), bool)
    np.not_equal(starts[1:], (starts + lengths)[:-1], out=is_first[1:])
    is_first[bounds[:-1][bounds[:-1] < len(cell)]] = True
    firsts = is_first.nonzero()[0]
    if len(firsts) < len(cell):
        starts, lengths = starts.take(firsts), np.add.reduceat(lengths, firsts)
        bounds = firsts.searchsorted(bounds)
    ends = bounds.tolist()
    runs = [Runs(starts[i:j], lengths[i:j]) for i, j in pairwise(ends)]
    return [runs[i : i + m] for i in range(0, n * m, max(m, 1))]
