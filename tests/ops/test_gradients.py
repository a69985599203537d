"""Gradients of arithmetic, functions of elements, products, reductions and shapes against torch autograd."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import hetu
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.graph import registry

Shape = tuple[int, ...]
TOLERANCE = {"float64": 1e-12, "float32": 3e-6, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Case:
    """An op on floating operands, and the same in torch.

    Attributes:
        op: Takes graph tensors, gives one or several.
        torch: The same of torch tensors.
        shapes: Of the operands.
        positive: Whether operands are kept away from 0 and below.
    """

    op: Callable[..., Any]
    torch: Callable[..., Any]
    shapes: Sequence[Shape]
    positive: bool = False


PAIRS = [
    ((3, 5), (3, 5)),
    ((3, 5), (5,)),
    ((3, 5), (3, 1)),
    ((7, 1), (1, 3)),
    ((2, 1, 3), (4, 1)),
    ((), (3, 5)),
    ((1,), ()),
    ((0, 3), (1, 3)),
    ((1, 1), (3, 5)),
]
SHAPES: list[Shape] = [(3, 5), (1,), (), (0, 3), (2, 1, 33)]
PRODUCTS = [
    ((3, 5), (5, 2)),
    ((1, 1), (1, 1)),
    ((2, 3, 5), (5, 4)),
    ((2, 3, 5), (2, 5, 4)),
    ((2, 1, 3, 5), (4, 5, 2)),
    ((3, 5), (2, 5, 4)),
    ((5,), (5,)),
    ((5,), (5, 3)),
    ((5,), (2, 5, 3)),
    ((3, 5), (5,)),
    ((2, 3, 5), (5,)),
    ((1, 3, 5), (2, 5, 4)),
    ((0, 5), (5, 2)),
    ((3, 0), (0, 2)),
    ((2, 0, 5), (5, 3)),
    ((0, 2, 3), (0, 3, 1)),
]
ELEMENTS = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "exp": torch.exp,
    "sin": torch.sin,
    "cos": torch.cos,
}
OF_POSITIVE = {"log": torch.log, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt}
INDEX = np.random.default_rng(0).integers(0, 4, (3, 9))


def cases() -> dict[str, list[Case]]:
    """For each op its cases."""
    found: dict[str, list[Case]] = {}

    def add(name: str, op: Any, reference: Any, shapes: Sequence[Sequence[Shape]], positive: bool = False) -> None:
        found.setdefault(name, []).extend(Case(op, reference, item, positive) for item in shapes)

    for name, fn in (("add", operator.add), ("sub", operator.sub), ("mul", operator.mul)):
        add(name, fn, fn, PAIRS)
        for number in (3, -0.5):
            add(name, lambda x, fn=fn, n=number: fn(x, n), lambda x, fn=fn, n=number: fn(x, n), [[(3, 5)]])
            add(name, lambda x, fn=fn, n=number: fn(n, x), lambda x, fn=fn, n=number: fn(n, x), [[()]])
    add("div", operator.truediv, operator.truediv, PAIRS, positive=True)
    add("div", lambda x: x / 3, lambda x: x / 3, [[(3, 5)]])
    add("div", lambda x: 3 / x, lambda x: 3 / x, [[(3, 5)]], positive=True)
    add("pow", operator.pow, operator.pow, PAIRS, positive=True)
    for n in (-2, -0.5, 0, 1, 2, 3, 2.0, 3.5):
        add("pow", lambda x, n=n: x**n, lambda x, n=n: x**n, [[(3, 5)], [(0,)]], positive=True)
    for n in (0.5, 2, 0):
        add("pow", lambda x, n=n: n**x, lambda x, n=n: n**x, [[(3, 5)], [()]], positive=True)
    for name, fn in {**ELEMENTS, **OF_POSITIVE}.items():
        add(name, getattr(hetu, name), fn, [[shape] for shape in SHAPES], positive=name in OF_POSITIVE)
    add("gelu", lambda x: hetu.gelu(x, "tanh"), lambda x: functional.gelu(x, approximate="tanh"), [[(3, 5)], [(0,)]])
    add("where", lambda a, b: hetu.where(a > b, a, b), lambda a, b: torch.where(a > b, a, b), PAIRS)
    add("where", lambda x: hetu.where(x > 0, x, 0), lambda x: torch.where(x > 0, x, 0), [[(3, 5)]])
    add("where", lambda x: hetu.where(x > 0, 2.5, x), lambda x: torch.where(x > 0, 2.5, x), [[(3, 5)]])
    add("abs", hetu.abs, torch.abs, [[shape] for shape in SHAPES])  # of which the second derivative is nothing
    for name in ("floor", "round"):
        add(name, lambda x, f=name: getattr(hetu, f)(x) * x, lambda x, f=name: getattr(torch, f)(x) * x, [[(3, 5)]])
    for low, high in ((-0.5, 0.5), (0, None), (None, 0.25), (0.5, -0.5)):
        bounds = {"min": low, "max": high}
        add("clamp", lambda x, b=bounds: hetu.clamp(x, **b), lambda x, b=bounds: torch.clamp(x, **b), [[(3, 5)], [()]])
    add("clamp", lambda x, a: hetu.clamp(x, max=a), lambda x, a: torch.clamp(x, max=a), PAIRS)
    add("clamp", hetu.clamp, torch.clamp, [[(3, 5), (5,), (3, 1)], [(2, 3), (3,), ()]])
    add("masked_fill", lambda x: hetu.masked_fill(x, x > 0, 2), lambda x: x.masked_fill(x > 0, 2), [[(3, 5)], [()]])
    fill = (lambda x, v: hetu.masked_fill(x, x > 0, v)), (lambda x, v: x.masked_fill(x > 0, v))
    add("masked_fill", *fill, [[(3, 5), ()], [(0, 3), ()]])
    for down in (False, True):
        order = (lambda x, d=down: hetu.sort(x, 0, d)), (lambda x, d=down: torch.sort(x, dim=0, descending=d)[0])
        add("sort", lambda x, f=order[0]: f(x)[0], order[1], [[(5, 3)], [(1,)], [(0, 3)]])
        best = (lambda x, d=down: hetu.topk(x, 2, -1, d)[0]), (lambda x, d=down: torch.topk(x, 2, -1, d)[0])
        add("topk", *best, [[(3, 5)], [(2,)], [(0, 3)]])
    for dim in (0, -1):
        sums = (lambda x, d=dim: hetu.cumsum(x, d)), (lambda x, d=dim: torch.cumsum(x, d))
        add("cumsum", *sums, [[(3, 5)], [(1,)], [(0, 3)], [(2, 3, 4)]])
        for keep in (False, True):
            total = {"dim": dim, "keepdim": keep}
            log = (lambda x, t=total: hetu.logsumexp(x, **t)), (lambda x, t=total: torch.logsumexp(x, **t))
            add("logsumexp", *log, [[(3, 5)], [(1,)], [(2, 3, 4)]])
    add("logsumexp", hetu.logsumexp, lambda x: torch.logsumexp(x, (0, 1)), [[(3, 5)]])
    add("matmul", hetu.matmul, torch.matmul, PRODUCTS)
    for x, w in (((3, 5), (2, 5)), ((2, 3, 5), (4, 5)), ((5,), (3, 5)), ((0, 5), (3, 5)), ((2, 0), (3, 0))):
        add("linear", hetu.linear, functional.linear, [(x, w), (x, w, w[:1])])
    for dim in (None, 0, -1, (0, 2), (0, 1, 2)):
        for keep in (False, True):
            for name, fn in (("sum", torch.sum), ("mean", torch.mean), ("max", torch.amax), ("min", torch.amin)):
                add(
                    name,
                    lambda x, name=name, d=dim, k=keep: getattr(hetu, name)(x, d, k),
                    lambda x, fn=fn, d=dim, k=keep: fn(x, (0, 1, 2) if d is None else d, k),
                    [[(2, 3, 5)], [(1, 7, 1)]] + ([] if name in ("max", "min") else [[(3, 0, 2)]]),
                )
    for name, fn in (("sum", torch.sum), ("mean", torch.mean), ("max", torch.amax)):
        add(name, getattr(hetu, name), fn, [[()], [(1,)]])
    add("max", lambda x: hetu.max(x, 0), lambda x: torch.amax(x, 0), [[(2, 0)]])
    add("reshape", lambda x: hetu.reshape(x, [-1, 3]), lambda x: x.reshape(-1, 3), [[(2, 3, 5)], [(3,)], [(0, 3)]])
    add("transpose", lambda x: hetu.transpose(x, 0, -1), lambda x: x.transpose(0, -1), [[(2, 3, 5)], [(1,)], [(0, 3)]])
    add(
        "broadcast_to", lambda x: hetu.broadcast_to(x, [4, 3, 5]), lambda x: x.expand(4, 3, 5), [[(3, 1)], [()], [(5,)]]
    )
    add("broadcast_to", lambda x: hetu.broadcast_to(x, [0, 2]), lambda x: x.expand(0, 2), [[(1, 2)], [(2,)]])
    add("slice", lambda x: hetu.slice(x, 1, 1, 3), lambda x: x[:, 1:3], [[(2, 3)], [(0, 7)], [(2, 5, 3)]])
    add("slice", lambda x: hetu.slice(x, 0, 1, None, 3), lambda x: x[1::3], [[(1,)], [(2, 3)], [(8, 1)]])
    add("slice", lambda x: hetu.slice(x, 0, 2, 2), lambda x: x[2:2], [[(5, 3)]])
    for dim in (0, 1, -1):
        join = (lambda *x, d=dim: hetu.concat(x, d)), (lambda *x, d=dim: torch.cat(x, d))
        add("concat", *join, [[(3, 5)], [(3, 5), (3, 5)], [(3, 5), (3, 5), (3, 5)]])
    add("concat", lambda *x: hetu.concat(x), lambda *x: torch.cat(x), [[(3, 5), (0, 5), (1, 5)], [(0,), (0,)]])
    add("split", lambda x: hetu.split(x, [1, 0, 4], 1), lambda x: x.split([1, 0, 4], 1), [[(3, 5)], [(0, 5)]])
    add("split", lambda x: hetu.split(x, 2), lambda x: x.split(2), [[(5, 3)], [(4,)], [(1, 2)]])
    # Pieces of which nothing is used have the gradient 0.
    add("split", lambda x: hetu.split(x, 2)[1], lambda x: x.split(2)[1], [[(5, 3)]])
    add(
        "gather",
        lambda x: hetu.gather(x, 1, hetu.constant(INDEX)),
        lambda x: x.gather(1, torch.from_numpy(INDEX)),
        [[(3, 4)], [(7, 5)]],
    )
    add("stop_gradient", lambda x: hetu.stop_gradient(x) * x, lambda x: x.detach() * x, [[(3, 5)]])
    return found


CASES = cases()
NAMED = [
    pytest.param(case, id=f"{name}-{i}-{'-'.join('x'.join(map(str, shape)) or 'scalar' for shape in case.shapes)}")
    for name, several in CASES.items()
    for i, case in enumerate(several)
]


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def values_of(case: Case, dtypes: Sequence[str]) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal(shape) for shape in case.shapes]
    return [
        torch.from_numpy(np.asarray(np.abs(x) + 0.25 if case.positive else x)).to(getattr(torch, dtype))
        for x, dtype in zip(drawn, dtypes, strict=True)
    ]


def gradients_of(case: Case, dtypes: Sequence[str], values: Sequence[torch.Tensor]) -> tuple[list[Any], ...]:
    """The outputs, the weights of their elements, and the gradients of the weighted sum."""
    rng = np.random.default_rng(1)
    with hetu.graph("define_and_run", device="cpu") as g:
        xs = [hetu.placeholder(dtype, shape) for dtype, shape in zip(dtypes, case.shapes, strict=True)]
        ys = as_list(case.op(*xs))
        drawn = [torch.from_numpy(np.asarray(rng.standard_normal(y.shape))).to(TORCH_DTYPES[y.dtype]) for y in ys]
        weights = [hetu.placeholder(y.dtype, y.shape) for y in ys]
        grads = hetu.gradients(ys, xs, weights)
    g.verify()
    feeds = dict(zip([*xs, *weights], [*values, *drawn], strict=True))
    results = g.run([*ys, *grads], feed_dict=feeds)
    return results[: len(ys)], drawn, results[len(ys) :]


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    assert torch.equal(got.isnan(), wanted.isnan())  # the mean of nothing
    got, wanted = got.nan_to_num(), wanted.nan_to_num()
    if wanted.numel():
        error = (got.double() - wanted.double()).abs().max().item()
        assert error <= tolerance * max(1.0, wanted.abs().max().item())


def check(case: Case, dtypes: Sequence[str], exact_in: torch.dtype) -> None:
    values = values_of(case, dtypes)
    ys, weights, grads = gradients_of(case, dtypes, values)
    exact = [value.to(exact_in).requires_grad_() for value in values]
    expected = as_list(case.torch(*exact))
    wanted = torch.autograd.grad(expected, exact, [w.to(y.dtype) for w, y in zip(weights, expected, strict=True)])
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    for y, other in zip(ys, expected, strict=True):
        assert_close(y, other.detach(), tolerance)
    for grad, value, other in zip(grads, values, wanted, strict=True):
        assert grad.dtype == value.dtype
        assert_close(grad, other, tolerance)


@pytest.mark.parametrize("case", NAMED)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_against_autograd(case: Case, dtype: str) -> None:
    check(case, [dtype] * len(case.shapes), getattr(torch, dtype))


@pytest.mark.parametrize("case", [item for item in NAMED if np.prod(item.values[0].shapes[0]) < 60])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(case: Case, dtype: str) -> None:
    """Against autograd in float64 on the same values: nothing but roundings at the end."""
    check(case, [dtype] * len(case.shapes), torch.float64)


def test_every_op_of_these_families_is_in_the_table() -> None:
    """An op with a rule that stands neither here nor with the layers would have only finite differences."""
    elsewhere = {"all_reduce", "attn_varlen", "cast", "cross_entropy", "dropout", "embedding", "layer_norm"}
    elsewhere |= {"op", "parallel_attn", "rms_norm", "rotary", "softmax", "swiglu"}
    base = hetu.graph.OpDef.gradient
    public = {name for name, item in registry().items() if item.is_public and type(item).gradient is not base}
    assert public - elsewhere == set(CASES) - {"stop_gradient"}


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("bfloat16", "float32"), ("float16", "bfloat16")])
@pytest.mark.parametrize("shapes", [((3, 5), (5,)), ((), (3, 1)), ((3, 5), ())])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "pow", "where", "concat"])
def test_promoted_operands_get_gradients_of_their_own_dtype(
    name: str, shapes: tuple[Shape, Shape], dtypes: tuple[str, str]
) -> None:
    ops = {
        "add": (operator.add,) * 2,
        "sub": (operator.sub,) * 2,
        "mul": (operator.mul,) * 2,
        "div": (operator.truediv,) * 2,
        "pow": (operator.pow,) * 2,
        "where": (lambda a, b: hetu.where(b > 0.5, a, b), lambda a, b: torch.where(b > 0.5, a, b)),
        "concat": (lambda a, b: hetu.concat([a, b]), lambda a, b: torch.cat([a, b])),
    }
    if name == "concat":
        shapes = ((3, 5), (1, 5))
    for order in (1, -1):
        check(Case(*ops[name], shapes[::order], positive=True), dtypes[::order], torch.float64)


def test_integer_operands_have_no_gradient_and_pass_one_on() -> None:
    values, ints = np.array([1.5, -2.0, 3.0]), np.array([2, 0, 1])
    with hetu.graph("define_and_run", device="cpu") as g:
        x, n = hetu.placeholder("float64", [3]), hetu.placeholder("int64", [3])
        ys = [x * n, n - x, n / x, x**n, hetu.where(n > 0, x, n), hetu.concat([n, x])]
        grads = [hetu.gradients(y, x) for y in ys]
    t, m = torch.from_numpy(values).requires_grad_(), torch.from_numpy(ints)
    wanted = [t * m, m - t, m / t, t**m, torch.where(m > 0, t, m.double()), torch.cat([m, t])]
    for got, expected in zip(g.run(grads, feed_dict={x: values, n: ints}), wanted, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), t)[0])


def test_symbols_are_factors_and_exponents() -> None:
    s, t = hetu.IntSymbol("s"), hetu.IntSymbol("t", min=-5)
    values = np.array([0.0, 2.0, -3.0])
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [s])
        ys = [x * s, s - x, x / (s + 1), x**s, x**t, s**x, t**x]
        grads = [hetu.gradients(y, x) for y in ys]
    for n in (0, 1, 2):
        exact = torch.from_numpy(values).requires_grad_()
        wanted = [exact * 3, 3 - exact, exact / 4, exact**3, exact**n, 3**exact, n**exact]
        for got, expected in zip(g.run(grads, feed_dict={x: values}, int_symbol_dict={t: n}), wanted, strict=True):
            torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), exact)[0])
    torch.testing.assert_close(
        g.run(grads[4], feed_dict={x: [1.0, 2.0, 4.0]}, int_symbol_dict={t: -2}),
        torch.tensor([-2.0, -0.25, -2 / 64], dtype=torch.float64),
    )


# Where a function has a kink or is not finite


def both(op: Callable[..., Any], reference: Callable[..., Any], *arrays: Sequence[float]) -> None:
    """Exactly what torch gives, NaN included."""
    case = Case(op, reference, [np.shape(array) for array in arrays])
    values = [torch.tensor(array, dtype=torch.float64) for array in arrays]
    _, (weight,), grads = gradients_of(case, ["float64"] * len(arrays), values)
    exact = [value.clone().requires_grad_() for value in values]
    wanted = torch.autograd.grad(reference(*exact), exact, weight)
    for got, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_kinks_are_torchs() -> None:
    nan, inf = float("nan"), float("inf")
    both(hetu.relu, torch.relu, [-1.0, 0.0, 2.0, nan, inf, -inf])
    both(lambda x: hetu.max(x, 1), lambda x: x.amax(1), [[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [1.0, nan, 5.0]])
    both(hetu.max, torch.amax, [[-inf, -inf], [-inf, -inf]])
    both(operator.pow, operator.pow, [0.0, 0.0, 0.0, -2.0, 2.0], [0.0, 2.0, 0.5, 2.0, 0.0])
    both(lambda x: x**0, lambda x: x**0, [0.0, inf, -1.0])
    both(lambda x: x**1, lambda x: x**1, [0.0, inf, -1.0])
    both(lambda x: 0**x, lambda x: 0**x, [0.0, 2.0])
    both(lambda x: (-2.0) ** x, lambda x: (-2.0) ** x, [1.0, 2.0])
    both(hetu.sqrt, torch.sqrt, [0.0, 4.0, -1.0])
    both(operator.truediv, operator.truediv, [1.0, 0.0], [0.0, 0.0])


def test_what_where_does_not_choose_leaves_no_trace() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [2])
        dx = hetu.gradients(hetu.where(x > 0, hetu.log(hetu.where(x > 0, x, 1)), 0), x)
    torch.testing.assert_close(g.run(dx, feed_dict={x: [2.0, -1.0]}), torch.tensor([0.5, 0.0], dtype=torch.float64))


CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_gather_sums_up_in_float32(device: str) -> None:
    """4099 uses of one element: float16 has no 2049, so an accumulator of that type would stop at 2048."""
    with hetu.graph("define_and_run", device=device) as g:
        x, index = hetu.placeholder("float16", [2]), hetu.placeholder("int64", [4099])
        dx = hetu.gradients(hetu.gather(x, 0, index), x)
    assert g.run(dx, feed_dict={index: np.ones(4099, int)}).tolist() == [0.0, 4100.0]


# What a rule adds to the graph


def added(build: Callable[..., Any], *shapes: Shape) -> list[str]:
    """The ops that a gradient consists of, apart from what the forward and the placeholders are."""
    with hetu.graph("define_and_run") as g:
        xs = [hetu.placeholder("float32", shape) for shape in shapes]
        y = as_list(build(*xs))[0]
        weight = hetu.placeholder("float32", y.shape)
        before = len(g.nodes)
        hetu.gradients(y, xs, weight)
    return sorted(node.definition.name for node in g.nodes[before:])


def test_rules_are_as_short_as_torchs() -> None:
    """One product an operand, and no pass over memory that torch's own backward has not."""
    assert added(hetu.matmul, (3, 5), (5, 2)) == ["matmul", "matmul", "transpose", "transpose"]
    assert added(hetu.linear, (3, 5), (2, 5)) == ["matmul", "matmul", "transpose"]
    assert added(hetu.linear, (3, 5), (2, 5), (2,)) == ["matmul", "matmul", "sum", "transpose"]
    assert added(hetu.linear, (4, 3, 5), (2, 5)) == ["matmul", "matmul", "reshape", "reshape", "transpose"]
    assert "sum" not in added(hetu.matmul, (4, 3, 5), (5, 2))
    assert added(operator.add, (3, 5), (3, 5)) == []
    assert added(operator.add, (3, 5), (5,)) == ["sum"]
    assert added(hetu.silu, (3, 5)) == ["silu_grad"]
    assert added(hetu.gelu, (3, 5)) == ["gelu_grad"]
    assert added(lambda x: hetu.slice(x, 0, 1), (3, 5)) == ["slice_grad"]
    assert added(lambda x: hetu.split(x, 1), (3, 5)) == ["concat", "full", "full"]
    assert added(lambda *x: hetu.concat(x), (3, 5), (1, 5)) == ["split"]
    assert added(lambda x: hetu.sum(x, 0), (3, 5)) == ["broadcast_to", "reshape"]


