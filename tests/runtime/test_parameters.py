"""Parameters: where their first values come from, and that a graph keeps them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import hetu


def value(init: Any, shape: list[int], dtype: Any = hetu.float32, name: str = "w") -> torch.Tensor:
    with hetu.graph("define_and_run", device="cpu") as g:
        w = hetu.parameter(init, shape, dtype, name)
    return g.run(w)


def test_numbers_and_arrays() -> None:
    table = np.arange(6, dtype=np.float64).reshape(2, 3)
    assert torch.equal(value(0.5, [2]), torch.full((2,), 0.5))
    assert torch.equal(value(table, [2, 3]), torch.from_numpy(table).float())
    assert torch.equal(value(torch.ones(3), [3], hetu.bfloat16), torch.ones(3, dtype=torch.bfloat16))


def test_an_array_is_copied() -> None:
    table = np.ones(2, np.float32)
    with hetu.graph("define_and_run", device="cpu") as g:
        w = hetu.parameter(table, [2])
    table[:] = 7
    assert torch.equal(g.run(w), torch.ones(2))


def test_what_a_run_gives_is_a_copy() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        w = hetu.parameter(1.0, [2])
        flat = hetu.reshape(w, [1, 2])
    g.run(w).zero_()
    g.run(flat).zero_()
    assert torch.equal(g.run(w), torch.ones(2))


def test_random_values_depend_on_seed_and_name_alone() -> None:
    normal = functools.partial(torch.nn.init.normal_, std=0.02)
    hetu.manual_seed(3)
    first = value(normal, [4, 5])
    torch.rand(7)
    assert torch.equal(value(normal, [4, 5]), first)
    assert not torch.equal(value(normal, [4, 5], name="v"), first)
    hetu.manual_seed(4)
    assert not torch.equal(value(normal, [4, 5]), first)
    assert 0 < first.abs().max() < 0.2


def test_initialisers_leave_torchs_generator_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    value(torch.nn.init.normal_, [100])
    assert torch.equal(torch.rand(3), wanted)


def test_half_precision_is_rounded_from_float32() -> None:
    hetu.manual_seed(0)
    whole = value(torch.nn.init.normal_, [50])
    assert torch.equal(value(torch.nn.init.normal_, [50], hetu.bfloat16), whole.bfloat16())


@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        (lambda x: torch.zeros(3), hetu.ShapeError, "gave shape [3], expected [2]"),
        (lambda x: x.fill_(torch.nan), hetu.DTypeError, "no finite numbers"),
        (lambda x: torch.zeros(2, dtype=torch.int64), hetu.DTypeError, "torch.int64"),
        (lambda x: {}["fan"], hetu.HetuError, "the initialiser of w raised KeyError: 'fan'"),
        (lambda x: "a string", hetu.HetuError, "the initialiser of w raised"),
    ],
)
def test_bad_initialisers_name_the_line(init: Any, error: type[hetu.HetuError], message: str) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        w = hetu.parameter(init, [2], name="w")
    with pytest.raises(error) as caught:
        g.run(w)
    assert message in str(caught.value)
    assert "where:  test_parameters.py:" in str(caught.value)


def test_all_pipelines_have_the_same() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("n")])
        y = x + hetu.parameter(2.0, [1])
    one, two = g.run(y, {x: hetu.Shards([np.zeros(1, np.float32), np.ones(3, np.float32)])})
    assert one.tolist() == [2.0]
    assert two.tolist() == [3.0, 3.0, 3.0]
