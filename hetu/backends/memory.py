"""Memory on a device: what kernels write is allocated here, and host arrays are copied without anybody waiting.

Copies of what plans say (work lists, rows' numbers, positions) are kept within a bound, by :data:`device_copies`.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from functools import cache, lru_cache
from typing import Any, Protocol, TypeVar
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray

from hetu.backends.torch_private import current_device, current_stream, dispatch_modes, empty_strided_cuda
from hetu.errors import HetuError

SMALL = 16 * 1024
"""Bytes that the driver takes into memory of its own, about 4 MB, before it copies them: so little it takes at once,
unless some 250 such copies are under way. Measured on an H100; 24 KB, 200 times, already waited for the stream."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor with anything in it: ``torch.empty``, in a third of its time on a GPU's host.

    There the dispatcher takes 6 µs for it, and what torch.compile's generated code calls 2. That is used on the current
    device, and where no mode watches what is made.

    Example:
        >>> empty((2, 3, 4), torch.float16, torch.device("cpu")).shape
        torch.Size([2, 3, 4])
    """
    if (
        empty_strided_cuda is None
        or not is_cuda(device)
        or device.index != current_device()
        or not shape
        or 0 in shape
        or dispatch_modes() > 0
    ):
        return torch.empty(shape, dtype=dtype, device=device)
    sizes = tuple(shape)  # it refuses a torch.Size
    return empty_strided_cuda(sizes, _strides(sizes[1:]), dtype)


@cache
def is_cuda(device: torch.device) -> bool:
    """Whether a device is a CUDA one, in a fifth of the time: torch makes a string when it is asked for the type."""
    return device.type == "cuda"


@lru_cache(maxsize=256)  # lengths change from run to run, what lies behind them doesn't
def _strides(inner: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of contiguous tensors of ``(any, *inner)``.

    Example:
        >>> _strides((3, 4))
        (12, 4, 1)
    """
    strides = [1]
    for size in reversed(inner):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


_ZEROS = 256
_zeros: dict[tuple[torch.device, int], list[torch.Tensor]] = {}


