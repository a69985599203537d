"""pow, comparisons and where in particular: promotion as torch has it, numbers and symbols on either side."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.dtypes import ALL

OPS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "pow": operator.pow,
    "where": lambda a, b: torch.where(torch.tensor([True, False]), a, b),
}
NUMBERS = (3, 2.5, True)


def build(name: str, a: Any, b: Any) -> hetu.Tensor:
    if name == "where":
        return hetu.where(hetu.constant([True, False]), a, b)
    return getattr(hetu, name)(a, b)


def in_torch(name: str, a: Any, b: Any) -> torch.Tensor | None:
    if name in ("eq", "ne") and not isinstance(a, torch.Tensor):
        a, b = b, a
    try:
        result = OPS[name](a, b)
    except (RuntimeError, NotImplementedError):
        return None
    # torch takes no powers of bools, but for the exponent True, which it sees to be 1.
    return None if name == "pow" and result.dtype == torch.bool else result


def in_hetu(name: str, a: Any, b: Any) -> hetu.Tensor | None:
    try:
        return build(name, a, b)
    except hetu.DTypeError:
        return None


@pytest.mark.parametrize("name", OPS)
def test_promotion_is_torchs(name: str) -> None:
    """Every pair of dtypes, with and without dimensions, and every kind of number on either side."""
    with hetu.graph("define_and_run", device="cpu") as g:
        operands = [
            (hetu.placeholder(dtype, shape), torch.full(shape, 2, dtype=TORCH_DTYPES[dtype]))
            for dtype in ALL
            for shape in ((), (2,))
        ]
        numbers = [(number, number) for number in NUMBERS]
        pairs = [(a, b) for a in operands for b in (*operands, *numbers)]
        pairs += [(a, b) for a in numbers for b in operands]
        pairs += [(a, b) for a in numbers for b in numbers] if name == "where" else []
        built = [in_hetu(name, a[0], b[0]) for a, b in pairs]
    wanted = [in_torch(name, a[1], b[1]) for a, b in pairs]
    assert [item is None for item in built] == [item is None for item in wanted]
    fetches = [item for item in built if item is not None]
    results = g.run(fetches, feed_dict=dict(operands))
    for tensor, result, expected in zip(fetches, results, (item for item in wanted if item is not None), strict=True):
        assert TORCH_DTYPES[tensor.dtype] == result.dtype == expected.dtype, tensor.op
        torch.testing.assert_close(result, expected, msg=lambda text, node=tensor.op: f"{node.inputs}: {text}")


@pytest.fixture
def float64_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64_default")
def test_dtype_does_not_depend_on_torchs_default() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("int64", [2])
        powers = [x**2.5, 2.5**x]
        chosen = [hetu.where(x > 0, 1.5, 2), hetu.where(x > 0, x, 0.5)]
        # 16777217 is no float32, in which ints are compared with floats: there they are equal.
        compared = hetu.eq(x, 16777216.0)
    results = g.run([*powers, *chosen, compared], feed_dict={x: np.array([1, 16777217])})
    assert {item.dtype for item in results[:4]} == {torch.float32}
    assert results[4].tolist() == [False, True]


def test_symbols_on_either_side() -> None:
    s, t = hetu.IntSymbol("s"), hetu.IntSymbol("t", min=-3)
    values = np.array([1.0, 3.0, 4.0])
    with hetu.graph("define_and_run", device="cpu") as g:
        x, n = hetu.placeholder("float64", [s]), hetu.placeholder("int64", [s], name="n")
        fetches = [x < s, s < x, hetu.eq(s, x), x**s, s**x, hetu.where(x > 2, s, x), x < 2**70, x**t]
        ints = n**t
    wanted = [values < 3, values > 3, values == 3, values**3, 3**values, np.where(values > 2, 3, values), values < 9]
    wanted.append(values**-2)
    for result, expected in zip(g.run(fetches, feed_dict={x: values}, int_symbol_dict={t: -2}), wanted, strict=True):
        np.testing.assert_allclose(result, expected)
    assert g.run(ints, feed_dict={n: [1, 2, 3]}, int_symbol_dict={t: 2}).tolist() == [1, 4, 9]
    with pytest.raises(hetu.HetuError, match="exponent of at least 0 for a base of ints, got t") as caught:
        g.run(ints, feed_dict={n: [1, 2, 3]}, int_symbol_dict={t: -1})
    assert "ints = n**t" in str(caught.value)
