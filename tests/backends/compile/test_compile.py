"""Compiled runs against those that are not: all ops, random programs, all lengths, and what can't be compiled.

Most tests put what was traced in the place of what Inductor makes of it: all but Inductor's own code is the same, and
takes no C++ compiler. Two tests take Inductor, with lengths 0 and 1 among others: for all sizes at once, as on a CPU,
and for typical ones, as on a GPU.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from llama import build
from support.random_runs import Program, Request
from support.training import SMALL, ragged_packs
from torch import fx

import hetu
from hetu.backends import torch_private
from hetu.backends.compile import inductor, tracing
from hetu.backends.compile.regions import Region, divide
from hetu.backends.lower.module import lower
from hetu.backends.lower.traced import TRACED
from hetu.backends.lower.values import MADE_BY
from hetu.cache import LRU
from hetu.config import settings
from hetu.graph import GoodSample, registry

GOOD = [(name, i, sample) for name, op in registry().items() for i, sample in enumerate(op.samples()[0])]


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has compiled nothing yet."""
    monkeypatch.setattr(inductor, "compiled", LRU(inductor.MOST_COMPILED))


@pytest.fixture
def traced_only(empty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs what was traced as it is."""

    def as_traced(module: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        return module.forward

    monkeypatch.setattr(inductor, "find_inductor", lambda: as_traced)


@pytest.fixture(params=["for all sizes", "for typical sizes"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How regions are traced on the CPU."""
    if request.param == "for typical sizes":
        monkeypatch.setitem(tracing.TYPICAL, "cpu", 1024)
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def nothing_is_refused() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="hetu.config")
        yield


def as_lists(given: Any) -> Any:
    return [as_lists(item) for item in given] if isinstance(given, (list, tuple, hetu.Shards)) else given


def assert_close(got: Any, wanted: Any, tolerance: float) -> None:
    if isinstance(wanted, torch.Tensor):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    else:
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_close(one, other, tolerance)


# What is computed


@pytest.mark.parametrize("name", registry())
def test_an_op_and_its_gradient_give_the_same(name: str, traced_only: None) -> None:
    """Each with another op around it, so that something is fused; nothing is refused."""
    for _, _, sample in [item for item in GOOD if item[0] == name][:3]:
        got, wanted = (_run_sample(sample, compiles) for compiles in (True, False))
        dtype = wanted[0].dtype
        assert_close(got, wanted, {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 2e-2))


