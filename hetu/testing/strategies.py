"""That all strategies of a graph compute what one device computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hetu.arguments import array, items, mapping, real, refuse
from hetu.errors import HetuError, caller
from hetu.graph import Graph, Tensor
from hetu.parallel import Layout
from hetu.shards import Shards
from hetu.symbols import IntSymbol
from hetu.testing.graphs import given_graph


def assert_strategies_agree(
    graph: Graph,
    fetches: Sequence[Tensor],
    feed_dict: Mapping[Tensor, Any],
    int_symbol_dicts: Sequence[Mapping[IntSymbol, int]],
    *,
    cu_seqlens: Any = None,
    reference: Sequence[Any] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> list[Any]:
    """Runs a graph under each of its strategies, in this process, and compares what they give.

    A value with a row for each token is put into the order of the documents before it is compared. Every other value
    must be the same on all pipelines.

    Args:
        graph: A graph whose strategies spread one context group's tokens.
        fetches: What to compare.
        feed_dict: Placeholders' values: of those with a row per token the whole group's rows, documents one after the
            other; others as they are.
        int_symbol_dicts: The symbols of each strategy's run, strategy by strategy.
        cu_seqlens: With packing, ``(B + 1,)``: where the documents of the pack begin and end.
        reference: What the fetches must be; None for what the first strategy gives.
        rtol: Largest difference relative to the reference.
        atol: Largest absolute difference.

    Returns:
        The reference, one whole value per fetch.

    Raises:
        AssertionError: Naming strategy, fetch and the largest difference.
        HetuError: If there is not one dict of symbols per strategy, or whatever the runs refuse.

    Example:
        >>> import hetu, torch
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run", num_strategy=2) as g:
        ...     qkv = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 3 * 8], name="qkv")
        ...     out = hetu.parallel_attn(qkv, 8, 1, [[s], [s // 2, s - s // 2]], [[0], [0, 0]])[0]
        >>> feeds = {qkv: torch.randn(5, 24)}
        >>> (whole,) = hetu.testing.assert_strategies_agree(g, [out], feeds, [{s: 5}, {s: 5}])
        >>> whole.shape
        torch.Size([5, 8])
    """
    graph = given_graph(graph, "assert_strategies_agree")
    wanted = items(fetches, "fetches", "tensors", op="assert_strategies_agree")
    for tensor in wanted:
        if not isinstance(tensor, Tensor):
            refuse(tensor, "an item of fetches", "a tensor of the graph", op="assert_strategies_agree")
    given = mapping(feed_dict, "feed_dict", "a value for each placeholder", op="assert_strategies_agree")
    dicts = items(int_symbol_dicts, "int_symbol_dicts", "a dict per strategy", op="assert_strategies_agree")
    if len(dicts) != graph.num_strategy:
        raise HetuError(
            f"int_symbol_dicts has {len(dicts)} dicts of symbols for {graph.num_strategy} strategies",
            op="assert_strategies_agree",
            where=caller(),
            fix="give one per strategy, also where they are the same",
        )
    whole = None if reference is None else items(reference, "reference", op="assert_strategies_agree")
    if whole is not None and len(whole) != len(wanted):
        refuse(whole, "reference", f"a value per fetch, of which there are {len(wanted)}", op="assert_strategies_agree")
    for number, value in enumerate(whole or ()):
        array(value, f"reference[{number}]", op="assert_strategies_agree")
    rtol, atol = (
        real(value, name, "a number from 0", lambda x: x >= 0, op="assert_strategies_agree")
        for name, value in (("rtol", rtol), ("atol", atol))
    )
    for strategy, symbols in enumerate(dicts):
        got = _run(graph, wanted, given, strategy, symbols, cu_seqlens)
        if whole is None:
            whole = got
        for tensor, value, expected in zip(wanted, got, whole, strict=True):
            _compare(value, expected, rtol, atol, f"{tensor.name} under strategy {strategy}")
    assert whole is not None
    return whole


def _compare(value: torch.Tensor, expected: Any, rtol: float, atol: float, name: str) -> None:
    wanted = torch.as_tensor(expected, device=value.device).to(value.dtype)

    def named(text: str) -> str:
        return f"{name}: {text}"

    torch.testing.assert_close(value, wanted, rtol=rtol, atol=atol, equal_nan=True, msg=named)


def _run(
    graph: Graph,
    fetches: Sequence[Tensor],
    feeds: Mapping[Tensor, Any],
    strategy: int,
    symbols: Mapping[IntSymbol, int],
    cu_seqlens: Any,
) -> list[torch.Tensor]:
    """What a strategy gives, put together."""
    layout = graph.layout(strategy, int_symbol_dict=symbols, cu_seqlens=cu_seqlens)
    own_rows = graph.planner.pipelines(graph.planner.subgraph(fetches), strategy).own_rows
    fed = {
        tensor: Shards(layout.scatter(torch.as_tensor(value))) if tensor in own_rows else value
        for tensor, value in feeds.items()
    }
    values = graph.run(fetches, fed, int_symbol_dict=symbols, strategy=strategy)
    return [_whole(layout, tensor, value, strategy) for tensor, value in zip(fetches, values, strict=True)]


def _whole(layout: Layout, tensor: Tensor, value: Any, strategy: int) -> torch.Tensor:
    """A fetched value in the order of the documents, or what all pipelines have."""
    if isinstance(value, torch.Tensor):
        return value
    rows = [layout.rows(r) for r in range(layout.num_pipelines)]
    if tensor.ndim and [len(shard) for shard in value] == rows:
        gathered: torch.Tensor = layout.gather(value)
        return gathered
    for r, shard in enumerate(value):
        if not torch.equal(shard.nan_to_num(), value[0].nan_to_num()):
            raise AssertionError(f"{tensor.name} under strategy {strategy} differs between pipelines 0 and {r}")
    first: torch.Tensor = value[0]
    return first
