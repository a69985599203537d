"""Launches of a Triton kernel at the cost of a lookup."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton

Constants = tuple[dict[str, Any], dict[str, Any]]
"""A kernel's compile-time arguments and the compiler's options."""

_ALIGNED = 16
_INT32 = 2**31


class Launcher:
    """Launches one kernel.

    Triton finds the compiled variant of a call by looking at every argument, 20 to 50 µs of Python for kernels with
    dozens of them. Here the caller says what the variant depends on, and calls with the same key reuse what Triton
    compiled for the first of them. Its own way is taken for a key's first call, in the interpreter, and where an
    argument is specialised otherwise than usual: a pointer that is no multiple of 16 bytes, an integer past int32.

    The kernel's parameters are tensors, then numbers that are not specialised (``do_not_specialize``), then constants.
    """

    def __init__(self, kernel: Any, check: Callable[[Any], None] | None = None) -> None:
        """``check`` is called with all that is compiled, and refuses by raising an error."""
        self.kernel = kernel
        self.check = check
        self._checked: set[Any] = set()
        self._compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(
        self,
        device: torch.device,
        key: Hashable,
        programs: int,
        tensors: Sequence[torch.Tensor | None],
        numbers: Sequence[int | float],
        constants: Callable[[], Constants],
    ) -> None:
        """Launches ``programs`` programs on a device, on its current stream.

        Args:
            device: Of the tensors.
            key: Whatever decides the constants, the tensors' element types, and which of them are None; the device too.
            programs: Size of the grid.
            tensors: The first arguments.
            numbers: Those after them.
            constants: Gives the rest, where a call is a key's first.
        """
        if device.type == "cuda" and torch.cuda.current_device() != device.index:  # where Triton launches
            with torch.cuda.device(device):
                self(device, key, programs, tensors, numbers, constants)
            return
        pointers = 0
        for x in tensors:
            if x is not None:
                pointers |= x.data_ptr()
        is_usual = pointers % _ALIGNED == 0 and max(numbers) < _INT32
        kept = self._compiled.get(key) if is_usual else None
        if kept is not None:
            compiled, rest = kept
            launch(compiled, device, programs, (*tensors, *numbers, *rest))
            return
        values, options = constants()
        compiled = self.kernel[(programs,)](*tensors, *numbers, **values, **options)
        if compiled is None:  # by the interpreter
            return
        if self.check is not None and compiled not in self._checked:
            self.check(compiled)
            self._checked.add(compiled)
        if is_usual:
            names = self.kernel.arg_names[len(tensors) + len(numbers) :]
            self._compiled[key] = compiled, tuple(values[name] for name in names)


def launch(compiled: Any, device: torch.device, programs: int, arguments: Sequence[Any]) -> None:
    """Launches a compiled kernel on the current device, which the argument names, and its current stream.

    ``compiled[grid](...)`` collects for each launch what a profiler's hooks may ask for, and calls them from C though
    there are none: a third of its time. That way is taken only where there are some (``proton``).
    """
    if _has_hooks():
        compiled[(programs, 1, 1)](*arguments)
        return
    stream = _current_stream(device.index)
    compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _has_hooks() -> bool:
    """Whether anything is to be called before or after launches: a chain of hooks, or None or a single one."""
    runtime: Any = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))