def test_split_is_differentiated_by_one_concat() -> None:
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder("float32", [6])
        a, b, c = hetu.split(x, 2)
        hetu.gradients([a * b, c * 2], x)
    assert sum(node.definition.name == "concat" for node in g.nodes) == 1
    assert not any(node.definition.name == "slice_grad" for node in g.nodes)


# Gradients of gradients


SECOND: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    **{name: (getattr(hetu, name), fn) for name, fn in {**ELEMENTS, **OF_POSITIVE}.items()},
    "gelu-tanh": (lambda x: hetu.gelu(x, "tanh"), lambda x: functional.gelu(x, approximate="tanh")),
    "slice": (lambda x: hetu.slice(x * x * x, 1, 1, 3), lambda x: (x * x * x)[:, 1:3]),
    "gather": (
        lambda x: hetu.gather(x * x * x, 1, hetu.constant(INDEX[:, :4])),
        lambda x: (x * x * x).gather(1, torch.from_numpy(INDEX[:, :4])),
    ),
    "matmul": (lambda x: x @ hetu.transpose(x, 0, 1) @ x, lambda x: x @ x.T @ x),
    "max": (lambda x: hetu.max(x * x * x, 1), lambda x: (x * x * x).amax(1)),
    "topk": (lambda x: hetu.topk(x * x * x, 2)[0], lambda x: (x * x * x).topk(2)[0]),
    "cumsum": (lambda x: hetu.cumsum(x * x * x, 1), lambda x: (x * x * x).cumsum(1)),
    "logsumexp": (lambda x: hetu.logsumexp(x, 1), lambda x: torch.logsumexp(x, 1)),
    "clamp": (lambda x: hetu.clamp(x * x * x, -0.5, 0.5), lambda x: (x * x * x).clamp(-0.5, 0.5)),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(name: str) -> None:
    """Of everything with an op of its own in its rule, and of some others."""
    op, reference = SECOND[name]

    def twice(x: hetu.Tensor) -> hetu.Tensor:
        dx = hetu.gradients(op(x), x)
        return dx * dx

    def twice_in_torch(x: torch.Tensor) -> torch.Tensor:
        (dx,) = torch.autograd.grad(reference(x).sum(), x, create_graph=True)
        return dx * dx

    check(Case(twice, twice_in_torch, [(3, 5)], positive=name in OF_POSITIVE), ["float64"], torch.float64)


