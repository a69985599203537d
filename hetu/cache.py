"""A least-recently-used cache with counters that a user can read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

Value = TypeVar("Value")

_NOTHING: Any = object()


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a cache did so far."""

    hits: int
    misses: int
    evictions: int
    size: int
    capacity: int


class LRU(Generic[Value]):
    """Keeps the ``capacity`` values used last. Safe to use from several threads.

    Example:
        >>> cache = LRU(1)
        >>> cache.get("a", lambda: 1), cache.get("a", lambda: 2)
        (1, 1)
        >>> cache.stats().hits
        1
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._items: OrderedDict[Hashable, Value] = OrderedDict()
        self._hits = self._misses = self._evictions = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made by ``make`` if it is not there. An error in ``make`` leaves nothing behind."""
        with self._lock:
            found: Any = self._items.get(key, _NOTHING)
            if found is not _NOTHING:
                self._hits += 1
                self._items.move_to_end(key)
                return cast(Value, found)
        value = make()  # outside of the lock: two threads may make it twice, none waits for the other
        with self._lock:
            self._misses += 1
            self._items[key] = value
            self._items.move_to_end(key)
            if len(self._items) > self.capacity:
                self._items.popitem(last=False)
                self._evictions += 1
        return value

    def values(self) -> list[Value]:
        """All values, the one used longest ago first. Nothing is counted as used."""
        with self._lock:
            return list(self._items.values())

    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, len(self._items), self.capacity)
