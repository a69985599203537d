"""Triton's interpreter without work of which nothing comes: tests of kernels take a fifth of the time.

It computes by numpy. More time than that takes goes into

- looking through all of ``triton.language``, at every call of one jitted function by another, for what it has replaced
  already when the kernel was launched;
- computing each sum and product of 32-bit integers once more in 64 bits, for an assertion that is then left out,
  because ``debug`` is off;
- making a table of numpy's types each time that one is looked up;
- making the shape of each tensor and type anew, and comparing shapes and types that are the same;
- passing each call of the language on through two functions that add an argument;
- taking each bfloat16 apart to put it together as a float32, of whose bits it is the first half: also where it is
  subnormal, which Triton gets wrong.
"""

from __future__ import annotations

import inspect
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

_patched = set[str]()
"""Modules that were replaced for the launch under way."""

_numpy_types: dict[str, Any] = {}

_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
"""What types of one element and one shape have in common, which is all."""

_shapes: dict[tuple[int, ...], dict[str, Any]] = {}
"""What tensors of one shape have in common."""


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
    key = (element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape))
    if key not in _block_types:
        _make_block_type(self, element_ty, shape)
        _block_types[key] = self.__dict__.copy()
    self.__dict__.update(_block_types[key], element_ty=element_ty)


def _make_tensor_once(self: Any, handle: Any, type: Any) -> None:
    sizes = tuple(type.shape.values) if type.is_block() else ()
    if sizes not in _shapes:
        _make_tensor(self, handle, type)
        _shapes[sizes] = {"shape": self.shape, "numel": self.numel}
    self.__dict__.update(_shapes[sizes], handle=handle, type=type, dtype=type.scalar)


def _broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


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
    tl.tensor.__init__, tl.block_type.__init__ = _make_tensor_once, _make_block_type_once
    TritonSemantic.broadcast_impl_value = _broadcast_others
    TritonSemantic._cast_to_computation_type = _cast_others
    options = interpreter.interpreter_builder.options
    assert not options.debug, "then it asserts what it computes"
    object.__setattr__(options, "sanitize_overflow", False)  # they are frozen
