"""Heads exchanged for tokens: each member of a group attends for some heads, over all tokens of the group.

Query heads are dealt in order, as evenly as possible, remainders to the first members; with more members than heads
some have none. A member's key heads are those that its query heads use, so where there are fewer key heads than members
one goes to several. A member sends each other one its own rows of that one's heads, attends for its heads, and sends
the results home; nothing else travels. Source: Jacobs et al., "DeepSpeed Ulysses", 2023.

Rows are put into sequence order when they land, so that a document is one segment. As they come, member after member,
it would be as many spans as it has runs on all members, each against all of them: under ``stripe`` a diagonal through
every pair of spans, and under all splits tiles that are cut off at the ends of short pieces, a work list that grows
with the square of the group, and a kernel that looks for the next segment. To place a row costs one copy of it, which
is nothing next to a row's attention to thousands of keys; and there is none where a member's rows are one stretch of
the sequence, as under ``normal``: they land where they belong.

Kernels want query heads that share key heads alike. So a range that begins or ends inside the query heads of a key head
is attended to in up to three steps, for the heads before, between and after; they share no key head.

In the backward lse and delta come along, and gradients travel home. A query has one attend, so its gradients are
finished, and so are those of keys where no key head has gone to several members. Where one has, gradients of keys and
values come home in float32, and their owner adds them up: its own first, then the nearest member's.

Nothing can deadlock: all of a member's transfers of one direction are posted together, and what it waits for or
computes on the way to the others waits only for what everybody posts before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import QuerySpans, SegmentTable
from hetu.parallel.mask.varlen import varlen_tables
from hetu.parallel.methods.method import AttnSpec
from hetu.parallel.methods.peers import around, transfer_number, whole
from hetu.parallel.methods.tables import held_by, see
from hetu.parallel.plan.buffers import Buffer, shard
from hetu.parallel.plan.heads import HeadRange, Heads, Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Instruction, Receive, Runs, Send, Source, Wait
from hetu.parallel.plan.parts import PipelinePlan, PlanData

Payloads = tuple[Payload, ...]

GATHERED = 1
"""The buffer of all tokens of the group, for a member's heads."""


def ulysses(group: GroupLayout, who: slice, spec: AttnSpec) -> list[PipelinePlan]:
    """The parts of some members; see the module."""
    if len(group.members) == 1:
        return [_alone(group, spec)]
    ranges = deal(spec.heads, len(group.members))
    places = [sequence_rows(group, member) for member in range(len(group.members))]
    out, home = (Payload.QKV,), (Payload.OUT, Payload.LSE, *([Payload.P] if spec.heads.columns else []))
    spans, table = _sequence_tables(group, spec.mask)
    sources = tuple(
        [
            Source(pipeline, whole(rows), place)
            for pipeline, rows, place in zip(group.members, group.rows, places, strict=True)
            if rows
        ]
    )
    parts = []
    for member in range(who.start, who.stop):
        own = ranges[member]
        attends = [Attend(GATHERED, table, sources, some) for some in alike(spec.heads, own) if group.tokens]
        instructions = _exchange(group, member, ranges, places, attends, out, home, spec.num_pipelines)
        buffers = shard(group.rows[member], spec.heads), Buffer(group.tokens, own, (*out, *home))
        parts.append(PipelinePlan(group.members[member], spans, buffers, tuple(instructions), queries=GATHERED))
    return parts


def build_backward(plan: PlanData, pipelines: Sequence[int]) -> list[PipelinePlan]:
    """See :attr:`hetu.parallel.methods.method.Method.backward`; for plans of this method."""
    parts = []
    for part in map(plan.part, pipelines):
        group, member = plan.layout.place(part.pipeline)
        ranges = deal(plan.heads, len(group.members))
        if len(ranges) > 1:
            parts.append(_turned(part, group, member, ranges, plan))
        else:  # nothing travels, and the gradients of its step are written where they belong
            parts.append(replace(part, buffers=(shard(part.rows, plan.heads, is_backward=True),)))
    return parts


