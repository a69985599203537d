"""Mixed precision: which element type ops get their operands in, while ``hetu.autocast`` is in force."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from hetu.arguments import flag
from hetu.dtypes import DType, as_dtype, bfloat16, float16, float32, float64
from hetu.errors import DTypeError, caller

_entered: ContextVar[tuple[autocast, ...]] = ContextVar("hetu_autocast", default=())
"""What is in force: the last of these."""


class autocast(AbstractContextManager[None]):  # noqa: N801 - used like a function, as torch.autocast is
    """Within it, ops whose cost is that of matrix products get their floating operands in half precision.

    Products of matrices and attention run in ``dtype``; norms, softmax, losses, logarithms and powers in float32;
    everything else in the type of its operands. Casts become nodes of the graph, so that gradients pass through them:
    parameters stay in float32, and so do their gradients and the optimiser's state. float64 is left alone.

    Args:
        dtype: ``hetu.bfloat16`` or ``hetu.float16``.
        enabled: False switches it off within an outer one.

    Raises:
        DTypeError: If it is another dtype.
        HetuError: If ``enabled`` is no bool.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g, hetu.autocast(hetu.bfloat16):
        ...     x = hetu.placeholder(hetu.float32, [2, 2])
        ...     (x @ x).dtype, hetu.softmax(x @ x).dtype
        (hetu.bfloat16, hetu.float32)
    """

    def __init__(self, dtype: DType | Any = bfloat16, enabled: bool = True) -> None:
        low = as_dtype(dtype)
        if low not in (bfloat16, float16):
            raise DTypeError(
                f"expected dtype to be hetu.bfloat16 or hetu.float16, got {low}",
                op="autocast",
                where=caller(),
                fix="use bfloat16",
            )
        self.dtype = low if flag(enabled, "enabled", op="autocast") else None

    def __repr__(self) -> str:
        return f"hetu.autocast({'enabled=False' if self.dtype is None else self.dtype})"

    def __enter__(self) -> None:
        _entered.set((*_entered.get(), self))

    def __exit__(self, *_: object) -> None:
        entered = _entered.get()
        last = max((i for i, item in enumerate(entered) if item is self), default=len(entered))
        _entered.set(entered[:last] + entered[last + 1 :])  # this one goes, in whatever order blocks are left


def no_autocast() -> autocast:
    """Switches autocast off: gradients are computed in the types of what they are the gradients of."""
    return autocast(enabled=False)


def wanted_dtype(precision: str, operands: Sequence[DType]) -> DType | None:
    """What an op's floating operands are cast to; None to leave them alone.

    Args:
        precision: ``OpDef.precision``: ``"low"``, ``"high"`` or ``"any"``.
        operands: Their floating dtypes.
    """
    entered = _entered.get()
    low = entered[-1].dtype if entered else None
    if low is None or precision == "any" or float64 in operands:
        return None
    return low if precision == "low" else float32
