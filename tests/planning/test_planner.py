"""The planner by itself: what it needs of a backend is handed to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import hetu
from hetu.planning.binder import BoundPipeline
from hetu.planning.planner import Planner, Prepared
from hetu.planning.subgraph import Subgraph

ENDS = np.array([0, 1, 3], np.int32)


def doubled_lengths() -> tuple[hetu.Graph, dict[hetu.Tensor, Any], hetu.Tensor]:
    """An attention whose ``cu_seqlens`` the graph computes from what is fed."""
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 16], name="x")
        ends = hetu.placeholder(hetu.int32, [hetu.IntSymbol("documents") + 1], name="ends")
        out = hetu.attn_varlen(x, x, x, 16, ends * 2, ends * 2)[0]
    return g, {x: np.zeros((6, 16), np.float32), ends: ENDS}, out


def longest(prepared: Prepared, out: hetu.Tensor) -> int:
    """The longest document that planning found."""
    (binding,) = prepared.bindings
    return binding[out.op.attrs["max_seqlen_q"]]


def test_what_the_graph_computes_for_planning_is_asked_of_a_callable() -> None:
    g, feeds, out = doubled_lengths()
    asked: list[str] = []

    def compute(subgraph: Subgraph, arrays: Mapping[hetu.Tensor, Any], bound: BoundPipeline) -> Any:
        (fetch,) = subgraph.fetches
        asked.append(fetch.op.definition.name)
        (ends,) = subgraph.feeds
        return torch.from_numpy(arrays[ends] * 2)

    planner = Planner(g, compute)
    prepared, _ = planner.prepare(planner.subgraph(out), feeds, {}, None)
    assert asked
    assert set(asked) == {"mul"}
    assert g._executor is None, "planning made what runs the graph"
    assert longest(prepared, out) == 4


def test_a_graph_plans_alike() -> None:
    g, feeds, out = doubled_lengths()
    assert longest(g.prepare(out, feeds), out) == 4


def test_lengths_that_are_fed_need_no_backend() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 16], name="x")
        ends = hetu.placeholder(hetu.int32, [hetu.IntSymbol("documents") + 1], name="ends")
        out = hetu.attn_varlen(x, x, x, 16, ends, ends)[0]
    g.prepare(out, {x: np.zeros((6, 16), np.float32), ends: ENDS})
    assert g._executor is None
