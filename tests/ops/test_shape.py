"""reshape, transpose, slice and concat in particular: what symbols leave open, and what runs must refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.longer import LONGER

import hetu

BOUND = st.integers(-8, 8) | st.none()


def constraints(g: hetu.Graph) -> list[hetu.Constraint]:
    """What the ops demand of runs."""
    return [item for node in g.nodes for item in node.constraints]


@settings(deadline=None, max_examples=100 * LONGER)
@given(st.integers(0, 8), BOUND, BOUND, st.integers(1, 4), st.booleans())
def test_slice_is_pythons_where_bounds_hold(
    n: int, start: int | None, stop: int | None, step: int, symbolic: bool
) -> None:
    low, high = (0 if start is None else start + n * (start < 0)), (n if stop is None else stop + n * (stop < 0))
    start, s = 0 if start is None else start, hetu.IntSymbol("s")
    values = np.arange(n)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("int64", [s if symbolic else n])

        def run() -> torch.Tensor:
            out = hetu.slice(x, 0, start, stop, step)
            return g.run(out, feed_dict={x: values})

        if 0 <= low <= high <= n:
            np.testing.assert_array_equal(run(), values[low:high:step])
        else:
            with pytest.raises(hetu.ShapeError, match="expected 0 <= start <= stop <= "):
                run()


def test_slice_bounds_are_symbols_of_the_run() -> None:
    s, t = hetu.IntSymbol("s"), hetu.IntSymbol("t")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("int64", [s], name="x")
        window = hetu.slice(x, 0, t, t + 2)  # t is in no shape: 2 elements, wherever they start
        tail = hetu.slice(x, 0, t)
    assert window.shape == (2,)
    assert tail.shape == (s - t,)
    feeds = {x: np.arange(5)}
    np.testing.assert_array_equal(g.run(window, feed_dict=feeds, int_symbol_dict={t: 3}), [3, 4])
    np.testing.assert_array_equal(g.run(tail, feed_dict=feeds, int_symbol_dict={t: 1}), [1, 2, 3, 4])
    with pytest.raises(hetu.ShapeError, match=r"stop <= s in dim 0") as caught:
        g.run(window, feed_dict=feeds, int_symbol_dict={t: 4})
    assert "window = hetu.slice(x, 0, t, t + 2)" in str(caught.value)
    with pytest.raises(hetu.UnboundSymbolError, match="no value for t"):
        g.run(window, feed_dict=feeds)


def test_slice_takes_whatever_is_an_index() -> None:
    with hetu.graph("define_and_run"):
        x = hetu.placeholder("float32", [5])
        assert hetu.slice(x, np.int64(0), np.int64(1), np.int32(-1), np.int64(2)).shape == (2,)


@settings(deadline=None, max_examples=100 * LONGER)
@given(st.lists(st.integers(0, 4), max_size=4), st.data())
def test_reshape_is_numpys(shape: list[int], data: st.DataObject) -> None:
    """Sizes shuffled and multiplied together, one perhaps -1; each size a symbol or not."""
    symbols = [hetu.IntSymbol(f"s{i}") if data.draw(st.booleans()) else size for i, size in enumerate(shape)]
    order = data.draw(st.permutations(range(len(shape))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(shape)), max_size=2)))
    groups = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(shape)], strict=True)]
    wanted = [math.prod(shape[i] for i in group) for group in groups]
    asked = [math.prod((symbols[i] for i in group), start=1) for group in groups]
    hole = data.draw(st.none() | st.integers(0, len(groups) - 1))
    if hole is not None:
        assume(math.prod(size for place, size in enumerate(wanted) if place != hole) > 0)
        asked[hole] = -1
    values = np.arange(math.prod(shape)).reshape(shape)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("int64", symbols)
        out = hetu.reshape(x, asked)
    result = g.run(out, feed_dict={x: values})
    assert tuple(result.shape) == tuple(wanted)
    np.testing.assert_array_equal(result, values.reshape(wanted))


def test_reshape_asks_the_run_what_symbols_leave_open() -> None:
    s, t = hetu.IntSymbol("s"), hetu.IntSymbol("t")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [s], name="x")
        pairs, rows, square = hetu.reshape(x, [-1, 2]), hetu.reshape(x, [t, -1]), hetu.reshape(x, [t, t])
    six = {x: np.zeros(6, "float32")}
    assert g.run(pairs, feed_dict=six, int_symbol_dict={t: 1}).shape == (3, 2)
    with pytest.raises(hetu.ShapeError, match=r"whole number in the place of -1 in a reshape from \[s\] to \[-1, 2\]"):
        g.run(pairs, feed_dict={x: np.zeros(5, "float32")})
    with pytest.raises(hetu.ShapeError, match="with a size of 0"):
        g.run(rows, feed_dict=six, int_symbol_dict={t: 0})
    with pytest.raises(hetu.ShapeError, match="as many elements as x"):
        g.run(square, feed_dict=six, int_symbol_dict={t: 2})


def test_reshape_needs_no_run_for_what_can_be_told() -> None:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder("float32", [s, 12])
        assert hetu.reshape(x, [s, 3, -1]).shape == (s, 3, 4)
        assert hetu.reshape(x, [-1, 4]).shape == (3 * s, 4)
        assert hetu.reshape(x, [3 * s, 2, 2]).shape == (3 * s, 2, 2)
        assert hetu.reshape(x, [12 * s]).shape == (12 * s,)
        assert not constraints(g)


def test_reshape_of_an_empty_tensor_with_a_symbol_of_zero() -> None:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [s, 12])
        out = hetu.reshape(x, [s, -1, 4])
    assert g.run(out, feed_dict={x: np.zeros((0, 12), "float32")}).shape == (0, 3, 4)


def test_concat_of_symbolic_lengths() -> None:
    a, b = hetu.IntSymbol("a"), hetu.IntSymbol("b")
    with hetu.graph("define_and_run", device="cpu") as g:
        x, y = hetu.placeholder("int32", [a, 2], name="x"), hetu.placeholder("int64", [b, 2], name="y")
        rows, columns = hetu.concat([x, y]), hetu.concat([x, y], dim=1)
    assert rows.shape == (a + b, 2)
    assert rows.dtype == hetu.int64
    assert columns.shape == (a, 4)
    feeds = {x: np.ones((3, 2), "int32"), y: np.zeros((0, 2), "int64")}
    assert g.prepare(rows, feeds)
    with pytest.raises(hetu.ShapeError, match="equal apart from dimension 1"):
        g.run(columns, feed_dict=feeds)


def test_concat_records_only_its_own_sizes() -> None:
    a, b = hetu.IntSymbol("a"), hetu.IntSymbol("b")
    with hetu.graph("define_and_run") as g:
        x = [hetu.placeholder("float32", [n, m]) for n, m in ((a, b), (2, b), (a, 3))]
        assert hetu.concat([x[0], x[1]], 0).shape == (a + 2, b)
        assert not constraints(g)
        assert hetu.concat([x[0], x[2]], 0).shape == (2 * a, 3)
    assert len(constraints(g)) == 1
