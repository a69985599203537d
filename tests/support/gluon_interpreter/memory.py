"""Global memory: pointers into tensors, and descriptors of tensors for TMA.

An access outside of all tensors of a launch is an error. So is one to what another program of the launch writes: the
order of programs is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from support.gluon_interpreter.values import TORCH, KernelError, Value, value


class Memory:
    """The storage of one or several tensors."""

    def __init__(self, x: torch.Tensor) -> None:
        size = x.untyped_storage().nbytes() // x.element_size()
        self.flat = torch.as_strided(x.detach(), (size,), (1,), 0)
        self.dtype = TORCH[x.dtype]
        self.is_known = np.zeros(size, np.bool_)
        self.owner = np.full(size, -1, np.int32)

    def add(self, x: torch.Tensor) -> None:
        """Lets kernels access a tensor that lies in it."""
        known = torch.from_numpy(self.is_known)
        torch.as_strided(known, x.shape, x.stride(), x.storage_offset())[...] = True

    def _check(self, at: Any, program: int) -> None:
        if np.size(at) == 0:
            return
        if np.min(at) < 0 or np.max(at) >= len(self.is_known) or not np.all(self.is_known[at]):
            raise KernelError("an access outside of the tensors of the launch")
        owner = self.owner[at]
        if np.any((owner != -1) & (owner != program)):
            raise KernelError("two programs access an element, and one writes it")

    def load(self, at: Any, program: int) -> Any:
        """Elements at offsets, as float32 or int64."""
        self._check(at, program)
        found = self.flat[torch.from_numpy(np.asarray(at))]
        return (found.float() if found.dtype.is_floating_point else found.long()).numpy()

    def store(self, at: Any, data: Any, program: int) -> None:
        """Overwrites elements at offsets."""
        self._check(at, program)
        self.owner[at] = program
        self.flat[torch.from_numpy(np.asarray(at))] = torch.from_numpy(np.asarray(data)).to(self.flat.dtype)

    def add_to(self, at: Any, data: Any) -> Any:
        """Adds atomically, whoever does so too, and gives what was there."""
        if np.size(at) and not np.all(self.is_known[at]):
            raise KernelError("an access outside of the tensors of the launch")
        places = torch.from_numpy(at)
        before = self.flat[places].numpy()
        self.flat.index_put_((places,), torch.from_numpy(data).to(self.flat.dtype), accumulate=True)
        return before


class Memories:
    """Those of a launch: tensors that share a storage have one."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.dtype], Memory] = {}

    def of(self, x: torch.Tensor) -> Memory:
        """The memory in which a tensor lies."""
        key = x.untyped_storage().data_ptr(), x.dtype
        memory = self._made.get(key)
        if memory is None:
            memory = self._made[key] = Memory(x)
        memory.add(x)
        return memory


class Pointer:
    """One pointer, or a tensor of them."""

    def __init__(self, memory: Memory, at: Value) -> None:
        self.memory, self.at = memory, at

    @property
    def shape(self) -> tuple[int, ...]:
        return self.at.shape

    def __add__(self, offset: Any) -> Pointer:
        own = value(offset)
        if own.dtype.is_floating():
            raise KernelError("an offset that is no integer")
        return Pointer(self.memory, self.at + own)

    __radd__ = __add__


class Descriptor:
    """What the host's ``TensorDescriptor`` is in a kernel."""

    def __init__(self, host: Any, memory: Memory) -> None:
        self.memory, self.first = memory, host.base.storage_offset()
        self.sizes, self.strides, self.block_shape = tuple(host.shape), tuple(host.strides), tuple(host.block_shape)
        self.layout, self.dtype = host.layout, memory.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a box."""
        return int(np.prod(self.block_shape)) * self.dtype.primitive_bitwidth // 8

    def places(self, begin: Sequence[int]) -> tuple[Any, Any]:
        """Offsets of a box's elements, and which of them are in the tensor."""
        at: Any = np.int64(self.first)
        inside: Any = np.True_
        for dim, (first, size, stride, whole) in enumerate(
            zip(begin, self.block_shape, self.strides, self.sizes, strict=True)
        ):
            index = (first + np.arange(size)).reshape([-1 if i == dim else 1 for i in range(len(self.block_shape))])
            at = at + index * stride
            inside = inside & (index >= 0) & (index < whole)
        return np.broadcast_to(at, self.block_shape), np.broadcast_to(inside, self.block_shape)

    def load(self, begin: Sequence[int], program: int) -> Any:
        """A box; what is outside of the tensor is 0."""
        at, inside = self.places(begin)
        box = np.zeros(self.block_shape, np.float32)
        box[inside] = self.memory.load(at[inside], program)
        return box

    def store(self, begin: Sequence[int], box: Any, program: int) -> None:
        """Overwrites what of a box is in the tensor."""
        at, inside = self.places(begin)
        self.memory.store(at[inside], box[inside], program)
