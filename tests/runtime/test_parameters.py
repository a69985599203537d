"""Parameters: where their first values come from, and that a graph keeps them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


class Casting(TorchDispatchMode):
    """Counts what torch converts: of each call how many tensors of the parameter's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (torch.ops.aten._to_copy.default, torch.ops.aten._foreach_copy_.default):
            read = args[0] if isinstance(args[0], torch.Tensor) else args[1]
            self.counts += [1] if isinstance(read, torch.Tensor) and tuple(read.shape) == (3, 5) else []
            self.counts += [len(read)] if isinstance(read, list) else []
        return op(*args, **(kwargs or {}))


def test_a_step_casts_parameters_once() -> None:
    rows = hetu.IntSymbol("rows")
    strategies = [hetu.Strategy([4], [0]), hetu.Strategy([2, 2], [0, 0])]
    with hetu.graph("define_and_run", strategies=strategies, device="cpu") as g, hetu.autocast(hetu.bfloat16):
        x = hetu.placeholder(hetu.float32, [rows, 5], name="x")
        w, v = (hetu.parameter(0.5, shape, name=name) for name, shape in (("w", [3, 5]), ("v", [3, 3])))
        loss = hetu.sum(hetu.linear(hetu.linear(x, w), v))
        train = hetu.optim.SGD(lr=0.25).minimize(loss)
    feeds = {x: [hetu.Shards([np.ones((2, 5))] * 2)] * 3}

    found = [float(g.run(train, feeds, num_micro_batches=3, strategy=1))]
    with Casting() as seen:
        found.append(float(g.run(train, feeds, num_micro_batches=3, strategy=1)))
    assert [count for count in seen.counts if count != 1] == [2], "both parameters in one call, for all"
    assert seen.counts.count(1) <= 6, "what is left are gradients"
    assert found[0] == 12 * 5 * 3 * 3 * 0.25 and found[1] != found[0], "an update is seen"


def test_what_a_run_gives_of_a_cast_is_a_copy() -> None:
    rows = hetu.IntSymbol("rows")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [rows], name="x")
        w = hetu.parameter(1.0, [2])
        low, flat = hetu.cast(w, hetu.bfloat16), hetu.reshape(hetu.cast(w, hetu.bfloat16), [1, 2])
    first, second = g.run([low, flat, x], {x: [[1.0], [2.0]]}, num_micro_batches=2)[:2]
    for value in (first[0], second[0]):
        value.zero_()
    assert torch.equal(first[1], torch.ones(2, dtype=torch.bfloat16)) and torch.equal(second[1].sum(), first[1].sum())
    assert torch.equal(g.run(low), torch.ones(2, dtype=torch.bfloat16))
