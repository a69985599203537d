"""Where a run takes its symbols' values from, which source is the stronger, and what it says where two disagree."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu import IntSymbol

Feeds = dict[Any, Any]


class Varlen:
    """A graph with a symbol for each source: rows (shapes), longest (what the op tells), width (``.data``)."""

    def __init__(self) -> None:
        self.rows, self.longest, self.width = IntSymbol("rows", max=64), IntSymbol("longest"), IntSymbol("width")
        with hetu.graph("define_and_run", device="cpu") as self.graph:
            self.x = hetu.placeholder(hetu.float32, [2 * self.rows, 8], name="x")
            self.cu = hetu.placeholder(hetu.int32, [3], name="cu")
            self.out, self.lse, _, _ = hetu.attn_varlen(
                self.x, self.x, self.x, 8, self.cu, self.cu, self.longest, self.longest
            )
            self.part = hetu.slice(self.x, 0, 0, self.width)

    def feeds(self, *lengths: int) -> Feeds:
        rows = torch.zeros(sum(lengths), 8)
        return {self.x: rows, self.cu: np.array([0, *np.cumsum(lengths)], np.int32)}

    def binding(self, fetch: Any, feeds: Feeds, symbols: dict[IntSymbol, int] | None = None) -> hetu.Binding:
        return self.graph.prepare(fetch, feeds, int_symbol_dict=symbols).bindings[0]

    def error(self, fetch: Any, feeds: Feeds, symbols: dict[Any, Any] | None = None) -> str:
        with pytest.raises(hetu.HetuError) as caught:
            self.graph.run(fetch, feed_dict=feeds, int_symbol_dict=symbols)
        assert type(caught.value) is hetu.BindingError
        return str(caught.value)


def test_each_source_of_a_value() -> None:
    case = Varlen()
    binding = case.binding(case.lse, case.feeds(3, 5))
    assert (binding[case.rows], binding.source(case.rows)) == (4, "shape of x, dimension 0")
    assert (binding[case.longest], binding.source(case.longest)) == (5, "longest sequence of cu_seqlens_q")
    case.width.set_data(2)
    binding = case.binding(case.part, case.feeds(3, 5))
    assert (binding[case.width], binding.source(case.width)) == (2, ".data")
    binding = case.binding(case.part, case.feeds(3, 5), {case.width: 3, case.rows: 4})
    assert (binding[case.width], binding.source(case.width)) == (3, "int_symbol_dict")
    assert binding.source(case.rows) == "int_symbol_dict"


def test_stronger_sources_go_first() -> None:
    case = Varlen()
    for leaf in (case.rows, case.longest, case.width):
        leaf.set_data(1)
    feeds = case.feeds(3, 5)
    assert case.graph.run(case.lse, feed_dict=feeds).shape == (2, 1, 5)  # what the op tells, not .data
    assert case.graph.run(case.lse, feed_dict=feeds, int_symbol_dict={case.longest: 9}).shape == (2, 1, 9)
    assert case.graph.run(case.part, feed_dict=feeds).shape == (1, 8)
    assert case.graph.run(case.part, feed_dict=feeds, int_symbol_dict={case.width: 6}).shape == (6, 8)
    assert [leaf.data for leaf in (case.rows, case.longest, case.width)] == [1, 1, 1]


def test_a_default_may_be_changed_between_runs() -> None:
    case = Varlen()
    for width in (2, 4, 2):
        case.width.set_data(width)
        assert case.graph.run(case.part, feed_dict=case.feeds(3, 5)).shape == (width, 8)


def test_a_symbol_that_nobody_asks_for_stands_in_for_none() -> None:
    """As many have values as are needed, but another one."""
    case = Varlen()
    with pytest.raises(hetu.UnboundSymbolError, match="width"):
        case.graph.run(case.part, feed_dict=case.feeds(3, 5), int_symbol_dict={hetu.IntSymbol("other"): 4})


def test_symbols_that_nobody_fetches_may_stay_unbound() -> None:
    case = Varlen()
    assert case.width not in case.binding(case.out, case.feeds(3, 5))
    with pytest.raises(hetu.UnboundSymbolError) as caught:
        case.graph.run(case.part, feed_dict=case.feeds(3, 5))
    text = str(caught.value)
    assert "no value for width" in text
    assert "where:  test_sources.py:" in text
    assert (
        "fix:    give width in int_symbol_dict, feed an array whose shape tells it, or give the symbol a default"
        in text
    )


def test_int_symbol_dict_against_a_shape() -> None:
    case = Varlen()
    text = case.error(case.out, case.feeds(3, 5), {case.rows: 5})
    assert "2*rows is 10, but shape of x, dimension 0 is 8\n" in text
    assert "  bound:  rows = 5   from int_symbol_dict\n" in text


def test_one_shape_against_another() -> None:
    s = IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [s], name="x")
        y = hetu.placeholder(hetu.float32, [s], name="y")
        total = x + y
    with pytest.raises(hetu.BindingError) as caught:
        g.run(total, feed_dict={x: torch.zeros(3), y: torch.zeros(4)})
    assert "s is 3 from shape of x, dimension 0, but 4 from shape of y, dimension 0\n" in str(caught.value)
    assert "where:  test_sources.py:" in str(caught.value)
    assert 'y = hetu.placeholder(hetu.float32, [s], name="y")' in str(caught.value)


def test_int_symbol_dict_against_what_the_op_tells() -> None:
    case = Varlen()
    text = case.error(case.out, case.feeds(3, 5), {case.longest: 4})
    assert "[attn_varlen] max_seqlen_q is 4, but sequence 1 of cu_seqlens_q has 5 tokens\n" in text
    assert "  bound:  longest = 4   from int_symbol_dict\n" in text


def test_a_shape_that_no_value_gives_or_that_is_out_of_range() -> None:
    case = Varlen()
    assert "shape of x, dimension 0 is 7, but 2*rows is that for no int rows\n" in case.error(
        case.out, case.feeds(3, 4)
    )
    assert "makes rows 65, expected an int from 0 to 64\n" in case.error(case.out, case.feeds(65, 65))


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ({"rows": 65}, "rows is 65 from int_symbol_dict, expected an int from 0 to 64\n"),
        ({"rows": 2.0}, "rows is 2.0 (float) from int_symbol_dict, expected an int\n"),
        ({"": 4}, "'rows' (str) is no symbol, so int_symbol_dict can't bind it\n"),
    ],
)
def test_values_that_int_symbol_dict_may_not_have(symbols: dict[str, Any], message: str) -> None:
    case = Varlen()
    given = {(getattr(case, name) if name else "rows"): value for name, value in symbols.items()}
    assert message in case.error(case.out, case.feeds(3, 5), given)


def test_what_is_required_holds_in_every_run() -> None:
    s = IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [s], name="x")
        hetu.require(s > 2)
        y = x + x
    assert g.run(y, feed_dict={x: torch.ones(3)}).tolist() == [2, 2, 2]
    with pytest.raises(hetu.BindingError) as caught:
        g.run(y, feed_dict={x: torch.ones(2)})
    text = str(caught.value)
    assert "s > 2 does not hold: 2 against 2\n" in text
    assert "hetu.require(s > 2)" in text
    assert "bound:  s = 2   from shape of x, dimension 0\n" in text


def test_two_threads_with_different_bindings() -> None:
    case = Varlen()
    results: dict[int, list[tuple[int, ...]]] = {}
    start = threading.Barrier(2)

    def work(width: int) -> None:
        start.wait()
        runs = [case.graph.run(case.part, case.feeds(3, 5), int_symbol_dict={case.width: width}) for _ in range(20)]
        results[width] = [tuple(out.shape) for out in runs]

    threads = [threading.Thread(target=work, args=(width,)) for width in (2, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {2: [(2, 8)] * 20, 7: [(7, 8)] * 20}
