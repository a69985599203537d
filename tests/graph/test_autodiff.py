"""hetu.gradients itself: what it sums up, what it adds to a graph, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.symbols import constraint

VALUES = np.array([1.0, -2.0, 0.5])


def ops_of(g: hetu.Graph, *fetches: hetu.Tensor) -> list[str]:
    """The ops that a run of these fetches computes."""
    return sorted(node.definition.name for node in g.planner.subgraph(fetches).nodes)


def names_since(g: hetu.Graph, before: int) -> list[str]:
    return sorted(node.definition.name for node in g.nodes[before:])


def test_uses_of_a_tensor_are_summed_up() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [3])
        y = x * x + 3 * x - x / 2 + hetu.exp(x)
        dx = hetu.gradients(y, x)
    assert isinstance(dx, hetu.Tensor)
    assert (dx.dtype, dx.shape) == (x.dtype, x.shape)
    np.testing.assert_allclose(g.run(dx, feed_dict={x: VALUES}), 2 * VALUES + 2.5 + np.exp(VALUES))


def test_a_diamond_is_walked_once() -> None:
    """Ten doublings: 1024 paths, but one gradient a node."""
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [3])
        y = x
        for _ in range(10):
            y = y + y
        before = len(g.nodes)
        dx = hetu.gradients(y, x)
    assert names_since(g, before) == ["add"] * 10 + ["full"]
    np.testing.assert_array_equal(g.run(dx, feed_dict={x: VALUES}), [1024.0] * 3)


def test_several_ys_and_xs() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x, z = hetu.placeholder("float64", [3]), hetu.placeholder("float64", [])
        grads = hetu.gradients([x * z, x + 1, z * z], [z, x])
        assert hetu.gradients([x * z], [x, x])[0].shape == (3,)
    assert isinstance(grads, list)
    d_z, d_x = g.run(grads, feed_dict={x: VALUES, z: 3.0})
    np.testing.assert_allclose(d_z, VALUES.sum() + 6)
    np.testing.assert_allclose(d_x, [4.0] * 3)


def test_uses_are_summed_up_in_an_order_that_all_processes_share() -> None:
    """That of the xs, and not of a set: ranks that build other graphs can't run together."""
    with hetu.graph("define_and_run") as g:
        xs = [hetu.placeholder(hetu.float32, [2], name=f"x{i}") for i in range(12)]
        grads = hetu.gradients([hetu.tanh(x) * x for x in xs], xs)
    assert [grad.op.id for grad in grads] == sorted(grad.op.id for grad in grads)
    g.verify()


def test_weights_of_ys() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x, w = hetu.placeholder("float64", [3]), hetu.placeholder("float64", [3])
        one = hetu.gradients(x * x, x, w)
        some = hetu.gradients([x * x, 5 * x], x, [w, None])
    feeds = {x: VALUES, w: np.array([1.0, 0.0, 10.0])}
    np.testing.assert_allclose(g.run(one, feed_dict=feeds), 2 * VALUES * feeds[w])
    np.testing.assert_allclose(g.run(some, feed_dict=feeds), 2 * VALUES * feeds[w] + 5)


def test_weights_that_do_not_fit_are_refused() -> None:
    with hetu.graph("define_and_run"):
        x = hetu.placeholder("float64", [3])
        y = x * x
        with pytest.raises(hetu.ShapeError, match="2 grad_ys for 1 ys"):
            hetu.gradients(y, x, [x, x])
        with pytest.raises(hetu.DTypeError, match=r"the weight of mul_0 is float32, expected float64"):
            hetu.gradients(y, x, hetu.placeholder("float32", [3]))
        with pytest.raises(hetu.ShapeError, match=r"the weight of mul_0 has shape \[\], expected \[3\]"):
            hetu.gradients(y, x, hetu.placeholder("float64", []))


def test_a_y_that_is_an_x_and_an_x_on_the_way_to_another() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x, w = hetu.placeholder("float64", [3]), hetu.placeholder("float64", [3])
        itself = hetu.gradients(x, x, w)
        assert itself is w
        y = x * x
        z = y * y
        d_y, d_x = hetu.gradients([z, y], [y, x])
    feeds = {x: VALUES, w: np.ones(3)}
    np.testing.assert_allclose(g.run(d_y, feed_dict=feeds), 2 * VALUES**2 + 1)
    np.testing.assert_allclose(g.run(d_x, feed_dict=feeds), 4 * VALUES**3 + 2 * VALUES)


