"""The base of ops that only gradients are made of, and checks that the ops of a model's layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hetu.arguments import real
from hetu.dtypes import int32, int64
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, OpDef, Tensor
from hetu.ops.common.build import Dim, show


class GradientOp(OpDef):
    """An op that only gradients are made of: its operands come from another op's rule, which has checked them."""

    is_public = False

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        return (), ()


def same_shape(call: Call, wanted: Sequence[Dim], other: Sequence[Dim], what: str) -> None:
    """Demands one shape, dimension by dimension.

    Args:
        call: The call to check.
        wanted: A shape.
        other: The shape that must be equal to it in every run.
        what: What is expected, for the error; both shapes are added to it.
    """
    text = f"expected {what}, got {show(wanted)} and {show(other)}"
    if len(wanted) != len(other):
        call.fail(ShapeError, text)
    for one, two in zip(wanted, other, strict=True):
        call.same(one, two, text)


def check_eps(call: Call) -> None:
    """Demands a finite ``eps`` of at least 0, and makes a float of it."""
    wanted = "a number of at least 0"
    call.attrs["eps"] = real(call.attrs["eps"], "eps", wanted, lambda eps: 0 <= eps < math.inf, op=call.op)


def check_indices(call: Call, item: Tensor, what: str, fix: str | None = None) -> None:
    """Demands int32 or int64."""
    if item.dtype not in (int32, int64):
        call.fail(
            DTypeError,
            f"expected {what} to be int32 or int64, got {item.dtype}",
            fix or f"cast them: hetu.cast({item.name}, hetu.int64)",
        )
