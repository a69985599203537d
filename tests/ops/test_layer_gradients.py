"""Gradients of the ops of a model's layers: against torch autograd, finite differences, and in half precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import hetu
from hetu.backends.torch import loss as torch_loss

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the largest entry of a gradient: the roundings of its inputs, of what is kept for it, and of itself.
TOLERANCE = {"float64": 1e-12, "float32": 3e-6, "bfloat16": 3e-2, "float16": 4e-3}


@dataclass(frozen=True)
class Case:
    """An op with the same in torch.

    Attributes:
        name: For the test's id.
        build: Takes graph tensors: the floating ones, then the others.
        torch: Takes torch tensors, likewise.
        shapes: Of the floating inputs.
        others: The other inputs.
    """

    name: str
    build: Callable[..., hetu.Tensor]
    torch: Callable[..., torch.Tensor]
    shapes: Sequence[tuple[int, ...]]
    others: Sequence[np.ndarray] = ()


def rotated(x: torch.Tensor, at: torch.Tensor, head_dim: int, num_heads: int, interleaved: bool) -> torch.Tensor:
    """The definition, by complex numbers."""
    angle = at.double()[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    heads = x.double().reshape(len(x), math.prod(x.shape[1:]) // head_dim, head_dim)
    front, rest = heads[:, :num_heads], heads[:, num_heads:]
    pairs = front.unflatten(-1, (-1, 2)) if interleaved else front.unflatten(-1, (2, -1)).transpose(-1, -2)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    result = torch.complex(pairs[..., 0], pairs[..., 1]) * turn
    turned = torch.stack([result.real, result.imag], -1)
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat([turned.flatten(2), rest], 1).reshape(x.shape).to(x.dtype)


def cases() -> list[Case]:
    rng = np.random.default_rng(0)
    found = []
    for shape in ((7, 5), (0, 5), (3, 1), (9,), (2, 3, 33), (1, 257)):
        width, text = shape[-1], "x".join(map(str, shape))
        scaled = (shape, (width,))

        def rms(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
            return functional.rms_norm(x, x.shape[-1:], weight, 1e-6)

        def layer(x: torch.Tensor, weight: Any = None, bias: Any = None) -> torch.Tensor:
            return functional.layer_norm(x, x.shape[-1:], weight, bias)

        found += [
            Case(f"rms_norm-{text}", hetu.rms_norm, rms, [shape]),
            Case(f"rms_norm-weight-{text}", hetu.rms_norm, rms, scaled),
            Case(f"layer_norm-{text}", hetu.layer_norm, layer, [shape]),
            Case(f"layer_norm-weight-{text}", hetu.layer_norm, layer, scaled),
            Case(f"layer_norm-both-{text}", hetu.layer_norm, layer, (*scaled, (width,))),
            Case(
                f"layer_norm-bias-{text}",
                lambda x, b: hetu.layer_norm(x, bias=b),
                lambda x, b: functional.layer_norm(x, x.shape[-1:], None, b),
                scaled,
            ),
            Case(f"softmax-{text}", hetu.softmax, lambda x: torch.softmax(x, -1), [shape]),
            Case(f"softmax-first-{text}", lambda x: hetu.softmax(x, 0), lambda x: torch.softmax(x, 0), [shape]),
            Case(f"swiglu-{text}", hetu.swiglu, lambda gate, up: functional.silu(gate) * up, [shape, shape]),
        ]
    for shape in ((7, 6), (0, 4), (3, 2), (2, 3, 34), (5, 0)):
        text = "x".join(map(str, shape))
        found.append(Case(f"swiglu-packed-{text}", hetu.swiglu, packed_swiglu, [shape]))
    for shape in ((7,), (2, 5), (0,), ()):
        ids = rng.integers(0, 6, shape)
        text = "x".join(map(str, shape))
        found.append(Case(f"embedding-{text}", lambda w, i: hetu.embedding(i, w), lambda w, i: w[i], [(6, 3)], [ids]))
    for reduction in ("mean", "sum", "none"):
        for shape in ((7, 11), (5, 1), (2, 3, 9), (13,), *([] if reduction == "mean" else [(0, 3)])):
            labels = rng.integers(0, shape[-1], shape[:-1])
            if labels.ndim and len(labels):
                labels[0] = -100
            found.append(cross_entropy_case(reduction, shape, labels))
    for interleaved in (False, True):
        for shape, heads in (((5, 12), 3), ((5, 20), 3), ((5, 3, 4), 1), ((0, 8), 2), ((1, 4), 0)):
            at = rng.integers(0, 2**20, shape[0])
            found.append(rotary_case(interleaved, shape, heads, at))
    found.append(Case("cast", lambda x: hetu.cast(x, "float32"), lambda x: x.float(), [(3, 5)]))
    return found


def packed_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.tensor_split(2, -1)
    return functional.silu(gate) * up


def cross_entropy_case(reduction: str, shape: tuple[int, ...], labels: np.ndarray) -> Case:
    def reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        rows = wide.reshape(-1, shape[-1])
        loss = functional.cross_entropy(rows, labels.reshape(-1), reduction=reduction)
        return loss.reshape(labels.shape) if reduction == "none" else loss

    def build(logits: hetu.Tensor, labels: hetu.Tensor) -> hetu.Tensor:
        return hetu.cross_entropy(logits, labels, reduction=reduction)

    return Case(f"cross_entropy-{reduction}-{'x'.join(map(str, shape))}", build, reference, [shape], [labels])


def rotary_case(interleaved: bool, shape: tuple[int, ...], heads: int, at: np.ndarray) -> Case:
    return Case(
        f"rotary-{'pairs' if interleaved else 'halves'}-{'x'.join(map(str, shape))}-{heads}",
        lambda x, t: hetu.rotary(x, t, 4, heads, interleaved=interleaved),
        lambda x, t: rotated(x, t, 4, heads, interleaved),
        [shape],
        [at],
    )


CASES = cases()
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def inputs_of(case: Case, dtype: str, seed: int = 0) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(shape)).to(DTYPES[dtype]) for shape in case.shapes]


def run(case: Case, dtype: str, values: Sequence[torch.Tensor], device: str = "cpu") -> tuple[Any, Any, Any]:
    """The op's output, the weights of its elements, and the gradients of the weighted sum."""
    with hetu.graph("define_and_run", device=device) as g:
        xs = [hetu.placeholder(dtype, shape) for shape in case.shapes]
        others = [hetu.placeholder("int64", item.shape) for item in case.others]
        y = case.build(*xs, *others)
        weight = hetu.placeholder(y.dtype, y.shape)
        grads = hetu.gradients(y, xs, weight)
    g.verify()
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal([int(n) for n in y.shape]))
    weights = weights.to(DTYPES[y.dtype.name])
    feeds = {**dict(zip(xs, values, strict=True)), **dict(zip(others, case.others, strict=True)), weight: weights}
    y_value, *found = (item.cpu() for item in g.run([y, *grads], feed_dict=feeds))
    return y_value, weights, found


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    if wanted.numel():
        error = (got.double() - wanted.double()).abs().max().item()
        assert error <= tolerance * max(1.0, wanted.abs().max().item())