def test_one_y_named_twice_counts_twice() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [3])
        y = x * x
        dx = hetu.gradients([y, y], x)
    np.testing.assert_allclose(g.run(dx, feed_dict={x: VALUES}), 4 * VALUES)


def test_gradients_of_gradients() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [3])
        first = hetu.gradients(x**3, x)
        second = hetu.gradients(first, x)
        third = hetu.gradients(second, x)
    results = g.run([first, second, third], feed_dict={x: VALUES})
    for got, wanted in zip(results, (3 * VALUES**2, 6 * VALUES, np.full(3, 6.0)), strict=True):
        np.testing.assert_allclose(got, wanted)


@pytest.mark.parametrize("op", ["embedding", "dropout"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_linear_ops_can_be_differentiated(op: str, dtype: str) -> None:
    """For y = c x the first gradient of y^3 is 3 c^3 x^2, and that of its square 36 c^6 x^3."""
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(dtype, [2, 4], name="x")
        ids = hetu.constant([1, 0, 1], dtype="int64")
        y = hetu.embedding(ids, x) if op == "embedding" else hetu.dropout(x, 0.5)
        first = hetu.gradients(hetu.sum(y * y * y), x)
        second = hetu.gradients(hetu.sum(first * first), x)
        third = hetu.gradients(hetu.sum(second), x)
    data = np.arange(8.0).reshape(2, 4)
    hetu.manual_seed(0)
    once, twice, thrice = (value.double().numpy() for value in g.run([first, second, third], {x: data.astype(dtype)}))
    uses = np.array([[1.0], [2.0]]) if op == "embedding" else np.where(once == 0, 0, 8.0)
    np.testing.assert_allclose(once, 3 * uses * data**2)
    np.testing.assert_allclose(twice, 36 * uses**2 * data**3)
    np.testing.assert_allclose(thrice, 108 * uses**2 * data**2)


def test_the_gradient_of_a_long_concat_is_one_node() -> None:
    """So that building it takes time in proportion to the number of pieces, and their bounds make no long sums."""
    with hetu.graph("define_and_run", device="cpu") as g:
        xs = [hetu.placeholder("float32", [hetu.IntSymbol(f"s{i}"), 2]) for i in range(50)]
        loss = hetu.sum(hetu.concat(xs, 0) * hetu.concat(xs, 0))
        before = len(g.nodes)
        grads = hetu.gradients(loss, xs)
    assert names_since(g, before).count("split") == 2
    assert "slice" not in names_since(g, before)
    feeds = {x: np.full((i % 3, 2), float(i), np.float32) for i, x in enumerate(xs)}
    for i, grad in enumerate(g.run(grads, feeds)):
        assert grad.tolist() == [[2.0 * i] * 2] * (i % 3)


def test_bounds_of_many_pieces_are_compared_by_what_does_not_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are sums of many symbols: multiplying out their differences took time that was quadratic in the pieces."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a difference was multiplied out")

    monkeypatch.setattr(constraint, "difference_of", refuse)
    with hetu.graph("define_and_run", device="cpu") as g:
        sizes = [hetu.IntSymbol(f"s{i}") for i in range(20)]
        x = hetu.placeholder("float32", [sum(sizes[1:], start=sizes[0])])
        end, pieces = 0 * sizes[0], []
        for size in sizes:
            pieces.append(hetu.slice(x, 0, end, end + size))
            end = end + size
    data = np.arange(30, dtype=np.float32)
    lengths = [i % 4 for i in range(20)]
    found = g.run(pieces, {x: data}, int_symbol_dict=dict(zip(sizes[:-1], lengths[:-1], strict=True)))
    assert [len(piece) for piece in found] == lengths
    assert torch.cat(found).tolist() == data.tolist()


def test_nodes_of_several_outputs() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [3])
        first, second, _ = hetu.split(x, 1)
        dx, d_first = hetu.gradients(first * second, [x, first])
    values = g.run([dx, d_first], feed_dict={x: VALUES})
    np.testing.assert_array_equal(values[0], [VALUES[1], VALUES[0], 0])
    np.testing.assert_array_equal(values[1], [VALUES[1]])


