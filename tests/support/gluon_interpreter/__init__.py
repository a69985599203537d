"""Runs kernels written in Gluon on a CPU: the part of the language that hetu's kernels for Hopper use.

Triton has no interpreter for it. Here the kernels' own Python functions run, with other objects for the names of Triton
that they use; partitions of ``warp_specialize`` are threads in an order drawn by a seed. Programs of a grid run one
after the other.

**What it models**: shapes and how they broadcast; dtypes and their rounding, int32 that leaves its range; C's division;
barriers, by phases and arrivals and bytes; copies by TMA, which land later than they begin, at the latest when nothing
else can go on, and hold NaN until then; products of tensor cores, whose results are not there before the wait for
them; ``fence_async_shared``; inline assembly, instruction by instruction, with shuffles and votes of warps;
descriptors, of which what is outside of the tensor is read as 0 and not written.

**What it finds, in every order of the threads**: accesses to shared memory that nothing puts in an order, as in a
missing or a wrong wait, a release too early, a missing fence; a deadlock, with who waits for what; a copy or a product
that nobody waits for; accesses outside of tensors, and to what other programs write.

**What it doesn't**: layouts, registers and speed, to which compiling holds kernels; the approximations of exponentials
and tangents; the order in which tensor cores add; threads of one partition among themselves, which Triton orders. An
ordinary load and an ordinary store of two partitions that nothing orders are found only where the store comes first:
the load then gives NaN, which does no harm if it is masked.
"""

from __future__ import annotations

import inspect
import random
import textwrap
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from support.gluon_interpreter import hopper, language, machine
from support.gluon_interpreter.memory import Descriptor, Memories, Pointer
from support.gluon_interpreter.scheduler import Scheduler
from support.gluon_interpreter.values import KernelError, Value, float32, int32, int64
from triton.experimental.gluon import language as real
from triton.experimental.gluon.language.nvidia import hopper as real_hopper

__all__ = ["Edit", "KernelError", "interpreted"]


@dataclass
class Edit:
    """A change of the source of a function that a kernel calls.

    Attributes:
        function: Its name, with that of its module before it where several have one of that name.
        before: A piece of its source, which is there once.
        after: What takes its place.
        is_made: Whether the function was called for, and so changed.
    """

    function: str
    before: str
    after: str
    is_made: bool = False


def _replacements() -> list[tuple[Any, Any]]:
    tma = real_hopper.tma
    load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    return [
        (real, language),
        (tma, hopper.tma),
        (load, hopper.tma.load),
        (store, hopper.tma.store),
        (real_hopper.mbarrier, hopper.mbarrier),
        (real_hopper.fence_async_shared, hopper.fence_async_shared),
        (real_hopper.warpgroup_mma, hopper.warpgroup_mma),
        (real_hopper.warpgroup_mma_wait, hopper.warpgroup_mma_wait),
    ]


class _Made:
    """What there is instead of Triton's objects, and of functions of kernels, each made once."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self._edits = list(edits)
        self._known = {id(theirs): ours for theirs, ours in _replacements()}
        self._names: dict[int, dict[str, Any]] = {}
        self._functions: dict[int, Any] = {}

    def of(self, x: Any) -> Any:
        """What there is instead."""
        if id(x) in self._known:
            return self._known[id(x)]
        if isinstance(x, real.constexpr):
            return x.value
        if isinstance(x, triton.JITFunction) or type(x).__name__ == "ConstexprFunction":
            return self.function(x.fn)
        return x

    def function(self, fn: Any) -> Any:
        """A function that finds ours where it names theirs; it looks for them when it is called."""
        if id(fn) in self._functions:
            return self._functions[id(fn)]
        code = self._code(fn)

        def call(*args: Any, **named: Any) -> Any:
            names = self._names.get(id(fn.__globals__))
            if names is None:
                names = self._names[id(fn.__globals__)] = {name: self.of(x) for name, x in fn.__globals__.items()}
            return types.FunctionType(code, names, fn.__name__, fn.__defaults__, fn.__closure__)(*args, **named)

        call.__name__ = fn.__name__
        self._functions[id(fn)] = call
        return call

    def _code(self, fn: Any) -> types.CodeType:
        names = fn.__name__, f"{fn.__module__.rsplit('.')[-1]}.{fn.__name__}"
        edits = [edit for edit in self._edits if edit.function in names]
        if not edits:
            return fn.__code__
        source = textwrap.dedent(inspect.getsource(fn))
        source = source[source.index("def ") :]
        for edit in edits:
            if source.count(edit.before) != 1:
                raise ValueError(f"{edit.before!r} is there {source.count(edit.before)} times in {edit.function}")
            source = source.replace(edit.before, edit.after)
            edit.is_made = True
        made: dict[str, Any] = {}
        exec(compile("from __future__ import annotations\n" + source, fn.__code__.co_filename, "exec"), made)
        return made[fn.__name__].__code__


class _Kernel:
    """A kernel that is interpreted; launched as Triton's are."""

    def __init__(self, kernel: Any, seed: int, edits: Sequence[Edit]) -> None:
        self.arg_names = kernel.arg_names
        self._constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        self._made = _Made(edits)
        self._body = self._made.function(kernel.fn)
        self._rng = random.Random(seed)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        (programs,) = grid

        def launched(**named: Any) -> None:
            memories = Memories()
            given = {
                name: named[name] if name in self._constants else _argument(named[name], memories)
                for name in self.arg_names
            }
            for program in self._rng.sample(range(programs), programs):
                scheduler = Scheduler(self._rng.randrange(2**32), program, programs)
                with machine.running(scheduler):
                    scheduler.run(lambda: self._body(**given))

        return launched


def _argument(x: Any, memories: Memories) -> Any:
    if isinstance(x, torch.Tensor):
        return Pointer(memories.of(x), Value(x.storage_offset(), int64))
    if hasattr(x, "block_shape"):
        return Descriptor(x, memories.of(x.base))
    if isinstance(x, int | float):
        return Value(x, float32 if isinstance(x, float) else int32)
    return x


def interpreted(kernel: Any, seed: int = 0, edits: Sequence[Edit] = ()) -> Any:
    """A kernel that is launched as ``kernel[grid](...)``, by arguments with names, on tensors of the CPU.

    Args:
        kernel: What ``gluon.jit`` made.
        seed: Of the order of threads and of copies.
        edits: How a test breaks it.
    """
    return _Kernel(kernel, seed, edits)
