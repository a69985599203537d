"""The bases of ops that work element by element: on two operands that broadcast, and on one floating tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hetu.dtypes import DType
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
            call.fail(DTypeError, "expected at least one tensor, got two numbers", "calculate with them in Python")
        dtype = self.dtype(call)
        for item in call.inputs:
            check_fits(call, item, dtype)
        shapes = [item.symbolic_shape if isinstance(item, Tensor) else () for item in call.inputs]
        return [output(call, self.output_dtype(dtype), broadcast(call, *shapes))]


def check_fits(call: Call, item: Any, dtype: DType) -> None:
    """Refuses a number that the int dtype of a computation can't hold; torch would let it wrap around."""
    if isinstance(item, int) and dtype.kind == "int":
        bits = 8 * dtype.itemsize
        low, high = (0, 2**bits - 1) if dtype.name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if not low <= item <= high:
            call.fail(DTypeError, f"{item} does not fit {dtype} ({low} to {high})", "cast the tensor to a wider dtype")


class Pointwise(OpDef):
    """A function of each element of a floating tensor."""

    inputs = ("x",)

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        x = tensor(call, 0, "x")
        floating(call, x, "x")
        return [output(call, x.dtype, x.symbolic_shape)]
