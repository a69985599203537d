"""Random small graphs, built from one recipe in hetu and in torch: equal values, equal gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import hetu

Shape = tuple[int, ...]
SHAPES: list[Shape] = [(3, 4), (4, 3), (4,), (3, 1), (2, 3, 4), (4, 4)]
STEPS = 12


@dataclass(frozen=True)
class Dialect:
    """What a recipe is told in: the same functions of hetu or of torch."""

    lib: Any
    reshape: Callable[[Any, Shape], Any]
    slice: Callable[[Any, int, int, int], Any]
    concat: Callable[[list[Any], int], Any]
    gather: Callable[[Any, int, np.ndarray], Any]
    silu: Callable[[Any], Any]
    softmax: Callable[[Any], Any]
    broadcast: Callable[[Any, Shape], Any]
    max: Callable[[Any, int], Any]


HETU = Dialect(
    lib=hetu,
    reshape=hetu.reshape,
    slice=hetu.slice,
    concat=hetu.concat,
    gather=lambda x, dim, index: hetu.gather(x, dim, hetu.constant(index)),
    silu=hetu.silu,
    softmax=hetu.softmax,
    broadcast=hetu.broadcast_to,
    max=lambda x, dim: hetu.max(x, dim, keepdim=True),
)
TORCH = Dialect(
    lib=torch,
    reshape=torch.reshape,
    slice=lambda x, dim, start, stop: x.narrow(dim, start, stop - start),
    concat=torch.cat,
    gather=lambda x, dim, index: x.gather(dim, torch.from_numpy(index)),
    silu=functional.silu,
    softmax=lambda x: torch.softmax(x, -1),
    broadcast=torch.broadcast_to,
    max=lambda x, dim: x.amax(dim, keepdim=True),
)

Step = Callable[[Dialect, list[Any]], Any]
"""Makes the next tensor, or several, of those there are."""


class Recipe:
    """A random computation: its inputs' shapes, steps, and which of the results are summed up.

    It is drawn by looking at shapes alone, so that both libraries follow the same one.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.inputs: list[Shape] = [SHAPES[i] for i in self.rng.integers(0, len(SHAPES), 3)]
        self.shapes: list[Shape] = list(self.inputs)
        self.steps: list[Step] = []
        while len(self.steps) < STEPS:
            self._draw(str(self.rng.choice([name for name in dir(self) if name.startswith("draw_")])))
        self.targets = sorted({*self.rng.integers(0, len(self.shapes), 2).tolist(), len(self.shapes) - 1})

    def _draw(self, name: str) -> None:
        found = getattr(self, name)()
        if found is not None:
            step, shapes = found
            self.steps.append(step)
            self.shapes += shapes

    def run(self, dialect: Dialect, inputs: list[Any]) -> list[Any]:
        """All tensors of the computation."""
        made = list(inputs)
        for step in self.steps:
            result = step(dialect, made)
            made += result if isinstance(result, (list, tuple)) else [result]
        return made

    def pick(self, least: int = 0) -> tuple[int, Shape]:
        """Any tensor so far of at least so many dimensions; later ones are likelier."""
        fitting = [i for i, shape in enumerate(self.shapes) if len(shape) >= least]
        weights = np.arange(1, len(fitting) + 1)
        i = int(self.rng.choice(fitting, p=weights / weights.sum()))
        return i, self.shapes[i]

    def draw_elementwise(self) -> Any:
        (i, one), (j, other) = self.pick(), self.pick()
        try:
            shape = np.broadcast_shapes(one, other)
        except ValueError:
            return None
        if np.prod(shape) > 500:
            return None
        op = self.rng.choice(["add", "sub", "mul", "div", "where"])

        def step(d: Dialect, x: list[Any]) -> Any:
            a, b = d.lib.tanh(x[i]), d.lib.tanh(x[j])  # so that no value runs away
            return {
                "add": lambda: a + b,
                "sub": lambda: a - b,
                "mul": lambda: a * b,
                "div": lambda: a / (b * b + 1),
                "where": lambda: d.lib.where(a > b, a, b * 0.5),
            }[op]()

        return step, [shape]

    def draw_of_one(self) -> Any:
        i, shape = self.pick()
        op = self.rng.choice(["relu", "silu", "exp", "sigmoid", "log", "sqrt", "rsqrt", "pow", "number"])

        def step(d: Dialect, x: list[Any]) -> Any:
            t, positive = x[i], x[i] * x[i] + 0.5
            return {
                "relu": lambda: d.lib.relu(t),
                "silu": lambda: d.silu(t),
                "exp": lambda: d.lib.exp(d.lib.tanh(t) * 0.5),
                "sigmoid": lambda: d.lib.sigmoid(t),
                "log": lambda: d.lib.log(positive),
                "sqrt": lambda: d.lib.sqrt(positive),
                "rsqrt": lambda: d.lib.rsqrt(positive),
                "pow": lambda: d.lib.tanh(t) ** 3,
                "number": lambda: 2 - t / 3,
            }[op]()

        return step, [shape]

    def draw_softmax(self) -> Any:
        i, shape = self.pick(1)
        return (lambda d, x: d.softmax(x[i])), [shape]

    def draw_matmul(self) -> Any:
        (i, one), (j, other) = self.pick(1), self.pick(1)
        try:
            shape = np.matmul(np.zeros(one), np.zeros(other)).shape
        except ValueError:
            return None
        return (lambda d, x: d.lib.matmul(d.lib.tanh(x[i]), d.lib.tanh(x[j]))), [shape]

    def draw_transpose(self) -> Any:
        i, shape = self.pick(2)
        one, other = self.rng.choice(len(shape), 2, replace=False).tolist()
        swapped = list(shape)
        swapped[one], swapped[other] = swapped[other], swapped[one]
        return (lambda d, x: d.lib.transpose(x[i], one, other)), [tuple(swapped)]

    def draw_reshape(self) -> Any:
        i, shape = self.pick()
        wanted = [(int(np.prod(shape)),), (1, *shape), (*shape, 1), shape[::-1]][self.rng.integers(4)]
        return (lambda d, x: d.reshape(x[i], wanted)), [wanted]

    def draw_slice(self) -> Any:
        i, shape = self.pick(1)
        dim = int(self.rng.integers(len(shape)))
        start, stop = sorted(self.rng.integers(0, shape[dim] + 1, 2).tolist())
        if start == stop:
            return None
        return (lambda d, x: d.slice(x[i], dim, start, stop)), [(*shape[:dim], stop - start, *shape[dim + 1 :])]

    def draw_concat(self) -> Any:
        (i, one), (j, other) = self.pick(1), self.pick(1)
        dim = int(self.rng.integers(len(one)))
        if len(one) != len(other) or any(a != b for k, (a, b) in enumerate(zip(one, other, strict=True)) if k != dim):
            return None
        return (lambda d, x: d.concat([x[i], x[j]], dim)), [(*one[:dim], one[dim] + other[dim], *one[dim + 1 :])]

    def draw_split(self) -> Any:
        i, shape = self.pick(1)
        dim = int(self.rng.integers(len(shape)))
        cut = int(self.rng.integers(0, shape[dim] + 1))
        sizes = [cut, shape[dim] - cut]
        pieces = [(*shape[:dim], size, *shape[dim + 1 :]) for size in sizes]
        return (lambda d, x: d.lib.split(x[i], sizes, dim)), pieces

    def draw_gather(self) -> Any:
        i, shape = self.pick(1)
        dim = int(self.rng.integers(len(shape)))
        if not shape[dim]:
            return None
        index = self.rng.integers(0, shape[dim], shape)
        return (lambda d, x: d.gather(x[i], dim, index)), [shape]

    def draw_reduction(self) -> Any:
        i, shape = self.pick(1)
        dim, op = int(self.rng.integers(len(shape))), self.rng.choice(["sum", "mean", "max"])
        if not shape[dim]:
            return None
        kept = (*shape[:dim], 1, *shape[dim + 1 :])
        if op == "max":
            return (lambda d, x: d.max(x[i], dim)), [kept]
        return (lambda d, x: getattr(d.lib, op)(x[i], dim, True)), [kept]

    def draw_broadcast(self) -> Any:
        i, shape = self.pick()
        if np.prod(shape) > 100:
            return None
        return (lambda d, x: d.broadcast(x[i], (2, *shape))), [(2, *shape)]


