"""Constants, fills and initial values: numbers are kept as they are, or refused where they are written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import hetu

INTS = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-(2**15), 2**15 - 1), "int32": (-(2**31), 2**31 - 1)}
INTS["int64"] = (-(2**63), 2**63 - 1)
WRONG = [0.5, math.nan, math.inf, -math.inf, 1e30]


def arrays_of(value: Any) -> list[Any]:
    """A number as a list, and as what arrays hold it."""
    made: list[Any] = [[value]]
    for dtype in ("int64", "uint64", "float64", "float16"):
        with np.errstate(all="ignore"):
            try:
                array = np.array([value], dtype)
            except (OverflowError, ValueError):
                continue
        if float(array[0]) == value or (isinstance(value, float) and math.isnan(value)):
            made.append(array)
            if dtype != "uint64":
                made.append(torch.from_numpy(array))
    return made


@pytest.mark.parametrize("dtype", [*INTS, "bool"])
def test_what_does_not_fit_is_refused_when_it_is_written(dtype: str) -> None:
    low, high = INTS.get(dtype, (0, 1))
    with hetu.graph("define_and_run", device="cpu") as g:
        for value in (low - 1, high + 1, *WRONG):
            for array in arrays_of(value):
                with pytest.raises(hetu.DTypeError):
                    hetu.constant(array, dtype=dtype)
            for number in (value, np.array(value)) if isinstance(value, float) else (value,):
                with pytest.raises(hetu.DTypeError, match="expected value to "):
                    hetu.full([1], number, dtype)
    assert not g.nodes


@pytest.mark.parametrize("dtype", [*INTS, "bool", "float16", "bfloat16", "float32", "float64"])
def test_what_fits_is_kept(dtype: str) -> None:
    low, high = INTS.get(dtype, (0, 1))
    wanted = getattr(torch, dtype)
    with hetu.graph("define_and_run", device="cpu") as g:
        fetches, values = [], []
        for value in (low, high, 0, 1, 1.0, True, np.int8(1), np.array(1.0), torch.tensor(1)):
            fetches += [hetu.full([1], value, dtype), hetu.constant([value], dtype=dtype)]
            values += [value, value]
            if isinstance(value, int):
                for array in arrays_of(value):
                    fetches.append(hetu.constant(array, dtype=dtype))
                    values.append(value)
    for found, value in zip(g.run(fetches), values, strict=True):
        assert found.dtype == wanted
        assert torch.equal(found, torch.tensor([getattr(value, "item", lambda value=value: value)()]).to(wanted))


def test_floats_are_rounded_and_reach_infinity_as_torchs_do() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        fetches = [hetu.constant([0.1], dtype="float64"), hetu.constant([1e300, math.nan, -math.inf])]
        fetches += [hetu.full([1], math.inf), hetu.full([1], 2**70), hetu.full([1], 2**70, "float64")]
        for value, dtype in ((1e300, "float32"), (10**400, "float64")):
            with pytest.raises(hetu.DTypeError, match="expected value to fit"):
                hetu.full([1], value, dtype)
    wide, kept, infinite, *long = g.run(fetches)
    assert wide.tolist() == [0.1]
    assert kept.nan_to_num(nan=7, posinf=math.inf, neginf=-math.inf).tolist() == [math.inf, 7.0, -math.inf]
    assert infinite.tolist() == [math.inf]
    assert [x.item() for x in long] == [2.0**70] * 2


@pytest.mark.parametrize(
    "value",
    [
        np.ma.masked_array([1.0, 2.0], [0, 1]),
        np.ma.masked,
        torch.ones(2).to_sparse(),
        torch.ones(2, 2).to_sparse_csr(),
        torch.ones(2, device="meta"),
        torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        np.ones(2, complex),
        torch.ones(2, dtype=torch.complex64),
        np.array([None]),
        np.array(["a"]),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.zeros(2, [("a", "i4")]),
        iter([1.0]),
        {1.0},
        {"a": 1.0},
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore")
def test_what_means_something_else_is_refused(value: Any) -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        with pytest.raises(hetu.DTypeError, match="expected value to be "):
            hetu.constant(value)
        with pytest.raises(hetu.DTypeError, match="expected init to be "):
            hetu.parameter(value, [2])
    assert not g.nodes


def test_arrays_of_any_byte_order_and_width_are_constants() -> None:
    wide = [np.array([1, 2], kind) for kind in (">i4", ">f8", "u2", "u4", "u8", "f2", np.longdouble)]
    with hetu.graph("define_and_run", device="cpu") as g:
        constants = [hetu.constant(array, dtype="int64") for array in wide]
        weights = [hetu.parameter(array, [2]) for array in wide]
    assert [x.tolist() for x in g.run(constants)] == [[1, 2]] * len(wide)
    assert [x.tolist() for x in g.run(weights)] == [[1.0, 2.0]] * len(wide)
