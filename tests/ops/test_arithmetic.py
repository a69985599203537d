"""add, sub, mul, div in particular: promotion, broadcasting, numbers and symbols as operands."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.longer import LONGER

import hetu
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.dtypes import ALL

OPS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}
NUMBERS = (3, 2.5, True)


def constraints(g: hetu.Graph) -> list[hetu.Constraint]:
    """What the ops demand of runs."""
    return [item for node in g.nodes for item in node.constraints]


@pytest.fixture
def float64_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def torch_result(op: str, a: Any, b: Any) -> torch.Tensor | None:
    try:
        return OPS[op](a, b)
    except RuntimeError:  # torch does not subtract bools
        return None


def build_or_none(op: str, a: Any, b: Any) -> hetu.Tensor | None:
    try:
        return OPS[op](a, b)
    except hetu.DTypeError:
        return None


@pytest.mark.parametrize("op", OPS)
def test_promotion_is_torchs(op: str) -> None:
    """Every pair of dtypes, with and without dimensions, and every kind of number on either side."""
    with hetu.graph("define_and_run", device="cpu") as g:
        operands = [
            (hetu.placeholder(dtype, shape), torch.full(shape, 2, dtype=TORCH_DTYPES[dtype]))
            for dtype in ALL
            for shape in ((), (2,))
        ]
        numbers = [(number, number) for number in NUMBERS]
        pairs = [(a, b) for a in operands for b in (*operands, *numbers)]
        pairs += [(a, b) for a in numbers for b in operands]
        built = [build_or_none(op, a[0], b[0]) for a, b in pairs]
    wanted = [torch_result(op, a[1], b[1]) for a, b in pairs]
    assert [item is None for item in built] == [item is None for item in wanted]
    fetches = [item for item in built if item is not None]
    results = g.run(fetches, feed_dict=dict(operands))
    for tensor, result, expected in zip(fetches, results, (item for item in wanted if item is not None), strict=True):
        assert TORCH_DTYPES[tensor.dtype] == result.dtype == expected.dtype, tensor.op
        # number / tensor is rounded once here and twice in torch
        torch.testing.assert_close(result, expected, msg=lambda text, node=tensor.op: f"{node.inputs}: {text}")


@pytest.mark.usefixtures("float64_default")
@pytest.mark.parametrize("op", OPS)
def test_dtype_does_not_depend_on_torchs_default(op: str) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("int64", [2])
        fetches = [OPS[op](x, 2.5), OPS[op](2.5, x), *([x / x, 2 / x] if op == "div" else [])]
    for tensor, result in zip(fetches, g.run(fetches, feed_dict={x: np.array([1, 2])}), strict=True):
        assert tensor.dtype == hetu.float32
        assert result.dtype == torch.float32


@settings(deadline=None, max_examples=60 * LONGER)
@given(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4, min_side=0), st.sampled_from(list(OPS)))
def test_broadcasting_is_numpys(shapes: hnp.BroadcastableShapes, op: str) -> None:
    a, b = (np.random.default_rng(0).uniform(1, 2, shape) for shape in shapes.input_shapes)
    with hetu.graph("define_and_run", device="cpu") as g:
        x, y = hetu.placeholder("float64", a.shape), hetu.placeholder("float64", b.shape)
        out = OPS[op](x, y)
    assert out.shape == shapes.result_shape
    np.testing.assert_array_equal(g.run(out, feed_dict={x: a, y: b}).numpy(), OPS[op](a, b))


@settings(deadline=None, max_examples=60 * LONGER)
@given(hnp.array_shapes(min_dims=0, max_dims=3, max_side=3), hnp.array_shapes(min_dims=0, max_dims=3, max_side=3))
def test_what_numpy_does_not_broadcast_is_refused(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    try:
        wanted = np.broadcast_shapes(one, other)
    except ValueError:
        wanted = None
    with hetu.graph("define_and_run"):
        x, y = hetu.placeholder("float32", one), hetu.placeholder("float32", other)
        if wanted is None:
            with pytest.raises(hetu.ShapeError, match="that broadcast"):
                hetu.add(x, y)
        else:
            assert hetu.add(x, y).shape == wanted


def test_symbols_that_may_differ_are_compared_by_the_run() -> None:
    s, t = hetu.IntSymbol("s"), hetu.IntSymbol("t")
    with hetu.graph("define_and_run", device="cpu") as g:
        x, y = hetu.placeholder("float32", [s, 2], name="x"), hetu.placeholder("float32", [t, 2], name="y")
        out = x + y
    assert len(constraints(g)) == 1
    assert g.run(out, feed_dict={x: np.ones((3, 2)), y: np.ones((3, 2))}).shape == (3, 2)
    for rows in (4, 1):  # 1 is not stretched: whether it is would have to be known when the graph is built
        with pytest.raises(hetu.ShapeError) as caught:
            g.run(out, feed_dict={x: np.ones((3, 2)), y: np.ones((rows, 2))})
        message = str(caught.value)
        assert "[add] expected shapes that broadcast, got [s, 2] and [t, 2]" in message
        assert "out = x + y" in message
        assert "s = 3" in message
        assert f"t = {rows}" in message


def test_constraints_are_only_recorded_where_undecided() -> None:
    s, u = hetu.IntSymbol("s"), hetu.IntSymbol("u", min=2, max=4)
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder("float32", [s, 1, 3])
        assert (x + x).shape == (s, 1, 3)
        assert (x + hetu.placeholder("float32", [2 * s + 1 - s - 1, 5, 1])).shape == (s, 5, 3)
        assert not constraints(g)
        assert (hetu.placeholder("float32", [u]) + hetu.placeholder("float32", [3])).shape == (3,)
        assert len(constraints(g)) == 1
        with pytest.raises(hetu.ShapeError, match="u and 5 differ"):
            hetu.placeholder("float32", [u]) + hetu.placeholder("float32", [5])


def test_symbols_are_operands_on_either_side() -> None:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [s])
        fetches = [x + s, s + x, x - s, s - x, x * (s // 2), (s + 1) * x, x / s, s / x, x - 2**70, hetu.add(s, x)]
    values = np.array([1.0, 2.0, 4.0], "float32")
    wanted = [values + 3, values + 3, values - 3, 3 - values, values, 4 * values, values / 3, 3 / values]
    wanted += [values - np.float32(2**70), values + 3]
    for result, expected in zip(g.run(fetches, feed_dict={x: values}), wanted, strict=True):
        assert result.dtype == torch.float32
        np.testing.assert_array_equal(result.numpy(), expected)


def test_a_symbol_that_is_only_an_operand_is_needed() -> None:
    t = hetu.IntSymbol("t")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("int64", [2])
        out = x * t
    np.testing.assert_array_equal(g.run(out, feed_dict={x: [1, 2]}, int_symbol_dict={t: 5}), [5, 10])
    with pytest.raises(hetu.UnboundSymbolError, match="no value for t"):
        g.run(out, feed_dict={x: [1, 2]})


def test_a_number_over_a_tensor_is_rounded_once() -> None:
    values = np.arange(1, 300).astype("float32")
    with hetu.graph("define_and_run", device="cpu") as g:
        x, y = hetu.placeholder("float32", [299]), hetu.placeholder("float16", [3])
        exact, half = 49 / x, 1e5 / y
    np.testing.assert_array_equal(g.run(exact, feed_dict={x: values}).numpy(), np.float32(49) / values)
    np.testing.assert_array_equal(
        g.run(half, feed_dict={y: np.array([1e4, 2, -4e4])}).numpy(), np.float16([10, 5e4, -2.5])
    )


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1])
def test_a_number_that_would_wrap_around_is_refused(number: int) -> None:
    with hetu.graph("define_and_run"):
        x = hetu.placeholder("int32", [2])
        assert (x + (number - np.sign(number).item())).dtype == hetu.int32
        with pytest.raises(hetu.DTypeError, match=f"{number} does not fit hetu.int32"):
            x + number


def test_arrays_are_no_operands() -> None:
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder("float32", [2])
        for array in (np.ones(2), torch.ones(2)):
            for call in (lambda array=array: array * x, lambda array=array: x * array):
                with pytest.raises(hetu.DTypeError, match=r"wrap arrays in hetu\.constant"):
                    call()
    assert len(g.nodes) == 1


def test_negation_and_matmul_by_operator() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [2, 2])
        fetches = [-x, x @ x]
    values = np.array([[1.0, 2.0], [3.0, 4.0]], "float32")
    negated, squared = g.run(fetches, feed_dict={x: values})
    np.testing.assert_array_equal(negated, -values)
    np.testing.assert_array_equal(squared, values @ values)