def test_logsumexp_of_nothing_but_zeros_has_the_gradient_of_torch() -> None:
    values = torch.tensor([[-torch.inf, -torch.inf], [1.0, -torch.inf], [torch.inf, 1.0]], dtype=torch.float64)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [3, 2], name="x")
        dx = hetu.gradients(hetu.sum(hetu.logsumexp(x, 1)), x)
    leaf = values.clone().requires_grad_()
    leaf.logsumexp(1).sum().backward()
    assert torch.equal(g.run(dx, {x: values}).nan_to_num(7), leaf.grad.nan_to_num(7)) and leaf.grad[0].isnan().all()


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-1.0, None), (None, 1.0), (float("nan"), None), (1.0, -1.0)])
@pytest.mark.parametrize("tensors", [False, True])
def test_clamp_passes_no_gradient_to_nan(bounds: tuple[float | None, float | None], tensors: bool) -> None:
    values = torch.tensor([float("nan"), float("inf"), -1.0, 0.5, 1.0, -2.0], dtype=torch.float64)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float64", [6], name="x")
        low, high = (hetu.full([6], b, "float64") if tensors and b is not None else b for b in bounds)
        dx = hetu.gradients(hetu.sum(hetu.clamp(x, low, high)), x)
    leaf = values.clone().requires_grad_()
    limits = [torch.full([6], b, dtype=torch.float64) if tensors and b is not None else b for b in bounds]
    torch.clamp(leaf, *limits).sum().backward()  # type: ignore[arg-type]
    assert torch.equal(g.run(dx, {x: values}), leaf.grad)  # type: ignore[arg-type]
