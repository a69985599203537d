"""Expressions mean the same three ways, at any size; and what is known of them holds for every value."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.expressions import INTS, SYMBOLS, SYMPY, Tree, Unknowns, build, trees, unknowns
from support.longer import LONGER

import hetu
from hetu.symbols import IntSymbol, as_symbol, compile_exprs
from hetu.symbols.text import names_of


def plain(tree: Tree, given_: Unknowns) -> int:
    """The value on plain ints; an example that divides by zero is another test's."""
    try:
        return build(tree, given_.values, int, INTS)
    except ZeroDivisionError:
        assume(False)
        raise


@given(trees, unknowns())
@settings(max_examples=300 * LONGER)
def test_an_expression_means_the_same_three_ways(tree: Tree, given_: Unknowns) -> None:
    expected = plain(tree, given_)
    symbol = as_symbol(build(tree, given_.leaves, int, SYMBOLS))

    assert symbol.evaluate(given_.bound) == expected
    (compiled,) = compile_exprs([symbol], given_.leaves)(*given_.values)
    assert compiled == expected
    assert type(compiled) is int
    assert symbol.expr.subs({leaf.expr: value for leaf, value in given_.bound.items()}) == expected
    assert build(tree, [sympy.Integer(value) for value in given_.values], sympy.Integer, SYMPY) == expected


@given(trees, unknowns())
@settings(max_examples=300 * LONGER)
def test_what_is_known_of_an_expression_holds(tree: Tree, given_: Unknowns) -> None:
    expected = plain(tree, given_)
    symbol = as_symbol(build(tree, given_.leaves, int, SYMBOLS))

    assert symbol.min is None or symbol.min <= expected
    assert symbol.max is None or expected <= symbol.max
    assert expected % symbol.multiple_of == 0
    assert set(symbol.leaves) <= set(given_.leaves)
    assert symbol.constant in (None, expected)


@given(trees, unknowns())
def test_an_expression_reads_as_the_python_that_makes_it(tree: Tree, given_: Unknowns) -> None:
    expected = plain(tree, given_)
    symbol = as_symbol(build(tree, given_.leaves, int, SYMBOLS))
    assert eval(str(symbol), dict(zip("abc", given_.values, strict=True))) == expected
    assert eval(str(symbol.expr), {"max": max, "min": min, **dict(zip("abc", given_.values, strict=True))}) == expected


@given(trees, unknowns())
def test_the_text_makes_the_expression_again(tree: Tree, given_: Unknowns) -> None:
    """Of symbols, too: with hetu's functions for Python's, whatever their ranges."""
    plain(tree, given_)
    symbol = as_symbol(build(tree, given_.leaves, int, SYMBOLS))
    names = {"max": hetu.maximum, "min": hetu.minimum, **dict(zip("abc", given_.leaves, strict=True))}
    assert eval(str(symbol), names) == symbol


def test_names_that_python_does_not_take_are_told_apart() -> None:
    """``#`` would begin a comment, and what follows it would be lost."""
    leaves = [IntSymbol(name) for name in ("s", "s", "s_1", "seq len", "class", "2nd", "")]
    whole = sum(leaves, start=as_symbol(0)) + leaves[0] // 2
    names = names_of(leaf.expr for leaf in leaves)
    assert len(set(names.values())) == len(leaves)
    assert eval(str(whole), {names[leaf.expr]: leaf for leaf in leaves}) == whole
    assert str(IntSymbol("a") + 10**3000).endswith(hex(10**3000)[2:])


