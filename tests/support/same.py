"""Equal to the bit."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

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


def assert_same(mine: Any, wanted: Any) -> None:
    """Two values, or nested lists or dicts of them, have the same types, shapes and bits."""
    assert type(mine) is type(wanted)
    match wanted:
        case torch.Tensor():
            assert mine.dtype == wanted.dtype and torch.equal(mine, wanted), f"{mine} is not {wanted}"
        case dict():
            assert mine.keys() == wanted.keys()
            for key in wanted:
                assert_same(mine[key], wanted[key])
        case _ if is_dataclass(wanted):
            assert_same(vars(mine), vars(wanted))
        case list() | tuple():
            assert len(mine) == len(wanted)
            for a, b in zip(mine, wanted, strict=True):
                assert_same(a, b)
        case _:
            assert mine == wanted
