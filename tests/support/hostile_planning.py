"""Good calls of what plans, prices and tests without running, and of what scripts of PKU's Hetu call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.hostile import Call, Case

import hetu
from hetu import parallel, testing
from hetu.integrations import pku_hetu
from hetu.parallel.plan.heads import Payload

H100 = hetu.Hardware.h100()


def planning_calls(case: Case) -> Iterator[tuple[str, Call]]:
    """A good call of each, by name."""
    yield from _hardware_calls()
    yield from _plan_calls()
    yield from _testing_calls(case)
    yield from _pku_calls()
    yield from _graph_calls(case)


def _hardware_calls() -> Iterator[tuple[str, Call]]:
    case = {"head_dim": 64, "kind": "causal", "is_backward": False}
    rated = hetu.Hardware(1e9, 1e9, 0.0, 1e9, rates=(parallel.Rate(100, 1e9), parallel.Rate(1000, 2e9)))
    for name, hardware in (("", H100), (" with rates", rated)):
        yield f"Hardware.rate{name}", (hardware.rate, {"keys": 100.0, **case})
        yield f"Hardware.attend_time{name}", (hardware.attend_time, {"flops": 1e9, "keys": 100, **case})
    yield "Hardware.transfer_time", (H100.transfer_time, {"count": 3, "shares_host": True})
    yield "Hardware.hosts", (hetu.Hardware.hosts, {"device": H100, "link_bytes": 1e9, "latency": 1e-6})
    yield "Hardware.from_json", (lambda source: hetu.Hardware.from_json(H100.to_json(), source), {"source": "a file"})
    yield "Hardware.load", (hetu.Hardware.load, {"path": "nowhere"})
    yield "Hardware.save", (H100.save, {"path": "hardware.json"})
    yield "Rate", (parallel.Rate, {"keys": 10.0, "flops": 1e12, **case})
    yield "Topology.one_host", (hetu.Topology.one_host, {"num_pipelines": 2})
    yield "Topology.shares_host", (hetu.Topology((0, 0, 1)).shares_host, {"one": 0, "other": 2})


def _plan_calls() -> Iterator[tuple[str, Call]]:
    s = hetu.IntSymbol("s")
    two, sizes = hetu.Strategy([s, 3], [0, 0]), {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    options = {"split": "sym", "mask": hetu.Mask.causal(), "method": "ring", "batch": 1}
    yield "Strategy.cost", (two.cost, {**sizes, "dtype": "float16", **options})
    cost = two.cost(4, 2, 8, "float16")
    yield "StrategyCost.evaluate", (cost.evaluate, {"int_symbol_dict": {s: 3}, "cu_seqlens": None})
    yield "StrategyCost.document", (cost.document, {"group": 0})
    yield "groups_of", (parallel.groups_of, {"cp_groups": [0, 0, 1]})
    heads, layout = parallel.Heads(4, 2, 8, 2), hetu.Layout.build([2, 3], [0, 0])
    yield "Heads", (parallel.Heads, {"num_q": 4, "num_kv": 2, "head_dim": 8, "itemsize": 2, "columns": 0})
    yield "Heads.range", (heads.range, {"start": 0, "stop": 4})
    yield "Heads.row_bytes", (heads.row_bytes, {"payload": Payload.KV, "heads": heads.range(0, 2)})
    made = {"layout": layout, "method": "auto", "mask": hetu.Mask.causal(), "heads": heads}
    made |= {"topology": hetu.Topology((0, 0))}
    yield "build_plan", (parallel.build_plan, {**made, "hardware": H100})
    yield "build_pipeline_plan", (parallel.build_pipeline_plan, {**made, "pipeline": 0})
    plan = parallel.build_plan(layout, heads=heads)
    for name in ("part", "bytes_sent"):
        yield f"AttnPlan.{name}", (getattr(plan, name), {"pipeline": 0})
    for name in ("grad_rows_sent", "grad_rows_received"):
        yield f"AttnPlan.{name}", (getattr(plan.backward(), name), {"pipeline": 0})
    yield "AttnPlan.need", (plan.need, {"pipelines": [0]})
    yield "AttnPlan.draw", (plan.draw, {"width": 10, "head": 0})
    yield "AttnPlan.cost between hosts", (plan.cost, {"hardware": H100, "topology": hetu.Topology((0, 1))})
    yield "Layout.draw", (layout.draw, {"mask": hetu.Mask.causal(), "width": 10})
    yield "Layout.query_spans of a pack", (layout.query_spans, {"pipeline": 0, "joins": False})
    yield "Mask.matrix", (hetu.Mask.causal().matrix, {"queries": 3, "keys": 4})
    yield "Mask.pairs", (hetu.Mask.causal().pairs, {"lengths": np.array([3, 4])})


def _testing_calls(case: Case) -> Iterator[tuple[str, Call]]:
    (rows,), x = case.symbols, case.tensors["x"]
    given = {"feed_dict": {x: (4, 24)}, "int_symbol_dict": {rows: 4}, "strategy": 0}
    yield "testing.bind", (_bind, {"graph": case.graph, "fetches": x, **given})
    bound = testing.bind(case.graph, x, {x: (4, 24)})
    yield "testing.assert_bound", (testing.assert_bound, {"bound": bound, "expected": {rows: 4}})
    yield "testing.assert_shapes", (testing.assert_shapes, {"bound": bound, "expected": {x: (4, 24)}})
    yield "Bound.values", (bound.values, {"expr": rows})
    yield "Bound.shapes", (bound.shapes, {"tensor": x})
    yield "testing.counting", (lambda graph: testing.counting(graph).__enter__(), {"graph": case.graph})
    lengths = {"lengths_q": [2, 3], "lengths_k": [2, 3]}
    yield "testing.allowed_pairs", (testing.allowed_pairs, {"mask": hetu.Mask.causal(), **lengths})
    q, cu = torch.ones(5, 2, 8), [0, 2, 5]
    attention = {"q": q, "k": q, "v": q, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "mask": None, "softmax_scale": 0.5}
    attention |= {"softcap": 1.0, "sinks": torch.zeros(2), "weights": None}
    yield "testing.attention", (testing.attention, attention)
    with hetu.graph("define_and_run", device="cpu", strategies=[hetu.Strategy([2], [0])]) as g:
        y = hetu.placeholder("float32", [2, 24], name="y")
        out = hetu.parallel_attn(y, 8, 1)[0]
    zeros = torch.zeros(2, 24)
    agree = {"graph": g, "fetches": [out], "feed_dict": {y: zeros}, "int_symbol_dicts": [{}]}
    agree |= {"cu_seqlens": None, "reference": [zeros[:, :8]], "rtol": 1e-5, "atol": 1e-5}
    yield "testing.assert_strategies_agree", (_agrees, agree)


def _bind(graph: Any, fetches: Any, feed_dict: Any, **given: Any) -> None:
    testing.bind(graph, fetches, feed_dict, **given)  # which calls it shapes


def _agrees(**given: Any) -> None:
    with suppress(AssertionError):  # that they don't
        testing.assert_strategies_agree(**given)


def _pku_calls() -> Iterator[tuple[str, Call]]:
    made = {"g": "define_and_run", "create_new": True, "prefix": "hostile", "num_strategy": 2, "tmp": True}
    yield "pku_hetu.graph", (pku_hetu.graph, made)
    yield "pku_hetu.run_level", (lambda type: pku_hetu.run_level(type), {"type": "update"})
    yield "pku_hetu.placeholder", (pku_hetu.placeholder, {"dtype": "float32", "shape": [2, 3]})
    yield "pku_hetu.from_numpy", (lambda value: pku_hetu.from_numpy(value), {"value": np.ones(2)})
    with pku_hetu.Graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [2], name="x")
        y = x + 1
    moved = {"dtype": "float64", "input": y, "device": "cpu"}
    yield "pku_hetu.data_transfer", (_within(g, pku_hetu.data_transfer), moved)
    run = {"loss": y, "fetches": [y], "feed_dict": {x: np.ones(2, np.float32)}, "int_symbol_dict": {}}
    run |= {"num_micro_batches": 1, "cur_strategy_id": 0, "run_level": 0}
    yield "pku_hetu.Graph.run", (g.run, run)


def _within(graph: hetu.Graph, call: Callable[..., Any]) -> Callable[..., None]:
    def called(**given: Any) -> None:
        with graph:
            call(**given)

    return called


def _graph_calls(case: Case) -> Iterator[tuple[str, Call]]:
    x = case.tensors["x"]
    yield "Graph.apply", (case.graph.apply, {"op": "relu", "inputs": [x], "attrs": {}})
    yield "Graph.num_pipelines", (case.graph.num_pipelines, {"strategy": 0})
    with hetu.graph("define_and_run", device="cpu") as g:
        w = hetu.parameter(1.0, [2], name="w")
        loss = hetu.sum(w * w)
    sgd = hetu.optim.SGD(lr=0.5)
    yield "Optimizer.minimize", (_within(g, sgd.minimize), {"loss": loss, "parameters": [w]})
    with g:
        train = sgd.minimize(loss)
    yield "grad_norm", (lambda train: hetu.optim.grad_norm(train), {"train": train})
    with hetu.trace() as recorded:
        pass
    yield "trace().save", (recorded.save, {"path": Path("trace.json")})
