"""Every op there is, against its own samples: one walk over the registry."""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.graph import BadSample, GoodSample, registry

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
    wanted = wanted if isinstance(wanted, (tuple, list)) else [wanted]
    for tensor, result, expected in zip(outputs, results, wanted, strict=True):
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
        built = sample.build(*inputs)
        outputs = list(built) if isinstance(built, (tuple, list)) else [built]
        runs = [sample.feeds, doubled(sample)] if sample.symbolic else [sample.feeds]
        for feeds in runs:
            results = g.run(outputs, feed_dict=dict(zip(inputs, feeds, strict=True)))
            check(outputs, results, inputs, sample, feeds, device)
    g.verify()
    before = any(item.op.definition.is_step_wide for item in outputs)  # what is computed first is one of its own
    assert g.executor.stats()["executables"].misses == 1 + before, "other sizes made another executable"
    assert f" = {name}(" in str(g)
    assert "test_registry.py" in str(g)


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


@pytest.mark.parametrize("name", registry())
def test_documented_and_sampled(name: str) -> None:
    good, bad = SAMPLES[name]
    assert good
    assert bad
    function = getattr(hetu, name)
    assert name in hetu.ops.__all__
    doc = function.__doc__
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert f"\n    {section}" in doc, f"{name} has no section {section}"
    for parameter in function.__code__.co_varnames[
        : function.__code__.co_argcount + function.__code__.co_kwonlyargcount
    ]:
        assert f"{parameter}" in doc.split("Args:")[1], f"{name} does not document {parameter}"
    assert doctest.DocTestParser().get_examples(doc), "pytest runs them, but there are none"
