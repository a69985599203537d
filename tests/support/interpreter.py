"""Triton's interpreter without work of which nothing comes: tests of kernels take a fifth of the time.

It computes by numpy. More time than that takes goes into

- looking through all of ``triton.language``, at every call of one jitted function by another, for what it has replaced
  already when the kernel was launched;
- computing each sum and product of 32-bit integers once more in 64 bits, for an assertion that is then left out,
  because ``debug`` is off;
- making a table of numpy's types each time that one is looked up;
- making the shape of each tensor and type anew, and comparing shapes and types that are the same;
- passing each call of the language on through two functions that add an argument;
- finding out anew of which type a sum of two types is, and making the constant that is added anew;
- copying an operand into the other's shape, which numpy's functions see to;
- looking into each argument as if it were a tuple of tuples of constants;
- taking each bfloat16 apart to put it together as a float32, of whose bits it is the first half: also where it is
  subnormal, which Triton gets wrong.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch_lang, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_numpy_type, _convert_float = interpreter._get_np_dtype, interpreter._convert_float
_make_tensor, _make_block_type = tl.tensor.__init__, tl.block_type.__init__
_broadcast, _cast = TritonSemantic.broadcast_impl_value, TritonSemantic._cast_to_computation_type
_check_types, _unwrap = TritonSemantic.binary_op_type_checking_impl, tl.core._unwrap_if_constexpr
_get_item = inspect.unwrap(tl.tensor.__getitem__)

_patched = set[str]()
"""Modules that were replaced for the launch under way."""

_numpy_types: dict[str, Any] = {}

_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
"""What types of one element and one shape have in common, which is all."""

_shapes: dict[tuple[int, ...], dict[str, Any]] = {}
"""What tensors of one shape have in common."""

_constants: dict[tuple[Any, ...], tl.tensor | None] = {}
"""Numbers beside tensors of a type, as a tensor of that type; None where the result is of another one."""

_PLAIN = {tl.tensor, tl.dtype, tl.pointer_type, tl.block_type, int, float, bool, str, type(None)}
"""Types of what holds no constants."""


@cache
def _modules(fn: Any) -> frozenset[str]:
    """Which modules the interpreter replaces for a function: those of the language that it knows by any name."""
    return frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)


def _patch_once(fn: Any) -> Any:
    if _modules(fn) <= _patched:
        return None
    _patched.update(_modules(fn))
    return _patch_lang(fn)


def _launch_anew(self: Any, *arguments: Any, **options: Any) -> None:
    _patched.clear()
    _launch(self, *arguments, **options)


def _numpy_type_once(kind: Any) -> Any:
    name = kind.scalar.name
    if name not in _numpy_types:
        _numpy_types[name] = _numpy_type(kind)
    return _numpy_types[name]


def _patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    plain = inspect.unwrap(member)

    def call(*arguments: Any, **options: Any) -> Any:
        options["_semantic"] = interpreter.interpreter_semantic
        return plain(*arguments, **options)

    scope.set_attr(obj, name, call)


def _make_block_type_once(self: Any, element_ty: Any, shape: Any) -> None:
    sizes = tuple([size.value if type(size) is tl.constexpr else size for size in shape])
    key = element_ty.name, sizes
    if key not in _block_types:
        _make_block_type(self, element_ty, shape)
        _block_types[key] = self.__dict__ | {"sizes": sizes}
    self.__dict__.update(_block_types[key], element_ty=element_ty)


def _make_tensor_once(self: Any, handle: Any, type: Any) -> None:
    if type.sizes not in _shapes:
        _make_tensor(self, handle, type)
        _shapes[type.sizes] = {"shape": self.shape, "numel": self.numel}
    self.__dict__.update(_shapes[type.sizes], handle=handle, type=type, dtype=type.scalar)


def _unwrap_others(value: Any) -> Any:
    kind = type(value)
    if kind is tl.constexpr:
        return value.value
    return value if kind in _PLAIN else _unwrap(value)


def _broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
    return (lhs, rhs) if lhs.type.sizes == rhs.type.sizes else _broadcast(self, lhs, rhs)


@cache
def _common(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of what is computed of two shapes of one length, or of a scalar; None if Triton has to say it."""
    if not one or not other:
        return one or other
    fit = len(one) == len(other) and all(m == n or 1 in (m, n) for m, n in zip(one, other, strict=True))
    return tuple(map(max, one, other)) if fit else None


