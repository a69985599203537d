"""Every op there is, against its own samples: one walk over the registry."""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.graph import BadSample, GoodSample, OpDef, registry

TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-5, "float64": 1e-12}
SAMPLES = {name: definition.samples() for name, definition in registry().items()}
GOOD = [
    pytest.param(name, item, id=f"{name}-{i}") for name, (good, _) in SAMPLES.items() for i, item in enumerate(good)
]
BAD = [pytest.param(name, item, id=f"{name}-{i}") for name, (_, bad) in SAMPLES.items() for i, item in enumerate(bad)]


def placeholders(sample: GoodSample) -> list[hetu.Tensor]:
    """One a feed. Symbolic dimensions of one size are one symbol, as the op may need them to be equal."""
    symbols = {size: hetu.IntSymbol(f"n{size}") for size in {feed.shape[dim] for feed, dim in _symbolic(sample)}}
    shapes = [list(feed.shape) for feed in sample.feeds]
    for feed, dim in sample.symbolic:
        shapes[feed][dim] = symbols[shapes[feed][dim]]
    return [hetu.placeholder(feed.dtype, shape) for feed, shape in zip(sample.feeds, shapes, strict=True)]


def _symbolic(sample: GoodSample) -> list[tuple[Any, int]]:
    return [(sample.feeds[feed], dim) for feed, dim in sample.symbolic]


def doubled(sample: GoodSample) -> list[np.ndarray]:
    """The feeds with every symbolic dimension twice as long."""
    shapes = [list(feed.shape) for feed in sample.feeds]
    for feed, dim in sample.symbolic:
        shapes[feed][dim] *= 2
    return [np.resize(feed, shape) for feed, shape in zip(sample.feeds, shapes, strict=True)]


def as_list(built: Any) -> list[Any]:
    return list(built) if isinstance(built, (tuple, list)) else [built]


