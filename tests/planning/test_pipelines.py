"""The pipelines of a run are those of its strategy, whatever is fetched; and each is fed what is its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hetu

WIDTH = 24


def data(rows: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, WIDTH), np.float32)


class Model:
    """A graph with two strategies, by lists or by values; what is fetched needs attention, or doesn't."""

    def __init__(self, by_values: bool, groups: tuple[int, ...] = (0, 0), split: str = "normal") -> None:
        self.s = s = hetu.IntSymbol("s")
        lengths = [s // 2, s - s // 2]
        strategies = [hetu.Strategy([s], [0], name="one"), hetu.Strategy(lengths, groups, name="two")]
        lists = () if by_values else ([[s], lengths], [[0], list(groups)])
        options = {"strategies": strategies} if by_values else {"num_strategy": 2}
        rows = hetu.IntSymbol("rows")
        with hetu.graph("define_and_run", device="cpu", **options) as self.graph:
            self.x = hetu.placeholder(hetu.float32, [rows, WIDTH], name="x")
            self.out = hetu.parallel_attn(self.x, 8, 1, *lists, split=split)[0]
            self.position = hetu.layout_tokens(self.x, *lists, split=split)[0]
            self.total = hetu.sum(self.x)
            self.w = hetu.parameter(0.5, [WIDTH], name="w")
            self.train = hetu.optim.SGD(lr=0.1).minimize(hetu.sum(self.x * self.w))
            self.constant = hetu.full([2], 3.0)

    def run(self, fetch: Any, fed: Any, strategy: Any = 1, **options: Any) -> Any:
        feeds = {} if fed is None else {self.x: fed}
        return self.graph.run(fetch, feeds, int_symbol_dict={self.s: 6}, strategy=strategy, **options)


@pytest.fixture(params=[False, True], ids=["lists", "values"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.param)


@pytest.mark.parametrize("fetch", ["out", "position", "total", "w", "constant"])
def test_a_strategy_has_its_pipelines_whatever_is_fetched(model: Model, fetch: str) -> None:
    fed = None if fetch in ("w", "constant") else hetu.Shards([data(3), data(3, seed=1)])
    result = model.run(getattr(model, fetch), fed)
    assert isinstance(result, hetu.Shards) and len(result) == 2
    alone = model.run(getattr(model, fetch), None if fed is None else data(6), strategy=0)
    assert isinstance(alone, torch.Tensor)
    for wrong in (1, 3):
        if fed is not None:
            with pytest.raises(hetu.StrategyError, match=f"fed {wrong} shards, but the strategy has 2 pipelines"):
                model.run(getattr(model, fetch), hetu.Shards([data(3)] * wrong))


def test_a_step_without_attention_sums_over_all_pipelines(model: Model) -> None:
    x = data(6)
    expected = model.run(model.train, x, strategy=0, run_level="compute_only")
    shards = hetu.Shards([x[:3], x[3:]])
    torch.testing.assert_close(model.run(model.train, shards, run_level="compute_only"), expected)


@pytest.mark.parametrize("fetch", ["out", "position", "total", "train"])
@pytest.mark.parametrize("rows", [3, 6, 12])
def test_whole_rows_are_not_shared_among_pipelines(model: Model, fetch: str, rows: int) -> None:
    """Also where they could be a batch of each pipeline's tokens: six rows are twice three."""
    for options in ({}, {"num_micro_batches": 2}):
        fed = [data(rows), data(rows)] if options else data(rows)
        with pytest.raises(hetu.StrategyError, match=r"x was fed one array for the 2 pipelines") as caught:
            model.run(getattr(model, fetch), fed, **options)
        assert "where:  test_pipelines.py:" in str(caught.value) and "layout.scatter" in str(caught.value)


@pytest.mark.parametrize("split", ["sym", "stripe", "balanced"])
@pytest.mark.parametrize("groups", [(0, 0), (4, 1)])
def test_no_split_or_group_takes_whole_rows(split: str, groups: tuple[int, int]) -> None:
    model = Model(True, groups, split)
    for fetch in (model.out, model.position):
        with pytest.raises(hetu.StrategyError, match="each pipeline needs its own rows"):
            model.run(fetch, data(6))


def test_auto_leaves_out_strategies_that_whole_rows_do_not_fit(model: Model) -> None:
    assert model.graph.prepare(model.out, {model.x: data(6)}, int_symbol_dict={model.s: 6}).strategy == 0


def attended(build: Callable[[hetu.Tensor], Any], dims: list[Any], lens: Any = (2, 2)) -> tuple[hetu.Graph, Any, Any]:
    """A graph in which what attention reads is built from a placeholder of a shape."""
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, dims, name="x")
        out = hetu.parallel_attn(build(x), 8, 1, [lens], [[0] * len(lens)])[0]
    return g, x, out


B, N = hetu.IntSymbol("b"), hetu.IntSymbol("n")
MADE_OF = {
    "itself": (lambda x: x, [N, WIDTH]),
    "fixed rows": (lambda x: x, [4, WIDTH]),
    "a product": (lambda x: hetu.linear(x, hetu.parameter(0.1, [WIDTH, 4])), [4, 4]),
    "a batch": (lambda x: hetu.reshape(x, [B * N, WIDTH]), [B, N, WIDTH]),
    "a sum": (lambda x: hetu.parameter(1.0, [4, WIDTH]) + x, [4, WIDTH]),
    "a choice": (lambda x: hetu.where(x > 0, 0.0, x), [4, WIDTH]),
    "a piece": (lambda x: hetu.concat([hetu.full([2, WIDTH], 0.0), x], 0), [2, WIDTH]),
    "a cast": (lambda x: hetu.cast(hetu.rms_norm(x, hetu.parameter(1.0, [WIDTH])), hetu.bfloat16), [4, WIDTH]),
}


@pytest.mark.parametrize("made_of", MADE_OF)
def test_rows_are_followed_to_where_they_are_fed(made_of: str) -> None:
    build, dims = MADE_OF[made_of]
    g, x, out = attended(build, dims)
    shape = [{B: 2, N: 2}.get(dim, dim) for dim in dims] if made_of == "a batch" else [dims[0], dims[1]]
    shape[0] = 4 if shape[0] is N else shape[0]
    with pytest.raises(hetu.StrategyError, match="x was fed one array for the 2 pipelines of strategy 0"):
        g.run(out, {x: np.ones(shape, np.float32)})
    assert len(g.run(out, {x: hetu.Shards([np.ones(shape, np.float32)] * 2)})) == 2


def test_labels_of_a_pipelines_rows_are_its_own() -> None:
    """They are not what attention reads, but have as many rows: by the same symbol, or by a demand."""
    rows, other = hetu.IntSymbol("rows"), hetu.IntSymbol("other")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [rows, WIDTH], name="x")
        labels = [hetu.placeholder(hetu.int64, [size], name=f"labels_{size}") for size in (rows, other)]
        out = hetu.parallel_attn(x, 8, 1, [[2, 2]], [[0, 0]])[0]
        losses = [hetu.cross_entropy(out, item) for item in labels]
    for label, loss in zip(labels, losses, strict=True):
        feeds = {x: hetu.Shards([data(2), data(2)]), label: np.zeros(2, np.int64)}
        with pytest.raises(hetu.StrategyError, match=f"{label.name} was fed one array for the 2 pipelines"):
            g.run(loss, feeds)


