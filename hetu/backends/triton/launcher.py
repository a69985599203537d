"""Launches of a Triton kernel at the cost of a lookup."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton

from hetu.backends.torch_private import current_stream
from hetu.backends.triton import interpreter

Constants = tuple[dict[str, Any], dict[str, Any]]
"""A kernel's compile-time arguments and the compiler's options."""

Arguments = tuple[tuple[torch.Tensor | None, ...], tuple[int | float, ...]]
"""The other arguments of a launch, tensors and numbers, each in the order of the kernel's parameters."""

ALIGNED = 16
"""Bytes: what the addresses of tensors usually are multiples of, and kernels are compiled for."""

INT32 = 2**31


class Launcher:
    """Launches one kernel.

    Triton finds the compiled variant of a call by looking at every argument, 20 to 50 µs of Python for kernels with
    dozens of them. Here the caller says what the variant depends on, and calls with the same key reuse what Triton
    compiled for the first of them. Its own way is taken for a key's first call, in the interpreter, and where an
    argument is specialised otherwise than usual: a pointer that is no multiple of 16 bytes, an integer past int32.

    The kernel's parameters are tensors, then numbers that are not specialised (``do_not_specialize``), then constants,
    which are written in capitals.

    Attributes:
        kernel: The kernel.
        check: Is called with all that is compiled, and refuses by raising an error.
        arguments: Puts tensors and numbers, which it takes by their names alone, into the kernel's order.
    """

    def __init__(self, kernel: Any, first_number: str, check: Callable[[Any], None] | None = None) -> None:
        """``first_number`` is the first parameter that is no tensor."""
        self.kernel = kernel
        self.check = check
        self._names = tuple(name for name in kernel.arg_names if not name.isupper())
        self.arguments = _in_order(self._names, first_number)
        self._constants = tuple(kernel.arg_names[len(self._names) :])
        self._checked: set[Any] = set()
        self._compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}

    def kept(self, key: Hashable) -> tuple[Any, tuple[Any, ...]] | None:
        """What was compiled for a key, and its constants in order; None before its first usual call."""
        return self._compiled.get(key)

    def __call__(
        self,
        device: torch.device,
        key: Hashable,
        programs: int,
        arguments: Arguments,
        constants: Callable[..., Constants],
        *of: Any,
    ) -> None:
        """Launches ``programs`` programs on a device, on its current stream.

        Args:
            device: Of the tensors.
            key: Whatever decides the constants, the tensors' element types, and which of them are None; the device too.
            programs: Size of the grid.
            arguments: What ``self.arguments(...)`` gives.
            constants: Gives the other arguments, where a call is a key's first.
            *of: What ``constants`` is called with.
        """
        if device.type == "cuda" and torch.cuda.current_device() != device.index:  # where Triton launches
            with torch.cuda.device(device):
                self(device, key, programs, arguments, constants, *of)
            return
        tensors, numbers = arguments
        pointers = 0
        for x in tensors:
            if x is not None:
                pointers |= x.data_ptr()
        is_usual = pointers % ALIGNED == 0 and max(numbers) < INT32
        kept = self._compiled.get(key) if is_usual else None
        if kept is not None:
            compiled, rest = kept
            launch(compiled, device, programs, (*tensors, *numbers, *rest))
            return
        values, options = constants(*of)
        named = dict(zip(self._names, (*tensors, *numbers), strict=True))
        with interpreter.running():
            compiled = self.kernel[(programs,)](**named, **values, **options)
        if compiled is None:  # by the interpreter
            return
        if self.check is not None and compiled not in self._checked:
            self.check(compiled)
            self._checked.add(compiled)
        if is_usual:
            self._compiled[key] = compiled, tuple(values[name] for name in self._constants)


def _in_order(names: Sequence[str], first_number: str) -> Callable[..., Arguments]:
    """A function that takes arguments by these names alone, and gives those before ``first_number`` and the others.

    It is written here rather than by hand, so that it has a kernel's own names in the kernel's own order: two numbers
    that change places would be a wrong result, or a write to any address, and nobody would be told. Python itself
    refuses a name that is missing or that the kernel doesn't have, and takes less time for it than a check would.

    Example:
        >>> _in_order(["x", "y", "n"], "n")(y=2, n=3, x=1)
        ((1, 2), (3,))
    """
    at = names.index(first_number)
    tensors, numbers = (f"({''.join(f'{name}, ' for name in part)})" for part in (names[:at], names[at:]))
    found: Callable[..., Arguments] = eval(f"lambda *, {', '.join(names)}: ({tensors}, {numbers})")
    return found


def launch(compiled: Any, device: torch.device, programs: int, arguments: Sequence[Any]) -> None:
    """Launches a compiled kernel on the current device, which the argument names, and its current stream.

    ``compiled[grid](...)`` collects for each launch what a profiler's hooks may ask for, and calls them from C though
    there are none: a third of its time. That way is taken only where there are some (``proton``).
    """
    if has_hooks():
        compiled[(programs, 1, 1)](*arguments)
        return
    stream = current_stream(device.index)
    compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def has_hooks() -> bool:
    """Whether anything is to be called before or after launches: a chain of hooks, or None or a single one."""
    runtime: Any = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))
