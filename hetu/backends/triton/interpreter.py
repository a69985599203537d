"""Triton's interpreter where there is no GPU: for hetu's kernels, and for nobody else's.

Triton itself asks ``TRITON_INTERPRET`` when a kernel is defined, its own library's too, so that all of a process is
interpreted or nothing. Here only hetu's kernels are, unless that variable says something: other users of Triton in
this process, and the processes that it starts, find Triton as if hetu were not there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import triton
import triton.language as tl

_IS_FOR_ALL: bool = triton.knobs.runtime.interpret

IS_USED = _IS_FOR_ALL if "TRITON_INTERPRET" in os.environ else not torch.cuda.is_available()
"""Whether hetu's kernels are interpreted: as ``TRITON_INTERPRET`` says, else where there is no GPU."""


def jit(fn: Any = None, **options: Any) -> Any:
    """The decorator of hetu's kernels: ``triton.jit``, or what makes the same function for the interpreter."""
    if fn is None:
        return partial(jit, **options)
    return _interpreted(fn, **options) if IS_USED else triton.jit(fn, **options)


def _interpreted(fn: Any, **options: Any) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(fn, **options)


@cache
def _interpreted_library(fn: Any) -> Any:
    """The interpreter's version of a function of Triton's library."""
    return _interpreted(fn.fn)


def running() -> AbstractContextManager[None]:
    """What a launch of an interpreted kernel has to be in."""
    return _library() if IS_USED and not _IS_FOR_ALL else nullcontext()


_PLACES: tuple[Any, ...] = (tl, tl.core, tl.math, tl.standard, tl.random, tl.tensor, tl.core.tensor_descriptor_base)
"""Where Triton's library keeps functions: those of ``@triton.jit`` are replaced while a kernel is interpreted, and the
interpreter replaces builtins, of which it leaves some replaced when it is done."""

_one_at_a_time = threading.Lock()


@contextmanager
def _library() -> Iterator[None]:
    """Makes the functions of Triton's library ones that can be interpreted, and afterwards all what it was."""
    with suppress(ImportError):  # the interpreter imports it, and it looks at the library as it is then
        import_module("triton.experimental.gluon")
    with _one_at_a_time:
        before = [(place, dict(vars(place))) for place in _PLACES]
        try:
            for place, names in before:
                for name, value in names.items():
                    if isinstance(value, triton.JITFunction):
                        setattr(place, name, _interpreted_library(value))
            yield
        finally:
            for place, names in before:
                now = dict(vars(place))
                # What it adds to a module are names that its versions of the functions there need the next time too.
                for name in now.keys() - names.keys() if isinstance(place, type) else ():
                    delattr(place, name)
                for name, value in names.items():
                    if now.get(name) is not value:
                        setattr(place, name, value)
