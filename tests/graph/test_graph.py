"""The graph itself: building, refusing, printing, passes and verification."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.graph import Graph, Node, OpDef, find_op, register, registry
from hetu.graph.passes import live_nodes, merge_duplicates


def small_graph() -> tuple[Graph, hetu.Tensor, hetu.Tensor]:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", name="small", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [s, 4], name="x")
        y = hetu.linear(x, hetu.constant(np.ones((2, 4), "float32"), name="w"), name="y")
    return g, x, y


# Building


def test_tensors_tell_what_they_are() -> None:
    g, x, y = small_graph()
    s = x.symbolic_shape[0]
    assert isinstance(y, hetu.tensor)
    assert hetu.tensor is hetu.Tensor
    assert (y.name, y.dtype, y.shape, y.ndim, y.graph) == ("y", hetu.float32, (s, 2), 2, g)
    assert all(isinstance(size, hetu.IntSymbol) for size in y.symbolic_shape)
    assert y.symbolic_shape[1].constant == 2
    assert y.op is g.nodes[-1]
    assert y.op.input("x") is x
    assert y.op.input("bias") is None
    assert y.op.where.line.startswith("y = hetu.linear(x, ")
    assert [node.id for node in g.nodes] == [0, 1, 2]
    assert repr(y) == "hetu.Tensor(y: float32[s, 2])"


def test_a_tensor_is_neither_true_nor_false() -> None:
    _, _, y = small_graph()
    with pytest.raises(hetu.HetuError, match="no value while the graph is built"):
        bool(y)


def test_nothing_is_built_outside_of_a_graph() -> None:
    for call in (lambda: hetu.placeholder("float32", [1]), lambda: hetu.constant(1), lambda: hetu.require(True)):
        with pytest.raises(hetu.HetuError, match="called outside of a graph") as caught:
            call()
        assert "test_graph.py" in str(caught.value)
        assert "fix:" in str(caught.value)


def test_an_op_joins_the_graph_of_its_tensors() -> None:
    g, _, y = small_graph()
    assert hetu.silu(y).graph is g  # after the "with", and so also:
    with hetu.graph("define_and_run") as other:
        assert (y + y).graph is g
        assert hetu.constant(1).graph is other


def test_graphs_nest() -> None:
    with hetu.graph("define_and_run") as outer:
        with hetu.graph("define_and_run") as inner:
            assert hetu.constant(1).graph is inner
        assert hetu.constant(1).graph is outer
        with outer:
            assert hetu.constant(1).graph is outer


def within(context: Any) -> Any:
    """A with block that ends when it is closed, as that of a fixture."""

    def block() -> Any:
        with context:
            yield

    entered = block()
    next(entered)
    return entered


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_graphs_are_left_in_any_order(order: tuple[int, ...]) -> None:
    graphs = [hetu.graph("define_and_run", name=str(i)) for i in range(3)]
    blocks = [within(g) for g in graphs]
    left = list(graphs)
    for i in order:
        assert hetu.constant(1).graph is left[-1]
        blocks[i].close()
        left.remove(graphs[i])
    with pytest.raises(hetu.HetuError, match="outside of a graph"):
        hetu.constant(1)


def test_a_graph_that_is_entered_twice_is_left_twice() -> None:
    one, two = hetu.graph("define_and_run"), hetu.graph("define_and_run")
    first, second, third = within(one), within(two), within(one)
    first.close()
    assert hetu.constant(1).graph in (one, two)
    third.close()
    assert hetu.constant(1).graph is two
    second.close()
    with pytest.raises(hetu.HetuError, match="is left where it was not entered"):
        one.__exit__(None, None, None)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_autocasts_are_left_in_any_order(order: tuple[int, int]) -> None:
    dtypes = (hetu.bfloat16, hetu.float16)
    with hetu.graph("define_and_run"):
        x = hetu.placeholder("float32", [2, 2])
        blocks = [within(hetu.autocast(dtype)) for dtype in dtypes]
        blocks[order[0]].close()
        assert (x @ x).dtype == dtypes[order[1]]
        blocks[order[1]].close()
        assert (x @ x).dtype == hetu.float32


def test_what_minimize_gave_is_no_operand() -> None:
    with hetu.graph("define_and_run") as g:
        w = hetu.parameter(1.0, [], name="w")
        train = hetu.optim.SGD(lr=0.1).minimize(w * w)
        norm, before = hetu.optim.grad_norm(train), len(g.nodes)
        for result in (train, norm):
            for use in (
                lambda x: hetu.exp(x),
                lambda x: 1.0 - x,
                lambda x: hetu.cast(x, "float64"),
                lambda x: hetu.concat([hetu.reshape(w, [1]), x], 0),
                lambda x: hetu.gradients(w * w, w, x),
                lambda x: hetu.optim.SGD(lr=0.1).minimize(x),
            ):
                with pytest.raises(hetu.HetuError, match="minimize") as caught:
                    use(result)
                assert "where:  test_graph.py:" in str(caught.value)
    assert {node.definition.name for node in g.nodes[before:]} <= {"reshape", "mul", "full"}
    assert g.prepare(train).strategy == g.prepare([norm, w]).strategy == 0


def test_a_failed_with_leaves_no_graph_behind() -> None:
    with pytest.raises(ZeroDivisionError), hetu.graph("define_and_run"):
        _ = 1 / 0
    with pytest.raises(hetu.HetuError, match="outside of a graph"):
        hetu.constant(1)


def test_threads_do_not_see_each_others_graphs() -> None:
    seen: list[str] = []

    def work() -> None:
        with pytest.raises(hetu.HetuError, match="outside of a graph"):
            hetu.constant(1)
        seen.append("refused")

    with hetu.graph("define_and_run"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == ["refused"]


def test_foreign_tensors_are_refused() -> None:
    g, x, _ = small_graph()
    _, foreign, _ = small_graph()
    with pytest.raises(
        hetu.HetuError,
        match=r"expected b to be of the same graph .*, but tensor x belongs to another graph \(made at test_graph.py:",
    ):
        x + foreign
    assert len(g.nodes) == 3


def test_names_are_unique() -> None:
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder("float32", [1], name="x")
        with pytest.raises(hetu.HetuError, match=r"\[silu\] the graph has a node or a tensor named 'x' already"):
            hetu.silu(x, name="x")
        hetu.silu(x, name="silu_0")
        hetu.silu(x, name="silu_2")
        made_up = [hetu.silu(x).name for _ in range(3)]
    assert made_up == ["silu_1", "silu_3", "silu_4"]
    assert len({node.name for node in g.nodes}) == len(g.nodes) == 6


def test_no_tensor_has_another_ones_name() -> None:
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder("float32", [3], name="order.values")
        with pytest.raises(hetu.HetuError, match=r"\[sort\] the graph has a node or a tensor named 'order.values' al"):
            hetu.sort(x, name="order")
        hetu.placeholder("float32", [3], name="sort_0.indices")
        assert hetu.sort(x)[1].name == "sort_1.indices"  # a name that is made up is another one
        with pytest.raises(hetu.HetuError, match=r"'sort_1\.values' already"):
            hetu.abs(x, name="sort_1.values")
    assert [node.name for node in g.nodes] == ["order.values", "sort_0.indices", "sort_1"]
    assert g.find("order.values") is x
    g.verify()
    g.nodes[1].outputs[0].name = "order.values"
    with pytest.raises(hetu.HetuError, match=r"two nodes or tensors are named order\.values"):
        g.verify()


@pytest.mark.parametrize("kind", ["define_and_run", "eager"])
@pytest.mark.parametrize(
    "refused",
    [
        lambda x, y: x[1:, 9],  # after a slice
        lambda x, y: hetu.gradients(y, x),  # after the gradient of y
        lambda x, y: hetu.matmul(x, x),  # after casts
    ],
)
def test_what_is_refused_on_the_way_is_taken_back(kind: str, refused: Callable[..., Any]) -> None:
    with hetu.graph(kind, device="cpu") as g, hetu.autocast("bfloat16"):
        x = hetu.constant([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], name="x")
        y = hetu.sum(x.int().float() * 2.0)
        before = list(g.nodes)
        with pytest.raises(hetu.HetuError):
            refused(x, y)
        assert g.nodes == before
        assert (x * 2.0).name == "mul_1"
    g.verify()


def test_a_refused_minimize_leaves_no_gradients() -> None:
    with hetu.graph("define_and_run") as g:
        w = hetu.parameter(1.0, [2], name="w")
        loss = hetu.sum(w * w)
        before = list(g.nodes)
        with pytest.raises(hetu.HetuError, match="named 'w' already"):
            hetu.optim.SGD(lr=0.1).minimize(loss, name="w")
        assert g.nodes == before


def test_a_refused_op_leaves_the_graph_as_it_was() -> None:
    g, x, _ = small_graph()
    before, text = list(g.nodes), str(g)
    for call in (
        lambda: hetu.reshape(x, [3, 3, -1, -1], name="z"),
        lambda: x + hetu.IntSymbol("t") + [1],
        lambda: hetu.softmax(x, 2),
    ):
        with pytest.raises(hetu.HetuError):
            call()
    del g.nodes[3:]  # x + t is fine by itself
    assert g.nodes == before
    assert str(g) == text
    with g:
        assert hetu.silu(x, name="z").name == "z"


@pytest.mark.parametrize(("kind", "options"), [("lazy", {}), ("define_and_run", {"num_strategy": 0})])
def test_graphs_of_no_kind(kind: str, options: dict[str, int]) -> None:
    with pytest.raises(
        hetu.HetuError,
        match=r"kind to be .*, got 'lazy'|num_strategy to be an int from 1 to \d+, got 0",
    ):
        hetu.graph(kind, **options)


def test_ops_are_registered_once() -> None:
    with pytest.raises(ValueError, match="'add' is registered already"):

        @register
        class Again(OpDef):
            name = "add"

    assert type(find_op("add")).__name__ == "Add"
    assert registry()["add"] is find_op("add")


def test_require() -> None:
    s, bounded = hetu.IntSymbol("s"), hetu.IntSymbol("bounded", min=1, max=8)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [s], name="x")
        hetu.require(s <= 4)
        hetu.require(bounded <= 8)
        with pytest.raises(hetu.ShapeError, match=r"\[require\] .* never holds"):
            hetu.require(bounded > 8)
        y = x + 1
    assert g.run(y, feed_dict={x: np.zeros(4)}).shape == (4,)
    with pytest.raises(hetu.BindingError) as caught:
        g.run(y, feed_dict={x: np.zeros(5)})
    assert "hetu.require(s <= 4)" in str(caught.value)
    assert "s = 5" in str(caught.value)


# Printing

GOLDEN = """\
graph layer(define_and_run, num_strategy=2):
  %ids: int64[s] = placeholder(dtype=hetu.int64, shape=(s))                    # test_graph.py:LINE
  %table: float32[7, 4] = constant(value=<float32 [7, 4]>, dtype=hetu.float32) # test_graph.py:LINE
  %embedding_0: float32[s, 4] = embedding(%ids, %table)                        # test_graph.py:LINE
  %add_0: float32[s, 4] = add(%embedding_0, s)                                 # test_graph.py:LINE
  %slice_0: float32[s - 1, 4] = slice(%add_0, 1, s, dim=0, step=1)             # test_graph.py:LINE
  %half: bfloat16[s - 1, 4] = cast(%slice_0, dtype=hetu.bfloat16)              # test_graph.py:LINE
  %gelu_0: bfloat16[s - 1, 4] = gelu(%half, approximate='tanh')                # test_graph.py:LINE
  require s <= 9
  require s >= 1"""


def test_printing_reads_like_a_program() -> None:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", num_strategy=2, name="layer") as g:
        ids = hetu.placeholder(hetu.int64, [s], name="ids")
        table = hetu.constant(np.zeros((7, 4), "float32"), name="table")
        x = hetu.slice(hetu.embedding(ids, table) + s, 0, 1)
        hetu.gelu(hetu.cast(x, hetu.bfloat16, name="half"), "tanh")
        hetu.require(s <= 9)
    text = str(g)
    wheres = [node.where.lineno for node in g.nodes]
    assert wheres == sorted(wheres)
    for node in g.nodes:
        text = text.replace(f"test_graph.py:{node.where.lineno}", "test_graph.py:LINE")
    assert _squeezed(text) == _squeezed(GOLDEN)


def _squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_networkx_holds_the_same_program() -> None:
    g, _, y = small_graph()
    with g:
        hetu.add(y, y, name="twice")
    drawn = g.to_networkx()
    assert list(drawn.nodes) == ["x", "w", "y", "twice"]
    assert sorted((a, b, data["tensor"]) for a, b, data in drawn.edges(data=True)) == [
        ("w", "y", "w"),
        ("x", "y", "x"),
        ("y", "twice", "y"),
        ("y", "twice", "y"),
    ]
    assert drawn.nodes["y"]["op"] == "linear"
    assert drawn.nodes["y"]["label"] == "linear(%x, %w)"
    assert drawn.nodes["y"]["where"].startswith("test_graph.py:")
    assert drawn.edges["x", "y", 0]["type"] == "float32[s, 4]"


# Passes


def test_live_nodes_are_what_the_fetches_need() -> None:
    g, x, y = small_graph()
    with g:
        dead, live = hetu.silu(y), hetu.gelu(x)
    assert [node.name for node in live_nodes([live])] == ["x", live.name]
    assert [node.name for node in live_nodes([y, live])] == ["x", "w", "y", live.name]
    assert dead.op not in live_nodes([y])
    assert live_nodes([dead, dead, x]) == live_nodes([dead])


def merged(*pairs: tuple[hetu.Tensor, hetu.Tensor]) -> list[bool]:
    nodes = live_nodes([tensor for pair in pairs for tensor in pair])
    replaced = merge_duplicates(nodes)
    return [replaced.get(a, a) is replaced.get(b, b) for a, b in pairs]


def test_duplicates_are_merged_and_lookalikes_are_not() -> None:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run"):
        x, y = hetu.placeholder("int64", [s, 2]), hetu.placeholder("int64", [s, 2])
        same = [
            (x + y, x + y),
            ((x + y) * 2, (x + y) * 2),
            (hetu.sum(x, 0), hetu.sum(x, (-2,))),
            (x * (s + 1), x * (1 + s)),
            (hetu.reshape(x, [-1]), hetu.reshape(x, [2 * s])),
            (hetu.slice(x, 0, 1), hetu.slice(x, -2, 1, s)),
        ]
        other = [
            (x + y, x - y),
            (x + y, y + x),  # not looked for
            (x * 2, x * 2.0),
            (x * 1, x * True),
            (x * 0.0, x * -0.0),
            (hetu.sum(x, 0), hetu.sum(x, 1)),
            (hetu.sum(x, 0), hetu.sum(x, 0, keepdim=True)),
            (x, y),
            (hetu.constant(1), hetu.constant(1)),  # equal or not: arrays are not looked into
            (hetu.cast(x, "int32"), hetu.cast(x, "int16")),
        ]
    assert merged(*same) == [True] * len(same)
    assert merged(*other) == [False] * len(other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_sign_of_zero_tells_values_apart(dtype: str) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        zeros = [hetu.full([1], value, dtype=dtype) for value in (0.0, -0.0, 0.0)]
        x = hetu.full([1], 1.0, dtype=dtype)
        products = [x * 0.0, x * -0.0, x * np.float64(-0.0)]
        chosen = [hetu.where(x > 0, value, 1.0) for value in (0.0, -0.0)]
        results = g.run([1.0 / item for item in (*zeros, *products, *chosen)])
    infinite = float("inf")
    assert [item.item() for item in results[:3]] == [infinite, -infinite, infinite]
    assert [item.item() for item in results[3:6]] == [infinite, -infinite, -infinite]
    assert [item.item() for item in results[6:]] == [infinite, -infinite]
    assert merged((zeros[0], zeros[2])) == [True]


def test_merging_changes_no_result() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [3])
        fetches = [x + 1, x + 1, (x + 1) * 2, x * 2, x * 2.0]
    results = g.run(fetches, feed_dict={x: np.arange(3.0)})
    for result, expected in zip(results, [[1, 2, 3], [1, 2, 3], [2, 4, 6], [0, 2, 4], [0, 2, 4]], strict=True):
        np.testing.assert_array_equal(result, expected)


# Verification


def swap_nodes(g: Graph) -> None:
    g.nodes[0], g.nodes[2] = g.nodes[2], g.nodes[0]


def renumber(g: Graph) -> None:
    swap_nodes(g)
    for place, node in enumerate(g.nodes):
        node.id = place


def other_dtype(g: Graph) -> None:
    g.nodes[2].outputs[0].dtype = hetu.float16


def other_shape(g: Graph) -> None:
    tensor = g.nodes[2].outputs[0]
    tensor.symbolic_shape = (tensor.symbolic_shape[0] + 1, tensor.symbolic_shape[1])


def other_attribute(g: Graph) -> None:
    g.nodes[3].attrs["dim"] = (0,)


def same_name(g: Graph) -> None:
    g.nodes[1].name = "x"


def foreign_node(g: Graph) -> None:
    g.nodes[1] = dataclasses.replace(g.nodes[1], graph=small_graph()[0])


def foreign_input(g: Graph) -> None:
    g.nodes[2].inputs = (small_graph()[1], *g.nodes[2].inputs[1:])


def one_output_less(g: Graph) -> None:
    g.nodes[2].outputs = ()


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (swap_nodes, "is not at its place"),
        (renumber, "before it is made"),
        (other_dtype, r"Tensor\(y: float16\[s, 2\]\) should be float32\[s, 2\]"),
        (other_shape, r"should be float32\[s, 2\]"),
        (other_attribute, r"should be float32\[2\]"),
        (same_name, "two nodes or tensors are named x"),
        (foreign_node, "is not at its place"),
        (foreign_input, "before it is made"),
        (one_output_less, "y has 0 outputs, not 1"),
    ],
)
def test_verify_finds_tampering(tamper: Callable[[Graph], None], message: str) -> None:
    g, _, y = small_graph()
    with g:
        hetu.sum(y, 1)
    g.verify()
    tamper(g)
    with pytest.raises(hetu.HetuError, match=message):
        g.verify()


UNARY = (
    hetu.silu,
    hetu.gelu,
    hetu.softmax,
    hetu.rms_norm,
    lambda x: x * 0.5,
    lambda x: 1 - x,
    lambda x: hetu.transpose(x, 0, 1) @ x,
    lambda x: hetu.reshape(x, [-1, 1]),
    lambda x: hetu.sum(x, 0, keepdim=True),
    lambda x: hetu.slice(x, 0, 0, x.symbolic_shape[0] // 2),
    lambda x: hetu.concat([x, x], 1),
)
BINARY = (hetu.add, hetu.sub, hetu.mul)


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs(seed: int) -> None:
    """Built, verified, printed, run under two lengths; fetching one tensor gives what fetching all gives."""
    draw = random.Random(seed)
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        tensors = [hetu.placeholder("float64", [s, 3], name="x"), hetu.placeholder("float64", [s, 3], name="y")]
        while len(tensors) < 20:
            one = draw.choice(tensors)
            alike = [item for item in tensors if item.shape == one.shape]
            made = draw.choice(BINARY)(one, draw.choice(alike)) if draw.random() < 0.5 else draw.choice(UNARY)(one)
            tensors.append(made)
    g.verify()
    assert len(str(g).splitlines()) >= 21
    used = {(tensor.op, node) for node in g.nodes for tensor in node.tensors}
    assert {(a.name, b.name) for a, b in used} == set(g.to_networkx().edges())
    for length in (4, 9):
        rng = np.random.default_rng(seed)
        feeds = {tensors[0]: rng.standard_normal((length, 3)), tensors[1]: rng.standard_normal((length, 3))}
        everything = g.run(tensors, feed_dict=feeds)
        for tensor, result in zip(tensors, everything, strict=True):
            assert tuple(result.shape) == tuple(size.evaluate({s: length}) for size in tensor.symbolic_shape)
        last = g.run(tensors[-1], feed_dict={x: feeds[x] for x in _placeholders(tensors[-1])})
        np.testing.assert_array_equal(last, everything[-1])
    assert g.executor.stats()["executables"].misses == 2


def _placeholders(tensor: hetu.Tensor) -> list[hetu.Tensor]:
    nodes: list[Node] = live_nodes([tensor])
    return [node.outputs[0] for node in nodes if node.definition.name == "placeholder"]


@pytest.mark.parametrize("value", [[[1.0, 2.0], [3.0]], [torch.ones(2), torch.ones(3)], (torch.ones(2), torch.ones(2))])
def test_a_list_that_is_no_array_is_refused(value: Any) -> None:
    """One array a pipeline has a type of its own."""
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("n")], name="x")
        y = x * 2
    with pytest.raises(hetu.BindingError, match=r"(?s)x was fed a \w+ that is no array.*hetu\.Shards"):
        g.run(y, {x: value})


@pytest.mark.parametrize(
    ("name", "gives"), [("plan", "AttnPlan"), ("layout", "Layout"), ("prepare", "Prepared"), ("planner", "Planner")]
)
def test_an_editor_knows_what_a_graph_gives(name: str, gives: str) -> None:
    member = inspect.getattr_static(hetu.Graph, name)
    assert getattr(member, "fget", member).__annotations__["return"] == gives