def _run_sample(sample: GoodSample, compiles: bool) -> list[Any]:
    symbols = {feed.shape[dim]: None for feed, dim in ((sample.feeds[i], dim) for i, dim in sample.symbolic)}
    sizes = {size: hetu.IntSymbol(f"n{size}") for size in symbols}
    shapes = [
        [sizes[n] if (i, dim) in [tuple(item) for item in sample.symbolic] else n for dim, n in enumerate(feed.shape)]
        for i, feed in enumerate(sample.feeds)
    ]
    hetu.manual_seed(0)
    with hetu.graph("define_and_run", device="cpu") as g, hetu.config(backend="torch", compile=compiles):
        inputs = [hetu.placeholder(feed.dtype, shape) for feed, shape in zip(sample.feeds, shapes, strict=True)]
        built = sample.build(*[x + x * 0 if x.dtype.is_floating else x for x in inputs])
        outputs = list(built) if isinstance(built, (tuple, list)) else [built]
        floating = [x for x in outputs if x.dtype.is_floating and not x.on_cpu]
        sources = [x for x in inputs if x.dtype.is_floating]
        grads: list[Any] = []
        if sample.smooth and floating and sources:
            try:
                grads = hetu.gradients([x * x for x in floating], sources)
            except hetu.HetuError:  # it has no rule
                grads = []
        feeds = dict(zip(inputs, sample.feeds, strict=True))
        return as_lists(g.run([*outputs, *(x * 2 for x in floating), *(x for x in grads if x is not None)], feeds))


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_give_the_same(seed: int, traced_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random graphs, strategies, micro-batches and run levels, with recomputation and without."""
    if seed % 4 < 2:
        monkeypatch.setitem(tracing.TYPICAL, "cpu", 16)  # there are lengths on both sides of what it decides
    results = []
    for compiles in (True, False):
        hetu.manual_seed(seed)
        program = Program(seed, is_scoped=seed % 2 == 0)
        with hetu.config(compile=compiles):
            runs = [program.graph.run(**Request(program, 100 * seed + i, False).arguments) for i in range(4)]
        state = program.state()["parameters"]
        results.append((as_lists(runs), [state[name] for name in sorted(state)]))
    tolerance = {"float64": 1e-10, "float32": 1e-4}.get(program.dtype, 0.1)
    assert_close(results[0], results[1], tolerance)


def test_one_compilation_serves_all_layers_pipelines_strategies_and_lengths(traced_only: None, sizes: str) -> None:
    trained: dict[bool, list[Any]] = {}
    for compiles in (True, False):
        hetu.manual_seed(0)
        model = build(replace(SMALL, layers=3), device="cpu")
        train = hetu.optim.AdamW(lr=1e-3, max_grad_norm=1.0).minimize(model.loss)
        counts = []
        with hetu.config(compile=compiles):
            for index, pack in [*enumerate(ragged_packs(4)), (0, [np.empty(0, np.uint8)]), (3, [np.ones(1, np.uint8)])]:
                feeds, symbols = model.feeds(index, pack)
                model.graph.run(train, feeds, int_symbol_dict=symbols, strategy=index)
                counts.append(inductor.compiled.stats().misses)
        state = model.graph.state_dict()["parameters"]
        trained[compiles] = [state[name] for name in sorted(state)]
        if compiles:
            assert counts[0] > 0 and set(counts) == {counts[0]}, "a strategy or a length compiled something again"
            printed = "\n".join(map(str, model.graph.executor.executables()))
            regions = sorted(int(found[1]) for found in re.finditer(r"compiled (\d+) of \1 regions", printed))
            assert regions == [7, 14, 21, 28], "between attentions, and before and after, on each pipeline"
            assert counts[0] == 5, "two layers inside of the model are alike"
    assert_close(trained[True], trained[False], 1e-5)


def test_inductor_compiles_once_for_all_lengths(empty: None) -> None:
    """Inductor itself: lengths 0 and 1, growing and shrinking, two strategies, dropout, more threads than before."""
    s, rows = hetu.IntSymbol("s"), hetu.IntSymbol("rows")
    normal = functools.partial(torch.nn.init.normal_, std=0.3)

    def train(compiles: bool) -> tuple[list[Any], list[torch.Tensor]]:
        hetu.manual_seed(0)
        data = np.random.default_rng(0).standard_normal((70, 16)).astype(np.float32)
        with hetu.graph("define_and_run", num_strategy=2, device="cpu") as g, hetu.config(compile=compiles):
            x = hetu.placeholder(hetu.float32, [rows, 16], name="x")
            normed = hetu.rms_norm(x, hetu.parameter(1.0, [16], name="norm"))
            qkv = hetu.linear(normed, hetu.parameter(normal, [48, 16], name="qkv"))
            out = hetu.parallel_attn(qkv, 8, 1, [[s], [s // 3, s - s // 3]], [[0], [0, 0]], p_dropout=0.2)[0]
            h = x + hetu.dropout(hetu.linear(out, hetu.parameter(normal, [16, 16], name="out")), 0.3)
            step = hetu.optim.SGD(lr=0.1).minimize(hetu.sum(h * h) / (16 * s + 1))
            results, counts = [], []
            for i, n in enumerate((7, 0, 1, 64, 2, 33)):
                g_layout = g.layout(i % 2, int_symbol_dict={s: n})
                shards = hetu.Shards(g_layout.scatter(data[:n]))
                feeds = {x: shards if i % 2 else shards[0]}
                torch.set_num_threads(1 + i // 3)
                results.append(g.run([h, step], feeds, int_symbol_dict={s: n}, strategy=i % 2))
                counts.append(inductor.compiled.stats().misses)
        assert set(counts) == {counts[0]} and counts[0] > 0, counts
        state = g.state_dict()["parameters"]
        return as_lists(results), [state[name] for name in sorted(state)]

    before = torch.get_num_threads()
    try:
        assert_close(train(True), train(False), 1e-5)
    finally:
        torch.set_num_threads(before)


def test_inductor_decides_by_typical_sizes_and_tells_which(
    empty: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """What it decided is a condition, on disk as well: other sizes take what was compiled for all, or nothing compiled.

    On a CPU it sums more than 4,096 numbers by other code.
    """
    monkeypatch.setitem(tracing.TYPICAL, "cpu", 1024)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    rows, lengths = hetu.IntSymbol("rows"), (7, 5000, 0, 1, 4096, 4097)
    told: list[Any] = []
    for _ in ("compiled", "from the disk"):
        monkeypatch.setattr(inductor, "compiled", LRU(inductor.MOST_COMPILED))
        with hetu.graph("define_and_run", device="cpu") as g:
            x = hetu.placeholder(hetu.float32, [rows, 3], name="x")
            y = hetu.exp(x) * x
            fetches = [y, hetu.sum(y * y + x, 0)]
            for n in lengths:
                fed = {x: np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32)}
                results = []
                for compiles in (True, False):
                    with hetu.config(compile=compiles):
                        results.append(as_lists(g.run(fetches, fed)))
                assert_close(*results, 1e-4)
        assert inductor.compiled.stats().misses == 2, "a length compiled something again"
        found = [compiled.conditions for compiled in inductor.compiled.values() if compiled.conditions is not None]
        told.append([[one.hold(n) for n in lengths] for one in found])
    assert told[0] == told[1] == [[True, False, False, False, True, False]]


def test_conditions_that_cannot_be_told_are_not_taken(monkeypatch: pytest.MonkeyPatch, traced_only: None) -> None:
    monkeypatch.setitem(tracing.TYPICAL, "cpu", 1024)

    def untold(self: Any) -> Any:
        raise RuntimeError("torch decided by something")

    monkeypatch.setattr(torch_private.SymbolicSizes, "conditions", untold)
    with hetu.graph("define_and_run", device="cpu") as g, hetu.config(compile=True):
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("n")], name="x")
        assert torch.equal(g.run(hetu.exp(x) * 2, {x: np.zeros(3, np.float32)}), torch.full([3], 2.0))
    assert [compiled.call is None for compiled in inductor.compiled.values()] == [True, False]


# What is kept and when


def test_what_is_computed_again_stays_apart_from_its_originals() -> None:
    model = build(SMALL, device="cpu", recompute=True)
    grads = hetu.gradients(model.loss, model.graph.nodes[6].outputs[0])
    subgraph = model.graph.planner.subgraph([model.loss, grads])
    options = {"num_pipelines": 1, "pipelines": [0], "device": torch.device("cpu"), "backend": "torch"}
    module = lower(subgraph.nodes, subgraph.fetches, subgraph.replaced, constants={}, **options).module
    regions = [step for step in divide(module.graph) if isinstance(step, Region)]
    clones = 0
    for region in regions:
        nodes = {node.meta[MADE_BY][0] for node in region.nodes}
        again = {node.original for node in nodes if node.original is not None}
        clones += len(again)
        assert not again & nodes
        scopes = {node.backward for node in nodes if node.original is not None}
        assert len(scopes) <= 1, "two layers are computed again at a time"
    assert clones > 5


def test_a_failed_run_changes_nothing(traced_only: None) -> None:
    with hetu.graph("define_and_run", device="cpu") as g, hetu.config(compile=True):
        ids = hetu.placeholder(hetu.int64, [hetu.IntSymbol("n")], name="ids")
        table = hetu.parameter(1.0, [5, 4], name="table")
        h = hetu.embedding(ids + 1, table)
        train = hetu.optim.SGD(lr=0.1).minimize(hetu.sum(h * h + h))
        g.run(train, {ids: [0, 3]})
        before = g.state_dict()
        with pytest.raises(hetu.HetuError, match="ids"):
            g.run(train, {ids: [0, 4]})
        after = g.state_dict()
    assert torch.equal(before["parameters"]["table"], after["parameters"]["table"])


def test_no_result_shares_memory_with_an_input_or_another(monkeypatch: pytest.MonkeyPatch, empty: None) -> None:
    """Inductor may give an input itself; what is then changed in place, a gradient say, would change it."""

    def lazy(module: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        return lambda x: [x, *module(x)[1:]]

    monkeypatch.setattr(inductor, "find_inductor", lambda: lazy)
    with hetu.graph("define_and_run", device="cpu") as g, hetu.config(compile=True):
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("n")], name="x")
        y, z = hetu.exp(x * 1.0 + 0.0), hetu.exp(x * 1.0) + 0.0
        for n in (0, 3, 2):
            fed = torch.ones(n)
            first, second = g.run([y, z], {x: fed})
            first.add_(1), second.add_(1)
            assert torch.equal(fed, torch.ones(n))


# What can't be compiled


@pytest.mark.parametrize("fault", ["missing", "refuses", "no compiler"])
def test_what_cannot_be_compiled_runs_as_it_is(
    fault: str, empty: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("it knows no such op")

    reasons = {"missing": "has no torch._inductor", "refuses": "knows no such op", "no compiler": "compiler"}
    if fault == "no compiler":
        from torch._inductor import config

        monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/g++",))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    else:
        monkeypatch.setattr(inductor, "find_inductor", lambda: None if fault == "missing" else refuse)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("n")], name="x")
        y = hetu.tanh(hetu.exp(x)) * 3.25
        with hetu.config(compile=True), pytest.warns(RuntimeWarning, match=reasons[fault]) as told:
            compiled = g.run(y, {x: [0.5, -1.0]})
        messages = [str(one.message) for one in told if one.category is RuntimeWarning]
        assert "test_compile.py" in messages[0], "it names the user's line"
        with hetu.config(compile=False):
            assert torch.equal(compiled, g.run(y, {x: [0.5, -1.0]}))
        with hetu.config(compile=True):  # and says it once
            g.run(y, {x: [0.25]})


# Around it


def test_all_that_is_traced_in_the_place_of_a_function_is_known() -> None:
    assert {function.__name__ for function in TRACED} >= {"hetu_rms_norm", "hetu_swiglu_grad", "hetu_cross_entropy"}


def test_progress_is_a_line_once_it_takes_long(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with inductor.Progress(2) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(inductor, "PATIENCE", 0.0)
    with inductor.Progress(2) as progress:
        progress.advance()
        progress.advance()
    assert re.search(r"\rhetu compiles: 2 of 2 regions after \d+ s\n$", capsys.readouterr().err)


@pytest.mark.parametrize(("value", "compiles"), [("1", True), ("0", False), ("", False)])
def test_the_environment_chooses(value: str, compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETU_COMPILE", value)
    assert settings().compile == compiles


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETU_COMPILE", "yes")
    with pytest.raises(hetu.HetuError, match="HETU_COMPILE is 'yes', expected 0 or 1"):
        settings()
