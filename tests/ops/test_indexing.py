"""split, gather, max and broadcast_to in particular: what symbols leave open, and what runs must refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hetu


def constraints(g: hetu.Graph) -> list[hetu.Constraint]:
    """What the ops demand of runs."""
    return [item for node in g.nodes for item in node.constraints]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.booleans())
def test_split_and_concat_undo_each_other(sizes: list[int], symbolic: bool) -> None:
    symbols = [hetu.IntSymbol(f"s{i}") if symbolic else size for i, size in enumerate(sizes)]
    values = np.arange(2 * sum(sizes)).reshape(2, -1)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("int64", [2, sum(symbols)])
        pieces = hetu.split(x, symbols, dim=1)
        back = hetu.concat(pieces, 1)
    assert [piece.shape for piece in pieces] == [(2, size) for size in symbols]
    known = dict(zip(symbols, sizes, strict=True)) if symbolic else {}
    *cut, whole = g.run([*pieces, back], feed_dict={x: values}, int_symbol_dict=known)
    for piece, expected in zip(cut, np.split(values, np.cumsum(sizes)[:-1], 1), strict=True):
        np.testing.assert_array_equal(piece, expected)
    np.testing.assert_array_equal(whole, values)


@given(st.integers(0, 9), st.integers(1, 5))
def test_split_into_equal_pieces_is_torchs(n: int, each: int) -> None:
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder("int64", [n])
        shapes = [piece.shape for piece in hetu.split(x, each)]
    assert shapes == [tuple(piece.shape) for piece in torch.arange(n).split(each)]
    assert not constraints(g)


def test_split_sizes_that_do_not_add_up_are_refused_by_the_run() -> None:
    s, t = hetu.IntSymbol("s"), hetu.IntSymbol("t")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [s])
        front, _ = hetu.split(x, [t, 3])
    feeds = {x: np.zeros(5)}
    assert g.run(front, feed_dict=feeds, int_symbol_dict={t: 2}).shape == (2,)
    with pytest.raises(hetu.ShapeError, match=r"sizes that add up to s, that of dim 0, got \[t, 3\]") as caught:
        g.run(front, feed_dict=feeds, int_symbol_dict={t: 1})
    assert "front, _ = hetu.split(x, [t, 3])" in str(caught.value)


def test_names_of_pieces() -> None:
    with hetu.graph("define_and_run"):
        x = hetu.placeholder("float32", [4])
        assert [piece.name for piece in hetu.split(x, 2, name="half")] == ["half.0", "half.1"]
        assert hetu.split(x, 4, name="whole")[0].name == "whole"


def test_max_of_nothing_is_refused_by_the_run() -> None:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [s, 2], name="x")
        rows, columns = hetu.max(x, 1), hetu.max(x, 0)
    nothing = {x: np.zeros((0, 2))}
    assert g.run(rows, feed_dict=nothing).shape == (0,)
    with pytest.raises(hetu.ShapeError, match=r"in dimension 0, got \[s, 2\]: there is no max of nothing") as caught:
        g.run(columns, feed_dict=nothing)
    assert "s = 0" in str(caught.value)


def test_gather_index_that_is_larger_is_refused_by_the_run() -> None:
    s, t = hetu.IntSymbol("s"), hetu.IntSymbol("t")
    with hetu.graph("define_and_run", device="cpu") as g:
        x, index = hetu.placeholder("float32", [s, 2]), hetu.placeholder("int64", [t, 7])
        out = hetu.gather(x, 1, index)
    assert out.shape == (t, 7)
    assert g.run(out, feed_dict={x: np.zeros((3, 2)), index: np.ones((2, 7), int)}).shape == (2, 7)
    with pytest.raises(hetu.ShapeError, match="index to be no larger than x but for dimension 1"):
        g.run(out, feed_dict={x: np.zeros((3, 2)), index: np.ones((4, 7), int)})


@pytest.mark.parametrize("value", [-1, 3])
def test_a_gather_index_out_of_range_is_refused(value: int) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x, index = hetu.placeholder("float32", [3]), hetu.placeholder("int32", [1])
        out = hetu.gather(x, 0, index)
    with pytest.raises(hetu.BindingError, match=rf"holds {value} at \[0\], expected 0 to below 3"):
        g.run(out, feed_dict={x: np.zeros(3), index: [value]})


def test_broadcast_to_asks_the_run_what_symbols_leave_open() -> None:
    s, t = hetu.IntSymbol("s"), hetu.IntSymbol("t")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [s])
        out, same = hetu.broadcast_to(x, [2, t]), hetu.broadcast_to(x, [2, s])
    assert len(constraints(g)) == 1
    assert g.run(same, feed_dict={x: np.ones(3)}).shape == (2, 3)
    assert g.run(out, feed_dict={x: np.ones(3)}, int_symbol_dict={t: 3}).shape == (2, 3)
    for rows in (3, 1):
        with pytest.raises(hetu.ShapeError, match=r"\[s\] can be stretched to, got \[2, t\]"):
            g.run(out, feed_dict={x: np.ones(rows)}, int_symbol_dict={t: 4})


CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_gradient_of_gather_is_the_same_bits_every_time(device: str) -> None:
    """Many uses of few elements, of sizes that make the order of additions matter."""
    rng = np.random.default_rng(0)
    feeds = rng.standard_normal((16, 4)), rng.integers(0, 4, (16, 20000)), 10 ** rng.uniform(-4, 4, (16, 20000))
    with hetu.graph("define_and_run", device=device) as g:
        x, index = hetu.placeholder("float32", [16, 4]), hetu.placeholder("int64", [16, 20000])
        weight = hetu.placeholder("float32", [16, 20000])
        dx = hetu.gradients(hetu.gather(x, 1, index), x, weight)
    with hetu.config(deterministic=True):
        first, *others = [g.run(dx, feed_dict=dict(zip((x, index, weight), feeds, strict=True))) for _ in range(5)]
    exact = np.zeros((16, 4))
    for row in range(16):
        np.add.at(exact[row], feeds[1][row], feeds[2][row])
    np.testing.assert_allclose(first.cpu().numpy(), exact, rtol=1e-4)
    assert all(torch.equal(first, other) for other in others)
