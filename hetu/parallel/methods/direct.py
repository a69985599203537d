"""``direct``: each owner sends what is needed straight to who needs it.

It can't deadlock (see :mod:`hetu.parallel.methods.method`): all that a member sends and receives is one batch, its
first instructions. In the common order all members' batches come first, before which nothing is under way.
"""

from __future__ import annotations

from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.methods.exchange import exchange
from hetu.parallel.methods.method import AttnSpec
from hetu.parallel.methods.part import PartBuilder
from hetu.parallel.methods.peers import around, whole
from hetu.parallel.plan.parts import PipelinePlan


def direct(group: GroupLayout, who: slice, spec: AttnSpec) -> list[PipelinePlan]:
    """Each owner sends what is needed straight to who needs it, all at once; a buffer a peer, nearest peer first."""
    moved = exchange(group, who, spec.mask)
    taken, given, tables = moved.taken, moved.given, moved.tables
    R, parts = len(group.members), []
    for i, member in enumerate(range(who.start, who.stop)):
        part = PartBuilder(group, member, spec, moved.spans[i])
        sources = [c for c in around(R, member, -1) if taken[i][c]]
        for buffer, c in enumerate(sources, 1):
            part.receive(c, buffer, taken[i][c])
        part.send_all([(r, moved.sent[r][i]) for r in around(R, member, 1) if given[r][i]])
        part.attend(0, tables[i * R + member], [(member, whole(group.rows[member]))])
        for buffer, c in enumerate(sources, 1):
            part.wait_for(c)
            part.attend(buffer, tables[i * R + c], [(c, moved.landed[i][c])])
        parts.append(part.finish())
    return parts