def _side_by_side(self: Any, lhs: Any, rhs: Any) -> Any:
    """Operands of a function of elements, which have the type of the result; their data are as they were."""
    mine, theirs = lhs.type.sizes, rhs.type.sizes
    if mine == theirs:
        return lhs, rhs
    sizes = _common(mine, theirs)
    if sizes is None:
        return _broadcast(self, lhs, rhs)
    if mine != sizes:
        lhs = tl.tensor(lhs.handle, tl.block_type(lhs.dtype, list(sizes)))
    if theirs != sizes:
        rhs = tl.tensor(rhs.handle, tl.block_type(rhs.dtype, list(sizes)))
    return lhs, rhs


def _constant(self: Any, value: float, dtype: Any, div_or_mod: bool) -> tl.tensor | None:
    """A number beside tensors of a type, as what is computed takes it; None if it computes in another type."""
    key = value, math.copysign(1, value), type(value), dtype.name, div_or_mod
    if key not in _constants:
        kind = self.computation_type_impl(dtype, False, self.to_tensor_type(value), True, div_or_mod)
        found = self._cast_to_computation_type(value, dtype) if kind.name == dtype.name else None
        if found is not None:
            found.handle.data.flags.writeable = False
        _constants[key] = found
    return _constants[key]


def _check_types_once(
    self: Any,
    lhs: Any,
    rhs: Any,
    allow_lhs_ptr: bool = False,
    allow_rhs_ptr: bool = False,
    arithmetic_check: bool = True,
    div_or_mod: bool = False,
) -> Any:
    of_tensors = type(lhs) is tl.tensor, type(rhs) is tl.tensor
    if all(of_tensors):
        mine, theirs = lhs.dtype, rhs.dtype
        if mine.is_ptr():
            if allow_lhs_ptr and theirs.is_int():
                return _side_by_side(self, lhs, rhs)
        elif mine.name == theirs.name and not div_or_mod:
            return _side_by_side(self, lhs, rhs)
    elif any(of_tensors) and arithmetic_check:
        x, number = (lhs, rhs) if of_tensors[0] else (rhs, lhs)
        if type(number) in (int, float) and not x.dtype.is_ptr():
            found = _constant(self, number, x.dtype, div_or_mod)
            if found is not None:
                return _side_by_side(self, *((lhs, found) if of_tensors[0] else (found, rhs)))
    return _check_types(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)


@tl.core.builtin
def _get_item_others(self: Any, slices: Any, _semantic: Any = None) -> Any:
    if type(slices) is not tuple or not self.type.is_block() or len(slices) - slices.count(None) > len(self.shape):
        return _get_item(self, slices, _semantic=_semantic)
    if any(item is not None and item != slice(None) for item in slices):
        return _get_item(self, slices, _semantic=_semantic)
    data = self.handle.data[slices]
    return tl.tensor(interpreter.TensorHandle(data, self.dtype), tl.block_type(self.dtype, list(data.shape)))


def _make_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
    if data.itemsize > 1 and type(dtype) is not tl.pointer_type and data.itemsize * 8 > dtype.primitive_bitwidth:
        self.__post_init__()  # says so


def _cast_others(self: Any, value: Any, dtype: Any) -> Any:
    return value if isinstance(value, tl.tensor) and value.dtype is dtype else _cast(self, value, dtype)


def _convert_float_others(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source is tl.bfloat16 and target is tl.float32:
        return data.astype(np.uint32) << 16
    return _convert_float(data, source, target, rounding)


def lighten() -> None:
    """Takes it out of the interpreter of this process."""
    interpreter._patch_lang, interpreter._patch_attr = _patch_once, _patch_attr
    interpreter.GridExecutor.__call__ = _launch_anew
    interpreter._get_np_dtype, interpreter._convert_float = _numpy_type_once, _convert_float_others
    tl.dtype.sizes = ()  # of a scalar; a block has its own
    tl.tensor.__init__, tl.block_type.__init__ = _make_tensor_once, _make_block_type_once
    tl.tensor.__getitem__, interpreter.TensorHandle.__init__ = _get_item_others, _make_handle
    tl.core._unwrap_if_constexpr = _unwrap_others
    TritonSemantic.broadcast_impl_value, TritonSemantic.binary_op_type_checking_impl = (
        _broadcast_others,
        _check_types_once,
    )
    TritonSemantic._cast_to_computation_type = _cast_others
    options = interpreter.interpreter_builder.options
    assert not options.debug, "then it asserts what it computes"
    object.__setattr__(options, "sanitize_overflow", False)  # they are frozen
