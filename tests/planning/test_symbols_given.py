"""g.layout, g.plan and g.prepare check what symbols are bound to as g.run does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hetu


def symbolic() -> tuple[hetu.Graph, hetu.IntSymbol, hetu.Tensor, hetu.Tensor]:
    s = hetu.IntSymbol("s", max=64, multiple_of=2)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [hetu.IntSymbol("rows"), 24])
        hetu.require(s >= 4)
        out = hetu.parallel_attn(x, 8, 1, [[s // 2, s // 2]], [[0, 0]])[0]
    return g, s, x, out


CALLS = {
    "layout": lambda g, x, out, symbols: g.layout(0, int_symbol_dict=symbols),
    "plan": lambda g, x, out, symbols: g.plan(0, int_symbol_dict=symbols),
    "prepare": lambda g, x, out, symbols: g.prepare(out, feeds(x), int_symbol_dict=symbols),
    "run": lambda g, x, out, symbols: g.run(out, feeds(x), int_symbol_dict=symbols),
}


def feeds(x: hetu.Tensor) -> dict[hetu.Tensor, Any]:
    return {x: hetu.Shards([np.ones((4, 24), np.float32)] * 2)}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", [66, 9, -2, 2, True, 8.0, "8", None, [8], np.float32(8), np.array([8]), 2**70])
def test_a_value_that_a_symbol_can_not_have(call: str, value: Any) -> None:
    g, s, x, out = symbolic()
    with pytest.raises(hetu.HetuError, match=r"\bs\b"):
        CALLS[call](g, x, out, {s: value})


@pytest.mark.parametrize("call", CALLS)
def test_after_a_good_value_too(call: str) -> None:
    g, s, x, out = symbolic()
    CALLS[call](g, x, out, {s: 8})
    for value in (8.0, np.float64(8), "8"):
        with pytest.raises(hetu.BindingError, match=r"s is .* from int_symbol_dict, expected an int"):
            CALLS[call](g, x, out, {s: value})


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", [8, np.int8(8), np.array(8), torch.tensor(8)])
def test_ints_of_any_library_are_values(call: str, value: Any) -> None:
    g, s, x, out = symbolic()
    CALLS[call](g, x, out, {s: value})


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("key", ["s", 8, None, hetu.IntSymbol("t") // 2])
def test_what_is_no_symbol_is_no_key(call: str, key: Any) -> None:
    g, s, x, out = symbolic()
    with pytest.raises(hetu.BindingError, match="int_symbol_dict"):
        CALLS[call](g, x, out, {s: 8, key: 8})


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("given", [[("s", 8)], "s", 8, {8}])
def test_what_is_no_dict_is_refused(call: str, given: Any) -> None:
    g, _, x, out = symbolic()
    with pytest.raises(hetu.HetuError, match="expected int_symbol_dict to be a dict"):
        CALLS[call](g, x, out, given)
