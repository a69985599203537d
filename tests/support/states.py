"""Small graphs that train, for tests of what lasts between runs, and the places of a nested state."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import hetu


class Trained:
    """A loss of two named parameters: ``a`` weighs a hundred times what ``b`` weighs, and dropout draws.

    Args:
        optimizer: Minimises it.
        order: That in which the parameters are made.
        groups: Gives the groups from the parameters by name; None for one group of all.
        device: Where it runs.
    """

    def __init__(self, optimizer: Any, order: str = "ab", groups: Any = None, device: str = "cpu") -> None:
        with hetu.graph("define_and_run", device=device) as self.graph:
            self.x = hetu.placeholder("float32", [2], name="x")
            self.p = {name: hetu.parameter(1.0, [2], name=name) for name in order}
            loss = hetu.sum(hetu.dropout(self.p["a"] * self.x, 0.5)) * 100.0 + hetu.sum(self.p["b"] * self.x)
            self.train = optimizer.minimize(loss, None if groups is None else groups(self.p), name="train")
        self.feeds = {self.x: torch.tensor([1.0, 2.0])}

    def step(self, **options: Any) -> float:
        return float(self.graph.run(self.train, self.feeds, **options))

    def state(self) -> dict[str, Any]:
        return self.graph.state_dict()

    def values(self) -> dict[str, list[float]]:
        return {name: self.graph.run(tensor).tolist() for name, tensor in sorted(self.p.items())}


def is_same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every part of a nested value."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """The part at a path."""
    for key in path:
        value = value[key]
    return value


def replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """A copy with another part at a path; without the part if that is ``...``."""
    if not path:
        return other
    key, *rest = path
    if isinstance(value, tuple):
        return tuple(replaced(list(value), path, other))
    made = copy.copy(value)
    if not rest and other is ...:
        del made[key]
    else:
        made[key] = replaced(value[key], tuple(rest), other)
    return made