def zero(device: torch.device) -> torch.Tensor:
    """An int32 0 that nobody else has or will have, for a kernel on the current stream to count with.

    On a GPU many are cleared by one launch, for each stream those that it cleared itself. In a CUDA graph, which is
    replayed, each is cleared by its own.

    Example:
        >>> zero(torch.device("cpu"))
        tensor([0], dtype=torch.int32)
    """
    if not is_cuda(device) or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    spare = _zeros.setdefault((device, current_stream(device.index)), [])
    try:
        return spare.pop()
    except IndexError:  # each begins at a multiple of 16 bytes, as launches expect
        made = torch.zeros((_ZEROS, 4), dtype=torch.int32, device=device)[:, :1].unbind()
        spare.extend(made[1:])
        return made[0]


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """A host array as a tensor: its own memory where torch takes that, else a copy.

    torch takes no read-only, unaligned, reversed or foreign-endian memory.

    Example:
        >>> as_tensor(np.arange(3)[::-1])
        tensor([2, 1, 0])
    """
    flags = array.flags
    if flags.writeable and flags.aligned and array.dtype.isnative and min(array.strides, default=0) >= 0:
        return torch.from_numpy(array)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def copied_to(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of a host array on a device; on the CPU the array's own memory.

    Example:
        >>> copied_to(np.arange(3), torch.device("cpu"))
        tensor([0, 1, 2])
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else sent_to(tensor, device)


def sent_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a GPU of a tensor on the CPU, which may be changed right after: nobody waits.

    More than a little goes through memory that the device may read by itself, because a copy from ordinary memory would
    wait for the stream. torch keeps such memory, and gives it out again only when the copy is done; that takes it three
    times as long as a little copy. From a user's memory of that kind the device would read later.
    """
    tensor = tensor.detach()
    if tensor.nbytes > SMALL or tensor.is_pinned():
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(tensor)
    return empty(tensor.shape, tensor.dtype, device).copy_(tensor, non_blocking=True)


class HasCopies(Protocol):
    """A part of a plan, of which there are copies on devices; weak references to it are possible."""

    @property
    def copies(self) -> dict[Hashable, Any]:
        """The copies, by what a backend tells them apart: the device, at least."""


Copy = TypeVar("Copy")


class _Owner(ref[Any]):
    """A weak reference to what has copies, and how many bytes these take."""

    __slots__ = ("nbytes", "number")
    number: int
    nbytes: int


class DeviceCopies:
    """Bounds the bytes of all copies of plans on devices.

    A copy lies in the ``copies`` of what it was made of, where it is found by one lookup, and dies with it. When the
    bytes of all copies exceed the limit, those of the part that has had copies for longest go: they are made again when
    they are needed. What is in use stays alive, because who uses it holds it.

    Attributes:
        limit: Bytes that all copies may take, on all devices of the process together; a single copy may be larger.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._bytes = 0
        self._owners: dict[int, _Owner] = {}  # the oldest first
        self._dead: deque[_Owner] = deque()
        self._note_death = self._dead.append  # all that the death of an owner does: it may come in any thread
        self._lock = threading.Lock()

    def keep(self, owner: HasCopies, key: Hashable, copy: Copy, nbytes: int) -> Copy:
        """Puts a copy into ``owner.copies[key]``; new lengths wait for it, so it does little.

        Args:
            owner: What it is a copy of.
            key: What tells it apart from other copies of the owner.
            copy: The copy, or what holds it.
            nbytes: Bytes that it takes.
        """
        number, copies = id(owner), owner.copies
        with self._lock:
            if self._dead:
                self._forget_dead()
            known = self._owners.get(number)
            if known is not None and key in copies:  # made twice, by two threads or of other data: begin anew
                self._evict(known)
                known = None
            if known is None:
                known = self._owners[number] = _Owner(owner, self._note_death)
                known.number, known.nbytes = number, nbytes
            else:
                known.nbytes += nbytes
            self._bytes += nbytes
            if self._bytes > self.limit:
                self._make_room(known, nbytes)
            copies[key] = copy
        return copy

    def nbytes(self) -> int:
        """Bytes that the copies take now."""
        with self._lock:
            self._forget_dead()
            return self._bytes

    def _make_room(self, newest: _Owner, nbytes: int) -> None:
        """Evicts what is oldest, and of the newest owner at most what it had before the last ``nbytes``."""
        for known in list(self._owners.values()):
            if self._bytes <= self.limit:
                return
            if known is not newest:
                self._evict(known)
        if self._bytes > self.limit:
            self._clear(newest)
            self._bytes = newest.nbytes = nbytes

    def _evict(self, known: _Owner) -> None:
        self._clear(known)
        self._forget(known)

    def _clear(self, known: _Owner) -> None:
        owner: HasCopies | None = known()
        if owner is not None:
            owner.copies.clear()

    def _forget_dead(self) -> None:
        while self._dead:
            known = self._dead.popleft()
            if self._owners.get(known.number) is known:
                self._forget(known)

    def _forget(self, known: _Owner) -> None:
        del self._owners[known.number]
        self._bytes -= known.nbytes


def _limit() -> int:
    """Bytes that all copies of plans may take, by ``HETU_DEVICE_COPIES_MB``."""
    text = os.environ.get("HETU_DEVICE_COPIES_MB") or "256"
    if not text.isdecimal():
        raise HetuError(
            f"HETU_DEVICE_COPIES_MB is {text!r}, expected a whole number of MiB", fix="unset it for 256 MiB"
        )
    return int(text) * 2**20


device_copies = DeviceCopies(_limit())
"""The copies of this process. ``HETU_DEVICE_COPIES_MB`` sets their limit, in MiB; it is read once, on import."""
