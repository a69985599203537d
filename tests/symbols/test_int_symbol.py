"""Leaves: what they are, what they take, and what they refuse."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hetu
from hetu import IntSymbol
from hetu.symbols import as_symbol


def test_a_named_leaf() -> None:
    s = IntSymbol("seq_len", max=131072, multiple_of=64)
    assert (s.name, s.is_leaf, s.min, s.max, s.multiple_of, s.constant) == ("seq_len", True, 0, 131072, 64, None)
    assert (str(s), repr(s), s.leaves) == ("seq_len", "IntSymbol(seq_len)", (s,))
    assert s.expr.is_integer
    assert IntSymbol("s").max is None
    assert IntSymbol("s", min=None).min is None


def test_an_unnamed_leaf_has_a_value() -> None:
    one, other = IntSymbol(4096), IntSymbol(4096)
    assert one.is_leaf
    assert one.data == one.get_data() == 4096
    assert one != other  # two unknowns
    assert one.constant is None  # and no constant: a run may bind it


def test_an_expression() -> None:
    s = IntSymbol("s", max=1000)
    e = (s + 127) // 128 * 128
    assert (e.name, e.is_leaf, e.min, e.max, e.multiple_of, e.constant) == (None, False, 0, 1024, 128, None)
    assert e.leaves == (s,)
    assert (s + 0) is s


def test_a_constant() -> None:
    five = as_symbol(5)
    assert (five.is_leaf, five.name, five.constant, five.data, five.leaves) == (False, None, 5, 5, ())
    assert five == 5
    assert five == np.int64(5)
    assert all(hash(as_symbol(n)) == hash(n) for n in (5, 0, -1, 2**70 + 1))
    assert {5: "here"}[five] == "here"
    assert five != 6
    assert five == IntSymbol("s") * 0 + 5
    assert as_symbol(0).multiple_of == 1
    assert IntSymbol("s") != 5
    assert IntSymbol("s") != "s"


def test_leaves_of_the_same_name_are_different() -> None:
    a, b = IntSymbol("s"), IntSymbol("s")
    assert a != b
    assert len({a: 1, b: 2}) == 2
    assert (a - b).constant is None
    assert (a - b).evaluate({a: 5, b: 3}) == 2


def test_leaves_come_in_the_order_they_were_made() -> None:
    made = [IntSymbol(name) for name in "zyxwv"]
    assert sum(reversed(made), start=as_symbol(0)).leaves == tuple(made)


def test_defaults() -> None:
    s, t = IntSymbol("s", max=100), IntSymbol("t")
    s.set_data(10)
    assert (s.data, (2 * s + 1).data) == (10, 21)
    with pytest.raises(hetu.UnboundSymbolError, match=r"^no value for t in s \+ t\n"):
        _ = (s + t).data
    t.set_data(2**70)
    assert (s + t).get_data() == 2**70 + 10
    s.set_data(11)
    assert s.data == 11
    with pytest.raises(hetu.BindingError, match=r"^s is 101 from set_data, expected an int from 0 to 100\n"):
        s.set_data(101)
    assert s.data == 11
    with pytest.raises(hetu.BindingError, match=r"^s \+ 1 is no leaf symbol, so set_data can't bind it\n"):
        (s + 1).set_data(5)
    with pytest.raises(TypeError, match=r"got 2\.5 \(float\)"):
        s.set_data(2.5)  # type: ignore[arg-type]


def test_a_missing_value_is_named() -> None:
    s, t, u = (IntSymbol(name) for name in "stu")
    with pytest.raises(hetu.UnboundSymbolError) as caught:
        (s + t * u).evaluate({t: 1})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("no value for s, u in ")
    assert lines[1].startswith("  where:  test_int_symbol.py:")
    assert lines[1].endswith("(s + t * u).evaluate({t: 1})")
    assert lines[2] == "  fix:    give s, u in int_symbol_dict, or set_data(...) a default"


def test_evaluating_with_numpys_ints_does_not_overflow() -> None:
    s = IntSymbol("s")
    assert (s * s).evaluate({s: np.int32(2**30)}) == 2**60


@given(st.integers(-50, 50) | st.none(), st.integers(-50, 50) | st.none(), st.integers(1, 20))
def test_a_range_is_narrowed_to_its_multiples(low: int | None, high: int | None, multiple: int) -> None:
    fits = [n for n in range(-100, 101) if (low is None or low <= n) and (high is None or n <= high)]
    fits = [n for n in fits if n % multiple == 0]
    if not fits:
        with pytest.raises(hetu.BindingError):
            IntSymbol("s", min=low, max=high, multiple_of=multiple)
        return
    s = IntSymbol("s", min=low, max=high, multiple_of=multiple)
    assert s.min == (None if low is None else fits[0])
    assert s.max == (None if high is None else fits[-1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntSymbol("s", min=5, max=4), "[IntSymbol] there is no int from min=5 to max=4"),
        (
            lambda: IntSymbol("s", min=1, max=63, multiple_of=64),
            "[IntSymbol] there is no multiple of 64 from min=1 to max=63",
        ),
        (lambda: IntSymbol("s", multiple_of=0), "[IntSymbol] multiple_of is 0, expected an int of at least 1"),
        (lambda: IntSymbol(5, max=4), "is 5 from set_data, expected an int from 0 to 4"),
    ],
)
def test_ranges_that_hold_nothing(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(hetu.BindingError) as caught:
        make()
    text = str(caught.value)
    assert message in text.splitlines()[0]
    assert "\n  where:  test_int_symbol.py:" in text
    assert "\n  fix:    " in text


@pytest.mark.parametrize("value", [2.5, True, None, "5", [5]])
def test_only_ints_make_sizes(value: Any) -> None:
    for make in (as_symbol, lambda v: hetu.maximum(3, v), lambda v: hetu.ceil_div(v, 3), lambda v: hetu.equal(3, v)):
        with pytest.raises(TypeError, match=r"expected (a size|b|a|values\[1\]) to be an int or an IntSymbol, got"):
            make(value)
    for name in ("min", "max", "multiple_of"):
        if value is not None:
            with pytest.raises(TypeError, match=f"expected {name} to be an int, got"):
                IntSymbol("s", **{name: value})


@pytest.mark.parametrize("value", [2.5, True, np.float32(2), 1j])
def test_operators_refuse_what_is_no_int(value: Any) -> None:
    s = IntSymbol("s")
    for sign, op in {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv}.items():
        with pytest.raises(TypeError) as caught:
            op(s, value)
        kind = type(value).__name__
        assert str(caught.value) == f"s {sign} {value}: symbols are exact ints, got a {kind}; write an int"
        with pytest.raises(TypeError, match="symbols are exact ints, got a"):
            op(value, s)
    for op in (operator.lt, operator.le, operator.gt, operator.ge):
        with pytest.raises(TypeError, match="symbols are exact ints, got a"):
            op(s, value)


def test_division_names_floor_division() -> None:
    s = IntSymbol("s")
    with pytest.raises(TypeError, match=r"^s / 2 may be no int: use // for floor division, or hetu.ceil_div$"):
        s / 2
    with pytest.raises(TypeError, match=r"^2 / s may be no int: use // "):
        2 / s


def test_other_types_may_know_better() -> None:
    class Known:
        def __radd__(self, other: Any) -> str:
            return "added"

        def __rtruediv__(self, other: Any) -> str:
            return "divided"

        def __gt__(self, other: Any) -> str:
            return "compared"

        def __eq__(self, other: object) -> Any:
            return "equal"

        __hash__ = None  # type: ignore[assignment]

    s = IntSymbol("s")
    assert (s + Known(), s / Known(), s < Known(), s == Known()) == ("added", "divided", "compared", "equal")
    with pytest.raises(TypeError, match="unsupported operand"):
        s + "text"


def test_numpys_ints_are_ints() -> None:
    s = IntSymbol("s")
    for made in (s + np.int64(3), np.int64(3) + s):
        assert made == s + 3
    assert str(np.int32(3) < s) == "s > 3"
    with pytest.raises(TypeError):
        np.array([1, 2]) * s


def test_whether_a_symbol_is_zero() -> None:
    s = IntSymbol("s")
    assert bool(s + 1)
    assert not as_symbol(0)
    assert as_symbol(-3)
    with pytest.raises(hetu.UnboundSymbolError) as caught:
        bool(s)
    lines = str(caught.value).splitlines()
    assert lines[0] == "whether s is zero is known only when the graph runs"
    assert lines[1].startswith("  where:  test_int_symbol.py:")
    assert lines[2] == "  fix:    demand it with hetu.require(s > 0), or give s a range (min=1)"


def test_extrema_of_nothing() -> None:
    for function in (hetu.maximum, hetu.minimum):
        with pytest.raises(TypeError, match="at least one value"):
            function()


def test_a_text_is_python_that_makes_the_symbol_again() -> None:
    a, b = IntSymbol("max"), IntSymbol("b")
    for symbol in (a**2 * b, (a * b) ** 3 - b // 2, hetu.maximum(a, b) + hetu.minimum(a, 3) % 7, b**0 + b):
        names = {"_max": a, "b": b, "max": hetu.maximum, "min": hetu.minimum}
        assert eval(str(symbol), names) == symbol
        values = {"_max": 5, "b": 7, "max": max, "min": min}
        assert eval(str(symbol), values) == symbol.evaluate({a: 5, b: 7})


@pytest.mark.parametrize("exponent", [-1, 0.5, True, IntSymbol("e")])
def test_a_power_has_a_whole_exponent(exponent: Any) -> None:
    with pytest.raises(TypeError, match=r"an int of at least 0|symbols are exact ints"):
        IntSymbol("s") ** exponent


def test_what_has_no_value_is_not_compared() -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    for nothing in (t // (s % s), t % (s % s), (s % s) // (s - s // 1 + s % s)):
        with pytest.raises(hetu.UnboundSymbolError, match="known only when the graph runs"):
            bool(nothing < 3)


@pytest.mark.parametrize("use", [range, int, hex, lambda s: [0] * s, lambda s: "text"[s:]])
def test_python_is_not_told_an_int_that_only_runs_know(use: Callable[[Any], Any]) -> None:
    s = IntSymbol("s")
    with pytest.raises(hetu.DTypeError, match="s is an int only when the graph runs"):
        use(s)
    assert use(s - s + 2) == use(2)