def test_what_all_pipelines_share_may_be_one_array() -> None:
    n, m = hetu.IntSymbol("n"), hetu.IntSymbol("m")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [n, 4], name="x")
        w = hetu.placeholder(hetu.float32, [4, WIDTH], name="w")
        bias = hetu.placeholder(hetu.float32, [WIDTH], name="bias")
        table = hetu.placeholder(hetu.float32, [m, WIDTH], name="table")
        cu = hetu.placeholder(hetu.int32, [hetu.IntSymbol("documents") + 1], name="cu")
        qkv = x @ w + bias + hetu.embedding(hetu.constant([0]), table)
        out = hetu.parallel_attn(qkv, 8, 1, [[2, 4]], [[0, 0]], True, cu)[0]
    feeds = {w: np.ones((4, WIDTH), "f"), bias: data(1)[0], table: data(9), cu: np.array([0, 2, 6], np.int32)}
    result = g.run(out, {x: hetu.Shards([np.ones((2, 4), "f"), np.ones((4, 4), "f")]), **feeds})
    assert [len(shard) for shard in result] == [2, 4]


def test_a_graph_without_strategies_takes_as_many_pipelines_as_shards() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [2], name="x")
        y = hetu.all_reduce(x)
    assert g.run(y, {x: [1.0, 2.0]}).tolist() == [1.0, 2.0]
    assert [shard.tolist() for shard in g.run(y, {x: hetu.Shards([[1.0, 2.0]] * 3)})] == [[3.0, 6.0]] * 3


