"""Calls of everything that users call, and values that nobody should pass."""

from __future__ import annotations

import decimal
import fractions
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

import hetu


class Broken:
    """Fails at whatever is asked of it."""

    def _fail(self, *_: Any) -> NoReturn:
        raise RuntimeError("broken")

    __index__ = __float__ = __bool__ = __iter__ = __len__ = __repr__ = __fspath__ = __getitem__ = _fail


def _foreign() -> hetu.Tensor:
    with hetu.graph("define_and_run", device="cpu"):
        return hetu.placeholder("float32", [2], name="foreign")


HOSTILE: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "object": object,
    "broken": Broken,
    "class": lambda: dict,
    "function": lambda: lambda *_: None,
    "text": lambda: "no such thing",
    "empty text": lambda: "",
    "digits": lambda: "3",
    "bytes": lambda: b"ab",
    "empty list": list,
    "list": lambda: [1, 2],
    "nested list": lambda: [[1], [2, 3]],
    "list of None": lambda: [None],
    "list of texts": lambda: ["a", "b"],
    "dict": lambda: {"a": 1},
    "set": lambda: {1, 2},
    "iterator": lambda: iter([1, 2]),
    "generator": lambda: (i for i in (1, 2)),
    "range": lambda: range(2),
    "True": lambda: True,
    "zero": lambda: 0,
    "minus one": lambda: -1,
    "seven": lambda: 7,
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "2**70": lambda: 2**70,
    "-2**70": lambda: -(2**70),
    "10**400": lambda: 10**400,
    "10**5000": lambda: 10**5000,
    "half": lambda: 0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "1e300": lambda: 1e300,
    "complex": lambda: 1j,
    "fraction": lambda: fractions.Fraction(1, 3),
    "decimal": lambda: decimal.Decimal("1.5"),
    "numpy bool": lambda: np.False_,
    "numpy int": lambda: np.int64(3),
    "numpy float": lambda: np.float32(1.5),
    "numpy text": lambda: np.str_("a"),
    "numpy time": lambda: np.datetime64("2020-01-01"),
    "masked": lambda: np.ma.masked,
    "masked array": lambda: np.ma.masked_array([1.0, 2.0], [0, 1]),
    "array": lambda: np.array([1, 2]),
    "bool array": lambda: np.array([True, False]),
    "array of objects": lambda: np.array([None, "a"], dtype=object),
    "matrix": lambda: np.ones((2, 2)),
    "empty array": lambda: np.zeros((0,)),
    "scalar array": lambda: np.array(1.5),
    "tensor": lambda: torch.ones(2),
    "scalar tensor": lambda: torch.tensor(2),
    "bool tensor": lambda: torch.tensor(True),
    "meta tensor": lambda: torch.ones(2, device="meta"),
    "sparse tensor": lambda: torch.ones(2).to_sparse(),
    "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    "dtype": lambda: np.dtype("float64"),
    "symbol": lambda: hetu.IntSymbol("stranger"),
    "expression": lambda: hetu.IntSymbol("stranger") // 2,
    "constraint": lambda: hetu.IntSymbol("stranger") > 2,
    "graph tensor": _foreign,
    "shards": lambda: hetu.Shards([np.ones(2), np.ones(3)]),
    "path": lambda: Path("nowhere"),
    "device": lambda: torch.device("cpu"),
    "error": lambda: ValueError("not raised"),
}
"""Makes values, by what they are; anew for each call, as some can be read only once, and symbols belong to no other."""


@dataclass
class Case:
    """A graph to call ops in.

    Attributes:
        graph: The graph.
        feeds: What its placeholders are fed.
        symbols: What its symbols are bound to.
        tensors: Its placeholders by name.
    """

    graph: hetu.Graph
    feeds: dict[hetu.Tensor, Any]
    symbols: dict[hetu.IntSymbol, int]
    tensors: dict[str, hetu.Tensor] = field(default_factory=dict)

    @classmethod
    def make(cls) -> Case:
        rows = hetu.IntSymbol("rows")
        rng = np.random.default_rng(0)
        arrays = {
            "x": rng.standard_normal((4, 24), np.float32),
            "y": rng.standard_normal((4, 24), np.float32),
            "weight": rng.standard_normal((24, 24), np.float32),
            "vector": rng.standard_normal(24).astype(np.float32),
            "ids": np.array([0, 1, 2, 3]),
            "index": np.array([[0], [1], [0], [1]]),
            "cu": np.array([0, 3, 4], np.int32),
            "condition": np.ones((4, 24), bool),
            "sinks": np.zeros(3, np.float32),
            "sink": np.zeros(1, np.float32),
        }
        with hetu.graph("define_and_run", device="cpu") as g:
            shapes = {name: list(array.shape) for name, array in arrays.items()}
            shapes["x"] = [rows, 24]
            tensors = {
                name: hetu.placeholder(array.dtype.name, shapes[name], name=name) for name, array in arrays.items()
            }
        return cls(g, {tensors[name]: array for name, array in arrays.items()}, {rows: 4}, tensors)


