"""From a layout to a plan: the methods, and those that move keys and values inside a context group.

A method is a function from a group to the parts of some of its members, entered into ``METHODS``. What a part says
depends on the layout alone, never on which other parts are built with it, so a process may build only its own.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from hetu.errors import StrategyError, caller
from hetu.parallel.layout import GroupLayout, Layout
from hetu.parallel.peers import around, transfer_number, whole
from hetu.parallel.plan import Attend, AttnPlan, Heads, Instruction, PipelinePlan, Receive, Runs, Send, Source, Wait
from hetu.parallel.segments import IntArray, SegmentTable
from hetu.parallel.tables import extents, see
from hetu.parallel.ulysses import ulysses


def build_plan(layout: Layout, *, method: str = "auto", is_causal: bool = True, heads: Heads) -> AttnPlan:
    """What every pipeline does.

    Args:
        layout: Which token lies where.
        method: ``"ring"``, ``"direct"``, ``"all_gather"`` or ``"ulysses"``; ``"auto"`` is ``"direct"``: of those that
            move keys and values none moves fewer bytes, and each of its transfers can be hidden behind all of the
            computation before it.
        is_causal: Whether a query sees only keys up to its own position in its document.
        heads: Widths of a token's row.

    Raises:
        StrategyError: If there is no such method.

    Example:
        >>> plan = build_plan(Layout.build([2, 2], [0, 0]), heads=Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2))
        >>> [plan.pairs(r) for r in range(2)], plan.bytes_sent(0)
        ([3, 7], 512)
    """
    method, build = _find(method)
    parts: dict[int, PipelinePlan] = {}
    for group in layout.groups:
        for part in build(group, slice(0, len(group.members)), is_causal, layout.num_pipelines, heads):
            parts[part.pipeline] = part
    return AttnPlan(layout, method, is_causal, heads, tuple(parts[r] for r in range(layout.num_pipelines)))


def build_pipeline_plan(
    layout: Layout, pipeline: int, *, method: str = "auto", is_causal: bool = True, heads: Heads
) -> PipelinePlan:
    """One pipeline's part of what :func:`build_plan` gives, without building the others'.

    Example:
        >>> heads = Heads(num_q=1, num_kv=1, head_dim=64, itemsize=2)
        >>> part = build_pipeline_plan(Layout.build([2, 2], [0, 0]), 1, method="ring", heads=heads)
        >>> [type(item).__name__ for item in part.instructions]
        ['Receive', 'Attend', 'Wait', 'Attend']
    """
    group, member = layout.place(pipeline)
    return _find(method)[1](group, slice(member, member + 1), is_causal, layout.num_pipelines, heads)[0]


# The methods


def direct(group: GroupLayout, who: slice, is_causal: bool, num_pipelines: int, heads: Heads) -> list[PipelinePlan]:
    """Each owner sends what is needed straight to who needs it, all at once; a buffer a peer, nearest peer first."""
    taken, given, tables, landed, sent = _exchange(group, who, is_causal)
    R, parts = len(group.members), []
    for i, member in enumerate(range(who.start, who.stop)):
        part = _Part(group, member, num_pipelines)
        sources = [c for c in around(R, member, -1) if taken[i][c]]
        for buffer, c in enumerate(sources, 1):
            part.receive(c, buffer, taken[i][c])
        part.send_all([(r, sent[r][i]) for r in around(R, member, 1) if given[r][i]])
        part.attend(0, tables[i * R + member], [(member, whole(group.rows[member]))])
        for buffer, c in enumerate(sources, 1):
            part.wait_for(c)
            part.attend(buffer, tables[i * R + c], [(c, landed[i][c])])
        parts.append(part.finish())
    return parts


def all_gather(group: GroupLayout, who: slice, is_causal: bool, num_pipelines: int, heads: Heads) -> list[PipelinePlan]:
    """What is needed of all peers lands in one buffer, and one step attends to it; the own shard is never copied."""
    taken, given, tables, landed, sent = _exchange(group, who, is_causal)
    R, parts = len(group.members), []
    for i, member in enumerate(range(who.start, who.stop)):
        part = _Part(group, member, num_pipelines)
        sources = [c for c in range(R) if taken[i][c]]
        offsets = dict(zip(sources, np.cumsum([0] + [taken[i][c] for c in sources]).tolist(), strict=False))
        for c in sources:
            part.receive(c, 1, taken[i][c], offsets[c])
        part.send_all([(r, sent[r][i]) for r in around(R, member, 1) if given[r][i]])
        part.attend(0, tables[i * R + member], [(member, whole(group.rows[member]))])
        for c in sources:
            part.wait_for(c)
        if sources:
            table = _join([tables[i * R + c] for c in sources], [offsets[c] for c in sources])
            part.attend(1, table, [(c, landed[i][c]) for c in sources])
        parts.append(part.finish())
    return parts


def ring(group: GroupLayout, who: slice, is_causal: bool, num_pipelines: int, heads: Heads) -> list[PipelinePlan]:
    """Shards hop from neighbour to neighbour, shrinking to what somebody further along still needs.

    Two buffers take turns: while one is attended to and passed on, the other fills. ``carried[h, c]`` are the rows of
    member c's shard that make hop h, from member c + h - 1 to member c + h; ``first[h, c]`` says where each document
    begins among them.
    """
    R = len(group.members)
    everyone = slice(0, R)
    hops, owners = np.arange(R)[:, None], np.arange(R)
    carried = extents(group, everyone, everyone, is_causal=is_causal)[(owners + hops) % R, owners]
    carried = np.maximum.accumulate(carried[::-1], axis=0)[::-1]
    carried[0] = 0  # at home nothing has travelled
    first = carried.cumsum(2)
    first -= carried
    first[0] = group.piece_row

    members = np.arange(who.start, who.stop)[:, None]
    owner = (members - np.arange(R)) % R  # (n, hop): whose shard is here after that many hops
    rows = carried.sum(2).tolist()
    landed = _cut_runs(group.piece_row[owner[:, 1:]], carried[np.arange(1, R), owner[:, 1:]])
    sent = _cut_runs(first[np.arange(R - 1), owner[:, :-1]], carried[np.arange(1, R), owner[:, :-1]])
    reach = see(group, who, everyone, is_causal=is_causal)
    tables = reach.tables(first[(members - owners) % R, owners])

    parts = []
    for i, member in enumerate(range(who.start, who.stop)):
        before, after = (member - 1) % R, (member + 1) % R
        part = _Part(group, member, num_pipelines)
        for hop in range(R):  # hop 0 is the own shard; what came by a hop is passed on by the next
            c, coming = (member - hop) % R, (member - hop - 1) % R
            has_come = hop == 0 or rows[hop][c] > 0
            if hop and has_come:
                part.wait_for(before, hop)
            # The next hop is under way before this one is attended to, so that both overlap.
            if hop + 1 < R and rows[hop + 1][coming]:
                part.receive(before, 1 + hop % 2, rows[hop + 1][coming], hop=hop + 1)
            if hop + 1 < R and rows[hop + 1][c]:
                part.send(after, _buffer(hop), sent[i][hop], hop + 1)
            table = tables[i * R + c]
            if hop == 0:
                part.attend(0, table, [(member, whole(group.rows[member]))])
            elif has_come and len(table):  # a shard may only pass through
                part.attend(_buffer(hop), table, [(c, landed[i][hop - 1])])
        parts.append(part.finish())
    return parts


Build = Callable[[GroupLayout, slice, bool, int, Heads], list[PipelinePlan]]

METHODS: dict[str, Build] = {"ring": ring, "direct": direct, "all_gather": all_gather, "ulysses": ulysses}
"""A method: the parts of ``who`` (a slice of the group's members) in a strategy of so many pipelines."""

AUTO = "direct"


def _find(method: str) -> tuple[str, Build]:
    method = AUTO if method == "auto" else method
    if method not in METHODS:
        names = ", ".join(("auto", *METHODS))
        raise StrategyError(f"there is no method {method!r}", op="plan", where=caller(), fix=f"use one of {names}")
    return method, METHODS[method]


# What the methods share


def _exchange(group: GroupLayout, who: slice, is_causal: bool) -> tuple[Any, Any, list[SegmentTable], Any, Any]:
    """What goes straight from owners to receivers.

    Returns:
        For each of ``who`` and each owner the number of rows that it takes (0 of itself); for each receiver and each of
        ``who`` the number that is given; the tables, with key rows counted from the pair's first; and the runs of the
        owners' shards, indexed as the first two.
    """
    R, n = len(group.members), who.stop - who.start
    everyone, rows, members = slice(0, R), np.arange(n), np.arange(who.start, who.stop)
    reach = see(group, who, everyone, is_causal=is_causal)
    taken = reach.extents()
    taken[rows, members] = 0
    first = taken.cumsum(2)
    first -= taken
    first[rows, members] = group.piece_row[who]
    tables = reach.tables(first)
    if n == R:  # who builds all parts has every receiver's extents already
        sizes, landed = taken.sum(2).tolist(), _cut_runs(group.piece_row, taken)
        return sizes, sizes, tables, landed, landed
    given = extents(group, everyone, who, is_causal=is_causal).transpose(1, 0, 2)
    given[rows, members] = 0
    both = np.concatenate([taken, given])
    start = np.concatenate([group.piece_row[None].repeat(n, axis=0), group.piece_row[who, None].repeat(R, axis=1)])
    sizes, runs = both.sum(2).tolist(), _cut_runs(start, both)
    # Given rows are indexed by receiver first, as those of who builds all parts.
    swap = [list(zip(*half, strict=True)) for half in (sizes[n:], runs[n:])]
    return sizes[:n], swap[0], tables, runs[:n], swap[1]


def _cut_runs(start: IntArray, length: IntArray) -> list[list[Runs]]:
    """Runs of ``(n, m, B)`` starts and lengths, one set for each of ``(n, m)``; runs that touch are joined.

    Starts of ``(m, B)`` hold for every n.
    """
    n, m, B = length.shape
    cell = (length.reshape(-1) != 0).nonzero()[0]
    starts, lengths = start.reshape(-1).take(cell % start.size), length.reshape(-1).take(cell)
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


def _buffer(hop: int) -> int:
    """Which of the ring's buffers a hop lands in; the own shard is buffer 0."""
    return 2 - hop % 2 if hop else 0


def _join(tables: list[SegmentTable], offsets: list[int]) -> SegmentTable:
    """Tables over parts of one buffer as one, ordered by query."""
    query = np.concatenate([table.query for table in tables])
    k_start = np.concatenate([table.k_start + offset for table, offset in zip(tables, offsets, strict=True)])
    k_len = np.concatenate([table.k_len for table in tables])
    diagonal = np.concatenate([table.diagonal for table in tables])
    order = query.argsort(kind="stable")
    return SegmentTable(query.take(order), k_start.take(order), k_len.take(order), diagonal.take(order))


class _Part:
    """Collects one member's instructions; knows transfers by their ends, and waits before a buffer is reused."""

    def __init__(self, group: GroupLayout, member: int, num_pipelines: int) -> None:
        self.group, self.member, self.num_pipelines = group, member, num_pipelines
        self.pipeline = group.members[member]
        self.buffers = [group.rows[member]]
        self.instructions: list[Instruction] = []
        self.sending: dict[int, list[int]] = {}  # buffer: transfers that may still read it

    def _transfer(self, hop: int, source: int, target: int) -> int:
        return transfer_number(hop, source, target, self.num_pipelines)

    def receive(self, owner: int, buffer: int, rows: int, offset: int = 0, hop: int = 0) -> None:
        self.instructions += [Wait(transfer) for transfer in self.sending.pop(buffer, ())]
        peer = self.group.members[owner]
        self.instructions.append(Receive(self._transfer(hop, peer, self.pipeline), peer, buffer, offset, rows))
        self.buffers += [0] * (buffer + 1 - len(self.buffers))
        self.buffers[buffer] = max(self.buffers[buffer], offset + rows)

    def send(self, target: int, buffer: int, runs: Runs, hop: int = 0) -> None:
        peer = self.group.members[target]
        transfer = self._transfer(hop, self.pipeline, peer)
        self.instructions.append(Send(transfer, peer, buffer, runs))
        self.sending.setdefault(buffer, []).append(transfer)

    def send_all(self, sends: list[tuple[int, Runs]]) -> None:
        for target, runs in sends:
            self.send(target, 0, runs)

    def wait_for(self, owner: int, hop: int = 0) -> None:
        self.instructions.append(Wait(self._transfer(hop, self.group.members[owner], self.pipeline)))

    def attend(self, buffer: int, table: SegmentTable, held: list[tuple[int, Runs]]) -> None:
        sources = tuple([Source(self.group.members[owner], runs) for owner, runs in held])
        self.instructions.append(Attend(buffer, table, sources))

    def finish(self) -> PipelinePlan:
        """The part, after waiting for all that is still being sent."""
        self.instructions += [Wait(transfer) for transfers in self.sending.values() for transfer in transfers]
        spans = self.group.query_spans(self.member)
        return PipelinePlan(self.pipeline, self.buffers[0], spans, tuple(self.buffers), tuple(self.instructions))