@EVERY_CASE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_against_autograd(case: Case, dtype: str, device: str) -> None:
    """Autograd in float64 on the same inputs, so half precision has only its own roundings to show."""
    values = inputs_of(case, dtype)
    y, weights, grads = run(case, dtype, values, device)
    wide = [value.double().requires_grad_() for value in values]
    expected = case.torch(*wide, *map(torch.from_numpy, map(np.asarray, case.others)))
    assert_close(y, expected.detach(), TOLERANCE[str(y.dtype).removeprefix("torch.")])
    wanted = torch.autograd.grad(expected, wide, weights.to(expected.dtype))
    for got, value, exact in zip(grads, values, wanted, strict=True):
        assert got.dtype == value.dtype
        # cast to float32 is the one case that computes in less than its input.
        assert_close(got, exact, max(TOLERANCE[dtype], 1e-7 if case.name == "cast" else 0))


@EVERY_CASE
def test_against_finite_differences(case: Case) -> None:
    """Along random directions of all inputs at once, by hetu's own values."""
    if case.name == "cast":
        pytest.skip("float32 has too few digits for differences")
    values, h = inputs_of(case, "float64"), 1e-5
    _, weights, grads = run(case, "float64", values)
    for seed in range(3):
        directions = inputs_of(case, "float64", seed=100 + seed)
        up, down = (
            run(case, "float64", [x + sign * h * d for x, d in zip(values, directions, strict=True)])[0]
            for sign in (1, -1)
        )
        slope = ((up - down) * weights).sum().item() / (2 * h)
        told = sum((grad * d).sum().item() for grad, d in zip(grads, directions, strict=True))
        assert told == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("op", "count"), [("rms_norm_grad", 1), ("layer_norm_grad", 1), ("swiglu_grad", 1), ("rotary_table", 1)]
)
def test_nodes_with_several_outputs_are_added_once(op: str, count: int) -> None:
    with hetu.graph("define_and_run") as g:
        x, w = hetu.placeholder("float32", [3, 8]), hetu.placeholder("float32", [8])
        at = hetu.placeholder("int64", [3])
        y = {
            "rms_norm_grad": lambda: hetu.rms_norm(x, w),
            "layer_norm_grad": lambda: hetu.layer_norm(x, w, w),
            "swiglu_grad": lambda: hetu.swiglu(x, x),
            "rotary_table": lambda: hetu.rotary(x, at, 4),
        }[op]()
        grad_y = hetu.placeholder("float32", y.shape)
        hetu.gradients(y, [item for item in (x, w) if item in y.op.tensors], grad_y)
    assert sum(node.definition.name == op for node in g.nodes) == count


def test_what_has_no_gradient_costs_nothing() -> None:
    """Only the table is asked for: nothing of the ids; and a mean of no labels has the gradient 0, not NaN."""
    with hetu.graph("define_and_run", device="cpu") as g:
        x, labels = hetu.placeholder("float32", [3, 5]), hetu.placeholder("int64", [3])
        loss = hetu.cross_entropy(x, labels)
        grad = hetu.gradients(loss, x)
    value, zero = g.run([loss, grad], feed_dict={x: np.ones((3, 5)), labels: [-100] * 3})
    assert value.isnan() and not zero.any()


@pytest.mark.parametrize("entries", [1, 12, 25])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_in_blocks_is_the_same(entries: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cross_entropy_case("sum", (9, 11), np.array([0, 10, -100, 3, 4, 5, 6, 7, -100]))
    values = inputs_of(case, dtype)
    whole_loss, _, whole_grads = run(case, dtype, values)
    monkeypatch.setitem(torch_loss._BLOCK_ENTRIES, "cpu", entries)
    loss, _, grads = run(case, dtype, values)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0)
    assert torch.equal(grads[0], whole_grads[0])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "name", ["cross_entropy-mean-7x11", "swiglu-packed-2x3x34", "rotary-halves-5x20-3", "swiglu-7x5"]
)
def test_every_element_is_written(name: str) -> None:
    case = next(item for item in CASES if item.name == name)
    y, _, grads = run(case, "bfloat16", inputs_of(case, "bfloat16"))
    assert not any(item.isnan().any() for item in (y, *grads))