def test_symbolic_sizes_are_those_of_the_xs() -> None:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        x, w = hetu.placeholder("float64", [s, 2]), hetu.placeholder("float64", [4, 2])
        loss = hetu.mean(hetu.silu(hetu.linear(x, w)))
        grads = hetu.gradients(loss, [x, w])
    assert [item.shape for item in grads] == [(s, 2), (4, 2)]
    assert [item.shape for item in g.run(grads, feed_dict={x: np.ones((5, 2)), w: np.ones((4, 2))})] == [(5, 2), (4, 2)]
    assert [item.shape for item in g.run(grads, feed_dict={x: np.ones((0, 2)), w: np.ones((4, 2))})] == [(0, 2), (4, 2)]


# What runs, and what is added


def test_branches_that_are_not_asked_for_do_not_run() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x, w, v = (hetu.placeholder("float64", [3, 3], name=name) for name in "xwv")
        y = hetu.sum(hetu.relu(x @ w) @ v)
        before = len(g.nodes)
        d_x, d_w, d_v = hetu.gradients(y, [x, w, v])
    assert sum(node.definition.name == "matmul" for node in g.nodes[before:]) == 4
    assert ops_of(g, d_v).count("matmul") == 2  # x @ w, and its own
    assert ops_of(g, d_w).count("matmul") == 3  # x @ w, through v, its own
    assert ops_of(g, y) == sorted(["placeholder"] * 3 + ["matmul", "relu", "matmul", "sum"])
    assert d_x.shape == (3, 3)


def test_only_rules_that_are_needed_are_built() -> None:
    """The gradient of the weights alone: no product for that of x, nothing for branches that lead elsewhere."""
    with hetu.graph("define_and_run") as g:
        x, w = hetu.placeholder("float64", [2, 3]), hetu.placeholder("float64", [4, 3])
        other = hetu.gelu(hetu.exp(x))
        y = hetu.sum(hetu.linear(x, w)) + hetu.sum(other)
        before = len(g.nodes)
        hetu.gradients(y, w)
        assert names_since(g, before).count("matmul") == 1
        assert not {"gelu_grad", "mul"} & set(names_since(g, before))
        before = len(g.nodes)
        hetu.gradients(w * w, w)  # y is no part of it: the product, and twice the gradient of one factor
        assert names_since(g, before) == ["add", "full", "mul", "mul", "mul"]


def test_what_two_terms_share_runs_once() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [3])
        dx = hetu.gradients(x * x, x)
    assert ops_of(g, dx) == ["add", "full", "mul", "placeholder"]
    np.testing.assert_allclose(g.run(dx, feed_dict={x: VALUES}), 2 * VALUES)


def test_an_op_without_a_gradient_beside_the_way_does_no_harm() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x, z = hetu.placeholder("float64", [3]), hetu.placeholder("float64", [3])
        chosen = hetu.cast(z, "int64")
        dx = hetu.gradients(x * chosen + hetu.where(x > 0, x, 0), [x])[0]
    np.testing.assert_allclose(g.run(dx, feed_dict={x: VALUES, z: [2.0, 3.0, 4.0]}), [3.0, 3.0, 5.0])


def test_nodes_point_at_the_line_that_asked_for_them() -> None:
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder("float64", [3])
        y = hetu.relu(x)
        before = len(g.nodes)
        hetu.gradients(y, x)  # here
    assert {node.where.line for node in g.nodes[before:]} == {"hetu.gradients(y, x)  # here"}


# Refusals


def refusal(error: type[hetu.HetuError], *request: Any) -> str:
    with pytest.raises(error) as caught:
        hetu.gradients(*request)
    message = str(caught.value)
    assert message.startswith("[gradients] ")
    assert "where:  test_autodiff.py:" in message
    return message


def test_integer_tensors_are_refused_by_name() -> None:
    with hetu.graph("define_and_run") as g:
        x, n = hetu.placeholder("float64", [3], name="x"), hetu.placeholder("int64", [3], name="n")
        counted = hetu.cast(x, "int64")
        size = len(g.nodes)
        message = refusal(hetu.DTypeError, x * n, n)
        assert "n, made by n at test_autodiff.py:" in message
        assert "is int64: only floating tensors have a gradient" in message
        assert "cast_0, made by" in refusal(hetu.DTypeError, counted, x)
        assert "expected xs to be graph tensors, got 2.0" in refusal(hetu.DTypeError, x, [2.0])
    assert len(g.nodes) == size + 1


