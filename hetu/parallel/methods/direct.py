"""``direct``: each owner sends what is needed straight to who needs it.

It can't deadlock (see :mod:`hetu.parallel.methods.method`): all that a member sends and receives is one batch, its
first instructions. In the common order all members' batches come first, before which nothing is under way.

The backward is turned round with nothing but a member's own part (:mod:`hetu.parallel.methods.backward` has the idea of
rounds). All keys and values are posted at the start, so a round may be told by the distance around the group: in round
d a member attends to what the owner d places before it sent, if that did, sends the gradients home, and gets those that
the member d places behind it computed of its own rows. These are the rows that it sent, for no key is sent that nobody
uses. Members have nothing to do in rounds of which there is nothing to attend to and nothing to get.
"""

from __future__ import annotations

from collections.abc import Sequence

from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.methods.backward_part import Event, When, build_part
from hetu.parallel.methods.exchange import exchange
from hetu.parallel.methods.method import AttnSpec
from hetu.parallel.methods.part import PartBuilder
from hetu.parallel.methods.peers import around, transfer_number, whole
from hetu.parallel.methods.returns import Return
from hetu.parallel.plan.instructions import Attend, Runs, Send
from hetu.parallel.plan.parts import PipelinePlan, PlanData


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
        part.attend(0, tables[i][member], [(member, whole(group.rows[member]))])
        for buffer, c in enumerate(sources, 1):
            part.wait_for(c)
            part.attend(buffer, tables[i][c], [(c, moved.landed[i][c])])
        parts.append(part.finish())
    return parts


def build_backward(plan: PlanData, pipelines: Sequence[int]) -> list[PipelinePlan]:
    """See :attr:`hetu.parallel.methods.method.Method.backward`; for plans of this method."""
    return [build_part(plan, r, _events(plan, r)) for r in pipelines]


def _events(plan: PlanData, pipeline: int) -> dict[When, Event]:
    """What a pipeline does in each round in which it does something."""
    group, member = plan.layout.place(pipeline)
    members = {r: number for number, r in enumerate(group.members)}
    size, num_pipelines = len(members), plan.layout.num_pipelines
    events: dict[When, Event] = {}
    steps: list[int] = []
    last = 0  # the round of the last attend

    def event(number: int) -> Event:
        found = events.get((number, 0))
        if found is None:
            found = events[number, 0] = Event()
        return found

    def returned(source: int, owner: int, distance: int, runs: Runs, home: Runs, buffer: int) -> Return:
        number = transfer_number(_RETURNS, source, owner, num_pipelines)
        return Return(number, source, owner, distance, buffer, runs, home, round=distance, before=1)

    for step, item in enumerate(plan.pipelines[pipeline].instructions):
        steps.append(step)
        if isinstance(item, Send):
            distance = (members[item.peer] - member) % size
            ret = returned(item.peer, pipeline, distance, item.runs, item.runs, item.buffer)
            event(ret.round).posts.append(ret)
        elif isinstance(item, Attend):
            if item.buffer:
                (source,) = item.sources
                distance = (member - members[source.owner]) % size
                ret = returned(pipeline, source.owner, distance, whole(item.rows), source.runs, item.buffer)
                last = ret.round
                event(last).sends.append(ret)
            event(last).steps += steps
            steps = []
    if steps:  # waits for what was sent
        event(last + 1).steps += steps
    return events


_RETURNS = 1
"""The step of transfers home, as :func:`transfer_number` counts steps; that of keys and values is 0."""
