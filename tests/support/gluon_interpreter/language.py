"""``gl``: what kernels name of ``triton.experimental.gluon.language``. What is not here is an error, no guess."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from support.gluon_interpreter import machine
from support.gluon_interpreter.memory import Pointer
from support.gluon_interpreter.ptx import elementwise
from support.gluon_interpreter.shared import BARRIER_LAYOUT, Barriers, Buffer
from support.gluon_interpreter.values import KernelError, Value, common, rounded, value
from support.gluon_interpreter.values import bfloat16 as bfloat16
from support.gluon_interpreter.values import float16 as float16
from support.gluon_interpreter.values import float32 as float32
from support.gluon_interpreter.values import int1 as int1
from support.gluon_interpreter.values import int32 as int32
from support.gluon_interpreter.values import int64 as int64

static_range = range


def _layout(*of: Any) -> None:
    """A layout, for which nothing asks here."""


SliceLayout = BlockedLayout = DotOperandLayout = NVMMADistributedLayout = DistributedLinearLayout = _layout
SwizzledSharedLayout = _layout


def program_id(axis: int) -> Value:
    """The number of the program."""
    return Value(machine.now().program, int32)


def num_programs(axis: int) -> Value:
    """How many there are."""
    return Value(machine.now().programs, int32)


def arange(start: int, end: int, layout: Any = None) -> Value:
    """Integers in a row, a power of two of them."""
    _check_sizes([end - start])
    return Value(np.arange(start, end), int32)


def full(shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Value:
    """A tensor of one number."""
    _check_sizes(shape)
    return Value(np.full(tuple(shape), value.data if isinstance(value, Value) else value), dtype)


def full_like(x: Value, value: Any) -> Value:
    """One of the shape and dtype of another."""
    return full(x.shape, value, x.dtype)


def _check_sizes(shape: Sequence[int]) -> None:
    if any(size < 1 or size & (size - 1) for size in shape):
        raise KernelError(f"sizes of tensors are powers of two, not {list(shape)}")


def convert_layout(x: Value, layout: Any, assert_trivial: bool = False) -> Value:
    """The same in other threads."""
    return x


def expand_dims(x: Value, axis: int) -> Value:
    """With one more dim, of size 1."""
    return Value(np.expand_dims(x.data, axis), x.dtype)


def where(condition: Any, x: Any, y: Any) -> Value:
    """X or y."""
    (picks, left, right), _ = common(condition, *_alike(x, y))
    return Value(np.where(picks, left, right), common(x, y)[1])


def _alike(x: Any, y: Any) -> tuple[Value, Value]:
    dtype = common(x, y)[1]
    return value(x).to(dtype), value(y).to(dtype)


def maximum(x: Any, y: Any) -> Value:
    """The larger one; of a number and NaN the number."""
    (left, right), dtype = common(x, y)
    return Value(np.fmax(left, right), dtype)


def minimum(x: Any, y: Any) -> Value:
    """The smaller one; of a number and NaN the number."""
    (left, right), dtype = common(x, y)
    return Value(np.fmin(left, right), dtype)


def max(x: Value, axis: int) -> Value:
    """The largest along a dim, and not NaN if there is a number."""
    return Value(np.fmax.reduce(x.data, axis), x.dtype)


def sum(x: Value, axis: int) -> Value:
    """The sum along a dim."""
    return Value(np.sum(x.data, axis), x.dtype)


def abs(x: Value) -> Value:
    """Without its sign."""
    return Value(np.abs(x.data), x.dtype)


def exp2(x: Value) -> Value:
    """2 to the power of it."""
    return _of_float(np.exp2, x)


def log2(x: Value) -> Value:
    """The logarithm in base 2."""
    return _of_float(np.log2, x)


def _of_float(compute: Any, x: Value) -> Value:
    if x.dtype is not float32:
        raise KernelError(f"{compute.__name__} of {x.dtype}")
    return Value(compute(x.data), float32)


def fma(x: Any, y: Any, z: Any) -> Value:
    """``x * y + z``, rounded once."""
    (a, b, c), dtype = common(x, y, z)
    return Value(np.float64(a) * np.float64(b) + np.float64(c), dtype)


def _masked(pointer: Pointer, mask: Any) -> tuple[Any, Any]:
    """Offsets and which of them are wanted, both of the shape of what is loaded or stored."""
    picks = value(True if mask is None else mask)
    if picks.dtype is not int1:
        raise KernelError("a mask that is no truth")
    common(pointer.at, picks)
    return np.broadcast_arrays(pointer.at.data, picks.data)


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
    """From global memory; where the mask is false, ``other``, and without that nothing that can be told."""
    at, picks = _masked(pointer, mask)
    memory, program = pointer.memory, machine.now().program
    if picks.ndim == 0:
        return Value(memory.load(at, program) if picks else other, memory.dtype)
    missing = other.data if isinstance(other, Value) else other
    if missing is None:
        missing = np.nan if memory.dtype.is_floating() else -(2**31)
    found = np.full(at.shape, missing, np.float32 if memory.dtype.is_floating() else np.int64)
    found[picks] = memory.load(at[picks], program)
    return Value(found, memory.dtype)


def store(pointer: Pointer, x: Any, mask: Any = None) -> None:
    """To global memory, where the mask is true."""
    at, picks = _masked(pointer, mask)
    data = np.broadcast_to(rounded(value(x).data, pointer.memory.dtype), at.shape)
    pointer.memory.store(at[picks], data[picks], machine.now().program)


def atomic_add(pointer: Pointer, x: Any, mask: Any = None, sem: str = "", scope: str = "") -> Value:
    """Adds to global memory, and gives what was there."""
    at, picks = _masked(pointer, mask)
    before = pointer.memory.add_to(at[picks], np.broadcast_to(value(x).data, at.shape)[picks])
    found = np.zeros(at.shape, before.dtype)
    found[picks] = before
    return Value(found, pointer.memory.dtype)


def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any, value: Any = None) -> Any:
    """Buffers, or barriers."""
    own = machine.now()
    if layout is BARRIER_LAYOUT:
        return Barriers(own, shape[0])
    _check_sizes(shape[1:])
    buffer = Buffer.allocated(own, dtype, shape, layout)
    if value is not None:
        buffer.store(value)
    return buffer


def inline_asm_elementwise(
    asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int
) -> Value | tuple[Value, ...]:
    """Instructions, for ``pack`` elements of a thread at a time."""
    values = [value(x) for x in args]
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    common(*values)
    arrays = np.broadcast_arrays(*(x.data for x in values))
    found = elementwise(asm, constraints, [(a, x.dtype) for a, x in zip(arrays, values, strict=True)], dtypes, pack)
    results = tuple(Value(data, own) for data, own in zip(found, dtypes, strict=True))
    return results if isinstance(dtype, tuple) else results[0]


def warp_specialize(parts: Sequence[Any], worker_num_warps: Sequence[int], worker_num_regs: Sequence[int]) -> None:
    """Starts partitions, each a function and its arguments, and waits until all have ended."""
    if not len(parts) - 1 == len(worker_num_warps) == len(worker_num_regs):
        raise KernelError("the workers, their warps and their registers are not as many")
    own = machine.now()
    started = []
    for at, (function, args) in enumerate(parts):
        name = f"partition {at} ({getattr(function, '__name__', function)})"
        knows = own.current.knows.copy()
        started.append(own.start(name, lambda function=function, args=args: function(*args), knows))
    own.wait("its partitions", lambda: all_done(started))
    for task in started:
        own.current.knows.join(task.knows)


def all_done(tasks: Sequence[Any]) -> bool:
    """Whether all of them have ended."""
    return not [task for task in tasks if not task.is_done]


def thread_barrier() -> None:
    """Nothing: the threads of a partition are one here."""
