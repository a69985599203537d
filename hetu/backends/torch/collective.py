"""Ops over all pipelines of a strategy, wherever they run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from hetu.backends.comm import World
from hetu.backends.lower.lowering import NodeLowering, lowering
from hetu.backends.lower.traced import aside
from hetu.backends.lower.values import Deferred
from hetu.parallel.placement import Placement


@aside
def hetu_start_reduce(
    parts: Sequence[torch.Tensor], op: str, count: int, world: World, home: Placement | None = None
) -> Any:
    """Starts a sum or a mean over a strategy's ``count`` pipelines; ``parts`` are the values of those that run here."""
    return world.start_reduce(parts, op, count, home)


@aside
def hetu_finish_reduce(started: Any, world: World) -> torch.Tensor:
    """Its result."""
    return world.finish_reduce(started)


@lowering("step_sum", backend="torch")
def _step_sum(cx: NodeLowering, x: fx.Node) -> fx.Node:
    return cx.step_value()


@lowering("reduce_scatter", backend="torch")
def _reduce_scatter(cx: NodeLowering, parts: Sequence[fx.Node]) -> list[Deferred]:
    started = cx.call(hetu_start_reduce, parts, "sum", cx.num_pipelines, cx.world(), cx.home())
    return [Deferred(partial(cx.call, hetu_finish_reduce, started, cx.world()))] * len(cx.pipelines)


@lowering("all_reduce", backend="torch")
def _all_reduce(cx: NodeLowering, parts: Sequence[fx.Node]) -> list[Deferred]:
    started = cx.call(hetu_start_reduce, parts, cx.node.attrs["op"], cx.num_pipelines, cx.world())
    # One tensor for all pipelines: no op writes to its operands.
    return [Deferred(partial(cx.call, hetu_finish_reduce, started, cx.world()))] * len(cx.pipelines)