def _turned(
    part: PipelinePlan, group: GroupLayout, member: int, ranges: list[HeadRange], plan: PlanData
) -> PipelinePlan:
    """The backward of a member's part."""
    having = [own for own in ranges if own.num_q]
    is_shared = any(a.first_kv + a.num_kv > b.first_kv for a, b in pairwise(having))
    home = (Payload.Q_GRADS, Payload.KV_GRADS) if is_shared else (Payload.QKV_GRADS,)
    places = [sequence_rows(group, c) for c in range(len(ranges))]
    attends = [item for item in part.instructions if isinstance(item, Attend)]
    out = (Payload.QKV_DOUT, Payload.LSE_DELTA)
    instructions = _exchange(group, member, ranges, places, attends, out, home, len(plan.pipelines))
    buffers = [shard(part.rows, plan.heads, is_backward=True), replace(part.buffers[GATHERED], payloads=(*out, *home))]
    added = [item for item in instructions if isinstance(item, Accumulate)]  # each from a buffer of its own
    buffers += [Buffer(part.rows, item.heads, (Payload.KV_GRADS,)) for item in added]
    return replace(part, buffers=tuple(buffers), instructions=tuple(instructions))


# Heads


def deal(heads: Heads, members: int) -> list[HeadRange]:
    """Which heads each member attends for.

    Example:
        >>> [str(own) for own in deal(Heads(num_q=5, num_kv=5, head_dim=8, itemsize=2), 3)]
        ['heads 0 to 1', 'heads 2 to 3', 'head 4']
    """
    each, more = divmod(heads.num_q, members)
    stops = np.cumsum([0] + [each + (member < more) for member in range(members)]).tolist()
    return [heads.range(start, stop) for start, stop in pairwise(stops)]


