"""Shared memory: buffers of which every row knows who wrote and read it, and barriers.

Rows are those of the last dim. A row holds NaN until something is written to it, and again from the start of a copy by
TMA until that lands. A store that leaves a row as it is does no harm to others, who may rely on either.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from support.gluon_interpreter.scheduler import Knowledge, Scheduler
from support.gluon_interpreter.values import KernelError, Value, rounded, value

UNKNOWN = -(2**31)
"""What integers hold that nobody has written."""

BARRIER_LAYOUT = object()
"""Of what is allocated for barriers."""


class Rows:
    """Who accessed the rows of an allocation.

    Attributes:
        writers: For each row the events that wrote what it holds: to know one of them is enough.
        loads: Events that loaded it since, into registers.
        readers: Copies and products that read it since.
    """

    def __init__(self, rows: int) -> None:
        self.writers, self.loads, self.readers = ([0] * rows for _ in range(3))


class Buffer:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, machine: Scheduler, data: Any, numbers: Any, rows: Rows, dtype: Any, layout: Any) -> None:
        self._machine, self._data, self._numbers, self._rows = machine, data, numbers, rows
        self.dtype, self.layout = dtype, layout

    @staticmethod
    def allocated(machine: Scheduler, dtype: Any, shape: Sequence[int], layout: Any) -> Buffer:
        """One that nobody has written to."""
        whole = tuple(shape)
        rows = int(np.prod(whole[:-1]))
        numbers = np.broadcast_to(np.arange(rows).reshape((*whole[:-1], 1)), whole)
        data = np.full(whole, *((np.nan, np.float32) if dtype.is_floating() else (UNKNOWN, np.int64)))
        return Buffer(machine, data, numbers, Rows(rows), dtype, layout)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._data.shape

    @property
    def numbers(self) -> list[int]:
        """The rows that it has a part of."""
        once = tuple(0 if stride == 0 else slice(None) for stride in self._numbers.strides)
        return np.unique(self._numbers[once]).tolist()

    def _view(self, data: Any, numbers: Any) -> Buffer:
        if not np.shares_memory(data, self._data):
            raise KernelError("a view of shared memory that would be a copy")
        return Buffer(self._machine, data, numbers, self._rows, self.dtype, self.layout)

    def index(self, at: Any) -> Buffer:
        """One of several buffers."""
        place = value(at).__index__()
        if not 0 <= place < len(self._data):
            raise KernelError(f"buffer {place} of {len(self._data)}")
        return self._view(self._data[place], self._numbers[place])

    def slice(self, start: int, length: int, dim: int = 0) -> Buffer:
        """A part of a dim."""
        if start < 0 or start + length > self.shape[dim]:
            raise KernelError(f"{start} .. {start + length} of {self.shape[dim]}")
        part = (*(slice(None),) * dim, slice(start, start + length))
        return self._view(self._data[part], self._numbers[part])

    def reshape(self, shape: Sequence[int]) -> Buffer:
        """Another view of the same elements."""
        return self._view(self._data.reshape(tuple(shape)), self._numbers.reshape(tuple(shape)))

    def permute(self, order: Sequence[int]) -> Buffer:
        """With its dims in another order."""
        return self._view(self._data.transpose(tuple(order)), self._numbers.transpose(tuple(order)))

    def load(self, layout: Any = None) -> Value:
        """Its elements in registers; NaN where another thread may be writing."""
        knows, event = self._machine.current.knows, self._machine.event()
        knows.plain |= event
        data = self._data.copy()
        numbers = self.numbers
        unknown = [row for row in numbers if not self._rows.writers[row] & knows.plain]
        if unknown:
            data[np.isin(self._numbers, unknown)] = np.nan if self.dtype.is_floating() else UNKNOWN
        for row in numbers:
            self._rows.loads[row] |= event
        return Value(data, self.dtype)

    def store(self, x: Value) -> None:
        """Overwrites it from registers."""
        if x.shape != self.shape or x.dtype != self.dtype:
            raise KernelError(f"{x.dtype} {x.shape} is stored into {self.dtype} {self.shape}")
        self._machine.may_switch()
        knows, event = self._machine.current.knows, self._machine.event()
        same = (self._data == x.data) | (np.isnan(self._data) & np.isnan(x.data))
        changed = set(np.unique(self._numbers[~same]).tolist())
        for row in self.numbers:
            rows = self._rows
            if row in changed:
                if rows.readers[row] & ~knows.plain:
                    raise KernelError("a store overwrites what a product or a copy may still read")
                rows.writers[row], rows.loads[row], rows.readers[row] = event, 0, 0
            else:
                rows.writers[row] |= event
        knows.plain |= event
        self._data[...] = x.data

    def read(self, knows: Knowledge, event: int, who: str) -> Any:
        """What a copy or a product reads, that of ``event``, which begins with this knowledge."""
        for row in self.numbers:
            if not self._rows.writers[row] & knows.fenced:
                is_there = self._rows.writers[row] & knows.plain
                missing = "fence_async_shared after a store" if is_there else "a wait for what is being written"
                raise KernelError(f"{who} reads shared memory without {missing}")
            self._rows.readers[row] |= event
        return self._data

    def begin_write(self, knows: Knowledge, event: int) -> None:
        """A copy begins to overwrite it."""
        rows = self._rows
        for row in self.numbers:
            if (rows.loads[row] | rows.readers[row]) & ~knows.plain:
                raise KernelError("a copy overwrites what others may still read")
            if rows.writers[row] and not rows.writers[row] & knows.fenced:
                raise KernelError("a copy overwrites what others may still write, or wrote without fence_async_shared")
            rows.writers[row], rows.loads[row], rows.readers[row] = event, 0, 0
        self._data[...] = np.nan

    def end_write(self, data: Any) -> None:
        """The copy has landed."""
        self._data[...] = rounded(data, self.dtype)


class Barrier:
    """An mbarrier: a phase is over after so many arrivals, and after the bytes that were announced."""

    def __init__(self, machine: Scheduler, name: str) -> None:
        self._machine, self.name = machine, name
        self.count, self.phase, self.pending, self.bytes = 0, 0, 0, 0
        self.began = 0
        self._heard, self._over = Knowledge(), Knowledge()

    def init(self, count: int) -> None:
        """Before its first use, and once."""
        if self.count:
            raise KernelError(f"{self.name} is made twice")
        self.count = self.pending = count
        self.began = self._machine.event()
        self._machine.current.knows.plain |= self.began

    def check(self, knows: Knowledge) -> None:
        """Refuses a copy that may not see the barrier yet."""
        if not self.began & knows.fenced:
            raise KernelError(f"{self.name} is used by a copy without fence_async_shared after its making")

    def arrive(self, count: int, announced: int, knows: Knowledge) -> None:
        """Arrivals, which may announce bytes."""
        if not self.count:
            raise KernelError(f"{self.name} is not made")
        if count > self.pending:
            raise KernelError(f"{self.name} takes {self.count} arrivals in a phase, and gets more")
        self.pending -= count
        self.landed(-announced, knows)

    def landed(self, nbytes: int, knows: Knowledge) -> None:
        """Bytes have come."""
        self.bytes -= nbytes
        self._heard.join(knows)
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            self._over.join(self._heard)
            self._heard = Knowledge()

    def wait(self, phase: int) -> None:
        """Until a phase of this parity is over."""
        if phase not in (0, 1):
            raise KernelError(f"phase {phase} of {self.name} is no parity")
        what = f"parity {phase} of {self.name}, of which {self.phase} phases are over ({self.pending} to arrive)"
        self._machine.wait(what, lambda: self.phase % 2 != phase)
        self._machine.current.knows.join(self._over)


class Barriers:
    """Several barriers."""

    def __init__(self, machine: Scheduler, count: int) -> None:
        self._all = [Barrier(machine, f"barrier {at} of {count}, made at {_place()}") for at in range(count)]

    def index(self, at: Any) -> Barrier:
        """One of them."""
        place = value(at).__index__()
        if not 0 <= place < len(self._all):
            raise KernelError(f"barrier {place} of {len(self._all)}")
        return self._all[place]


def _place() -> str:
    """The line of the kernel that allocates; the frames between are of the interpreter."""
    frame = sys._getframe(1)
    lines = []
    while frame is not None and len(lines) < 2:
        name = frame.f_code.co_filename
        if "gluon_interpreter" not in name:
            lines.append(f"{name.rsplit('/', 1)[-1]}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " from ".join(lines)
