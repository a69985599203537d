"""Plans that tests build, and ways to damage them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from support.layout_cases import HEADS

import hetu
from hetu.parallel import METHODS, Layout, Mask, Topology
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.methods import hold_back
from hetu.parallel.methods.exchange import exchange
from hetu.parallel.methods.method import AttnSpec
from hetu.parallel.methods.part import PartBuilder
from hetu.parallel.methods.peers import whole
from hetu.parallel.plan.buffers import Lifetime, lifetimes
from hetu.parallel.plan.heads import Payload
from hetu.parallel.plan.instructions import Attend, Instruction, Receive, Runs, Send, Wait
from hetu.parallel.plan.own_gradients import own_gradients
from hetu.parallel.plan.parts import PipelinePlan

KV_METHODS = tuple(method for method in METHODS if method != "ulysses")
"""Those that move keys and values."""


def broadcast(layout: Layout, mask: Mask) -> AttnPlan:
    """A method of its own: members send their shards to all others one after the other, into two buffers in turn.

    Members attend to their own shard late, and between two pipelines gradients go before keys and values.
    """
    return in_orders(layout, mask, lambda member, count: list(range(count)), send_first=False)


def in_orders(
    layout: Layout,
    mask: Mask,
    order: Callable[[int, int], list[int]],
    send_first: bool = True,
    num_buffers: int = 2,
) -> AttnPlan:
    """Members attend to each other's shards in orders of their own, ``order(member, count)``, by buffers in turn.

    What is needed is sent at once, or just before the own shard is attended to; it is received one step ahead, or with
    one buffer when it is needed.
    """
    spec, parts = AttnSpec(mask, HEADS, Topology.one_host(layout.num_pipelines)), dict[int, PipelinePlan]()
    for group in layout.groups:
        R = len(group.members)
        moved = exchange(group, slice(0, R), mask)
        taken, given, tables = moved.taken, moved.given, moved.tables
        for i in range(R):
            part = PartBuilder(group, i, spec, moved.spans[i])
            needed = [c for c in order(i, R) if c == i or taken[i][c]]
            buffers = dict(zip([c for c in needed if c != i], itertools.cycle(range(1, num_buffers + 1)), strict=False))
            sends = [(r, moved.sent[r][i]) for r in range(R) if r != i and given[r][i]]
            if send_first:
                part.send_all(sends)
            for c, following in zip([None, *needed], [*needed, None], strict=True):
                for owner in [c] if num_buffers == 1 else [following]:
                    if owner in buffers:
                        part.receive(owner, buffers[owner], taken[i][owner])
                if c == i:
                    part.send_all([] if send_first else sends)
                    part.attend(0, tables[i][i], [(i, whole(group.rows[i]))])
                elif c is not None:
                    part.wait_for(c)
                    part.attend(buffers[c], tables[i][c], [(c, moved.landed[i][c])])
            parts[part.pipeline] = part.finish()
    # The backward of "ring" turns whatever moves keys and values round.
    return AttnPlan(layout, "ring", mask, HEADS, tuple(parts[r] for r in range(layout.num_pipelines)))


def by_halves(plan: AttnPlan) -> AttnPlan:
    """A forward plan in which keys and values travel twice, of half of the heads each time, into the same rows.

    The backward of "ring" turns it round, too.
    """
    q, heads = plan.heads.num_q, plan.heads
    halves = heads.range(0, q // 2), heads.range(q // 2, q)
    parts = []
    for part in plan.pipelines:
        items: list[Instruction] = []
        for item in part.instructions:
            for half, some in enumerate(halves):
                if isinstance(item, Attend):
                    items += [item] * (half == 0)
                    continue
                number = 2 * item.transfer + half
                if isinstance(item, Send):
                    items.append(dataclasses.replace(item, transfer=number, heads=some))
                elif isinstance(item, Receive):
                    rows = Runs(np.array([item.offset]), np.array([item.rows]))
                    items.append(dataclasses.replace(item, transfer=number, heads=some, offset=0, runs=rows))
                else:
                    items.append(Wait(number))
        parts.append(dataclasses.replace(part, instructions=tuple(items)))
    return dataclasses.replace(plan, method="ring", pipelines=tuple(parts), memo={})


def with_instructions(plan: AttnPlan, r: int, instructions: list[Instruction]) -> AttnPlan:
    """The plan with other instructions on pipeline r."""
    part = dataclasses.replace(plan.pipelines[r], instructions=tuple(instructions))
    return dataclasses.replace(plan, pipelines=(*plan.pipelines[:r], part, *plan.pipelines[r + 1 :]))


def find(plan: AttnPlan, kind: type, r: int, number: int = 0, grads: bool | None = None) -> tuple[list[Any], int]:
    """A pipeline's instructions, and where the number-th of a kind stands: of transfers of gradients, if asked for."""
    instructions = list(plan.pipelines[r].instructions)
    ends = {item.transfer: item.grads for item in instructions if isinstance(item, Send | Receive)}
    places = [
        i
        for i, item in enumerate(instructions)
        if isinstance(item, kind) and (grads is None or ends.get(getattr(item, "transfer", -1)) is grads)
    ]
    return instructions, places[number]


@contextmanager
def holding_back(always: bool) -> Iterator[None]:
    """Backward plans that are built meanwhile hold back own rows wherever they may, however few; or never do."""
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("MIN_FLOPS", "MIN_BYTES"):
            patch.setattr(hold_back, limit, 0.0 if always else math.inf)
        yield


def attends(plan: AttnPlan, r: int) -> list[Attend]:
    """A pipeline's attends."""
    return [item for item in plan.pipelines[r].instructions if isinstance(item, Attend)]


def foreign_buffers(part: PipelinePlan) -> list[int]:
    """Rows of the buffers of others' keys."""
    return [buffer.rows for buffer in part.buffers[1:] if buffer.holds_keys]


def landing_buffers(part: PipelinePlan) -> list[int]:
    """Rows of the buffers in which gradients land that others computed."""
    return [buffer.rows for buffer in part.buffers if not buffer.holds_keys]


def rows_aside(part: PipelinePlan) -> int:
    """Most rows at a time whose gradients are computed aside: to be sent home, or added to those of own rows."""
    lives, own, held, most = lifetimes(part), own_gradients(part).aside, 0, 0

    def rows(at: dict[int, list[Lifetime]], number: int) -> int:
        found = [life for life in at.get(number, ()) if part.buffers[life.buffer].holds_keys]
        return sum(life.rows for life in found if life.payload is Payload.KV_GRADS)

    for number in range(len(part.instructions)):
        held += rows(lives.made, number)
        most = max(most, held + part.rows * (number in own))
        held -= rows(lives.freed, number)
    return most


def refused(plan: AttnPlan, *pieces: str) -> None:
    """That the verifier refuses a plan, and that its message has these pieces."""
    with pytest.raises(hetu.PlanError) as caught:
        plan.verify()
    for piece in pieces:
        assert piece in str(caught.value), (piece, str(caught.value))
