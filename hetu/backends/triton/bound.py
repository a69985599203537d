"""Launches of which all is known but the tensors' addresses and a few numbers: what the layers of a model repeat.

A launch by key (:mod:`hetu.backends.triton.launcher`) still asks each tensor for its strides, and Triton makes anew the
descriptors through which Hopper's kernels read. Layers that follow one plan differ in addresses alone. So what was
launched once is kept with the plan, and is launched again at the cost of reading the addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from hetu.backends.torch_private import current_device, current_stream
from hetu.backends.triton.launcher import ALIGNED, INT32, has_hooks

_MAPS = 1024
"""How many descriptors a parameter keeps: layers of a model come back to the same memory, step after step."""

_LAYOUT = "iiiKKppOOOOOO"
"""What comes before a kernel's own arguments, as Triton 3.6 hands them to its C code."""

Expand = Callable[[int], Sequence[Any]]
"""Gives what Triton's C code takes in place of a descriptor of a tensor at an address."""


class BoundLaunch:
    """Launches of one compiled kernel over tensors of the same shapes, strides and types, on one device.

    Args:
        compiled: The kernel.
        device: Of the tensors.
        constants: The kernel's compile-time arguments, in order.
        boxes: Of the tensors that the kernel reads through descriptors, which are its first: a descriptor of each.
            None can be bound if this Triton makes descriptors in a way that is not known.
    """

    __slots__ = ("_arguments", "_constants", "_expand", "_index", "_run")

    def __init__(
        self,
        compiled: Any,
        device: torch.device,
        constants: Sequence[Any],
        boxes: Sequence[Any] = (),
    ) -> None:
        self._index, self._constants = device.index, tuple(constants)
        self._arguments = (compiled.function, compiled.packed_metadata, None, None, None)
        self._expand: tuple[Expand, ...] = ()
        self._run: Callable[..., Any] = compiled.run
        if (found := _below_descriptors(compiled)) is not None:
            launch, before = found
            self._arguments = (compiled.function, *before, compiled.packed_metadata, None, None, None)
            self._run = launch
            self._expand = tuple(map(_expanding, boxes, compiled.metadata.tensordesc_meta)) if boxes else ()

    @staticmethod
    def of(
        compiled: Any, device: torch.device, constants: Sequence[Any], boxes: Sequence[Any] = ()
    ) -> BoundLaunch | None:
        """One, or None if launches of such a kernel can't be bound."""
        if boxes and _below_descriptors(compiled) is None:
            return None
        return BoundLaunch(compiled, device, constants, boxes)

    def __call__(self, programs: int, tensors: Sequence[torch.Tensor | None], numbers: Sequence[int | float]) -> bool:
        """Launches on the current stream.

        Args:
            programs: Size of the grid.
            tensors: In the kernel's order, those that it reads through descriptors first.
            numbers: The kernel's other arguments, in order.

        Returns:
            Whether it did. It doesn't where the kernel would need another variant, for an address that is no multiple
            of 16 bytes or a number past int32; on a device that is not the current one; and where a profiler's hooks
            want to be told.
        """
        index = self._index
        if (index is not None and current_device() != index) or has_hooks():
            return False
        addresses: list[Any] = []
        pointers = 0
        for x in tensors:
            if x is None:
                addresses.append(None)
            else:
                address = x.data_ptr()
                pointers |= address
                addresses.append(address)
        if pointers % ALIGNED or max(numbers) >= INT32:
            return False
        if expand := self._expand:
            described: list[Any] = []
            for make, address in zip(expand, addresses, strict=False):
                described += make(address)
            addresses = described + addresses[len(expand) :]
        self._run(programs, 1, 1, current_stream(index), *self._arguments, *addresses, *numbers, *self._constants)
        return True


@lru_cache(maxsize=256)
def _below_descriptors(compiled: Any) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """Triton's launch in C, which takes filled descriptors, and what it is told before the kernel's own metadata.

    None for a Triton that does it in another way than 3.6, and for kernels that want memory for each launch.
    """
    try:
        from triton.backends.nvidia import driver
    except ImportError:
        return None
    run = compiled.run
    if getattr(driver, "_BASE_ARGS_FORMAT", None) != _LAYOUT or not isinstance(run, driver.CudaLauncher):
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    launch, code = run.launch, getattr(run.launch, "__code__", None)
    if code is not None:  # what fills descriptors is around it
        if "launcher" not in code.co_freevars:
            return None
        launch = launch.__closure__[code.co_freevars.index("launcher")].cell_contents
    return launch, (run.launch_cooperative_grid, run.launch_pdl, None, None)


def _expanding(box: Any, meta: dict[str, Any]) -> Expand:
    """What Triton 3.6's ``make_tensordesc_arg`` does of a descriptor's memory alone, and of each address once."""
    from triton.backends.nvidia import driver
    from triton.runtime import driver as active

    fill = active.active.utils.fill_tma_descriptor
    kind = driver.TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
    shape, strides = tuple(box.shape), tuple(box.strides)
    given = meta["swizzle"], meta["elem_size"], kind, meta["block_size"], shape, strides, 0
    made: dict[int, tuple[Any, ...]] = {}

    def expand(address: int) -> tuple[Any, ...]:
        found = made.get(address)
        if found is None:
            if len(made) == _MAPS:
                made.clear()
            found = made[address] = (fill(address, *given), *shape, *strides)
        return found

    return expand
