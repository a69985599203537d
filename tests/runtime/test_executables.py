"""What is lowered: once for a structure, and gone when the cache forgets it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu.backends.lower import lowering
from hetu.planning.planner import STRUCTURES


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[torch.nn.Module]]:
    """The modules of all executables that are made while a test runs, without keeping them alive."""
    made: list[weakref.ref[torch.nn.Module]] = []
    plain = lowering.Executable.__init__

    def noted(self: Any, module: torch.nn.Module, *rest: Any) -> None:
        plain(self, module, *rest)
        made.append(weakref.ref(module))

    monkeypatch.setattr(lowering.Executable, "__init__", noted)
    return made


def alive(made: list[weakref.ref[torch.nn.Module]]) -> int:
    gc.collect()
    return sum(one() is not None for one in made)


def test_executables_that_the_cache_forgot_are_freed(lowered: list[weakref.ref[torch.nn.Module]]) -> None:
    """Their plans and bindings are remembered longer, and must not hold them."""
    count = STRUCTURES + 16
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("n"), 2], name="x")
        results = [x + float(i) for i in range(count)]
    for result in results:
        g.run(result, {x: torch.ones(3, 2)})
    stats = g.executor.stats()
    assert (stats["executables"].size, stats["executables"].evictions) == (STRUCTURES, 16)
    assert stats["bindings"].size == count, "this test wants bindings that outlive their executables"
    assert len(lowered) == count
    assert alive(lowered) == STRUCTURES
    assert torch.equal(g.run(results[0], {x: torch.ones(3, 2)}), torch.ones(3, 2))


def test_constants_live_as_long_as_what_uses_them(lowered: list[weakref.ref[torch.nn.Module]]) -> None:
    """They are shared among executables; those that the cache forgot must not keep them on a device."""
    count = STRUCTURES + 16
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [2], name="x")
        shared = hetu.constant(np.array([1.0, 2.0], np.float32))
        results = [x + shared + hetu.constant(np.full(2, i, np.float32)) for i in range(count)]
    values = []
    for i, result in enumerate(results):
        assert g.run(result, {x: [0.0, 0.0]}).tolist() == [1.0 + i, 2.0 + i]
        module = lowered[-1]()
        assert module is not None
        values.append([weakref.ref(item) for item in module.buffers()])
        del module
    gc.collect()
    alive_values = {id(ref()) for refs in values for ref in refs if ref() is not None}
    assert len(alive_values) == STRUCTURES + 1
    assert g.run(results[0], {x: [0.0, 0.0]}).tolist() == [1.0, 2.0]


def test_values_that_lengths_decide_are_freed_with_their_lengths(
    lowered: list[weakref.ref[torch.nn.Module]],
) -> None:
    """One structure that sees ever new lengths remembers no more of them than the planner does."""
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("n"), 2], name="x")
        y = hetu.reshape(x, [-1])
    g.run(y, {x: torch.ones(1, 2)})
    prepared = weakref.ref(g.prepare(y, {x: torch.ones(1, 2)}))
    assert prepared() is not None
    for n in range(2, g.planner.prepared.capacity + 2):
        g.run(y, {x: torch.ones(n, 2)})
    gc.collect()
    assert prepared() is None
    assert len(lowered) == 1