Call = tuple[Callable[..., Any], dict[str, Any]]


def op_calls(case: Case) -> Iterator[tuple[str, Call]]:
    """A good call of every op, by name, with a value for every parameter but the name."""
    t = case.tensors
    x, y, weight, vector, ids, cu = (t[name] for name in ("x", "y", "weight", "vector", "ids", "cu"))
    for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge"):
        yield name, (getattr(hetu, name), {"a": x, "b": y})
    for name in ("relu", "sigmoid", "silu", "tanh", "exp", "log", "sqrt", "rsqrt", "sin", "cos"):
        yield name, (getattr(hetu, name), {"x": x})
    for name in ("abs", "floor", "round", "stop_gradient"):
        yield name, (getattr(hetu, name), {"x": x})
    for name in ("sum", "mean", "max", "min", "logsumexp", "argmax"):
        yield name, (getattr(hetu, name), {"x": x, "dim": 1, "keepdim": False})
    attention = {"p_dropout": 0.0, "softmax_scale": -1.0, "return_softmax": False}
    attention |= {"window_size": (2, 1), "softcap": 0.5, "mask": None}
    lists = {"multi_seq_lens_symbol": [[4]], "multi_cp_group_symbol": [[0]]}
    calls: dict[str, dict[str, Any]] = {
        "all_reduce": {"x": x, "op": "sum"},
        "arange": {"start": 1, "stop": 4, "step": 2, "dtype": "int64"},
        "attn_varlen": {
            "q": x,
            "k": y,
            "v": y,
            "head_dim": 8,
            "cu_seqlens_q": cu,
            "cu_seqlens_k": cu,
            "max_seqlen_q": 3,
            "max_seqlen_k": 3,
            "zero_tensors": False,
            "is_causal": True,
            "sinks": t["sinks"],
            **attention,
        },
        "broadcast_to": {"x": vector, "shape": [4, 24]},
        "cast": {"x": x, "dtype": "float64"},
        "clamp": {"x": x, "min": -1, "max": y},
        "concat": {"tensors": [x, y], "dim": 0},
        "constant": {"value": [1.0, 2.0], "dtype": "float32"},
        "cross_entropy": {"logits": x, "labels": ids, "ignore_index": -100, "reduction": "mean"},
        "cumsum": {"x": x, "dim": 0},
        "dropout": {"x": x, "p": 0.5, "tokens": ids},
        "embedding": {"ids": ids, "weight": weight},
        "full": {"shape": [2, 3], "value": 1.0, "dtype": "float32"},
        "gather": {"x": y, "dim": 1, "index": t["index"]},
        "gelu": {"x": x, "approximate": "none"},
        "layer_norm": {"x": x, "weight": vector, "bias": vector, "eps": 1e-5},
        "layout_tokens": {"x": x, **lists, "packing": True, "cu_seqlens": cu, "split": "normal"},
        "linear": {"x": x, "weight": weight, "bias": vector},
        "masked_fill": {"x": x, "mask": t["condition"], "value": 0.5},
        "matmul": {"a": x, "b": weight},
        "one_hot": {"ids": ids, "num_classes": 4},
        "op": {"function": torch.relu, "shape": [4, 24], "dtype": "float32"},
        "parallel_attn": {
            "qkv": x,
            "head_dim": 8,
            "group_query_ratio": 1,
            **lists,
            "packing": True,
            "cu_seqlens_q": cu,
            "cu_seqlens_k": cu,
            "max_seqlen_q": 3,
            "max_seqlen_k": 3,
            **attention,
            "is_causal": True,
            "split": "normal",
            "method": "auto",
            "sinks": t["sink"],
        },
        "parameter": {"init": 0.5, "shape": [2], "dtype": "float32", "requires_grad": True},
        "placeholder": {"dtype": "float32", "shape": [2, 3]},
        "pow": {"base": y, "exponent": 2},
        "reshape": {"x": y, "shape": [24, 4]},
        "rms_norm": {"x": x, "weight": vector, "eps": 1e-6},
        "rotary": {"x": x, "positions": ids, "head_dim": 8, "num_heads": 2, "base": 1e4, "interleaved": False},
        "slice": {"x": y, "dim": 0, "start": 1, "stop": 3, "step": 1},
        "softmax": {"x": x, "dim": -1},
        "sort": {"x": x, "dim": -1, "descending": True},
        "split": {"x": y, "sizes": [1, 3], "dim": 0},
        "step_sum": {"x": ids, "least": 0},
        "swiglu": {"gate": x, "up": y},
        "token_mean_loss": {"logits": x, "labels": ids, "ignore_index": -100},
        "topk": {"x": x, "k": 3, "dim": -1, "largest": True},
        "transpose": {"x": y, "dim0": 0, "dim1": 1},
        "where": {"condition": t["condition"], "a": x, "b": y},
    }
    for name, given in calls.items():
        if name == "op":
            yield name, (lambda function, shape, dtype, name=None: hetu.op(function, shape, dtype, name)(y), given)
        else:
            yield name, (getattr(hetu, name), given)


