"""Scopes of hetu.recompute that open and close at random while a graph is built, and what shows that they matter."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx

import hetu

POLICIES: list[dict[str, Any]] = [
    {},
    {},
    {"attention": True},
    {"policy": {"tanh", "exp", "mul", "add", "linear", "dropout", "cast", "softmax"}},
    {"policy": {"parallel_attn", "silu", "sub", "rms_norm"}, "attention": True},
]


class RandomScopes(AbstractContextManager["RandomScopes"]):
    """Scopes that lie in each other or side by side, or overlap, because they are left in any order.

    Args:
        seed: Draws them.
    """

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._open: list[hetu.recompute] = []

    def shift(self) -> None:
        """Leaves some scopes and enters others, at any place where a graph is built."""
        while self._open and self._draw.random() < 0.4:
            self._open.pop(self._draw.randrange(len(self._open))).__exit__(None, None, None)
        while len(self._open) < 3 and self._draw.random() < 0.5:
            self._open.append(hetu.recompute(**self._draw.choice(POLICIES)))
            self._open[-1].__enter__()

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.pop().__exit__(None, None, None)


class LiveBytes(fx.Interpreter):
    """Runs a lowered module, lets go of values after their last use as the module does, and measures what is left.

    Attributes:
        peak: The most bytes that computed values took at once.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.peak = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        found: dict[int, int] = {}
        for value in [result, *(value for node, value in self.env.items() if node.op == "call_function")]:
            _storages(value, found)
        self.peak = max(self.peak, sum(found.values()))
        return result


def _storages(value: Any, found: dict[int, int]) -> None:
    """Notes the memory of the tensors in a nest of lists: each once, however many views there are."""
    if isinstance(value, torch.Tensor):
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, (list, tuple)):
        for item in value:
            _storages(item, found)
