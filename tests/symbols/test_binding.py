"""Values and their sources: solving from equations, conflicts, and errors in full."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.expressions import INTS, SYMBOLS, Tree, Unknowns, build, trees, unknowns
from support.longer import LONGER

import hetu
from hetu import Binding, IntSymbol
from hetu.symbols import Equation, Solver, as_symbol, check_leaf, compile_exprs

Known = dict[IntSymbol, int]


def solve(
    equations: Sequence[tuple[IntSymbol | int, int | None]], known: Mapping[IntSymbol, int] | None = None
) -> tuple[Known, dict[IntSymbol, str]]:
    """Solves once; the equations are the dimensions of a placeholder x."""
    values = dict(known or {})
    sources = dict.fromkeys(values, "int_symbol_dict")
    solver = Solver([Equation(as_symbol(e), f"shape of x, dimension {i}") for i, (e, _) in enumerate(equations)])
    solver.solve(values, sources, [value for _, value in equations])
    return values, sources


def refusal(
    equations: Sequence[tuple[IntSymbol | int, int | None]], known: Mapping[IntSymbol, int] | None = None
) -> str:
    """The error of a solve that is refused, without the line that says where."""
    with pytest.raises(hetu.BindingError) as caught:
        solve(equations, known)
    first, where, *rest = str(caught.value).splitlines()
    assert where.startswith("  where:  test_binding.py:")
    return "\n".join([first, *rest])


# Solving


def test_a_dimension_may_be_any_expression_linear_in_one_unknown() -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    assert solve([(2 * s + 1, 15)])[0] == {s: 7}
    assert solve([(10 - s, 3)])[0] == {s: 7}
    assert solve([(s * t + 2, 23), (t, 3)])[0] == {t: 3, s: 7}
    assert solve([(s * (t + 1), 28), (t, 3)])[0] == {t: 3, s: 7}
    assert solve([(s + t // 2, 8), (t, 3)])[0] == {t: 3, s: 7}
    assert solve([(s, 2**70 + 1)])[0] == {s: 2**70 + 1}
    assert solve([(3 * s - 2**70, 2**71)])[0] == {s: 2**70}
    assert solve([(s, 0)])[0] == {s: 0}


def test_equations_wait_for_each_other() -> None:
    s, t, u = (IntSymbol(name) for name in "stu")
    known, sources = solve([(s + t + u, 60), (s + t, 30), (s, 10)])
    assert known == {s: 10, t: 20, u: 30}
    assert sources == {s: "shape of x, dimension 2", t: "shape of x, dimension 1", u: "shape of x, dimension 0"}


def test_what_cannot_be_solved_is_left_open() -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    for one in (s // 2, s % 3, hetu.maximum(s, 4), s * s, s + t, s + s // 2, s * t):
        assert solve([(one, 6)]) == ({}, {})
    assert solve([(s * t, 0), (t, 0)])[0] == {t: 0}  # nothing to learn of s
    assert solve([(s, None)]) == ({}, {})


def test_a_later_call_goes_on() -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    solver = Solver([Equation(s + t, "shape of x, dimension 0"), Equation(s // 2, "shape of x, dimension 1")])
    known: Known = {}
    sources: dict[IntSymbol, str] = {}
    assert not solver.solve(known, sources, [10, None])
    assert known == {}
    known[t], sources[t] = 3, ".data"
    assert solver.solve(known, sources, [10, None])
    assert known == {s: 7, t: 3}
    assert solver.solve(known, sources, [10, 3])
    with pytest.raises(hetu.BindingError, match=r"^s//2 is 3, but shape of x, dimension 1 is 4\n"):
        solver.solve(known, sources, [10, 4])
    other: Known = {}
    assert solver.solve(other, {}, [None, None])  # nothing is kept between the runs
    assert other == {}


@given(unknowns(), st.lists(trees, min_size=1, max_size=4), st.data())
@settings(max_examples=200 * LONGER)
def test_what_is_solved_is_the_truth(given_: Unknowns, many: list[Tree], data: st.DataObject) -> None:
    try:
        values = [build(tree, given_.values, int, INTS) for tree in many]
    except ZeroDivisionError:
        assume(False)
    exprs = [build(tree, given_.leaves, int, SYMBOLS) for tree in many]
    told = data.draw(st.sets(st.sampled_from(given_.leaves)))
    known, _ = solve(list(zip(exprs, values, strict=True)), {leaf: given_.bound[leaf] for leaf in told})
    assert known.items() <= given_.bound.items()
    assert told <= known.keys()


@given(st.lists(st.integers(-20, 20), min_size=3, max_size=3), st.data())
def test_triangular_equations_are_always_solved(values: list[int], data: st.DataObject) -> None:
    leaves = [IntSymbol(name, min=None) for name in "abc"]
    weights = st.integers(-5, 5)
    equations = []
    for i, leaf in enumerate(leaves):
        own, others = data.draw(weights.filter(bool)), [data.draw(weights) for _ in range(i)]
        pairs = [(own, leaf, values[i]), *zip(others, leaves, values, strict=False)]
        expr = sum((weight * symbol for weight, symbol, _ in pairs), start=as_symbol(3))
        equations.append((expr, sum(weight * value for weight, _, value in pairs) + 3))
    order = data.draw(st.permutations(equations))
    assert solve(order)[0] == dict(zip(leaves, values, strict=True))
    # One more, which is wrong by one, is noticed wherever it stands.
    place = data.draw(st.integers(0, 3))
    wrong = (leaves[0] + leaves[1] - leaves[2], values[0] + values[1] - values[2] + 1)
    with pytest.raises(hetu.BindingError):
        solve([*order[:place], wrong, *order[place:]])


# Refusing


def test_two_shapes_that_disagree() -> None:
    s = IntSymbol("s")
    assert refusal([(s, 7), (s, 8)]) == (
        "s is 7 from shape of x, dimension 0, but 8 from shape of x, dimension 1\n"
        "  bound:  s = 7   from shape of x, dimension 0\n"
        "  fix:    make the two agree, or leave one of them out"
    )


def test_a_shape_that_contradicts_int_symbol_dict() -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    assert refusal([(s, 8)], {s: 7}).startswith("s is 7 from int_symbol_dict, but 8 from shape of x, dimension 0\n")
    assert refusal([(2 * s + t, 15)], {s: 4, t: 2}) == (
        "2*s + t is 10, but shape of x, dimension 0 is 15\n"
        "  bound:  s = 4   from int_symbol_dict\n"
        "  bound:  t = 2   from int_symbol_dict\n"
        "  fix:    make the two agree, or leave one of them out"
    )


def test_a_size_that_is_no_symbol() -> None:
    assert refusal([(64, 63)]) == "shape of x, dimension 0 is 63, expected 64\n  fix:    feed a size of 64"


def test_a_size_that_no_value_gives() -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    assert refusal([(2 * s + 1, 14)]) == (
        "shape of x, dimension 0 is 14, but 2*s + 1 is that for no int s\n  fix:    feed a size that 2*s + 1 can have"
    )
    assert refusal([(s * t, 14)], {t: 4}) == (
        "shape of x, dimension 0 is 14, but s*t is that for no int s\n"
        "  bound:  t = 4   from int_symbol_dict\n"
        "  fix:    feed a size that s*t can have"
    )


def test_a_size_out_of_range() -> None:
    s, k = IntSymbol("s", min=1, max=100), IntSymbol("k", multiple_of=64)
    assert refusal([(s, 101)]).splitlines()[0] == "shape of x, dimension 0 is 101, expected s, an int from 1 to 100"
    assert refusal([(2 * s + 1, 1)]) == (
        "shape of x, dimension 0 is 1, so that 2*s + 1 makes s 0, expected an int from 1 to 100\n"
        "  fix:    feed a size that 2*s + 1 can have"
    )
    assert "makes k 65, expected a multiple of 64, at least 0" in refusal([(k + 1, 66)])


def test_an_error_names_the_line_that_an_equation_stands_on() -> None:
    s, where = IntSymbol("s"), hetu.errors.caller()
    with pytest.raises(hetu.BindingError) as caught:
        Solver([Equation(s, "shape of x, dimension 0", where)]).solve({}, {}, [-1])
    assert f"\n  where:  test_binding.py:{where.lineno}   s, where = " in str(caught.value)


def test_values_that_a_leaf_takes() -> None:
    s, k = IntSymbol("s", max=100), IntSymbol("k", multiple_of=64)
    assert [check_leaf(s, n, "int_symbol_dict") for n in (0, 100)] == [0, 100]
    assert check_leaf(k, 2**70, "int_symbol_dict") == 2**70
    assert check_leaf(IntSymbol("n", min=None), -5, "int_symbol_dict") == -5


@pytest.mark.parametrize(
    ("leaf", "value", "what", "fix"),
    [
        (
            IntSymbol("s", max=100),
            101,
            "s is 101 from int_symbol_dict, expected an int from 0 to 100",
            "give s such a value",
        ),
        (IntSymbol("s"), -1, "s is -1 from int_symbol_dict, expected an int, at least 0", "give s such a value"),
        (
            IntSymbol("s", min=None, max=9),
            10,
            "s is 10 from int_symbol_dict, expected an int, at most 9",
            "give s such a value",
        ),
        (
            IntSymbol("s", multiple_of=64, min=None),
            65,
            "s is 65 from int_symbol_dict, expected a multiple of 64",
            "give s such a value",
        ),
        (IntSymbol("s"), 2.5, "s is 2.5 (float) from int_symbol_dict, expected an int", "give an int"),
        (IntSymbol("s"), True, "s is True (bool) from int_symbol_dict, expected an int", "give an int"),
        (IntSymbol("s") + 1, 5, "s + 1 is no leaf symbol, so int_symbol_dict can't bind it", "bind s instead"),
        (as_symbol(5), 5, "5 is no leaf symbol, so int_symbol_dict can't bind it", "leave it out"),
        ("s", 5, "'s' (str) is no symbol, so int_symbol_dict can't bind it", "use the IntSymbol itself"),
    ],
)
def test_values_that_it_does_not_take(leaf: Any, value: Any, what: str, fix: str) -> None:
    with pytest.raises(hetu.BindingError) as caught:
        check_leaf(leaf, value, "int_symbol_dict")
    lines = str(caught.value).splitlines()
    assert (lines[0], lines[-1]) == (what, f"  fix:    {fix}")
    assert lines[1].startswith("  where:  test_binding.py:")


# Bindings


def test_a_binding_tells_values_and_where_they_came_from() -> None:
    s, t, u = (IntSymbol(name) for name in "stu")
    values = {s: 7, t: 2**70}
    binding = Binding(values, {s: "int_symbol_dict", t: "shape of x, dimension 0"})
    values[s] = 8  # its own copy
    assert dict(binding) == {s: 7, t: 2**70}
    assert (binding[s], len(binding), s in binding, u in binding, binding.get(u)) == (7, 2, True, False, None)
    assert binding.source(t) == "shape of x, dimension 0"
    assert (binding.evaluate(2 * s + t), binding.evaluate(5)) == (14 + 2**70, 5)
    assert binding.describe(t - s + u) == [
        "s = 7   from int_symbol_dict",
        f"t = {2**70}   from shape of x, dimension 0",
    ]
    assert binding.describe(5) == []
    assert repr(binding) == f"Binding(s=7, t={2**70})"
    assert str(binding) == f"s = 7   from int_symbol_dict\nt = {2**70}   from shape of x, dimension 0"
    assert str(Binding({}, {})) == "(nothing bound)"
    with pytest.raises(TypeError):
        binding[s] = 9  # type: ignore[index]
    with pytest.raises(hetu.UnboundSymbolError, match=r"^no value for u in t \+ u\n"):
        binding.evaluate(t + u)


def test_binding_leaves_symbols_as_they_are() -> None:
    s = IntSymbol("s")
    s.set_data(3)
    assert Binding({s: 7}, {s: "int_symbol_dict"}).evaluate(s + 1) == 8
    assert s.data == 3


def test_threads_with_different_bindings_do_not_see_each_other() -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    area, start, wrong = (s + 127) // 128 * t, threading.Barrier(4), list[Any]()
    solver = Solver([Equation(s + t, "shape of x, dimension 0"), Equation(s, "shape of x, dimension 1")])

    def work(seed: int) -> None:
        start.wait()
        for i in range(300):
            n, m = seed * 10_000 + i, seed + i
            known: Known = {}
            solver.solve(known, {}, [n + m, n])
            got = known, area.evaluate(known), (s + i).evaluate(known)
            if got != ({s: n, t: m}, (n + 127) // 128 * m, n + i):
                wrong.append((seed, i, got))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert wrong == []


# Without sympy


def test_values_need_no_sympy(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t, k = IntSymbol("s"), IntSymbol("t"), IntSymbol("k", max=64, multiple_of=8)
    e = hetu.maximum((s + 127) // 128 * t, s % (t + 1), 5 - t)
    constraint, open_ = s > 2 * t, s >= t
    solver = Solver([Equation(x, f"shape of x, dimension {i}") for i, x in enumerate([2 * s + 1, s * t, e, k])])
    sizes = compile_exprs([e, s // 2], [s, t])
    assert e.evaluate({s: 1, t: 1}) == 5 - 1  # the first evaluation compiles
    assert constraint.holds({s: 3, t: 1})
    bool(open_.decided)

    class Called(BaseException):  # nothing catches it by accident
        pass

    def refuse(*_: Any, **__: Any) -> Any:
        raise Called

    for owner in (sympy.Basic, sympy.Expr, sympy.Integer, sympy.Add, sympy.Mul):
        monkeypatch.setattr(owner, "__new__", refuse)
    for name in ("sympify", "expand", "sstr"):
        monkeypatch.setattr(sympy, name, refuse)
    for name in ("subs", "xreplace", "doit", "atoms", "has"):
        monkeypatch.setattr(sympy.Basic, name, refuse)
    with pytest.raises(Called):
        s + 1  # the trap works
    known: Known = {}
    sources: dict[IntSymbol, str] = {}
    solver.solve(known, sources, [2**70 * 2 + 1, 2**71, None, 64])
    assert known == {s: 2**70, t: 2, k: 64}
    assert e.evaluate(known) == 2**64
    assert sizes(*map(known.__getitem__, (s, t))) == (2**64, 2**69)
    assert constraint.holds(known)
    binding = Binding(known, sources)
    assert binding.evaluate(e) == 2**64
    assert binding.evaluate(5) == 5
    assert binding.describe(e)[1] == "t = 2   from shape of x, dimension 1"
    with pytest.raises(hetu.BindingError, match=r"^2\*s \+ 1 is 15, but shape of x, dimension 0 is 17\n"):
        solver.solve({s: 7}, {s: "int_symbol_dict"}, [17, None, None, None])
    with pytest.raises(hetu.BindingError, match="is that for no int s"):
        solver.solve({}, {}, [16, None, None, None])
    with pytest.raises(hetu.BindingError, match="expected k, a multiple of 8 from 0 to 64"):
        solver.solve({}, {}, [None, None, None, 65])
    with pytest.raises(hetu.UnboundSymbolError, match="no value for t in max"):
        e.evaluate({s: 3})