def test_ops_without_a_gradient_are_refused_by_name() -> None:
    with hetu.graph("define_and_run"):
        x = hetu.placeholder("float64", [3], name="x")
        y = hetu.gradients(hetu.cross_entropy(x, hetu.constant(1)), x) * x
        message = refusal(hetu.HetuError, y, x)
    assert "cross_entropy_grad_0, made at test_autodiff.py:" in message
    assert "has no gradient with respect to x: cross_entropy_grad is not differentiable there" in message
    assert "stop_gradient" in message


def test_what_nothing_depends_on_is_refused() -> None:
    with hetu.graph("define_and_run"):
        x, z = hetu.placeholder("float64", [3], name="x"), hetu.placeholder("float64", [3], name="z")
        assert "no y depends on z through floating tensors (made at test_autodiff.py:" in refusal(
            hetu.HetuError, x * x, [x, z]
        )
        through_ints = hetu.cast(hetu.cast(x, "int64"), "float64")
        assert "no y depends on x" in refusal(hetu.HetuError, through_ints, x)
        assert "no y depends on x" in refusal(hetu.HetuError, hetu.cast(x > 0, "float64"), x)
    with hetu.graph("define_and_run"):
        stranger = hetu.placeholder("float64", [3])
        assert "no y depends on" in refusal(hetu.HetuError, stranger * 2, x)
        assert "ys belong to different graphs" in refusal(hetu.HetuError, [stranger, x], x)


def test_refusals_leave_only_dead_nodes() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x, z = hetu.placeholder("float64", [3]), hetu.placeholder("float64", [3])
        y = x * x
        refusal(hetu.HetuError, y, z)
        dx = hetu.gradients(y, x)
    g.verify()
    np.testing.assert_allclose(g.run(dx, feed_dict={x: VALUES}), 2 * VALUES)


# Constants, numbers, precision


def test_stopped_gradients_count_as_constants() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [3], name="x")
        still = hetu.stop_gradient(x * x)
        dx = hetu.gradients(x * still, x)
        assert "no y depends on x" in refusal(hetu.HetuError, still, x)
        d_still = hetu.gradients(still * x, still)  # as an x it is as good as any
        beside = hetu.gradients([still, 3 * x], x)
    values = g.run([dx, d_still, still, beside], feed_dict={x: VALUES})
    for got, wanted in zip(values, (VALUES**2, VALUES, VALUES**2, np.full(3, 3.0)), strict=True):
        np.testing.assert_allclose(got, wanted)


def test_a_fetched_view_is_not_the_memory_that_was_fed() -> None:
    fed = torch.ones(2, 1)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [2, 1])
        views = [hetu.stop_gradient(x), hetu.broadcast_to(x, [2, 3]), *hetu.split(x, 1), hetu.slice(x, 0, 1)]
        identity = hetu.gradients(hetu.reshape(x, [2]), x, hetu.reshape(x, [2]))
    for result in g.run([*views, identity], feed_dict={x: fed}):
        result.fill_(7)
    assert fed.eq(1).all()


def test_numbers_and_symbols_have_no_gradient() -> None:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [s])
        y = (2 * x + s) * s - x / 4 + np.float64(3.0) * x + np.int64(2) - x * np.bool_(True)
        dx = hetu.gradients(y, x)
    np.testing.assert_allclose(g.run([y, dx], feed_dict={x: VALUES})[1], np.full(3, 2 * 3 - 0.25 + 3 - 1))


def test_numpy_scalars_are_numbers() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [2])
        results = [x * np.float64(2.0), np.float32(0.5) + x, x * np.int8(3), x ** np.int64(2), x - np.float16(0.5)]
        assert {item.dtype for item in results} == {hetu.float32}
        assert all(type(node.inputs[1]) in (int, float) for node in g.nodes[1:] if node.definition.name != "add")
        results += [np.array(2.0) * x, torch.tensor(2) * x, x + torch.tensor(0.5)]
        for other in (
            np.ones(2),
            torch.ones(2),
            np.complex64(1),
            np.timedelta64(1, "ns"),
            np.ma.masked,
            np.str_("a"),
            np.datetime64("2020-01-01"),
        ):
            with pytest.raises(hetu.DTypeError, match=r"expected (a|b) to be a graph tensor or a number, got"):
                x * other
    wanted = [[2.0, 4.0], [1.5, 2.5], [3.0, 6.0], [1.0, 4.0], [0.5, 1.5]]
    wanted += [[2.0, 4.0], [2.0, 4.0], [1.5, 2.5]]
    for result, expected in zip(g.run(results, feed_dict={x: [1.0, 2.0]}), wanted, strict=True):
        assert result.tolist() == expected