# Strategies as values


def test_lists_and_values_give_the_same_bits() -> None:
    x = data(6)
    results = []
    for by_values in (False, True):
        model = Model(by_values)
        layout = model.graph.layout(1, int_symbol_dict={model.s: 6})
        results.append(model.run(model.out, hetu.Shards(layout.scatter(x))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_strategy_is_chosen_by_its_name() -> None:
    model = Model(True)
    x = data(6)
    shards = hetu.Shards([x[:3], x[3:]])
    by_name, by_index = (model.run(model.out, shards, strategy) for strategy in ("two", 1))
    assert all(map(torch.equal, by_name, by_index))
    symbols = {model.s: 6}
    assert (
        model.graph.layout("two", int_symbol_dict=symbols).digest()
        == model.graph.layout(1, int_symbol_dict=symbols).digest()
    )
    assert (
        model.graph.plan("two", int_symbol_dict=symbols).hash() == model.graph.plan(1, int_symbol_dict=symbols).hash()
    )
    assert model.graph.prepare(model.out, {model.x: x}, int_symbol_dict=symbols, strategy="one").strategy == 0
    for call in (model.graph.layout, model.graph.plan):
        with pytest.raises(hetu.StrategyError, match="there is no strategy 'three'") as caught:
            call("three", int_symbol_dict=symbols)
        assert "'one', 'two'" in str(caught.value)


S = hetu.IntSymbol("s")
ONE, TWO = hetu.Strategy([S], [0]), hetu.Strategy([S // 2, S - S // 2], [0, 0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strategies": []}, "expected a list of hetu.Strategy"),
        ({"strategies": ONE}, "expected a list of hetu.Strategy"),
        ({"strategies": "ab"}, "expected a list of hetu.Strategy"),
        ({"strategies": iter([ONE])}, "expected a list of hetu.Strategy"),
        ({"strategies": [ONE, ([S], [0])]}, "expected a list of hetu.Strategy"),
        ({"strategies": [ONE, TWO], "num_strategy": 3}, "num_strategy is 3, but there are 2"),
        ({"strategies": [hetu.Strategy([1], [0], "a"), hetu.Strategy([2], [0], "a")]}, "two strategies are named 'a'"),
    ],
)
def test_graphs_of_no_strategies(options: dict[str, Any], text: str) -> None:
    with pytest.raises(hetu.StrategyError, match=text) as caught:
        hetu.graph("define_and_run", **options)
    assert "where:  test_pipelines.py:" in str(caught.value)


@pytest.mark.parametrize(
    ("lists", "text"),
    [
        (([[S], [S // 2, S - S // 2]],), "multi_cp_group_symbol is missing"),
        (([[S]], [[0]]), "has 1 rows, but the graph has 2 strategies"),
        (
            ([[S], [S // 2, S // 2]], [[0], [0, 0]]),
            r"strategy 1 \[s//2, s//2\] .* but the graph's is \[s//2, s - s//2\]",
        ),
        (([[S], [S // 2, S - S // 2]], [[0], [0, 1]]), r"in groups \[0, 1\], but the graph's is"),
        ((5, [[0], [0, 0]]), "expected multi_seq_lens_symbol to be a list of lists, got 5"),
        (([S, S], [[0], [0, 0]]), r"expected multi_seq_lens_symbol\[0\] to be a list of ints and symbols"),
    ],
)
@pytest.mark.parametrize("op", ["parallel_attn", "layout_tokens"])
def test_lists_agree_with_the_graphs_strategies(lists: Any, text: str, op: str) -> None:
    with hetu.graph("define_and_run", strategies=[ONE, TWO]) as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), WIDTH])
        first = (x, 8, 1) if op == "parallel_attn" else (x,)
        with pytest.raises(hetu.StrategyError, match=text):
            getattr(hetu, op)(*first, *lists)
        getattr(hetu, op)(*first, [[S], [S // 2, S - S // 2]], [[0], [0, 0]])
    assert g.num_pipelines(1) == 2


def test_ops_agree_on_the_number_of_pipelines() -> None:
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), WIDTH])
        with pytest.raises(hetu.StrategyError, match="multi_seq_lens_symbol is missing"):
            hetu.parallel_attn(x, 8, 1)
        assert g.num_pipelines(0) is None
        hetu.parallel_attn(x, 8, 1, [[2, 3]], [[0, 0]])
        with pytest.raises(hetu.StrategyError, match="ops disagree on the number of pipelines of strategy 0"):
            hetu.layout_tokens(x, [[5]], [[0]])
        hetu.layout_tokens(x, [[3, 2]], [[0, 1]])
    assert g.num_pipelines(0) == 2


def test_a_graph_prints_its_strategies() -> None:
    assert "strategy 0: [s] in groups [0]" in str(hetu.graph("define_and_run", strategies=[ONE]))


# Feeds by context group


def packed(groups: list[Any], lens: list[int]) -> tuple[hetu.Graph, hetu.Tensor, hetu.Tensor, hetu.Tensor]:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), WIDTH], name="x")
        cu = hetu.placeholder(hetu.int32, [hetu.IntSymbol("documents") + 1], name="cu")
        out = hetu.parallel_attn(x, 8, 1, [lens], [groups], True, cu)[0]
    return g, x, cu, out


def test_what_a_group_is_fed_may_be_named_by_the_group() -> None:
    """Both groups hold three tokens, so that only the names tell whose documents these are."""
    groups, lens = [7, 0, 7], [2, 3, 1]
    g, x, cu, out = packed(groups, lens)
    lists = {7: np.array([0, 1, 3], np.int32), 0: np.array([0, 3], np.int32)}
    layout = g.layout(0, cu_seqlens=lists)
    shards = hetu.Shards(layout.scatter({7: data(3), 0: data(3, seed=1)}))
    expected = g.run(out, {x: shards, cu: hetu.Shards([lists[group] for group in groups])})
    for fed in (lists, dict(reversed(lists.items()))):
        for mine, other in zip(g.run(out, {x: shards, cu: fed}), expected, strict=True):
            assert torch.equal(mine, other)
    with pytest.raises(hetu.StrategyError, match=r"fed to cu for the context groups 0, but .* are 0, 7"):
        g.run(out, {x: shards, cu: {0: lists[0]}})
    with pytest.raises(hetu.StrategyError, match="x was fed one array per context group, of which one has several"):
        g.run(out, {x: {7: data(3), 0: data(3)}, cu: lists})


def test_groups_of_one_pipeline_are_fed_by_name() -> None:
    a = hetu.IntSymbol("a")
    g, x, cu, out = packed([a + 1, a], [3, 3])
    lists = {5: np.array([0, 1, 3], np.int32), 4: np.array([0, 3], np.int32)}
    expected = g.run(
        out, {x: hetu.Shards([data(3), data(3, seed=1)]), cu: hetu.Shards([lists[5], lists[4]])}, int_symbol_dict={a: 4}
    )
    got = g.run(out, {x: {4: data(3, seed=1), 5: data(3)}, cu: lists}, int_symbol_dict={a: 4})
    assert all(map(torch.equal, got, expected))
    a.set_data(4)
    assert all(map(torch.equal, g.run(out, {x: {4: data(3, seed=1), 5: data(3)}, cu: lists}), expected))
    alone, y, only, result = packed([3], [3])
    fed = alone.run(result, {y: {3: data(3)}, only: {3: np.array([0, 3], np.int32)}})
    assert torch.equal(fed, alone.run(result, {y: data(3), only: np.array([0, 3], np.int32)}))


def test_groups_that_nobody_names_take_no_dict() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [2], name="x")
        y = x + 1
    with pytest.raises(hetu.StrategyError, match="not said which group each pipeline is in"):
        g.run(y, {x: {0: [1.0, 2.0]}})
