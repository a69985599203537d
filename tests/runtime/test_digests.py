"""Digests are equal for what one script makes, and tell apart whatever a user can make otherwise."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

import hetu
from hetu.runtime.ranks import digests
from hetu.runtime.ranks.digests import array_text, graph_digest, graph_lines, state_parts, value_text

DTYPES = of_numpy.integer_dtypes() | of_numpy.floating_dtypes(sizes=[16, 32, 64]) | of_numpy.boolean_dtypes()
ARRAYS = of_numpy.arrays(DTYPES, of_numpy.array_shapes(min_dims=0, min_side=0, max_side=3))


def built(change: Callable[[], Any] | None = None) -> hetu.Graph:
    """A graph with symbols, a constant, and whatever a change adds."""
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [s, 2], name="x")
        hetu.silu(x * hetu.constant(np.ones(2, np.float32)) + hetu.full([s, 2], 0.5))
        if change is not None:
            change()
    return g


def two(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two symbols of one name, in either order."""
    one, other = hetu.IntSymbol("n", **a), hetu.IntSymbol("n", **b)
    hetu.full([one, other], 0.0)


CHANGES: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "zero": lambda: hetu.full([2], 0.0),
    "minus zero": lambda: hetu.full([2], -0.0),
    "an int": lambda: hetu.full([2], 0, "int64"),
    "a bool": lambda: hetu.full([2], False, "bool"),
    "a size": lambda: hetu.full([3], 0.0),
    "a symbol": lambda: hetu.full([hetu.IntSymbol("n")], 0.0),
    "a bounded symbol": lambda: hetu.full([hetu.IntSymbol("n", max=7)], 0.0),
    "a multiple": lambda: hetu.full([hetu.IntSymbol("n", multiple_of=2)], 0.0),
    "one symbol twice": lambda: (n := hetu.IntSymbol("n"), hetu.full([n, n], 0.0)),
    "two of one name": lambda: two({}, {}),
    "the first is bounded": lambda: two({"max": 7}, {}),
    "the second is bounded": lambda: two({}, {"max": 7}),
    "an array": lambda: hetu.constant(np.zeros(2, np.float32)),
    "another array": lambda: hetu.constant(np.full(2, 1e-45, np.float32)),
    "a longer array": lambda: hetu.constant(np.zeros(3, np.float32)),
    "a wider array": lambda: hetu.constant(np.zeros(2, np.float64)),
    "a weight": lambda: hetu.parameter(0.0, [2]),
    "a weight of an array": lambda: hetu.parameter(np.zeros(2), [2]),
    "a weight that stays": lambda: hetu.parameter(0.0, [2], requires_grad=False),
    "a normal weight": lambda: hetu.parameter(functools.partial(torch.nn.init.normal_, std=0.1), [2]),
    "a wider normal weight": lambda: hetu.parameter(functools.partial(torch.nn.init.normal_, std=0.2), [2]),
    "a named node": lambda: hetu.full([2], 0.0, name="zero"),
    "a demand": lambda: hetu.require(hetu.IntSymbol("n") <= 7),
    "another demand": lambda: hetu.require(hetu.IntSymbol("n") < 7),
}


def test_graphs_that_differ_have_other_digests() -> None:
    found = {name: graph_digest(built(change)).whole for name, change in CHANGES.items()}
    assert len(set(found.values())) == len(found), found
    assert found == {name: graph_digest(built(change)).whole for name, change in CHANGES.items()}


def test_strategies_differ_by_what_they_say() -> None:
    s = hetu.IntSymbol("s")
    lists = [([s, 3], [0, 0]), ([s, 3], [0, 1]), ([s, 4], [0, 0]), ([3, s], [0, 0])]
    graphs = [hetu.graph("define_and_run", strategies=[hetu.Strategy(*pair)]) for pair in lists]
    assert len({graph_digest(g).whole for g in graphs}) == len(lists)


def test_places_in_the_script_are_no_part() -> None:
    def first() -> None:
        hetu.full([2], 0.0)

    def second() -> None:
        hetu.full([2], 0.0)

    assert graph_digest(built(first)).whole == graph_digest(built(second)).whole


def test_it_does_not_matter_when_a_graph_is_looked_at() -> None:
    """A rank that refused a run has not looked, and the others have."""

    def build(looks: bool) -> str:
        s = hetu.IntSymbol("s")
        g = hetu.graph("define_and_run", device="cpu")
        for part in range(3):
            with g:
                hetu.placeholder("float32", [s + part, hetu.IntSymbol(f"n{part}")])
                hetu.require(hetu.IntSymbol(f"m{part}") <= s)
            if looks:
                graph_digest(g)
        return graph_digest(g).whole

    assert build(True) == build(False)


def test_what_was_digested_is_not_digested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    g, plain, seen = built(), digests.array_text, list[Any]()
    monkeypatch.setattr(digests, "array_text", lambda array: (seen.append(array), plain(array))[1])
    graph_digest(g)
    with g:
        hetu.constant(np.zeros(5, np.float32))
        hetu.require(hetu.IntSymbol("n") <= 7)
    graph_digest(g)
    assert [array.shape for array in seen] == [(2,), (5,)]


def test_every_node_has_a_line() -> None:
    g = built()
    names = [line.partition(":")[0] for line in graph_lines(g)]
    assert names == ["the graph itself", *(node.name for node in g.nodes)]


SCRIPT = """
import hetu, functools
from hetu.runtime.ranks.digests import graph_digest, value_text
with hetu.graph("define_and_run") as g:
    hetu.parameter(functools.partial(print, {"a", "b", "c"}, object, lambda t: t), [hetu.IntSymbol(4).data])
print(graph_digest(g).whole, value_text({"x", "y", "z"}))
"""


def test_processes_agree() -> None:
    """Whatever their addresses, and the order of their sets."""
    command, told = [sys.executable, "-c", SCRIPT], []
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        told.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert told[0] == told[1] != ""


@given(ARRAYS, ARRAYS)
def test_arrays_are_equal_to_the_bit_where_their_texts_are(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
    same = (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    assert (array_text(a) == array_text(b)) == same
    assert a.ndim == 0 or array_text(np.asfortranarray(a)) == array_text(a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.bool])
def test_tensors_of_every_dtype(dtype: torch.dtype) -> None:
    x = torch.arange(6).view(2, 3).to(dtype)
    assert array_text(x.t().contiguous().t()) == array_text(x) != array_text(x.view(3, 2))
    assert array_text(x[:0]) != array_text(x) and array_text(x[0, 0])
    if dtype != torch.bfloat16:
        assert array_text(x) == array_text(x.numpy())


def test_states_name_each_value() -> None:
    groups = [{"lr": 0.1, "params": ["w"]}, {"lr": None}]
    w = torch.zeros(2)
    state = {"w": w, "t": {"step": torch.tensor(3.0), "groups": groups}}
    lines = state_parts(state)
    of_groups = ["t/groups/0/lr = 0.1", "t/groups/0/params/0 = 'w'", "t/groups/1/lr = None"]
    assert lines[:4] == [*of_groups, "t/step = float32 3.0"] and lines[4].startswith("w = float32[2] ")
    w[1] = -0.0
    assert [one == other for one, other in zip(lines, state_parts(state), strict=True)] == [True] * 4 + [False]


@given(st.dictionaries(st.text(), st.integers() | st.floats() | st.booleans() | st.none()))
def test_the_order_of_a_dict_does_not_matter(value: dict[str, Any]) -> None:
    assert value_text(value) == value_text(dict(reversed(value.items())))