@pytest.mark.parametrize("low", [hetu.bfloat16, hetu.float16])
def test_autocast_casts_the_forward_and_gives_gradients_in_float32(low: hetu.DType) -> None:
    rng = np.random.default_rng(0)
    with hetu.graph("define_and_run", device="cpu") as g:
        x, w, b = hetu.placeholder("float32", [4, 3]), hetu.parameter(0.5, [5, 3]), hetu.parameter(0.0, [5])
        with hetu.autocast(low):
            hidden = hetu.linear(x, w, b)
            powered = hetu.exp(hidden)
            total = hetu.sum(hidden)
            loss = hetu.sum(powered) + total
            grads = hetu.gradients(loss, [x, w, b])
        assert (hidden.dtype, powered.dtype, total.dtype) == (low, hetu.float32, hetu.float32)
        assert {item.dtype for item in grads} == {hetu.float32}
        products = [node for node in g.nodes if node.definition.name == "matmul"]
        assert {tensor.dtype for node in products for tensor in node.tensors} == {low}  # in that of their forward
        assert hetu.linear(x, w).dtype == hetu.float32
    values = rng.standard_normal((4, 3)).astype("float32")
    t, wt, bt = (
        torch.from_numpy(item).requires_grad_()
        for item in (values, np.full((5, 3), 0.5, "float32"), np.zeros(5, "float32"))
    )
    hidden_t = t @ wt.T + bt
    wanted = torch.autograd.grad(hidden_t.exp().sum() + hidden_t.sum(), [t, wt, bt])
    for got, expected in zip(g.run(grads, feed_dict={x: values}), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["matmul", "linear"], hetu.bfloat16),
        (["exp", "log", "pow", "rsqrt", "sum"], hetu.float32),
        (["relu", "add", "max", "sqrt", "tanh"], None),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_autocast_is_torchs(names: list[str], wanted: hetu.DType | None, dtype: str) -> None:
    with hetu.graph("define_and_run"), hetu.autocast(hetu.bfloat16):
        x = hetu.placeholder(dtype, [3, 3])
        for name in names:
            y = getattr(hetu, name)(x, x) if name in ("matmul", "linear", "pow", "add") else getattr(hetu, name)(x)
            assert y.dtype == (x.dtype if wanted is None or dtype == "float64" else wanted), name


# Comparisons as operators


def test_comparisons_by_operator() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x, z = hetu.placeholder("float64", [3], name="x"), hetu.placeholder("float64", [3], name="z")
        results = [x < z, x <= z, x > z, x >= z, x < 0, hetu.lt(0, x), hetu.ge(1, x), x**2, 2**x]
    feeds = {x: VALUES, z: VALUES[::-1].copy()}
    a, b = feeds[x], feeds[z]
    wanted = [a < b, a <= b, a > b, a >= b, a < 0, a > 0, a <= 1, a**2, 2**a]
    for result, expected in zip(g.run(results, feed_dict=feeds), wanted, strict=True):
        np.testing.assert_array_equal(result, expected)
    assert {x: 1, z: 2}[x] == 1
    assert (x == z) is False and x in (z, x)
    with pytest.raises(hetu.HetuError, match="neither true nor false"):
        bool(x < z)


def test_what_is_fed_tells_lengths_even_where_its_values_are_not_needed() -> None:
    n = hetu.IntSymbol("n")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [n, 2], name="x")
        dx = hetu.gradients(hetu.sum(x), x)
    for rows in (3, 0, 5):
        assert torch.equal(g.run(dx, {x: np.zeros((rows, 2), np.float32)}), torch.ones(rows, 2))
    shards = hetu.Shards([np.zeros((rows, 2), np.float32) for rows in (1, 4)])
    assert [len(part) for part in g.run(dx, {x: shards})] == [1, 4]
    assert g.run(dx, int_symbol_dict={n: 2}).shape == (2, 2)
    with pytest.raises(hetu.UnboundSymbolError, match="no value for n"):
        g.run(dx)