def test_nothing_is_cancelled_that_may_be_zero() -> None:
    s, t, one = IntSymbol("s"), IntSymbol("t"), IntSymbol("one", min=1)
    assert (str((s * t) // t), str((s * one) // one)) == ("(s*t)//t", "s")
    assert (str(0 // t), str(0 // one)) == ("0//t", "0")
    with pytest.raises(hetu.BindingError, match="t is 0"):
        ((s * t) // t).evaluate({s: 5, t: 0})


def test_divmod_and_format() -> None:
    s, seven = IntSymbol("s"), as_symbol(7)
    assert divmod(s, 3) == (s // 3, s % 3)
    assert divmod(7, s) == (7 // s, 7 % s)
    with pytest.raises(TypeError):
        divmod(s, 1.5)
    assert f"{seven:>4}|{seven:04d}|{seven:x}|{s + 1:>8}|{s:*^7}|{s:6,d}|{s:<3}|{s}" == (
        "   7|0007|7|   s + 1|***s***|     s|s  |s"
    )
    with pytest.raises(ValueError, match="format"):
        f"{s:nonsense}"


def test_a_sum_that_begins_with_a_floor() -> None:
    """``-a//2`` would be ``(-a)//2``."""
    a = IntSymbol("a")
    texts = {
        str(-hetu.ceil_div(a + 2, 2)): "-((a + 1)//2) - 1",
        str(3 - a // 2): "3 - a//2",
        str(-(a % 3) - 2): "-(a%3) - 2",
    }
    assert list(texts) == list(texts.values())
    assert eval(str(-hetu.ceil_div(a + 2, 2)), {"a": 0}) == -1


@given(trees, trees, unknowns())
def test_equal_expressions_have_equal_values_and_hashes(one: Tree, other: Tree, given_: Unknowns) -> None:
    plain(("+", one, other), given_)
    a, b = (as_symbol(build(tree, given_.leaves, int, SYMBOLS)) for tree in (("+", one, other), ("+", other, one)))
    assert a == b
    assert hash(a) == hash(b)


@given(st.lists(trees, min_size=1, max_size=5), unknowns())
def test_many_expressions_are_one_function(many: list[Tree], given_: Unknowns) -> None:
    expected = tuple(plain(tree, given_) for tree in many)
    symbols = [as_symbol(build(tree, given_.leaves, int, SYMBOLS)) for tree in many]
    assert compile_exprs(symbols, given_.leaves)(*given_.values) == expected


def test_sizes_that_no_float_holds() -> None:
    s, n = IntSymbol("s"), 2**60 + 1
    for divisor in (3, 128, n - 1, n, n + 1):
        bound = {s: n * divisor + 1}
        assert (s // divisor).evaluate(bound) == n
        assert (s % divisor).evaluate(bound) == 1 % divisor
        assert hetu.ceil_div(s, divisor).evaluate(bound) == n + 1
    assert (s * (2**70 + 1) - 2**70 * s).evaluate({s: n}) == n


@pytest.mark.parametrize("a", [-7, -6, -1, 0, 1, 6, 7])
@pytest.mark.parametrize("b", [-3, -1, 1, 3])
def test_negative_numbers_divide_as_in_python(a: int, b: int) -> None:
    s, t = IntSymbol("s", min=None), IntSymbol("t", min=None)
    bound = {s: a, t: b}
    assert (s // b).evaluate(bound) == (s // t).evaluate(bound) == (a // t).evaluate(bound) == a // b
    assert (s % b).evaluate(bound) == (s % t).evaluate(bound) == (a % t).evaluate(bound) == a % b
    assert hetu.ceil_div(s, b).evaluate(bound) == hetu.ceil_div(s, t).evaluate(bound) == -(-a // b)


CANONICAL = [
    ("(s + 127) // 128 * 128", lambda s, t, k: hetu.ceil_div(s, 128) * 128, "128*((s + 127)//128)"),
    ("129 in front", lambda s, t, k: (s + 129) // 128, "(s + 1)//128 + 1"),
    ("a multiple", lambda s, t, k: (256 * s + t) // 128, "2*s + t//128"),
    ("a common factor", lambda s, t, k: (6 * s + 4) // 8, "(3*s + 2)//4"),
    ("a floor of a floor", lambda s, t, k: s // 3 // 4, "s//12"),
    ("by one", lambda s, t, k: s // 1 + s % 1, "s"),
    ("by minus one", lambda s, t, k: s // -1, "-s"),
    ("a remainder", lambda s, t, k: (256 * s + t + 130) % 128, "(t + 2)%128"),
    ("a multiple's remainder", lambda s, t, k: k % 64, "0"),
    ("a multiple among others", lambda s, t, k: (k + 63) // 64, "k//64"),
    ("within range", lambda s, t, k: (t % 1024, t // 1024), ("t", "0")),
    ("nested extrema", lambda s, t, k: hetu.maximum(t, hetu.maximum(s, 3), 5, t), "max(s, t, 5)"),
    ("a bound that always holds", lambda s, t, k: (hetu.maximum(s, 0), hetu.minimum(t, 2000)), ("s", "t")),
    ("a value that never wins", lambda s, t, k: hetu.minimum(s, t, 0), "0"),
    ("subtraction", lambda s, t, k: s - s // 2 - (s + t) // 2 % 3, "s - s//2 - ((s + t)//2)%3"),
    ("a negated floor", lambda s, t, k: (-(s // 2), 3 * (s // 2), -2 * (s % 3)), ("-(s//2)", "3*(s//2)", "-2*(s%3)")),
    ("negative operands", lambda s, t, k: (-s) // t * s, "s*((-s)//t)"),
    ("powers", lambda s, t, k: (s * s * 2, s * (t + 1), s * s // t), ("2*s**2", "s*(t + 1)", "(s**2)//t")),
    ("what cancels", lambda s, t, k: s + t - s - t, "0"),
]


@pytest.mark.parametrize(("make", "text"), [case[1:] for case in CANONICAL], ids=[case[0] for case in CANONICAL])
def test_canonical_forms(make: object, text: object) -> None:
    s, t, k = IntSymbol("s"), IntSymbol("t", max=1000), IntSymbol("k", multiple_of=64)
    made = make(s, t, k)  # type: ignore[operator]
    assert (tuple(map(str, made)) if isinstance(made, tuple) else str(made)) == text


def test_equal_sizes_written_differently() -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    assert s + t + s == 2 * s + t
    assert hetu.ceil_div(s, 128) == (s + 127) // 128
    assert hetu.maximum(s, t) == hetu.maximum(t, s, s)
    assert {s + t: 1}[t + s] == 1
    assert s + t != s - t


def test_the_text_computes_shared_parts_once() -> None:
    s = IntSymbol("s")
    padded = hetu.ceil_div(s, 128) * 128
    source = compile_exprs([padded, padded * padded, padded + 1], [s]).source  # type: ignore[attr-defined]
    assert source.count("//") == 1


def test_compiling_for_too_few_leaves() -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    with pytest.raises(ValueError, match="t is not among the leaves"):
        compile_exprs([s + t], [s])


def test_dividing_by_zero() -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    for make in (lambda: s // 0, lambda: s % 0, lambda: s // (t - t)):
        with pytest.raises(ZeroDivisionError):
            make()
    for expr in (s // (t - 1), s % (t - 1), hetu.ceil_div(s, t - 1)):
        with pytest.raises(hetu.BindingError) as caught:
            expr.evaluate({s: 5, t: 1})
        text = str(caught.value)
        assert text.startswith("t - 1 is 0, and a size is divided by it\n  where:  test_expressions.py:")
        assert text.endswith("\n  bound:  t = 1\n  fix:    bind t - 1 to another value")
    with pytest.raises(hetu.BindingError, match="t is 0"):
        compile_exprs([s // t], [s, t])(1, 0)


def test_many_operands_and_shared_parts_stay_cheap() -> None:
    """Each of these took seconds, or forever, when it was done the obvious way."""
    many = [IntSymbol(f"n{i}") for i in range(32)]
    longest = hetu.maximum(*many)
    assert longest.evaluate({leaf: i for i, leaf in enumerate(many)}) == 31
    assert longest.leaves == tuple(many)

    s, t = IntSymbol("s"), IntSymbol("t")
    shared = s
    for i in range(60):  # 2**60 paths from the top to s
        shared = hetu.maximum(shared, shared // 2 + i * t)
    assert shared.min == 0
    assert shared.evaluate({s: 7, t: 1}) >= 59

    deep, expected = s, 5
    for i in range(600):  # deeper than Python recurses
        deep, expected = (deep + t) // (2 + i % 3), (expected + 7) // (2 + i % 3)
    assert deep.leaves == (s, t)
    assert deep.evaluate({s: 5, t: 7}) == expected
    assert len(str(deep)) > 600
