"""``all_gather``: what is needed of all peers lands in one buffer.

It can't deadlock, for the same reason as ``direct``: a member posts all that travels at once, before all else.
"""

from __future__ import annotations

import numpy as np

from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.methods.exchange import exchange
from hetu.parallel.methods.method import AttnSpec
from hetu.parallel.methods.part import PartBuilder
from hetu.parallel.methods.peers import around, whole
from hetu.parallel.methods.tables import joined
from hetu.parallel.plan.parts import PipelinePlan


def all_gather(group: GroupLayout, who: slice, spec: AttnSpec) -> list[PipelinePlan]:
    """What is needed of all peers lands in one buffer, and one step attends to it; the own shard is never copied."""
    moved = exchange(group, who, spec.mask)
    taken, given, tables = moved.taken, moved.given, moved.tables
    R, parts = len(group.members), []
    for i, member in enumerate(range(who.start, who.stop)):
        part = PartBuilder(group, member, spec, moved.spans[i])
        sources = [c for c in range(R) if taken[i][c]]
        offsets = dict(zip(sources, np.cumsum([0] + [taken[i][c] for c in sources]).tolist(), strict=False))
        for c in sources:
            part.receive(c, 1, taken[i][c], offsets[c])
        part.send_all([(r, moved.sent[r][i]) for r in around(R, member, 1) if given[r][i]])
        part.attend(0, tables[i][member], [(member, whole(group.rows[member]))])
        for c in sources:
            part.wait_for(c)
        if sources:
            table = joined([tables[i][c] for c in sources], [offsets[c] for c in sources], part.spans)
            part.attend(1, table, [(c, moved.landed[i][c]) for c in sources])
        parts.append(part.finish())
    return parts
