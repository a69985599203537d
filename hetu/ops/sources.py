"""Where values enter a graph: placeholders, which every run feeds, parameters, constants, full and arange."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hetu.arguments import MAX_BYTES, Number, array, flag, integer, number_of, refuse, shown
from hetu.dtypes import ALL, DType, as_dtype, bool_, float32, int64, int_range
from hetu.errors import DTypeError, ShapeError
from hetu.graph import BadSample, Call, GoodSample, OpDef, Role, Tensor, TensorSpec, register
from hetu.ops.common.build import build, plain, representable, shape_of, show, size, sizes
from hetu.ops.common.samples import eighths, whole_numbers
from hetu.symbols import IntSymbol, as_symbol, ceil_div

__all__ = ["arange", "constant", "full", "parameter", "placeholder"]


@register
class Placeholder(OpDef):
    """A value that each run feeds."""

    name = "placeholder"
    role = Role.PLACEHOLDER

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        return [TensorSpec(call.attrs["dtype"], shape_of(call))]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(lambda x: x, [eighths(3, 2)], lambda x: x, [(0, 0)]),
            GoodSample(lambda x: x, [eighths(0, 1, dtype="float16")], lambda x: x),
            GoodSample(lambda x: x, [whole_numbers(dtype="uint8", low=0)], lambda x: x),
        ]
        bad = [
            BadSample(lambda: placeholder("float32", [-1]), ShapeError, "sizes of at least 0, got [-1]"),
            BadSample(lambda: placeholder("float32", 3), ShapeError, "a list of sizes, got 3"),  # type: ignore[arg-type]
            BadSample(lambda: placeholder("float32", [2.0]), ShapeError, "an int or an IntSymbol, got 2.0"),  # type: ignore[list-item]
            BadSample(lambda: placeholder("float32", [IntSymbol("s") * -1 - 1]), ShapeError, "sizes of at least 0"),
            BadSample(lambda: placeholder("float8", [1]), DTypeError, "no element type 'float8'"),
        ]
        return good, bad


@register
class Constant(OpDef):
    """A value that is the same in every run. Its array is the attribute ``value``."""

    name = "constant"
    role = Role.CONSTANT

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        value, dtype = call.attrs["value"], call.attrs["dtype"]
        representable(call, value, dtype, "value")
        call.attrs["value"] = _native(value, dtype)
        return [TensorSpec(dtype, tuple(int(item) for item in value.shape))]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        table = eighths(2, 3)
        good = [
            GoodSample(lambda: constant(table), [], lambda: table),
            GoodSample(lambda: constant(table, dtype="bfloat16"), [], lambda: table),
            GoodSample(lambda: constant([[1.5], [2.0]]), [], lambda: np.array([[1.5], [2.0]])),
            GoodSample(lambda: constant(7), [], lambda: np.array(7)),
            GoodSample(lambda: constant(np.zeros((0, 3), "float64")), [], lambda: np.zeros((0, 3))),
            GoodSample(lambda: constant([True, False]), [], lambda: np.array([True, False])),
        ]
        bad = [
            BadSample(lambda: constant("seven"), DTypeError, "none of them masked, got 'seven'"),
            BadSample(lambda: constant([[1], [2, 3]]), ShapeError, "rows of equal length"),
            BadSample(lambda: constant([1 + 2j]), DTypeError, "an array of real numbers"),
            BadSample(lambda: constant([300, -1], dtype="uint8"), DTypeError, "value to fit hetu.uint8, got 300"),
            BadSample(lambda: constant([1.0, math.nan], dtype="int64"), DTypeError, "to fit hetu.int64, got nan"),
        ]
        return good, bad


@register
class Full(OpDef):
    """One number, everywhere."""

    name = "full"

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        shape, dtype = shape_of(call), call.attrs["dtype"]
        call.attrs["value"] = _number(call, call.attrs["value"], dtype, "value")
        return [TensorSpec(dtype, shape)]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        good = [
            GoodSample(lambda: full([2, 3], 0.5), [], lambda: np.full((2, 3), 0.5)),
            GoodSample(lambda: full([0, 3], 7, "int64"), [], lambda: np.full((0, 3), 7)),
            GoodSample(lambda: full([], True, "bool"), [], lambda: np.array(True)),
        ]
        bad = [
            BadSample(lambda: full([-1], 0.0), ShapeError, "sizes of at least 0, got [-1]"),
            BadSample(lambda: full(3, 0.0), ShapeError, "a list of sizes, got 3"),  # type: ignore[arg-type]
            BadSample(lambda: full([1], "one"), DTypeError, "value to be a number, got 'one'"),  # type: ignore[arg-type]
            BadSample(lambda: full([1], 1.5, "int32"), DTypeError, "expected value to fit hetu.int32, got 1.5"),
            BadSample(lambda: full([1], 1e300), DTypeError, "expected value to fit hetu.float32, got 1e+300"),
        ]
        return good, bad


@register
class Arange(OpDef):
    """Evenly spaced whole numbers. The bounds are operands, so that a run needs their symbols."""

    name = "arange"
    inputs = ("start", "stop")

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        start, stop = (size(call, item, what) for item, what in zip(call.inputs, self.inputs, strict=True))
        step, dtype = integer(call.attrs["step"], "step", op=call.op, error=ShapeError), call.attrs["dtype"]
        if not 0 < abs(step) <= 2**40:
            call.fail(ShapeError, f"expected step to be an int from 1 to 2**40, or its negative, got {shown(step)}")
        if dtype == bool_:
            call.fail(DTypeError, "expected an int or a floating dtype, got hetu.bool", "compare the numbers instead")
        low, high = (start, stop) if step > 0 else (stop, start)
        what = f"expected {'start <= stop' if step > 0 else 'start >= stop'} with a step of {step}"
        call.check(as_symbol(low) <= high, f"{what}, got start {start} and stop {stop}")
        least, most = int_range(dtype) if dtype.kind == "int" else (-(2**63), 2**63 - 1)
        for holds in (as_symbol(low) >= least, as_symbol(high) <= most):
            call.check(holds, f"expected start and stop to fit {dtype}, got {start} and {stop}", "choose a wider dtype")
        call.attrs["step"] = step
        return [TensorSpec(dtype, [plain(ceil_div(as_symbol(high) - low, abs(step)))])]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        s = IntSymbol("s", min=3)

        def rows(x: Tensor) -> IntSymbol:
            return x.symbolic_shape[0]

        good = [
            GoodSample(lambda: arange(5), [], lambda: np.arange(5)),
            GoodSample(lambda: arange(2, 9, 3, dtype="float32"), [], lambda: np.arange(2, 9, 3.0)),
            GoodSample(lambda: arange(3, -4, -2, "int8"), [], lambda: np.arange(3, -4, -2)),
            GoodSample(lambda: arange(3, 3), [], lambda: np.arange(0)),
            GoodSample(lambda x: [arange(rows(x)), x], [eighths(5)], lambda x: [np.arange(len(x)), x], [(0, 0)]),
            GoodSample(
                lambda x: [arange(rows(x) // 2, rows(x), 2, "bfloat16"), x],
                [eighths(9)],
                lambda x: [np.arange(len(x) // 2, len(x), 2), x],
                [(0, 0)],
            ),
        ]
        bad = [
            BadSample(lambda: arange(3, 2), ShapeError, "start <= stop with a step of 1, got start 3 and stop 2"),
            BadSample(lambda: arange(s, 2), ShapeError, "start <= stop with a step of 1, got start s and stop 2"),
            BadSample(lambda: arange(2, 3, -1), ShapeError, "start >= stop with a step of -1"),
            BadSample(lambda: arange(2, 3, 0), ShapeError, "expected step to be an int from 1"),
            BadSample(lambda: arange(0.5), ShapeError, "stop to be an int or an IntSymbol"),  # type: ignore[arg-type]
            BadSample(lambda: arange(300, dtype="int8"), ShapeError, "to fit hetu.int8, got 0 and 300"),
            BadSample(lambda: arange(3, dtype="bool"), DTypeError, "an int or a floating dtype"),
        ]
        return good, bad


@register
class Parameter(OpDef):
    """A value that the graph keeps from run to run, and that optimisers change."""

    name = "parameter"
    role = Role.PARAMETER

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        attrs = call.attrs
        dtype, shape = attrs["dtype"], sizes(call, attrs["shape"], "shape")
        counts = [item for item in shape if isinstance(item, int) and item >= 0]
        if len(counts) < len(shape):
            what = f"expected plain sizes of at least 0, got {show(shape)}"
            call.fail(ShapeError, what, "a parameter's shape is the same in every run")
        if math.prod(counts) * dtype.itemsize > MAX_BYTES:
            call.fail(ShapeError, f"a parameter of shape {show(shape)} is too large for any machine", "check its sizes")
        if not dtype.is_floating:
            call.fail(DTypeError, f"expected a floating dtype, got {dtype}", "make integers with hetu.constant(...)")
        attrs["requires_grad"] = flag(attrs["requires_grad"], "requires_grad", op=call.op)
        attrs["shape"], attrs["init"] = shape, self._init(call, attrs["init"], shape)
        return [TensorSpec(dtype, shape)]

    @staticmethod
    def _init(call: Call, init: Any, shape: Sequence[Any]) -> Any:
        """A number, an array of the parameter's shape, or a function."""
        if callable(init):
            return init
        if number_of(init) is not None and not getattr(init, "shape", ()):
            return _number(call, init, call.attrs["dtype"], "init")
        kept = array(init, "init", op=call.op)
        if tuple(kept.shape) != tuple(shape):
            call.fail(ShapeError, f"expected init to have shape {show(shape)}, got {list(kept.shape)}")
        return _native(kept, call.attrs["dtype"])

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        table = eighths(2, 3)
        good = [
            GoodSample(lambda: parameter(table, [2, 3]), [], lambda: table),
            GoodSample(lambda: parameter(0.5, [3]), [], lambda: np.full(3, 0.5)),
            GoodSample(lambda: parameter(lambda x: x.fill_(2), [1, 0]), [], lambda: np.full((1, 0), 2)),
            GoodSample(lambda: parameter(lambda x: x + 1, [2], "bfloat16"), [], lambda: np.ones(2)),
        ]
        bad = [
            BadSample(lambda: parameter(0.0, [IntSymbol("n")]), ShapeError, "sizes of at least 0, got [n]"),  # type: ignore[list-item]
            BadSample(lambda: parameter(0.0, 3), ShapeError, "a list of sizes, got 3"),  # type: ignore[arg-type]
            BadSample(lambda: parameter(0, [2], "int64"), DTypeError, "a floating dtype, got hetu.int64"),
            BadSample(lambda: parameter(table, [3, 2]), ShapeError, "init to have shape [3, 2], got [2, 3]"),
            BadSample(
                lambda: parameter("xavier", [3, 2]),
                DTypeError,
                "none of them masked, got 'xavier'",
            ),
        ]
        return good, bad


