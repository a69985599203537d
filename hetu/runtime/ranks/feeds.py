"""The feeds of a run over several ranks: each tells what it feeds its own pipelines, and all plan for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hetu.backends.comm.distributed import DistributedWorld
from hetu.backends.comm.wire import pack_array, unpack_array
from hetu.errors import CommunicationError, StrategyError, caller
from hetu.graph import Tensor
from hetu.planning.feeds import Feeds, FeedSet, Symbols, host_values, read_own_feeds, shard_count
from hetu.planning.indices import check_indices
from hetu.planning.pipelines import UNKNOWN, Pipelines
from hetu.planning.subgraph import Subgraph
from hetu.runtime.request import RunRequest
from hetu.symbols import as_symbol


def is_chosen(strategy: Any) -> bool:
    """True if the user says which strategy a run follows."""
    return strategy is not None and not (isinstance(strategy, str) and strategy == "auto")


@dataclass(frozen=True, slots=True)
class OwnFeeds:
    """The feeds of a micro-batch on this rank.

    Attributes:
        tensors: The placeholders.
        arrays: The arrays of each pipeline that runs here.
        said: What the other ranks are told of them, as plain values.
    """

    tensors: tuple[Tensor, ...]
    arrays: dict[int, dict[Tensor, Any]]
    said: dict[str, Any]

    @classmethod
    def read(cls, world: DistributedWorld, request: RunRequest, feeds: Feeds, symbols: Symbols) -> OwnFeeds:
        """Reads and checks what this rank feeds its own pipelines."""
        graph, subgraph = request.graph, request.subgraph
        index = graph.planner.index(request.strategy if is_chosen(request.strategy) else 0)
        is_known = graph.num_strategy == 1 or is_chosen(request.strategy)
        pipelines = graph.planner.pipelines(subgraph, index) if is_known else UNKNOWN
        sharded = shard_count(feeds)
        count = pipelines.count or sharded
        if count is not None:
            mine: Sequence[int] = world.pipelines(count)
        else:  # each rank is a pipeline, if it feeds anything
            mine = () if subgraph.feeds and not feeds else (world.rank,)
        tensors, arrays = read_own_feeds(subgraph, feeds, mine, replace(pipelines, count=count), symbols)
        # Here and not when all is planned, so that all ranks hear of it before anything is sent.
        check_indices(subgraph.index_checks, arrays, lambda _, size: as_symbol(size).constant)
        own = []
        for r, row in arrays.items():
            hosts = [pack_array(array) for array in host_values(subgraph, row).values()]
            own.append([r, [tuple(row[tensor].shape) for tensor in tensors], hosts])
        names = [tensor.name for tensor in tensors]
        return cls(tensors, arrays, {"sharded": sharded, "tensors": names, "own": own})


def merge(
    world: DistributedWorld,
    subgraph: Subgraph,
    mine: OwnFeeds,
    said: list[dict[str, Any]],
    pipelines: Pipelines,
    symbols: Symbols,
) -> FeedSet:
    """The feeds of all pipelines: of those that run elsewhere only shapes and what planning reads.

    Args:
        world: The ranks.
        subgraph: What is computed.
        mine: This rank's own feeds.
        said: What each rank said of its feeds.
        pipelines: The strategy's pipelines.
        symbols: ``int_symbol_dict``; each rank has read its own feeds by it already.

    Raises:
        StrategyError: If not all of the pipelines are fed.
        CommunicationError: If the ranks feed different placeholders.
    """
    own = {r: (rank, tuple(one["tensors"]), *row) for rank, one in enumerate(said) for r, *row in one["own"]}
    sharded = next((one["sharded"] for one in said if one["sharded"]), None)
    count = pipelines.count or sharded or len(own)
    if sorted(own) != list(range(count)):
        feeding = ", ".join(map(str, sorted(own))) or "none"
        raise StrategyError(
            f"the strategy has {count} pipeline{'s' * (count != 1)}, but of pipelines 0 to {max([count - 1, *own])} "
            f"those that are fed are {feeding}",
            op="run",
            where=caller(),
            fix="feed each rank its own shard, or hetu.Shards of all pipelines on every rank",
        )
    fed = {names for _, names, _, _ in own.values()}
    if len(fed) > 1:
        raise CommunicationError(
            "the ranks feed different placeholders",
            op="run",
            where=caller(),
            bound=[f"rank {rank}: {', '.join(names)}" for rank, names, _, _ in own.values()],
            fix="feed the same placeholders on all ranks",
        )
    by_name = {tensor.name: tensor for tensor in subgraph.feeds + subgraph.witnesses}
    tensors = tuple(by_name[name] for name in next(iter(fed), ()))
    hosts = [dict(zip(subgraph.host_feeds, map(unpack_array, own[r][3]), strict=True)) for r in range(count)]
    arrays = tuple({**hosts[r], **mine.arrays.get(r, {})} for r in range(count))
    contents = tuple(hosts[r][tensor].tobytes() for tensor in subgraph.host_feeds for r in range(count))
    shapes = tuple(tuple(map(tuple, own[r][2])) for r in range(count))
    return FeedSet(tensors, arrays, shapes, contents)