def alike(heads: Heads, own: HeadRange) -> list[HeadRange]:
    """Cuts a range so that in each part all key heads have as many query heads.

    Example:
        >>> heads = Heads(num_q=12, num_kv=3, head_dim=8, itemsize=2)
        >>> [str(some) for some in alike(heads, heads.range(3, 10))]
        ['head 3', 'heads 4 to 7', 'heads 8 to 9']
    """
    group, start, stop = heads.num_q // heads.num_kv, own.first_q, own.first_q + own.num_q
    first = min(-(-start // group) * group, stop)
    last = max(stop // group * group, first)
    return [heads.range(a, b) for a, b in pairwise((start, first, last, stop)) if a < b]


# Tokens


def sequence_rows(group: GroupLayout, member: int) -> Runs:
    """Where a member's rows stand among all rows of its group, which follow each other document after document."""
    spans, own = group.spans, slice(group.bounds[member], group.bounds[member + 1])
    start, length = group.offsets.take(spans.document[own]) + spans.start[own], spans.length[own]
    step = np.where(length > 1, spans.step[own], 1)
    touches = (start[1:] == (start + length)[:-1]) & (step[1:] == 1) & (step[:-1] == 1)
    first = np.flatnonzero(np.append(True, ~touches)) if len(start) else start
    length = np.add.reduceat(length, first) if len(first) else length
    step = step.take(first)
    return Runs(start.take(first), length, step if (step > 1).any() else None)


def _sequence_tables(group: GroupLayout, mask: Mask) -> tuple[QuerySpans, SegmentTable]:
    """All tokens of a group as queries and as keys: those of plain variable-length attention."""
    cu_seqlens = np.append(group.offsets, group.tokens)
    return varlen_tables(cu_seqlens, cu_seqlens, group.tokens, mask, packed_lse=True)


def _alone(group: GroupLayout, spec: AttnSpec) -> PipelinePlan:
    """The only member attends for all heads, where its rows lie."""
    me, rows = slice(0, 1), group.rows[0]
    reach = see(group, me, me, spec.mask, held_by(group, me, spec.mask))
    (table,) = reach.tables(reach.rows[None], reach.rows)
    pipeline = group.members[0]
    attend = Attend(0, table, (Source(pipeline, whole(rows)),), spec.heads.all)
    return PipelinePlan(pipeline, reach.spans[0], (shard(rows, spec.heads),), (attend,))


# Instructions


def _exchange(
    group: GroupLayout,
    member: int,
    ranges: list[HeadRange],
    places: list[Runs],
    attends: list[Attend],
    out: Payloads,
    home: Payloads,
    num_pipelines: int,
) -> list[Instruction]:
    """What a member does, forward and backward.

    Args:
        group: Its group.
        member: Which one it is.
        ranges: Everybody's heads.
        places: Everybody's rows in sequence order.
        attends: What it computes.
        out: What of a token travels to who attends for it.
        home: What is computed, and travels back.
        num_pipelines: Of the strategy.
    """
    link = _Link(group, member, (*out, *home), num_pipelines)
    own, R, rows = ranges[member], len(ranges), whole(group.rows[member])
    # Whose rows it attends for, and who attends for its own.
    owners = [c for c in around(R, member, -1) if own.num_q and group.rows[c]]
    helpers = [c for c in around(R, member, 1) if ranges[c].num_q and rows.rows]
    is_both = bool(own.num_q and rows.rows)

    items: list[Instruction] = []
    items += [link.receive_rows(c, payload, own, places[c]) for c in owners for payload in out]
    items += [Send(link.to(c, payload), link.peer(c), 0, rows, payload, ranges[c]) for c in helpers for payload in out]
    items += [Copy(payload, own, 0, rows, GATHERED, places[member]) for payload in out if is_both]
    items += [Wait(link.come(c, payload)) for c in owners for payload in out]
    items += attends
    # What was sent is waited for no sooner: a peer that is late holds up nobody who has all that it needs.
    items += [Wait(link.to(c, payload)) for c in helpers for payload in out]
    # Copied first, since nobody may compute while what it sent home can't be received yet.
    items += [Copy(payload, own, GATHERED, places[member], 0, rows) for payload in home if is_both]
    items += [
        Send(link.to(c, payload), link.peer(c), GATHERED, places[c], payload, own) for c in owners for payload in home
    ]
    for landing, c in enumerate(helpers, GATHERED + 1):
        items += [link.receive_results(c, payload, ranges[c], rows, landing) for payload in home]
    for landing, c in enumerate(helpers, GATHERED + 1):
        for payload in home:
            items.append(Wait(link.come(c, payload)))
            if payload is Payload.KV_GRADS:
                items.append(Accumulate(landing, 0, rows, ranges[c]))
    items += [Wait(link.to(c, payload)) for c in owners for payload in home]
    return items


class _Link:
    """A member's transfers, by the other member and by payload."""

    def __init__(self, group: GroupLayout, member: int, payloads: Payloads, num_pipelines: int) -> None:
        self.members, self.me, self.num_pipelines = group.members, group.members[member], num_pipelines
        self.steps = {payload: step for step, payload in enumerate(payloads)}

    def peer(self, c: int) -> int:
        return self.members[c]

    def to(self, c: int, payload: Payload) -> int:
        return transfer_number(self.steps[payload], self.me, self.peer(c), self.num_pipelines)

    def come(self, c: int, payload: Payload) -> int:
        return transfer_number(self.steps[payload], self.peer(c), self.me, self.num_pipelines)

    def receive_rows(self, c: int, payload: Payload, own: HeadRange, place: Runs) -> Receive:
        """What comes to be attended to; where it is one stretch it lands where it belongs."""
        transfer, peer = self.come(c, payload), self.peer(c)
        if len(place.start) == 1 and place.step is None:
            return Receive(transfer, peer, GATHERED, int(place.start[0]), place.rows, payload, own)
        return Receive(transfer, peer, GATHERED, 0, place.rows, payload, own, place)

    def receive_results(self, c: int, payload: Payload, theirs: HeadRange, rows: Runs, landing: int) -> Receive:
        """What comes home, of some of the heads that the own rows have."""
        transfer, peer = self.come(c, payload), self.peer(c)
        if payload is Payload.KV_GRADS:
            return Receive(transfer, peer, landing, 0, rows.rows, payload, theirs)
        return Receive(transfer, peer, 0, 0, rows.rows, payload, theirs, rows)
