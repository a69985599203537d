"""Rows of a whole context group, fed on each of its ranks, that would be taken for a batch of shards.

A rank feeds its own shard, and a batch has any number of sequences: where lengths happen to divide, the whole group's
rows are as many as those of a shard of a larger batch. That all ranks of a group feed the very same rows tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hetu.arguments import is_torch
from hetu.backends.comm.distributed import DistributedWorld
from hetu.errors import StrategyError, caller
from hetu.parallel.layout.group import GroupLayout
from hetu.planning.arrays import host_array
from hetu.planning.feeds import Feeds
from hetu.planning.planner import Prepared
from hetu.runtime.request import RunRequest
from hetu.shards import Shards

Told = Mapping[str, str]
"""By the name of a placeholder, a digest of what this rank feeds it."""


def may_be_whole(prepared: Sequence[Prepared]) -> bool:
    """Whether any shard of some micro-batches has as many rows as its whole group: the same on all ranks."""
    return any(_may_be_whole(group) for item in prepared for group in _groups(item))


def tell_rows(
    world: DistributedWorld, request: RunRequest, prepared: Sequence[Prepared], digest: Callable[[Feeds], str]
) -> list[Told]:
    """What this rank feeds where that may be a whole group's rows, of each micro-batch.

    Args:
        world: The ranks.
        request: What was asked for.
        prepared: Its micro-batches.
        digest: Gives a digest of arrays.
    """
    told: list[Told] = []
    for item, (feeds, _) in zip(prepared, request.batches, strict=True):
        group = _group(item, world.rank)
        own_rows = request.graph.planner.pipelines(request.subgraph, item.strategy).own_rows
        if group is None or not _may_be_whole(group):
            told.append({})
            continue
        fed = {tensor: feeds[tensor] for tensor in own_rows if tensor in feeds}
        plain = {tensor: value for tensor, value in fed.items() if not isinstance(value, (Shards, Mapping))}
        told.append({tensor.name: digest({tensor: value}) for tensor, value in plain.items() if _tells(value)})
    return told


def refuse_whole_rows(told: Sequence[Sequence[Told]], prepared: Sequence[Prepared]) -> None:
    """Refuses rows that are the same on all ranks of a context group.

    Args:
        told: What :func:`tell_rows` gave on each rank.
        prepared: The micro-batches.

    Raises:
        StrategyError: Names the placeholder and the ranks.
    """
    for number, item in enumerate(prepared):
        for group in _groups(item):
            rows, ranks = [told[r][number] for r in group.members if r < len(told)], ", ".join(map(str, group.members))
            for name, first in rows[0].items() if len(rows) > 1 else ():
                if all(row.get(name) == first for row in rows):
                    raise StrategyError(
                        f"{name} was fed the same rows on ranks {ranks}, but each pipeline needs its own rows",
                        op="run",
                        where=caller(),
                        fix="feed layout.scatter(x)[rank] with layout = g.layout(...) of the same strategy; shards "
                        "that are equal are fed as hetu.Shards of all pipelines",
                    )


def _groups(prepared: Prepared) -> Sequence[GroupLayout]:
    """The context groups of a run's attention."""
    first = next(prepared.attention_plans(), None)
    return () if first is None else first.layout.groups


def _group(prepared: Prepared, rank: int) -> GroupLayout | None:
    return next((group for group in _groups(prepared) if rank in group.members), None)


def _may_be_whole(group: GroupLayout) -> bool:
    """Whether the rows of each member could be those of all members, of fewer sequences."""
    if len(group.members) < 2 or group.is_packed:
        return False
    total = int(group.seq_lens.sum())
    return total > 0 and len(set(group.rows)) == 1 and group.rows[0] > 0 and group.rows[0] % total == 0


def _tells(value: Any) -> bool:
    """Whether an array has rows that differ: equal ones are the same whoever feeds which of them."""
    rows = value if is_torch(value) else host_array(value)
    return not bool((rows == rows[:1]).all())