def other_calls(case: Case) -> Iterator[tuple[str, Call]]:
    """A good call of everything else that users call while a graph is built or before it is."""
    s = hetu.IntSymbol("s")
    x = case.tensors["x"]
    layout = hetu.Layout.build([2, 3], [0, 0])
    with hetu.graph("define_and_run", device="cpu") as g:
        rows = hetu.placeholder("float32", [hetu.IntSymbol("rows"), 24])
        hetu.parallel_attn(rows, 8, 1, [[s, s]], [[0, 0]])
    plan = g.plan(0, int_symbol_dict={s: 3})
    q, cu = torch.ones(5, 2, 8), torch.tensor([0, 2, 5])
    yield "IntSymbol", (hetu.IntSymbol, {"value": "n", "min": 0, "max": 8, "multiple_of": 2})
    yield "IntSymbol.set_data", (hetu.IntSymbol("n", max=8).set_data, {"value": 3})
    yield "maximum", (lambda values: hetu.maximum(values, s), {"values": 3})
    yield "minimum", (lambda values: hetu.minimum(s, values), {"values": 3})
    yield "ceil_div", (hetu.ceil_div, {"a": s, "b": 3})
    yield "equal", (hetu.equal, {"a": s, "b": 3})
    yield "require", (hetu.require, {"constraint": s < 9})
    yield "Graph.require", (case.graph.require, {"constraint": s < 9})
    yield "graph", (hetu.graph, {"kind": "define_and_run", "num_strategy": 1, "device": "cpu", "name": "g"})
    yield "graph of strategies", (hetu.graph, {"strategies": [hetu.Strategy([3], [0])], "device": "cpu"})
    yield "Strategy", (hetu.Strategy, {"lengths": [s, 3], "groups": [0, 0], "name": "two", "mask": None})
    yield "Mask.window", (hetu.Mask.window, {"left": 3, "right": s})
    yield "Mask.chunked", (hetu.Mask.chunked, {"size": 3})
    yield "Mask.prefix", (hetu.Mask.prefix, {"lengths": [3, s]})
    slices = {"q_ranges": [(0, 2)], "k_ranges": [(0, 3)], "kinds": ["causal"]}
    yield "Mask.slices", (hetu.Mask.slices, slices)
    yield "Mask.draw", (hetu.Mask.window(2, 0).draw, {"lengths": [3, 2], "width": 4})
    yield "autocast", (hetu.autocast, {"dtype": "bfloat16", "enabled": True})
    yield "recompute", (hetu.recompute, {"policy": {"tanh", "parallel_attn"}, "attention": True})
    yield "config", (_configured, {"backend": None, "verify_plans": False, "deterministic": False, "compile": False})
    yield "as_dtype", (lambda dtype: hetu.as_dtype(dtype), {"dtype": "float32"})
    yield "manual_seed", (_seeded, {"seed": 3})
    yield "gradients", (hetu.gradients, {"ys": x * 2, "xs": x, "grad_ys": x})
    yield from _module_calls(x)
    yield from _method_calls(case)
    yield "Shards", (hetu.Shards, {"arrays": [np.ones(2)]})
    yield "Hardware", (hetu.Hardware, {"flops": 1e12, "link_bytes": 1e9, "latency": 1e-6, "memory_bytes": 1e9})
    planned = {"lengths": [3, 5], "pipelines": 2, "hardware": hetu.Hardware.h100(), "max_tokens": 8}
    model = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": "float16", "token_flops": 1e6}
    yield "plan_batch", (hetu.plan_batch, {**planned, **model, "mask": hetu.Mask.window(2, 0)})
    batch = hetu.plan_batch(**planned)
    yield "BatchPlan.symbols", (batch.symbols, {"strategy": hetu.Strategy([s, 3], [0, 1])})
    yield "BatchPlan.scatter", (batch.scatter, {"documents": [np.ones(3), np.ones(5)]})
    yield "BatchPlan.gather", (batch.gather, {"shards": [np.ones(5), np.ones(3)]})
    yield (
        "Layout.build",
        (
            hetu.Layout.build,
            {
                "seq_lens": [4, 4],
                "cp_groups": [0, 0],
                "split": "balanced",
                "batch": 1,
                "cu_seqlens": [0, 3, 8],
                "mask": hetu.Mask.window(2, 0),
            },
        ),
    )
    yield (
        "Layout.from_spans",
        (
            hetu.Layout.from_spans,
            {"cp_groups": [0], "lengths": [[2]], "spans": [[(0, 0, 0, 2, 1)]], "is_packed": True},
        ),
    )
    for name in ("rows", "documents", "positions", "columns", "place", "group_index", "query_spans"):
        yield f"Layout.{name}", (getattr(layout, name), {"pipeline": 1})
    for name in ("query_spans", "rows_of"):
        yield f"GroupLayout.{name}", (getattr(layout.groups[0], name), {"member": 1})
    yield "Layout.scatter", (layout.scatter, {"x": np.ones((5, 2))})
    yield "Layout.gather", (layout.gather, {"shards": [np.ones((2, 2)), np.ones((3, 2))]})
    for name in ("pairs", "head_pairs", "rows_sent", "rows_received", "peak_bytes"):
        yield f"AttnPlan.{name}", (getattr(plan, name), {"pipeline": 1})
    yield "AttnPlan.cost", (plan.cost, {"hardware": hetu.Hardware.h100()})
    yield "AttnPlan.trace", (plan.trace, {"hardware": hetu.Hardware.h100()})
    yield "AttnPlan.verify", (plan.verify, {"max_bytes": 10**9})
    for name in ("layout", "plan"):
        yield (
            f"Graph.{name}",
            (
                getattr(g, name),
                {"strategy": 0, "int_symbol_dict": {s: 3}, "cu_seqlens": None, "batch": 1, "node": None},
            ),
        )
    yield (
        "Graph.explain",
        (g.explain, {"int_symbol_dict": {s: 3}, "batch": 1, "node": None, "hardware": hetu.Hardware.h100()}),
    )
    yield "Topology", (hetu.Topology, {"hosts": (0, 0)})
    yield "use_hardware", (hetu.use_hardware, {"hardware": hetu.Hardware.h100()})
    yield "save", (hetu.save, {"what": case.graph, "path": os.devnull + "/nowhere"})
    yield "load", (hetu.load, {"path": os.devnull + "/nowhere"})
    yield (
        "functional.attn_varlen",
        (
            hetu.functional.attn_varlen,
            {
                "q": q,
                "k": q,
                "v": q,
                "cu_seqlens_q": cu,
                "cu_seqlens_k": cu,
                "max_seqlen_q": 3,
                "max_seqlen_k": 3,
                "is_causal": True,
                "window_size": (-1, -1),
                "softcap": 0.0,
                "sinks": None,
                "mask": None,
                "dropout_p": 0.5,
                "softmax_scale": 0.5,
                "return_lse": True,
                "seed": 3,
            },
        ),
    )
    yield from _functional_calls(q)


