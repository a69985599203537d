"""What hetu.require takes: comparisons of sizes, and nothing that only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hetu


@pytest.mark.parametrize("through_graph", [False, True])
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda s, x: s != 3, "hetu.equal"),
        (lambda s, x: s == 3, "hetu.equal"),
        (lambda s, x: s % 8 == 0, "hetu.equal"),
        (lambda s, x: True, "hetu.equal"),
        (lambda s, x: x > 0, "symbolic_shape"),
        (lambda s, x: x == 0, "hetu.equal"),
        (lambda s, x: 3, "hetu.equal"),
        (lambda s, x: None, "hetu.equal"),
        (lambda s, x: "s > 3", "hetu.equal"),
        (lambda s, x: np.bool_(True), "hetu.equal"),
        (lambda s, x: s, "hetu.equal"),
        (lambda s, x: [s > 3], "hetu.equal"),
    ],
)
def test_what_is_no_comparison_of_sizes_is_refused(make: Callable[..., Any], word: str, through_graph: bool) -> None:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [s], name="x")
        with pytest.raises(hetu.HetuError, match="expected constraint to be a comparison of symbols") as caught:
            (g.require if through_graph else hetu.require)(make(s, x))
    assert word in str(caught.value)
    assert "where:  test_require.py" in str(caught.value)
    assert not g.constraints


@pytest.mark.parametrize("through_graph", [False, True])
def test_a_comparison_that_never_holds_is_refused_and_one_that_may_is_kept(through_graph: bool) -> None:
    s = hetu.IntSymbol("s", max=8)
    with hetu.graph("define_and_run", device="cpu") as g:
        require = g.require if through_graph else hetu.require
        with pytest.raises(hetu.ShapeError, match="s > 8 never holds"):
            require(s > 8)
        require(hetu.equal(s % 2, 0))
    assert [str(item) for item in g.constraints] == ["s%2 == 0"]
