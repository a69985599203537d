"""What a symbol is: copied, pickled, named, printed, and nested as deep as a program makes it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hetu
from hetu import IntSymbol


@dataclasses.dataclass
class Config:
    length: Any


def make_expressions(s: IntSymbol) -> list[IntSymbol]:
    return [s, 2 * s + 1, s // 3, s % 8, hetu.maximum(s, 3), hetu.minimum(s // 2, s % 5), hetu.ceil_div(s, 7)]


@pytest.mark.parametrize(
    "way",
    [
        copy.copy,
        copy.deepcopy,
        lambda e: copy.deepcopy([{"a": (e,)}])[0]["a"][0],
        lambda e: dataclasses.asdict(Config(e))["length"],
        lambda e: copy.deepcopy(e >= 1).lhs,
        lambda e: IntSymbol.from_expr(copy.deepcopy(e.expr)),
    ],
)
def test_a_copy_is_the_symbol_itself(way: Callable[[IntSymbol], IntSymbol]) -> None:
    for e in make_expressions(IntSymbol("s", min=1, max=100)):
        again = way(e)
        assert again == e
        assert hash(again) == hash(e)
        assert (again.min, again.max, str(again * 2)) == (e.min, e.max, str(e * 2))
    s = IntSymbol("s")
    assert way(s) is s


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_symbols_are_not_pickled_and_stay_as_they_were(protocol: int) -> None:
    s = IntSymbol("s", max=9)
    for e in (*make_expressions(s), s >= 3, s.expr, (s // 2).expr, Config(s)):
        with pytest.raises(hetu.HetuError, match="can't be pickled"):
            pickle.dumps(e, protocol)
    assert (s <= 9).decided is True
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [s * 2 + 1])
        y = x + 1
    assert g.run(y, {x: [1.0, 2.0, 3.0]}).tolist() == [2.0, 3.0, 4.0]


DEPTH = 400


def deep_floors(s: IntSymbol, t: IntSymbol) -> IntSymbol:
    for _ in range(DEPTH):
        s = (s + t + 1) // 2
    return s


def deep_minima(s: IntSymbol, t: IntSymbol) -> IntSymbol:
    for _ in range(DEPTH):
        s = hetu.minimum(s + 3, t)
    return s


def deep_mixture(s: IntSymbol, t: IntSymbol) -> IntSymbol:
    for _ in range(DEPTH // 2):
        s = hetu.maximum(s * 2 % (t + 5), t // 3) + 1
    return s


@pytest.mark.parametrize("build", [deep_floors, deep_minima, deep_mixture])
def test_sizes_may_be_nested_deeply(build: Callable[[IntSymbol, IntSymbol], IntSymbol]) -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    start = time.perf_counter()
    e = build(s, t)
    expected = 5
    for _ in range(DEPTH // 2 if build is deep_mixture else DEPTH):
        if build is deep_floors:
            expected = (expected + 7 + 1) // 2
        elif build is deep_minima:
            expected = min(expected + 3, 7)
        else:
            expected = max(expected * 2 % (7 + 5), 7 // 3) + 1
    assert e.evaluate({s: 5, t: 7}) == expected
    for other in (hetu.maximum(e, s), hetu.minimum(e, s + 1, t), (e * e + e) // 3, e % 7, e - e // 2, -e, 3 * e - s):
        assert str(other)
        assert other.leaves == (s, t)
        assert other.multiple_of >= 1
    for decision in (e <= t + 1, e >= s, e - e // 2 >= 0, hetu.equal(e, e + t), hetu.equal(e + 1, e)):
        assert decision.decided in (True, False, None)
    assert hetu.equal(e + 1, e).decided is False
    assert e == build(s, t)
    assert e != build(t, s)
    assert time.perf_counter() - start < 20  # a second, on an idle machine


def test_deep_sizes_can_be_run() -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    with hetu.graph("define_and_run", device="cpu") as g:
        y = hetu.full([deep_minima(s, t)], 1.0)
        z = hetu.reshape(y, [deep_minima(s, t), 1])
    assert g.run(z, int_symbol_dict={s: 1, t: 3}).shape == (3, 1)


def test_equal_functions_are_one_object_as_long_as_somebody_holds_it() -> None:
    s = IntSymbol("s")
    assert ((s + 1) // 2).expr is ((1 + s) // 2).expr
    assert hetu.maximum(s, 3).expr is hetu.maximum(3, s).expr
    assert (s % 5).expr is not (s // 5).expr
    assert ((s + 1) // 2).expr is not ((IntSymbol("s") + 1) // 2).expr


def test_sizes_are_formatted_as_text() -> None:
    s = IntSymbol("s")
    assert f"{s:>6}|{s + 1:<8}|{s:^5}|{s}" == "     s|s + 1   |  s  |s"
    assert f"{s:d}|{s:4,}" == "s|   s", "what a run knows as an int may be written as one before"
    with pytest.raises(ValueError, match="format"):
        f"{s:z}"


def test_unknowns_of_one_name_are_told_apart() -> None:
    one, two, other = IntSymbol("s"), IntSymbol("s"), IntSymbol("t")
    assert str(hetu.equal(one, two)) == "s_1 == s_2"
    assert str(two + one // 2) == "s_2 + s_1//2"
    assert str(one >= other) == "s >= t"
    assert (str(one), str(two), str(2 * two)) == ("s", "s", "2*s")
    with pytest.raises(hetu.UnboundSymbolError, match=r"no value for s_1, s_2 in s_1 \+ s_2"):
        (one + two).evaluate({})
    with hetu.graph("define_and_run", device="cpu") as g:
        x, y = hetu.placeholder("float32", [one], name="x"), hetu.placeholder("float32", [two], name="y")
        hetu.require(hetu.equal(one, two))
        z = hetu.sum(x) + hetu.sum(y)
    with pytest.raises(hetu.BindingError, match=r"s_1 == s_2 does not hold: 1 against 2") as caught:
        g.run(z, {x: [1.0], y: [1.0, 2.0]})
    assert "s_1 = 1   from shape of x" in str(caught.value)
    assert "s_2 = 2   from shape of y" in str(caught.value)


@pytest.mark.parametrize("name", ["x²", "½", "①", "a b", "class", "naïve", "x\ny", "'\"", "", "长度"])
def test_any_text_is_a_name(name: str) -> None:
    s = IntSymbol(name)
    assert s.name == name
    with hetu.graph("define_and_run", device="cpu", name=name) as g:
        x = hetu.placeholder("float32", [s], name=name)
        y = x + hetu.parameter(1.0, [1], name=name + "w")
    assert g.run(y, {x: [1.0]}).tolist() == [2.0]


@pytest.mark.parametrize("value", [object, 1.5, True, b"s", ["s"], np.array(["s"]), np.array([1])])
def test_what_is_no_name_and_no_default_is_refused(value: Any) -> None:
    with pytest.raises(hetu.DTypeError, match="expected value to be a name or an int"):
        IntSymbol(value)


def test_numbers_of_numpy_and_torch_are_sizes() -> None:
    import torch

    s = IntSymbol("s", min=np.int32(2), max=np.array(9), multiple_of=torch.tensor(2))
    assert (s.min, s.max, s.multiple_of) == (2, 8, 2)
    assert (s + np.array(3)).evaluate({s: np.int8(4)}) == 7
    s.set_data(torch.tensor(6))
    assert s.data == 6
    assert IntSymbol(np.int16(7)).data == 7
    for wrong in (np.float32(2.0), np.array([2]), torch.tensor(2.0), np.True_):
        with pytest.raises(hetu.DTypeError, match="expected value to be an int"):
            s.set_data(wrong)
