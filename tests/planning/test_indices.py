"""Values that decide: indices and lengths are looked at before anything runs, and the error names line and number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.lookups import CLASSES, HOW, OPS, ROWS, Lookup
from support.same import assert_same

import hetu


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fetch", ["y", "dx", "train"])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_what_is_out_of_range_is_refused_with_line_and_number(op: str, how: str, fetch: str, dtype: str) -> None:
    lookup = Lookup(op, how, dtype)
    for good in ([0, lookup.size - 1], [1, 1]):
        lookup.run(getattr(lookup, fetch), np.array(good, dtype))
    before = lookup.graph.state_dict()
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    for wrong in (lookup.size, -1, least, most):
        for ids in (np.array([0, wrong], dtype), torch.tensor([0, wrong], dtype=getattr(torch, dtype))):
            with pytest.raises(hetu.BindingError) as caught:
                lookup.run(getattr(lookup, fetch), ids)
            text = str(caught.value)
            op_name = "cross_entropy" if op == "token_mean_loss" else op
            assert f"[{op_name}] {lookup.name}" in text and f"holds {wrong} at [" in text
            assert f"expected 0 to below {lookup.size}" in text and "where:  lookups.py:" in text
    after = lookup.graph.state_dict()
    assert_same(after, before)


@pytest.mark.parametrize("op", ["cross_entropy", "token_mean_loss"])
@pytest.mark.parametrize("how", ["as fed", "computed"])
def test_ignored_labels_are_no_indices(op: str, how: str) -> None:
    lookup = Lookup(op, how)
    assert torch.isfinite(lookup.run(lookup.y, [-100, 1]))
    with pytest.raises(hetu.BindingError, match=r"holds -99 at \[1\].*") as caught:
        lookup.run(lookup.y, [-100, -99])
    assert "or -100 to ignore a row" in str(caught.value)


def test_sizes_that_a_run_tells_are_checked_too() -> None:
    n = hetu.IntSymbol("n")
    lookup = Lookup("embedding", rows=n)
    lookup.run(lookup.y, [3, 0])
    with pytest.raises(hetu.BindingError, match="expected 0 to below 4") as caught:
        lookup.run(lookup.y, [4, 0])
    assert "bound:  n = 4   from shape of x" in str(caught.value)


def test_all_micro_batches_are_checked_before_the_first_is_computed() -> None:
    lookup = Lookup("embedding")
    before = lookup.graph.state_dict()["parameters"]
    with pytest.raises(hetu.BindingError, match="holds 9 at"):
        lookup.run(lookup.train, [[0, 1], [2, 9]], num_micro_batches=2)
    assert_same(lookup.graph.state_dict()["parameters"], before)
    lookup.run(lookup.train, [[0, 1], [2, 3]], num_micro_batches=2)


def test_the_pipeline_is_named() -> None:
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([2, 2], [0, 0])], device="cpu") as g:
        ids = hetu.placeholder("int64", [2], name="tokens")
        y = hetu.embedding(ids, hetu.parameter(1.0, [4, 2]))
    with pytest.raises(hetu.BindingError, match=r"ids, fed as tokens on pipeline 1, holds 4 at \[0\]"):
        g.run(y, {ids: hetu.Shards([[0, 1], [4, 1]])})


@pytest.mark.parametrize("op", OPS)
def test_constants_are_checked_as_feeds_are(op: str) -> None:
    build, size, name = OPS[op]
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [ROWS, CLASSES], name="x")
        y = build(x, hetu.constant(np.array([0, size]), name="numbers"))
    for _ in range(2):
        with pytest.raises(hetu.BindingError, match=rf"{name}, constant numbers, holds {size} at \[1\]"):
            g.run(y, {x: np.ones((ROWS, CLASSES), np.float32)})


# Lengths

MADE_OF: dict[str, Callable[[hetu.Tensor], hetu.Tensor]] = {
    "parameter": lambda ends: ends * hetu.cast(hetu.parameter(1.0, [1]), "int32"),
    "dropout": lambda ends: hetu.cast(hetu.dropout(hetu.cast(ends, "float32"), 0.5), "int32"),
    "all_reduce": lambda ends: hetu.all_reduce(ends),
    "step_sum": lambda ends: hetu.cast(hetu.cast(ends, "int64") * hetu.step_sum(ends), "int32"),
    "layout_tokens": lambda ends: hetu.cast(hetu.layout_tokens(ends, [[3]], [[0]])[0], "int32"),
}
ATTENTION: dict[str, Callable[[hetu.Tensor, hetu.Tensor], Any]] = {
    "attn_varlen": lambda x, cu: hetu.attn_varlen(x, x, x, 8, cu, cu),
    "parallel_attn": lambda x, cu: hetu.parallel_attn(x, 8, 1, [[5]], [[0]], True, cu),
    "layout_tokens": lambda x, cu: hetu.layout_tokens(x, [[5]], [[0]], True, cu),
}


@pytest.mark.parametrize("made_of", MADE_OF)
@pytest.mark.parametrize("op", ATTENTION)
def test_lengths_are_computed_from_what_planning_knows(made_of: str, op: str) -> None:
    if made_of == "layout_tokens" and op != "attn_varlen":
        pytest.skip("other ops list other lengths here")
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder("float32", [5, 24], name="x")
        ends = hetu.placeholder("int32", [3], name="ends")
        cu = MADE_OF[made_of](ends)
        before = len(g.nodes)
        with pytest.raises(hetu.HetuError, match=rf"_q is computed from {made_of}_0.* has no value yet") as caught:
            ATTENTION[op](x, cu)
    assert len(g.nodes) == before and "where:  test_indices.py:" in str(caught.value)


@pytest.mark.parametrize("op", ATTENTION)
def test_lengths_may_be_computed_from_feeds_constants_and_symbols(op: str) -> None:
    s = hetu.IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [5, 24], name="x")
        ends = hetu.placeholder("float32", [3], name="ends")
        cu = hetu.cast(ends * hetu.constant([1.0]) + s - 1, "int32")
        out = ATTENTION[op](x, cu)[0]
    assert len(g.run(out, {x: np.ones((5, 24), np.float32), ends: [0.0, 2.0, 5.0]}, int_symbol_dict={s: 1})) == 5