def _module_calls(x: hetu.Tensor) -> Iterator[tuple[str, Call]]:
    """Good uses of modules; x is (rows, 24)."""
    lists: dict[str, Any] = {"multi_seq_lens_symbol": [[x.shape[0]]], "multi_cp_group_symbol": [[0]]}
    kind = {"dtype": "float32", "name": None}
    uses: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "Linear": (hetu.nn.Linear, {"in_features": 24, "out_features": 4, "bias": True}, {}),
        "RMSNorm": (hetu.nn.RMSNorm, {"normalized_shape": 24, "eps": 1e-5}, {}),
        "SwiGLU": (hetu.nn.SwiGLU, {"in_features": 24, "hidden_features": 4, "bias": True}, {}),
        "Attention": (
            hetu.nn.Attention,
            {"embed_dim": 24, "num_heads": 3, "num_kv_heads": 1, "head_dim": 8, "bias": True},
            lists,
        ),
    }
    for name, (module, good, options) in uses.items():
        yield (
            f"a nn.{name}",
            (partial(_use_module, module, x, options), good | kind),
        )
    rows = {"num_embeddings": 4, "embedding_dim": 2, **kind}
    yield "a nn.Embedding", (lambda **given: hetu.nn.Embedding(**given), rows)


def _use_module(module: Any, x: hetu.Tensor, options: dict[str, Any], **given: Any) -> hetu.Tensor:
    made = module(**given)
    return made(x, **options) if made.parameters()[0].shape[-1] == x.shape[-1] else x  # its width is no matter of x's


