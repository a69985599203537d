"""Triton's interpreter without work of which nothing comes: tests of kernels take a third of the time.

It computes by numpy. More time than that takes goes into

- looking through all of ``triton.language``, at every call of one jitted function by another, for what it has replaced
  already when the kernel was launched;
- computing each sum and product of 32-bit integers once more in 64 bits, for an assertion that is then left out,
  because ``debug`` is off;
- making a table of numpy's types each time that one is looked up.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_lang, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_numpy_type = interpreter._get_np_dtype

_patched = set[str]()
"""Modules that were replaced for the launch under way."""

_numpy_types: dict[str, Any] = {}


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


def lighten() -> None:
    """Takes it out of the interpreter of this process."""
    interpreter._patch_lang = _patch_once
    interpreter.GridExecutor.__call__ = _launch_anew
    interpreter._get_np_dtype = _numpy_type_once
    options = interpreter.interpreter_builder.options
    assert not options.debug, "then it asserts what it computes"
    object.__setattr__(options, "sanitize_overflow", False)  # they are frozen
