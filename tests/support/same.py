"""Equal to the bit."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import numpy as np
import torch


def assert_own(
    mine: list[torch.Tensor], everything: list[torch.Tensor], rank: int, size: int, name: str = "a value"
) -> None:
    """A rank's values are those of its pipelines: those of its number, modulo the number of processes."""
    try:
        assert_same(mine, everything[rank::size])
    except AssertionError as error:
        error.add_note(f"in {name}")
        raise


@cache
def _shown(kind: Any) -> list[str]:
    """The fields of a dataclass that are part of its value: what is remembered beside it is not shown."""
    return [field.name for field in fields(kind) if field.repr]


def assert_same(mine: Any, wanted: Any) -> None:
    """Two values, or nested lists, dicts or dataclasses of them, have the same types, shapes and bits."""
    assert type(mine) is type(wanted)
    match wanted:
        case torch.Tensor():
            assert mine.dtype == wanted.dtype and torch.equal(mine, wanted), f"{mine} is not {wanted}"
        case np.ndarray():
            assert mine.dtype == wanted.dtype and np.array_equal(mine, wanted), f"{mine} is not {wanted}"
        case dict():
            assert mine.keys() == wanted.keys()
            for key in wanted:
                assert_same(mine[key], wanted[key])
        case _ if is_dataclass(wanted):
            for name in _shown(type(wanted)):
                assert_same(getattr(mine, name), getattr(wanted, name))
        case list() | tuple():
            assert len(mine) == len(wanted)
            for a, b in zip(mine, wanted, strict=True):
                assert_same(a, b)
        case _:
            assert mine == wanted
