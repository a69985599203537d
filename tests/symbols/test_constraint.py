"""Comparisons: decided where that is certain, refused where it is not, never guessed."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.expressions import INTS, SYMBOLS, Tree, Unknowns, build, leaf_trees, trees, unknowns
from support.longer import LONGER

import hetu
from hetu import Constraint, IntSymbol, equal, maximum, minimum
from hetu.symbols import as_symbol

OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tree, Tree]:
    """Two expressions; often made of each other, so that there is something to cancel."""
    one = draw(trees)
    part = draw(leaf_trees | trees)
    number = draw(st.integers(1, 5))
    other = draw(
        st.sampled_from(
            [
                part,
                ("+", one, number),
                ("maximum", one, part),
                ("minimum", one, part),
                ("*", ("floordiv", one, number), number),
                ("-", one, ("floordiv", one, number)),
                ("+", ("*", ("floordiv", one, number), number), ("mod", one, number)),
                ("+", ("*", one, 2), 1),
                ("floordiv", ("*", one, part), part),
                ("floordiv", ("+", ("*", one, part), number), part),
                ("mod", ("+", ("*", part, one), number), part),
                ("maximum", ("minimum", one, ("+", part, number)), part),
                ("minimum", ("maximum", part, number), ("+", one, number)),
                ("maximum", one, ("+", one, number), part),
                ("floordiv", 0, part),
            ]
        )
    )
    return draw(st.sampled_from([(one, other), (other, one), (("-", other, one), part)]))


@given(pairs(), unknowns(), st.sampled_from(sorted(OPERATORS)))
@settings(max_examples=500 * LONGER)
def test_a_decision_is_right_for_every_value(pair: tuple[Tree, Tree], given_: Unknowns, op: str) -> None:
    try:
        a, b = (build(tree, given_.values, int, INTS) for tree in pair)
    except ZeroDivisionError:
        assume(False)
    constraint = Constraint(op, *(as_symbol(build(tree, given_.leaves, int, SYMBOLS)) for tree in pair))
    assert constraint.decided in (None, OPERATORS[op](a, b))
    assert constraint.holds(given_.bound) is OPERATORS[op](a, b)


@given(pairs(), st.lists(pairs(), min_size=1, max_size=3), unknowns(), st.sampled_from(sorted(OPERATORS)))
@settings(max_examples=80)
def test_a_decision_by_requirements_is_right_wherever_they_hold(
    pair: tuple[Tree, Tree], required: list[tuple[Tree, Tree]], given_: Unknowns, op: str
) -> None:
    """Each requirement is turned so that it holds; often it speaks of the same sizes as the comparison."""
    known = []
    try:
        a, b = (build(tree, given_.values, int, INTS) for tree in pair)
        for one, other in [*required, pair]:
            left, right = (build(tree, given_.values, int, INTS) for tree in (one, other))
            sign = ">=" if left > right else "==" if left == right else "<"
            known.append(
                Constraint(sign, *(as_symbol(build(tree, given_.leaves, int, SYMBOLS)) for tree in (one, other)))
            )
    except ZeroDivisionError:
        assume(False)
    constraint = Constraint(op, *(as_symbol(build(tree, given_.leaves, int, SYMBOLS)) for tree in pair))
    assert constraint.decided_by(known[:-1]) in (None, OPERATORS[op](a, b))
    assert constraint.decided_by(known) in (None, OPERATORS[op](a, b))


def test_what_requirements_teach() -> None:
    a, b, c = (IntSymbol(name) for name in "abc")
    with hetu.graph("define_and_run") as g:
        assert (a >= b).decided is None
        with pytest.raises(hetu.UnboundSymbolError):
            bool(a >= b)
        hetu.require(a >= b)
        hetu.require(b >= c + 1)
        assert a >= b
        assert b <= a
        assert a + 1 > b
        assert not a < b
        assert 2 * a >= b + b
        assert hetu.maximum(a, 3) >= b
        assert (a - b >= 0).decided_by(g.constraints)
        assert (a >= c).decided_by(g.constraints) is None  # a run that binds no b checks neither
        assert (b * a + c <= a * a + c).decided_by(g.constraints) in (None, True)
        assert (a > b).decided_by(g.constraints) is None
        tail = hetu.slice(hetu.placeholder("float32", [a]), 0, b)
        assert not tail.op.constraints
    with pytest.raises(hetu.UnboundSymbolError):  # another graph requires nothing
        bool(a >= b)


s = IntSymbol("s", min=2, max=100)
t, u = IntSymbol("t"), IntSymbol("u")
k = IntSymbol("k", multiple_of=64)
many = [IntSymbol(f"n{i}") for i in range(32)]


@pytest.mark.parametrize(
    "constraint",
    [
        s > 1,
        s >= 2,
        s < 101,
        s <= 100,
        t >= 0,
        t - t // 2 >= 0,
        t - t // 2 >= t // 2,
        t // 2 * 2 <= t,
        t // 2 + (t + 1) // 2 > t - 2,
        (t + 127) // 128 * 128 >= t,
        (t + 127) // 128 * 128 < t + 128,
        t % 7 < 7,
        t % 7 <= t,
        equal(t // 4 * 4 + t % 4, t),
        equal(t * (u + 1), u * t + t),
        equal((k + 63) // 64 * 64, k),
        equal(k % 32, 0),
        2 * t >= t,
        maximum(t, u) >= u,
        maximum(*many) >= many[17],
        minimum(*many) <= many[17],
        minimum(t + 1, t + 5) > t,
        t - minimum(t, 5) >= 0,
        (t + u) // 2 - t // 3 - u // 2 >= -1,
        equal((t * u) // u, t),
        equal((t * u + 3 * u) // u, t + 3),
        equal((t * u) % u, 0),
        equal(0 // u, 0),
        equal(0 % u, 0),
        maximum(t, u) >= minimum(t, u),
        maximum(minimum(t, u + 10), 0) <= u + 10,
        maximum(minimum(t, u + 10), u) <= u + 10,
        maximum(minimum(t, u + 10), u) >= u,
        equal(maximum(t, t + 2), t + 2),
        equal(minimum(s, s), maximum(s, s)),
        equal(IntSymbol("three", min=3, max=3), 3),
    ],
    ids=str,
)
def test_what_is_decided(constraint: Constraint) -> None:
    assert constraint.decided is True
    assert bool(constraint) is True


@pytest.mark.parametrize(
    "constraint",
    [
        s < 2,
        s > 100,
        equal(s, 1),
        t - t // 2 < 0,
        equal(t, t + 1),
        equal(2 * t, 2 * u + 1),
        equal(k, 65),
        t > t,
        equal(minimum(t, t + 1), maximum(t, t + 1)),
        equal(minimum(s, 1), maximum(s, 1)),
    ],
    ids=str,
)
def test_what_is_decided_against(constraint: Constraint) -> None:
    assert constraint.decided is False
    assert bool(constraint) is False


@pytest.mark.parametrize(
    "constraint",
    [
        s < 3,
        s > 99,
        equal(s, 5),
        t > 0,
        t // 2 * 2 >= t,
        equal(2 * t, 2 * u),
        equal(k, 64),
        maximum(t, u) > u,
        equal(minimum(t, u), maximum(t, u)),
    ],
    ids=str,
)
def test_what_is_left_open(constraint: Constraint) -> None:
    assert constraint.decided is None


def test_sums_of_many_floors_are_answered_soon() -> None:
    """Trying the floors' bounds in every order would take longer than anybody waits."""
    halves = sum((n // 2 for n in many), start=as_symbol(0))
    assert (halves >= t).decided is None
    assert (sum(many, start=as_symbol(0)) - halves >= halves).decided is True
    assert (maximum(*many) + maximum(*many[1:]) >= minimum(*many[2:]) - t).decided in (None, True)


def test_an_open_comparison_is_not_guessed() -> None:
    n = IntSymbol("n")
    with pytest.raises(hetu.UnboundSymbolError) as caught:
        bool(n > 5)
    lines = str(caught.value).splitlines()
    assert lines[0] == "whether n > 5 is known only when the graph runs: it depends on n"
    assert lines[1].startswith("  where:  test_constraint.py:")
    assert lines[1].endswith("   bool(n > 5)")
    assert lines[2] == "  fix:    demand it with hetu.require(n > 5), or give n a range that decides it"
    with pytest.raises(hetu.UnboundSymbolError, match=r"whether n > 0 is known"):
        assert 0 < n < 10


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda n: n < 5, "n < 5"),
        (lambda n: 5 < n, "n > 5"),  # noqa: SIM300
        (lambda n: 5 >= n, "n <= 5"),  # noqa: SIM300
        (lambda n: 2 * n >= n // 2 + 1, "2*n >= n//2 + 1"),
        (lambda n: equal(n % 2, 0), "n%2 == 0"),
    ],
)
def test_how_a_constraint_reads(make: Callable[[IntSymbol], Constraint], text: str) -> None:
    n = IntSymbol("n")
    assert str(make(n)) == text
    assert isinstance(make(n), Constraint)


def test_constraints_are_values() -> None:
    n = IntSymbol("n")
    one, where = n > 5, hetu.errors.caller()
    told = one.because("more than five", op_name="slice", where=where)
    assert one == (n > 5)
    assert hash(one) == hash(n > 5)
    assert one != (n >= 5)
    assert told == one
    assert (told.reason, told.op_name, told.where, told.op, told.lhs, told.rhs) == (
        "more than five",
        "slice",
        where,
        ">",
        n,
        5,
    )


def test_holding_needs_every_value() -> None:
    n, m = IntSymbol("n"), IntSymbol("m")
    assert (n > m).holds({n: 2**70 + 1, m: 2**70})
    assert not (n > m).holds({n: 2**70, m: 2**70})
    with pytest.raises(hetu.UnboundSymbolError, match="no value for m"):
        (n > m).holds({n: 3})
