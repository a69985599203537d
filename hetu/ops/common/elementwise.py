"""The bases of ops that work element by element: on two operands that broadcast, and on one floating tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hetu.arguments import MOST_OF_FLOATS, shown
from hetu.dtypes import DType, int_range
from hetu.errors import DTypeError
from hetu.graph import Call, OpDef, Tensor, TensorSpec
from hetu.ops.common.build import broadcast, floating, output, result_type, tensor
from hetu.symbols import IntSymbol

Operand = Tensor | IntSymbol | int | float | bool


class Elementwise(OpDef):
    """An op on two operands, tensors or numbers, by numpy's broadcasting and torch's promotion of dtypes."""

    inputs = ("a", "b")

    def dtype(self, call: Call) -> DType:
        """The dtype in which it is computed."""
        return result_type(call.inputs)

    def output_dtype(self, dtype: DType) -> DType:
        """The dtype of what is computed in ``dtype``."""
        return dtype

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        for what, item in zip(self.inputs, call.inputs, strict=True):
            if item is None:
                call.fail(DTypeError, f"expected {what} to be a tensor or a number, got None")
        if not any(isinstance(item, Tensor) for item in call.inputs):
            what = f"expected {' or '.join(self.inputs)} to be a tensor, got two numbers"
            call.fail(DTypeError, what, "calculate with them in Python")
        dtype = self.dtype(call)
        for what, item in zip(self.inputs, call.inputs, strict=True):
            check_fits(call, item, dtype, what)
        shapes = [item.symbolic_shape if isinstance(item, Tensor) else () for item in call.inputs]
        return [output(call, self.output_dtype(dtype), broadcast(call, *shapes))]


def check_fits(call: Call, item: Any, dtype: DType, name: str) -> None:
    """Refuses a whole number that the dtype of a computation can't hold; torch would let an int wrap around.

    A symbol's value is known only when the graph runs: every run checks it for a narrow dtype here, and for a wide one
    where it binds.

    Args:
        call: The call to check.
        item: The operand; only numbers and symbols are looked at.
        dtype: The dtype of the computation.
        name: The operand's name.
    """
    if isinstance(item, bool) or not isinstance(item, (int, IntSymbol)):
        return
    if dtype.kind == "int":
        low, high = int_range(dtype)
        limits, fix = f"{low} to {high}", "cast the tensor to a wider dtype"
    else:
        low, high = -MOST_OF_FLOATS, MOST_OF_FLOATS
        limits, fix = "at most 2**1023", "use a smaller number"
    if isinstance(item, int) and not low <= item <= high:
        call.fail(DTypeError, f"{name} of {shown(item)} does not fit {dtype} ({limits})", fix)
    if isinstance(item, IntSymbol) and dtype.kind == "int" and dtype.itemsize < 8:
        what = f"expected {item} to fit {dtype} ({limits})"
        call.check(item >= low, what, fix)
        call.check(item <= high, what, fix)


class Pointwise(OpDef):
    """A function of each element of a floating tensor."""

    inputs = ("x",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        floating(call, x, "x")
        return [output(call, x.dtype, x.symbolic_shape)]
