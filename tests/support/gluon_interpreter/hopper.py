"""What Hopper does beside a thread: copies by TMA, products of warp groups, barriers; as Gluon names them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from support.gluon_interpreter import machine
from support.gluon_interpreter.memory import Descriptor
from support.gluon_interpreter.scheduler import Knowledge, Task
from support.gluon_interpreter.shared import BARRIER_LAYOUT, Barrier, Buffer
from support.gluon_interpreter.values import KernelError, Type, Value, bfloat16, float16, float32, value


def _is_wanted(pred: Any) -> bool:
    return bool(value(pred))


def _box(desc: Descriptor, coord: Sequence[Any], buffer: Buffer) -> list[int]:
    if buffer.shape != desc.block_shape or buffer.dtype != desc.dtype:
        raise KernelError(f"a box of {desc.dtype} {desc.block_shape} and a buffer of {buffer.dtype} {buffer.shape}")
    return [value(x).__index__() for x in coord]


class _Load:
    """A copy into shared memory under way."""

    def __init__(self, desc: Descriptor, begin: list[int], barrier: Barrier, buffer: Buffer) -> None:
        self._desc, self._begin, self._barrier, self._buffer = desc, begin, barrier, buffer
        self._machine = machine.now()
        self._knows = self._machine.current.knows.copy()
        event = self._machine.event()
        barrier.check(self._knows)
        buffer.begin_write(self._knows, event)
        self._knows.hear(event)

    def land(self) -> None:
        """The box is there, and its barrier is told."""
        self._buffer.end_write(self._desc.load(self._begin, self._machine.program))
        self._barrier.landed(self._desc.nbytes, self._knows)


class _Store:
    """A copy out of shared memory under way."""

    def __init__(self, desc: Descriptor, begin: list[int], buffer: Buffer, knows: Knowledge) -> None:
        self._desc, self._begin, self._machine = desc, begin, machine.now()
        self.event = self._machine.event()
        self._data = buffer.read(knows, self.event, "a copy")

    def end(self) -> None:
        """It is in global memory."""
        self._desc.store(self._begin, self._data, self._machine.program)


def _load(desc: Descriptor, coord: Sequence[Any], barrier: Barrier, result: Buffer, pred: Any = True) -> None:
    if _is_wanted(pred):
        own = machine.now()
        own.copies.append(_Load(desc, _box(desc, coord, result), barrier, result))
        own.may_switch()


def _store(desc: Descriptor, coord: Sequence[Any], src: Buffer) -> None:
    own = machine.now()
    own.current.stores.append(_Store(desc, _box(desc, coord, src), src, own.current.knows))
    own.may_switch()


def _store_wait(pendings: int) -> None:
    own = machine.now()
    own.may_switch()
    task = own.current
    for store in _oldest(task.stores, pendings):
        store.end()
        task.knows.hear(store.event)


def _oldest(queue: list[Any], pending: int) -> list[Any]:
    """Takes what comes before the last ``pending`` ones."""
    count = max(len(queue) - pending, 0)
    taken, queue[:] = queue[:count], queue[count:]
    return taken


tma = SimpleNamespace(load=_load, store=_store, store_wait=_store_wait)


def _init(barrier: Barrier, count: int) -> None:
    barrier.init(count)


def _expect(barrier: Barrier, bytes: Any, pred: Any = True) -> None:
    if _is_wanted(pred):
        machine.now().may_switch()
        barrier.arrive(1, value(bytes).__index__(), machine.now().current.knows)


def _arrive(barrier: Barrier, count: int = 1, pred: Any = True) -> None:
    if _is_wanted(pred):
        machine.now().may_switch()
        barrier.arrive(count, 0, machine.now().current.knows)


def _wait(barrier: Barrier, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if _is_wanted(pred):
        barrier.wait(value(phase).__index__())


mbarrier = SimpleNamespace(
    init=_init, expect=_expect, arrive=_arrive, wait=_wait, MBarrierLayout=lambda: BARRIER_LAYOUT
)


def fence_async_shared(cluster: bool = False) -> None:
    """Stores before it are seen by copies and products after it."""
    knows = machine.now().current.knows
    knows.fenced |= knows.plain


class Product:
    """The result of a product under way: the accumulator of the next one, and an operand of nothing else."""

    type = Type()

    def __init__(self, data: Any, event: int) -> None:
        self.data, self.event, self.is_over = data, event, False

    def __getattr__(self, name: str) -> Any:
        raise KernelError(f"{name} of a product under way, which needs warpgroup_mma_wait first")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape


def warpgroup_mma(a: Any, b: Buffer, acc: Any, *, use_acc: Any = True, is_async: bool = False) -> Any:
    """``a @ b + acc`` in float32."""
    own = machine.now()
    own.may_switch()
    task, event = own.current, own.event()
    if a.dtype != b.dtype or a.dtype not in (float16, bfloat16):
        raise KernelError(f"a product of {a.dtype} and {b.dtype}")
    left = a.read(task.knows, event, "a product") if isinstance(a, Buffer) else value(a).data
    right = b.read(task.knows, event, "a product")
    is_used = _is_wanted(use_acc)
    if a.shape[0] % 64 or a.shape[1] % 16 or b.shape[1] % 8 or acc.shape != (a.shape[0], b.shape[1]):
        raise KernelError(f"no warp group multiplies {a.shape} by {b.shape} into {acc.shape}")
    data = np.matmul(left, right, dtype=np.float32)
    if is_used:
        data = data + (acc.data if isinstance(acc, Product) else value(acc).data)
    product = Product(data, event)
    task.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_wait(num_outstanding: int, deps: Sequence[Any]) -> Any:
    """Waits until no more than so many products are under way; of those that are over the results are tensors."""
    own = machine.now()
    own.may_switch()
    for product in _oldest(own.current.products, num_outstanding):
        _end(own.current, product)
    found = [Value(x.data, float32) if isinstance(x, Product) and x.is_over else x for x in deps]
    return found[0] if len(found) == 1 else tuple(found)


def _end(task: Task, product: Product) -> None:
    task.knows.hear(product.event)
    product.is_over = True