def parameter(
    init: Any,
    shape: Sequence[int],
    dtype: DType | Any = float32,
    name: str | None = None,
    *,
    requires_grad: bool = True,
) -> Tensor:
    """Makes a tensor that the graph keeps from run to run: what an optimiser trains.

    Its value is made when it is first needed, on the device of the graph, and is the same on all pipelines.

    Args:
        init: The first value: a number, an array of that shape, or a function. A function gets a float32 torch tensor
            of zeros on the CPU, and fills it in place or returns another; for example
            ``functools.partial(torch.nn.init.normal_, std=0.02)``. What it draws from torch's generator depends on
            the seed of :func:`hetu.manual_seed` and on the parameter's name alone.
        shape: One plain int per dimension.
        dtype: A floating element type.
        name: The node's name, unique in the graph, and the parameter's name in a state dict; None makes one up.
        requires_grad: Whether optimisers train it unless told otherwise.

    Returns:
        The tensor.

    Raises:
        ShapeError: If a size is negative or no int, or an array has another shape.
        DTypeError: If the dtype is not floating, or the value does not consist of numbers.
        HetuError: If no graph is being built, or the name is taken.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     weight = hetu.parameter(0.5, [2, 2], name="weight")
        >>> g.run(weight)
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    attrs = {"init": init, "shape": shape, "dtype": as_dtype(dtype), "requires_grad": requires_grad}
    return build("parameter", (), attrs, name)


def placeholder(dtype: DType | Any, shape: Sequence[int | IntSymbol], name: str | None = None) -> Tensor:
    """Makes a tensor whose value each run feeds.

    Args:
        dtype: The element type: a hetu, numpy or torch dtype, or its name.
        shape: One int or IntSymbol per dimension. Symbols get their values from the fed array's shape, where a
            dimension is linear in one unknown symbol (``2 * s + 1``).
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        The tensor, of the given dtype and shape.

    Raises:
        DTypeError: If there is no such element type.
        ShapeError: If a size is negative or no int.
        HetuError: If no graph is being built, or the name is taken.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run"):
        ...     hetu.placeholder(hetu.bfloat16, [s, 64], name="x")
        hetu.Tensor(x: bfloat16[s, 64])
    """
    return build("placeholder", (), {"dtype": as_dtype(dtype), "shape": shape}, name)


def full(
    shape: Sequence[int | IntSymbol], value: float, dtype: DType | Any = float32, name: str | None = None
) -> Tensor:
    """Makes a tensor that holds one number everywhere.

    Args:
        shape: One int or IntSymbol per dimension.
        value: The number.
        dtype: The element type.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of that shape and dtype.

    Raises:
        ShapeError: If a size is negative or no int.
        DTypeError: If the value is no number, or there is no such element type.
        HetuError: If no graph is being built, or the name is taken.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     half = hetu.full([2], 0.5)
        >>> g.run(half)
        tensor([0.5000, 0.5000])
    """
    return build("full", (), {"shape": shape, "value": value, "dtype": as_dtype(dtype)}, name)


def arange(
    start: int | IntSymbol,
    stop: int | IntSymbol | None = None,
    step: int = 1,
    dtype: DType | Any = int64,
    name: str | None = None,
) -> Tensor:
    """Makes the whole numbers from ``start`` to before ``stop``, as ``torch.arange``; ``arange(n)`` begins with 0.

    Args:
        start: The first number; what is given alone is ``stop``.
        stop: What the numbers stay below, or above if the step is negative.
        step: From one number to the next; not 0.
        dtype: An int or floating element type. Half precision rounds numbers that it does not hold.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        A tensor of one dimension, with ``ceil_div(stop - start, step)`` elements.

    Raises:
        ShapeError: If a bound is no int, the bounds are in the wrong order or beyond the dtype, or the step is 0. Every
            run checks what only the symbols' values decide.
        DTypeError: If the dtype is bool, or there is no such element type.
        HetuError: If no graph is being built, or the name is taken.

    Example:
        >>> import hetu
        >>> s = hetu.IntSymbol("s")
        >>> with hetu.graph("define_and_run") as g:
        ...     places = hetu.arange(s)
        >>> g.run(places, int_symbol_dict={s: 3})
        tensor([0, 1, 2])
    """
    bounds = (0, start) if stop is None else (start, stop)
    return build("arange", bounds, {"step": step, "dtype": as_dtype(dtype)}, name)


def constant(value: Any, dtype: DType | Any = None, name: str | None = None) -> Tensor:
    """Makes a tensor whose value is the same in every run.

    Args:
        value: A numpy array, a torch tensor, a number, or nested lists of numbers. It is copied: changing it
            later does not change the graph.
        dtype: The element type. None keeps that of an array, and gives float32, int64 or bool for Python numbers.
        name: The node's name, unique in the graph; None makes one up.

    Returns:
        The tensor, of the value's shape.

    Raises:
        DTypeError: If the value does not consist of numbers, or there is no such element type.
        ShapeError: If nested lists have rows of differing lengths.
        HetuError: If no graph is being built, or the name is taken.

    Example:
        >>> import hetu
        >>> with hetu.graph("define_and_run") as g:
        ...     two = hetu.constant([[1.0, 2.0]])
        >>> two
        hetu.Tensor(constant_0: float32[1, 2])
        >>> g.run(two + two)
        tensor([[2., 4.]])
    """
    kept = array(value, "value", op="constant")
    if dtype is None and isinstance(kept, np.ndarray) and kept.dtype == np.float64 and not hasattr(value, "dtype"):
        kept = kept.astype(float32.name)  # Python's floats are float32, as they are for torch; numpy made them float64
    wanted = as_dtype(kept.dtype if dtype is None else dtype)
    return build("constant", (), {"value": kept, "dtype": wanted}, name)


def _number(call: Call, value: Any, dtype: DType, what: str) -> Number:
    """A number that all elements of a tensor are to be."""
    number = number_of(value)
    if number is None:
        refuse(value, what, "a number", op=call.op, error=DTypeError)
    try:
        fits = not dtype.is_floating or not math.isfinite(number) or abs(float(number)) <= _MOST.get(dtype, math.inf)
    except OverflowError:
        fits = False
    if not dtype.is_floating:
        low, high = int_range(dtype) if dtype.kind == "int" else (0, 1)
        fits = math.isfinite(number) and number == int(number) and low <= number <= high
    if not fits:
        call.fail(DTypeError, f"expected {what} to fit {dtype}, got {shown(number)}", "choose another dtype or value")
    return float(number) if dtype.is_floating and abs(number) >= 2**63 else number  # torch has no longer ints


def _native(values: Any, dtype: DType) -> Any:
    """An array as torch reads it: numpy has element types that torch lacks."""
    if not isinstance(values, np.ndarray) or values.dtype.name in _KNOWN:
        return values
    return values.astype("float64" if dtype.is_floating else dtype.name)


_KNOWN = {dtype.name for dtype in ALL}
_MOST = {float32: float(np.finfo(np.float32).max)}
