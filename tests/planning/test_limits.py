"""Sizes and symbols that no machine can hold are refused when a run is bound, naming the symbol."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

import hetu
from hetu import IntSymbol
from hetu.symbols import magnitude_of


def full(s: IntSymbol) -> Any:
    return hetu.full([s], 1.0)


def square(s: IntSymbol) -> Any:
    return hetu.full([s, s], 1.0, "uint8")


def stretched(s: IntSymbol) -> Any:
    return hetu.sum(hetu.broadcast_to(hetu.full([1], 1.0), [s, s, s]))


def tripled(s: IntSymbol) -> Any:
    return hetu.full([3 * s], 1.0, "float64")


@pytest.mark.parametrize(("build", "size"), [(full, 2**55 + 1), (full, 2**62), (full, 2**70), (full, 10**400)])
@pytest.mark.parametrize("as_default", [False, True])
def test_a_tensor_too_large_for_any_machine(build: Callable[..., Any], size: int, as_default: bool) -> None:
    refused(build, size, as_default)


@pytest.mark.parametrize(("build", "size"), [(square, 2**32), (stretched, 2**20), (tripled, 2**55), (square, 2**63)])
def test_it_is_the_product_that_counts(build: Callable[..., Any], size: int) -> None:
    refused(build, size, as_default=False)


def refused(build: Callable[..., Any], size: int, as_default: bool) -> None:
    s = IntSymbol("s")
    with hetu.graph("define_and_run", device="cpu") as g:
        y = build(s)
    if as_default:
        s.set_data(size)
    with pytest.raises(hetu.BindingError, match="too large for any machine") as caught:
        g.run(y, int_symbol_dict={} if as_default else {s: size})
    text = str(caught.value)
    assert "where:  test_limits.py" in text
    assert "bound:  s = " in text
    assert "bind s to smaller values" in text
    with pytest.raises(hetu.BindingError):
        g.prepare(y, int_symbol_dict={s: size})


def test_the_shortcut_for_small_symbols_is_sound() -> None:
    draw, s, t = random.Random(5), IntSymbol("s", min=None), IntSymbol("t", min=None)
    made: list[IntSymbol] = [s, t, 2 * s - 3, s * t]
    for _ in range(200):
        a, b = draw.choice(made), draw.choice(made)
        made.append(draw.choice([a + b, a - 7 * b, a // 3, (a - 1) // -5, a % 9, -a % 4, hetu.maximum(a, b), -a]))
    for e in made:
        for most in (1, 10, 1000):
            values = {s: draw.randint(-most, most), t: draw.choice([-most, most])}
            assert abs(e.evaluate(values)) <= magnitude_of(e.expr, most), (str(e), values)


def test_plain_sizes_too() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        y = hetu.full([2**40, 2**40], 1.0)
        with pytest.raises(hetu.ShapeError, match="too large for any machine"):
            hetu.parameter(0.0, [2**40, 2**40])
    with pytest.raises(hetu.BindingError, match="too large for any machine"):
        g.run(y)


def test_large_sizes_of_nothing_are_fine() -> None:
    s, t = IntSymbol("s"), IntSymbol("t")
    with hetu.graph("define_and_run", device="cpu") as g:
        y = hetu.full([s, t], 1.0)
    assert g.run(y, int_symbol_dict={s: 2**62, t: 0}).shape == (2**62, 0)


OPS = [hetu.add, hetu.sub, hetu.mul, hetu.eq, hetu.ne, hetu.lt, hetu.le, hetu.gt, hetu.ge, hetu.div, hetu.pow]
LARGEST = {"uint8": 2**8, "int8": 2**7, "int16": 2**15, "int32": 2**31, "int64": 2**63}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("is_first", [False, True])
def test_a_symbol_as_an_operand_never_wraps(op: Any, dtype: str, is_first: bool) -> None:
    n = IntSymbol("n", min=None)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(dtype, [2], name="x")
        y = op(n, x) if is_first else op(x, n)
    largest = LARGEST[dtype]
    lowest = 0 if dtype == "uint8" else -largest
    # Quotients are computed as floats.
    for value in (2**1024, -(2**1024)) if op is hetu.div else (largest, lowest - 1, 2**70, -(2**70)):
        with pytest.raises(hetu.HetuError) as caught:
            g.run(y, {x: [0, 1]}, int_symbol_dict={n: value})
        assert "n = " in str(caught.value)
        assert "where:  test_limits.py" in str(caught.value)
    fits = g.run(y, {x: [1, 1]}, int_symbol_dict={n: 1})
    assert fits.tolist() == [op_of_ints(op, 1, 1)] * 2


def op_of_ints(op: Any, a: int, b: int) -> Any:
    import operator

    names = {"sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "pow": operator.pow}
    return names.get(op.__name__, getattr(operator, op.__name__, None))(a, b)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_floating_op_takes_a_symbol_of_any_length(dtype: str, is_first: bool) -> None:
    n = IntSymbol("n", min=None)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(dtype, [1], name="x")
        ops = [hetu.mul, hetu.add, hetu.lt, hetu.div]
        ys = [op(n, x) if is_first else op(x, n) for op in ops]
        ys.append(hetu.where(x > 0, n, x) if is_first else hetu.where(x < 0, x, n))
    for value in (3, 2**70, -(2**70), 2**100):
        product, total, less, quotient, chosen = (v.item() for v in g.run(ys, {x: [1.0]}, int_symbol_dict={n: value}))
        assert (product, chosen) == (float(value), float(value))
        assert total == pytest.approx(value + 1.0)
        assert less is ((value < 1) if is_first else (value > 1))
        assert quotient == pytest.approx(value if is_first else 1 / value)
    with pytest.raises(hetu.BindingError, match="n as an operand does not fit"):
        g.run(ys, {x: [1.0]}, int_symbol_dict={n: 2**1024})