@pytest.mark.parametrize("seed", range(40))
def test_values_and_gradients_are_torchs(seed: int) -> None:
    recipe = Recipe(seed)
    rng = np.random.default_rng(1000 + seed)
    feeds = [rng.standard_normal(shape) for shape in recipe.inputs]
    with hetu.graph("define_and_run", device="cpu") as g:
        xs = [hetu.placeholder("float64", shape) for shape in recipe.inputs]
        made = recipe.run(HETU, xs)
        assert [tensor.shape for tensor in made] == recipe.shapes
        ys = [made[i] for i in recipe.targets]
        # Results of the way there are asked for too, so that their gradients are seen and not only summed up.
        asked = [*xs, *made[len(xs) : len(xs) + 2]]
        total = hetu.sum(xs[0]) + hetu.sum(xs[1]) + hetu.sum(xs[2]) + hetu.sum(asked[3]) + hetu.sum(asked[4])
        grads = hetu.gradients([*ys, total], asked)
    g.verify()
    exact = [torch.from_numpy(feed).requires_grad_() for feed in feeds]
    wanted = recipe.run(TORCH, exact)
    asked_t = [*exact, *wanted[len(exact) : len(exact) + 2]]
    loss = sum(wanted[i].sum() for i in recipe.targets) + sum(item.sum() for item in asked_t)
    expected = torch.autograd.grad(loss, asked_t)
    results = g.run([*made, *grads], feed_dict=dict(zip(xs, feeds, strict=True)))
    for got, other in zip(results, [*wanted, *expected], strict=True):
        torch.testing.assert_close(got, other.detach(), rtol=1e-10, atol=1e-10)


def test_recipes_use_every_kind_of_step() -> None:
    kinds = {step.__qualname__.split(".")[1] for seed in range(40) for step in Recipe(seed).steps}
    assert kinds == {name for name in dir(Recipe) if name.startswith("draw_")}