def as_float64(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def check(
    outputs: Sequence[hetu.Tensor],
    results: Sequence[torch.Tensor],
    inputs: Sequence[Any],
    sample: GoodSample,
    feeds: Sequence[np.ndarray],
    device: str,
) -> None:
    """Compares dtype and shape with what the shape rule promised, and the values with the reference."""
    sizes = {
        dim: length
        for tensor, feed in zip(inputs, feeds, strict=True)
        for dim, length in zip(tensor.symbolic_shape, feed.shape, strict=True)
        if dim.is_leaf
    }
    with np.errstate(all="ignore"):
        wanted = sample.reference(*map(as_float64, feeds))
    for tensor, result, expected in zip(outputs, results, as_list(wanted), strict=True):
        assert result.dtype == TORCH_DTYPES[tensor.dtype]
        assert tuple(result.shape) == tuple(dim.evaluate(sizes) for dim in tensor.symbolic_shape)
        assert tuple(result.shape) == np.shape(expected)
        assert result.device.type == device
        tolerance = TOLERANCE.get(tensor.dtype.name, 0)
        got = result.to(torch.float64) if tensor.dtype.is_floating else result
        np.testing.assert_allclose(got.cpu().numpy(), expected, rtol=tolerance, atol=tolerance)


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
@pytest.mark.parametrize(("name", "sample"), GOOD)
def test_good_sample(name: str, sample: GoodSample, device: str) -> None:
    backend = "torch" if device == "cpu" else None
    with hetu.graph("define_and_run", device=device) as g, hetu.config(backend=backend):
        inputs = placeholders(sample)
        outputs = as_list(sample.build(*inputs))
        runs = [sample.feeds, doubled(sample)] if sample.symbolic else [sample.feeds]
        for feeds in runs:
            results = g.run(outputs, feed_dict=dict(zip(inputs, feeds, strict=True)))
            check(outputs, results, inputs, sample, feeds, device)
    g.verify()
    before = any(item.op.definition.is_step_wide for item in outputs)  # what is computed first is one of its own
    assert g.executor.stats()["executables"].misses == 1 + before, "other sizes made another executable"
    assert f" = {name}(" in str(g)
    assert "test_registry.py" in str(g)


@pytest.mark.parametrize(("name", "sample"), GOOD)
def test_results_are_the_callers_own(name: str, sample: GoodSample) -> None:
    """Whatever an op's output shares with its input, what a run gives can be written to, and nothing else changes."""
    with hetu.graph("define_and_run", device="cpu") as g, hetu.config(backend="torch"):
        inputs = placeholders(sample)
        outputs = as_list(sample.build(*inputs))
        views = [hetu.reshape(item, [-1]) for item in outputs if not item.on_cpu]
        floating = [item for item in outputs if item.dtype.is_floating]
        sources = [item for item in inputs if item.dtype.is_floating]
        grads = hetu.gradients(floating, sources) if floating and sources and has_rule(name) else []
        feeds = [torch.from_numpy(np.array(feed)) for feed in sample.feeds]
        fed = [feed.clone() for feed in feeds]
        results = g.run([*outputs, *views, *inputs, *outputs, *grads], dict(zip(inputs, feeds, strict=True)))
    expected = [result.clone() for result in results]
    for i, result in enumerate(results):
        result.copy_(torch.ones_like(result) if result.dtype == torch.bool else result + 1)  # fails on shared elements
        for other, wanted in zip(results[i + 1 :], expected[i + 1 :], strict=True):
            assert torch.equal(other.nan_to_num(), wanted.nan_to_num())
    for feed, before in zip(feeds, fed, strict=True):
        assert torch.equal(feed.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(("name", "sample"), BAD)
def test_bad_sample(name: str, sample: BadSample) -> None:
    with hetu.graph("define_and_run") as g, pytest.raises(hetu.HetuError) as caught:
        sample.build()
    message = str(caught.value)
    assert type(caught.value) is sample.error
    assert sample.message in message
    assert "where:  test_registry.py:" in message
    assert "sample.build()" in message
    refused = [node for node in g.nodes if node.definition.name == name and not node.definition.is_source]
    assert not refused, "the op was refused, and yet it is in the graph"


PUBLIC = [name for name, definition in registry().items() if definition.is_public]


@pytest.mark.parametrize("name", PUBLIC)
def test_sampled_and_with_an_example(name: str) -> None:
    """What else stands in a docstring is checked by test_docstrings.py."""
    good, bad = SAMPLES[name]
    assert good
    assert bad
    assert name in hetu.ops.__all__
    assert doctest.DocTestParser().get_examples(getattr(hetu, name).__doc__), "pytest runs them, but there are none"


# Gradients

WITHOUT_GRADIENT = {"arange", "constant", "full", "parameter", "placeholder", "stop_gradient"}
"""Ops with floating outputs that no gradient passes through: what has no inputs, and what is there to stop it."""

NOT_IN_FLOAT64 = {"attn_varlen", "parallel_attn"}
"""Their kernels take no float64, in which finite differences are told from rounding: tests/attention has theirs."""


def has_rule(name: str) -> bool:
    return type(registry()[name]).gradient is not OpDef.gradient


def test_what_has_no_gradient_is_listed() -> None:
    """Every public op that gives something floating has a rule, or is one of a few that are known not to."""
    found = set()
    for name in PUBLIC:
        for sample in SAMPLES[name][0]:
            with hetu.graph("define_and_run"):
                outputs = as_list(sample.build(*placeholders(sample)))
            if any(item.dtype.is_floating and item.op.definition.name == name for item in outputs):
                found |= set() if has_rule(name) else {name}
    assert found == WITHOUT_GRADIENT


PAGE = Path(__file__, "../../../docs/training.md").resolve()


@pytest.mark.parametrize("name", [name for name in PUBLIC if has_rule(name)])
def test_gradients_can_be_differentiated_but_for_those_that_the_page_names(name: str) -> None:
    said = " ".join(PAGE.read_text().split())
    _, _, rest = said.partition("differentiate again: that works through all ops but ")
    is_named = f"`{name}`" in rest.partition("whose gradients have no gradient")[0]
    refusals = []
    for sample in SAMPLES[name][0]:
        with hetu.graph("define_and_run"):
            inputs = placeholders(sample)
            outputs = [item for item in as_list(sample.build(*inputs)) if item.dtype.is_floating]
            sources = [item for item in inputs if item.dtype.is_floating]
            if sources and outputs:
                first = hetu.gradients([item * item for item in outputs], sources)
                try:
                    hetu.gradients([hetu.sum(item * item * item) for item in first], sources)
                except hetu.HetuError as error:
                    refusals.append(str(error))
    refusals = [text for text in refusals if "no y depends on" not in text]  # the gradient of x ** 0 is a constant
    assert bool(refusals) == is_named
    assert all("is not differentiable there" in text for text in refusals)


def in_float64(sample: GoodSample) -> list[GoodSample]:
    """The sample with plain sizes and, if it has any, with symbols."""
    feeds = [as_float64(feed) for feed in sample.feeds]
    sizes = [(), sample.symbolic] if sample.symbolic else [()]
    return [GoodSample(sample.build, feeds, sample.reference, symbolic) for symbolic in sizes]


SMOOTH = [
    pytest.param(item, id=f"{name}-{i}-{'symbolic' if item.symbolic else 'plain'}")
    for name, (good, _) in SAMPLES.items()
    for i, sample in enumerate(good)
    if has_rule(name) and name not in NOT_IN_FLOAT64
    if sample.smooth and any(feed.dtype.kind == "f" for feed in sample.feeds)
    for item in in_float64(sample)
]


@pytest.mark.parametrize("sample", SMOOTH)
def test_gradient_is_that_of_finite_differences(sample: GoodSample) -> None:
    """In float64, of the sum of all outputs' elements with random weights, along random directions of all inputs."""
    rng, h = np.random.default_rng(0), 1e-5
    with hetu.graph("define_and_run", device="cpu") as g:
        inputs = placeholders(sample)
        outputs = [item for item in as_list(sample.build(*inputs)) if item.dtype.is_floating]
        weights = [hetu.placeholder(item.dtype, item.symbolic_shape) for item in outputs]
        sources = [item for item in inputs if item.dtype.is_floating]
        grads = hetu.gradients(outputs, sources, weights)
    g.verify()

    def run(feeds: Sequence[np.ndarray], more: dict[hetu.Tensor, Any], *fetches: hetu.Tensor) -> list[np.ndarray]:
        hetu.manual_seed(0)
        results = g.run([*outputs, *fetches], feed_dict={**dict(zip(inputs, feeds, strict=True)), **more})
        return [item.numpy() for item in results]

    values = run(sample.feeds, {})
    fed = dict(zip(weights, [rng.standard_normal(item.shape) for item in values], strict=True))
    found = run(sample.feeds, fed, *grads)[len(outputs) :]
    fed_sources = [sample.feeds[inputs.index(item)] for item in sources]
    assert [(item.dtype, item.shape) for item in found] == [(item.dtype, item.shape) for item in fed_sources]

    def weighted(steps: dict[hetu.Tensor, np.ndarray], factor: float) -> float:
        moved = [
            feed + factor * steps[item] if item in steps else feed
            for item, feed in zip(inputs, sample.feeds, strict=True)
        ]
        return sum((value * weight).sum() for value, weight in zip(run(moved, {}), fed.values(), strict=True))

    for _ in range(3):
        steps = {item: rng.standard_normal(feed.shape) for item, feed in zip(sources, fed_sources, strict=True)}
        slope = (weighted(steps, h) - weighted(steps, -h)) / (2 * h)
        told = sum((grad * step).sum() for grad, step in zip(found, steps.values(), strict=True))
        assert told == pytest.approx(slope, rel=1e-6, abs=1e-7)