def _method_calls(case: Case) -> Iterator[tuple[str, Call]]:
    """Methods of tensors that are no functions of hetu, and indexing."""
    y = case.tensors["y"]
    yield "a Tensor.index", (lambda index: y[index], {"index": 1})
    yield "a Tensor.slice", (lambda start, stop, step: y[start:stop:step], {"start": 1, "stop": 3, "step": 1})
    yield "a Tensor.reshape", (lambda shape: y.reshape(shape), {"shape": [24, 4]})
    yield "a Tensor.expand", (lambda shape: y.expand(shape), {"shape": [2, -1, 24]})
    yield "a Tensor.permute", (lambda dims: y.permute(dims), {"dims": [1, 0]})
    yield "a Tensor.flatten", (y.flatten, {"start_dim": 0, "end_dim": 1})
    for name in ("unsqueeze", "squeeze", "size"):
        yield f"a Tensor.{name}", (getattr(y, name), {"dim": 0})
    yield "a Tensor.to", (y.to, {"dtype": "float64"})
    yield "Graph.find", (case.graph.find, {"name": "x"})


def _functional_calls(q: torch.Tensor) -> Iterator[tuple[str, Call]]:
    """Good calls of context parallelism."""
    rows = len(q)
    cp = hetu.functional.ContextParallel(torch.tensor([0, rows]))
    good: dict[str, Any] = {"q": q, "k": q, "v": q, "cp": cp, "is_causal": True, "window_size": (-1, -1)}
    good |= {"softcap": 0.0, "sinks": None, "mask": None, "dropout_p": 0.5, "softmax_scale": 0.5, "seed": 3}
    yield "functional.parallel_attn", (hetu.functional.parallel_attn, {**good, "return_lse": True})
    made = {"cu_seqlens": torch.tensor([0, rows]), "group": None, "split": "balanced", "method": "auto"}
    context = hetu.functional.ContextParallel
    yield "functional.ContextParallel", (context, {**made, "tokens": [rows], "mask": None, "device": "cpu"})
    ids = torch.arange(rows)
    yield "cp.dispatch", (cp.dispatch, {"x": ids, "dim": 0})
    yield "cp.undispatch", (cp.undispatch, {"y": ids, "dim": 0})
    yield "cp.next_tokens", (cp.next_tokens, {"ids": ids, "dim": 0, "ignore_index": -100})
    mean = {"loss_sum": torch.ones(()), "labels": ids, "group": None, "ignore_index": -100}
    yield "cp.token_mean", (cp.token_mean, mean)
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.bfloat16, "is_causal": True}
    yield "cp.plan", (cp.plan, {**heads, "window_size": (-1, -1), "mask": None})


def run_calls(case: Case) -> Iterator[tuple[str, Call]]:
    """Good runs."""
    y = case.tensors["x"] + 1
    prepared: dict[str, Any] = {
        "fetches": [y],
        "feed_dict": case.feeds,
        "int_symbol_dict": case.symbols,
        "strategy": 0,
    }
    yield "Graph.prepare", (case.graph.prepare, prepared)
    more = {"num_micro_batches": 1, "device": "cpu", "run_level": "update"}
    yield "Graph.run", (case.graph.run, {**prepared, **more})
    yield "Graph.load_parameters", (case.graph.load_parameters, {"given": {}, "strict": True})
    (rows,) = case.symbols
    yield "a value", (lambda rows_: case.graph.run(y, case.feeds, int_symbol_dict={rows: rows_}), {"rows_": 4})
    x = case.tensors["x"]
    yield "a feed", (lambda x_: case.graph.run(y, {**case.feeds, x: x_}), {"x_": case.feeds[x]})
    yield "a key", (lambda key: case.graph.run(y, {**case.feeds, **_keyed(key)}), {"key": x})


def _keyed(key: Any) -> Mapping[Any, Any]:
    return {key: 1} if isinstance(key, hetu.Tensor) or key.__hash__ is not None else {}


def _configured(**changes: Any) -> None:
    with hetu.config(**changes):
        pass


def _seeded(seed: Any) -> None:
    try:
        hetu.manual_seed(seed)
    finally:
        hetu.manual_seed(0)
