"""placeholder, constant and cast in particular."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hetu


def constraints(g: hetu.Graph) -> list[hetu.Constraint]:
    """What the ops demand of runs."""
    return [item for node in g.nodes for item in node.constraints]


def test_a_constant_is_a_copy() -> None:
    array, tensor = np.ones(2, "float32"), torch.ones(2)
    with hetu.graph("define_and_run", device="cpu") as g:
        constants = [hetu.constant(array), hetu.constant(tensor)]
    array[:], tensor[:] = 7, 7
    for result in g.run(constants):
        np.testing.assert_array_equal(result, [1, 1])


def test_a_constant_is_not_the_callers_to_change() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        kept = hetu.constant([1.0, 2.0])
        column = hetu.reshape(kept, [2, 1])
        views = [kept, column, hetu.slice(column, 0, 1), hetu.cast(hetu.transpose(column, 0, 1), "float32")]
    for fetch in views:
        g.run(fetch).add_(1)
        np.testing.assert_array_equal(g.run(kept), [1, 2])


def test_a_result_does_not_change_with_the_array_that_was_fed() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [2])
        fetches = [x, hetu.reshape(x, [1, 2])]
    buffer = np.ones(2, "float32")
    results = g.run(fetches, feed_dict={x: buffer})
    buffer[:] = 7
    for result in results:
        assert result.flatten().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1, "int64"),
        (1.5, "float32"),
        (True, "bool"),
        ([[1, 2.5]], "float32"),
        ([], "float32"),
        (np.float64(1), "float64"),
        (np.ones(2), "float64"),
        (np.ones(2, "float16"), "float16"),
        (torch.ones(2, dtype=torch.bfloat16), "bfloat16"),
        (torch.ones(2, dtype=torch.uint8, requires_grad=False), "uint8"),
    ],
)
def test_dtype_of_a_constant(value: object, dtype: str) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        kept, wide = hetu.constant(value), hetu.constant(value, dtype="float64")
    assert (kept.dtype.name, wide.dtype.name) == (dtype, "float64")
    assert [str(item.dtype) for item in g.run([kept, wide])] == [f"torch.{dtype}", "torch.float64"]
    assert tuple(g.run(kept).shape) == kept.shape == np.shape(value)


def test_a_constant_that_needs_grad_is_detached() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        kept = hetu.constant(torch.ones(2, requires_grad=True))
    assert not g.run(kept + kept).requires_grad


@pytest.mark.parametrize("value", [hetu.IntSymbol("s"), None, {"a": 1}, "1"])
def test_what_is_no_array_is_refused(value: object) -> None:
    with hetu.graph("define_and_run"), pytest.raises(hetu.DTypeError, match=r"test_sources\.py"):
        hetu.constant(value)


def test_placeholder_takes_dtypes_by_any_name() -> None:
    with hetu.graph("define_and_run"):
        for dtype in ("float16", np.float16, np.dtype("float16"), torch.float16, hetu.float16):
            assert hetu.placeholder(dtype, [1]).dtype == hetu.float16
        assert hetu.placeholder(hetu.bool, []).dtype.name == "bool"


def test_placeholder_sizes() -> None:
    s, fixed = hetu.IntSymbol("s"), hetu.IntSymbol("fixed", min=4, max=4)
    with hetu.graph("define_and_run") as g:
        x = hetu.placeholder("float32", (np.int64(2), s - 3, 2 * s + 1))
    assert x.shape == (2, s - 3, 2 * s + 1)
    assert len(constraints(g)) == 1, "s - 3 may be negative, 2 * s + 1 may not"
    assert x.ndim == 3
    assert fixed.is_leaf


def test_cast_of_every_dtype_to_every_other() -> None:
    from hetu.backends.dtypes import TORCH_DTYPES
    from hetu.dtypes import ALL

    with hetu.graph("define_and_run", device="cpu") as g:
        inputs = [hetu.placeholder(dtype, [3]) for dtype in ALL]
        outputs = [[hetu.cast(x, dtype) for dtype in ALL] for x in inputs]
    feeds = {x: torch.tensor([0, 1, 7]).to(TORCH_DTYPES[x.dtype]) for x in inputs}
    for x, row in zip(inputs, outputs, strict=True):
        for tensor, result in zip(row, g.run(row, feed_dict=feeds), strict=True):
            expected = feeds[x].to(TORCH_DTYPES[tensor.dtype])
            assert result.dtype == expected.dtype
            assert torch.equal(result, expected)


def test_what_stays_on_the_cpu_stays_there_and_meets_nothing_else() -> None:
    with hetu.graph("define_and_run"):
        q, cu = hetu.placeholder("float32", [4, 8]), hetu.placeholder("int32", [2])
        rng_state = hetu.attn_varlen(q, q, q, 8, cu, cu)[3]
        assert rng_state.on_cpu
        assert (hetu.cast(rng_state, "int32") + 1).on_cpu
        assert not hetu.cast(cu, "int64").on_cpu
        with pytest.raises(hetu.HetuError, match=r"\[add\] an input that stays on the CPU \(rng_state\) meets one"):
            rng_state + cu
