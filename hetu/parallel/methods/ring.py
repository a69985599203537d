"""``ring``: shards hop from neighbour to neighbour.

It can't deadlock (see :mod:`hetu.parallel.methods.method`): the common order goes hop by hop. At each hop first all
members wait for what came by it, then all post the batches of the next hop, then all attend. Both ends of a hop are in
these batches, or in none, for both members know how many rows make it. So when a hop begins, both ends of all hops
before are posted.
"""

from __future__ import annotations

import numpy as np

from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.methods.method import AttnSpec
from hetu.parallel.methods.part import PartBuilder, cut_runs
from hetu.parallel.methods.peers import whole
from hetu.parallel.methods.tables import extents, held_by, see
from hetu.parallel.plan.parts import PipelinePlan


def ring(group: GroupLayout, who: slice, spec: AttnSpec) -> list[PipelinePlan]:
    """Shards hop from neighbour to neighbour, shrinking to what somebody further along still needs.

    Two buffers take turns: while one is attended to and passed on, the other fills. ``carried[h, c]`` are the rows of
    member c's shard that make hop h, from member c + h - 1 to member c + h, by cells as :class:`Reach` has them;
    ``first[h, c]`` says where each cell begins among them.
    """
    R = len(group.members)
    everyone = slice(0, R)
    hops, owners = np.arange(R)[:, None], np.arange(R)
    held = held_by(group, everyone, spec.mask)
    use, cells = extents(group, everyone, everyone, spec.mask, held)
    carried = use[(owners + hops) % R, owners]
    carried = np.maximum.accumulate(carried[::-1], axis=0)[::-1]
    carried[0] = 0  # at home nothing has travelled
    first = carried.cumsum(2, dtype=np.int64)
    first -= carried
    first[0] = cells

    members = np.arange(who.start, who.stop)[:, None]
    owner = (members - np.arange(R)) % R  # (n, hop): whose shard is here after that many hops
    rows = carried.sum(2).tolist()
    landed = cut_runs(cells[owner[:, 1:]], carried[np.arange(1, R), owner[:, 1:]])
    sent = cut_runs(first[np.arange(R - 1), owner[:, :-1]], carried[np.arange(1, R), owner[:, :-1]])
    reach = see(group, who, everyone, spec.mask, held)
    tables = reach.tables(first[(members - owners) % R, owners], cells)

    parts = []
    for i, member in enumerate(range(who.start, who.stop)):
        before, after = (member - 1) % R, (member + 1) % R
        part = PartBuilder(group, member, spec, reach.spans[i])
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


def _buffer(hop: int) -> int:
    """Which of the ring's buffers a hop lands in; the own shard is buffer 0."""
    return 2 - hop % 2 if hop else 0
