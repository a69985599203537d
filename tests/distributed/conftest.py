"""Worlds that live as long as the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
from support.pool import Pool


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[..., Pool]]:
    """``world(size)``: the processes of a world that all tests share; ``world(1)`` is one process without others."""
    pools = []

    @cache
    def of(size: int, backend: str = "gloo") -> Pool:
        pools.append(Pool(size, backend))
        return pools[-1]

    yield of
    for pool in pools:
        pool.close()
