"""Graphs in which an op looks something up by indices, with its gradient and an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import hetu

ROWS, CLASSES = 4, 3
Build = Callable[[hetu.Tensor, hetu.Tensor], hetu.Tensor]


def gathered(x: hetu.Tensor, index: hetu.Tensor) -> hetu.Tensor:
    return hetu.gather(hetu.transpose(x, 0, 1), 1, hetu.broadcast_to(hetu.reshape(index, [1, -1]), [CLASSES, 2]))


def picked(x: hetu.Tensor) -> hetu.Tensor:
    return hetu.slice(x, 0, 0, 2)


# For each op: what it looks up, in a table of 4 x 3 by two indices; how many there are; the name of the input.
OPS: dict[str, tuple[Build, int, str]] = {
    "embedding": (lambda x, ids: hetu.sum(hetu.embedding(ids, x) * 2.0), ROWS, "ids"),
    "gather": (lambda x, ids: hetu.sum(gathered(x, ids)), ROWS, "index"),
    "cross_entropy": (lambda x, ids: hetu.cross_entropy(picked(x), ids), CLASSES, "labels"),
    "token_mean_loss": (lambda x, ids: hetu.token_mean_loss(picked(x), ids), CLASSES, "labels"),
}
HOW: dict[str, Callable[[hetu.Tensor], hetu.Tensor]] = {
    "as fed": lambda ids: ids,
    "in another shape": lambda ids: hetu.reshape(hetu.reshape(ids, [2, 1]), [2]),
    "in another dtype": lambda ids: hetu.cast(ids, "int64"),
    "computed": lambda ids: ids + 0,
    "cut": lambda ids: hetu.slice(hetu.concat([ids, ids], 0), 0, 0, 2),
}


class Lookup:
    """A graph in which an op looks something up, with the gradient of that."""

    def __init__(
        self,
        op: str,
        how: str = "as fed",
        dtype: str = "int64",
        rows: Any = ROWS,
        device: str = "cpu",
        optimizer: Any = None,
    ) -> None:
        build, self.size, self.name = OPS[op]
        optimizer = optimizer or hetu.optim.SGD(lr=0.1, momentum=0.9)
        with hetu.graph("define_and_run", device=device) as self.graph:
            self.ids = hetu.placeholder(dtype, [2], name="numbers")
            self.x = hetu.placeholder("float32", [rows, CLASSES], name="x")
            self.w = hetu.parameter(1.0, [1], name="w")
            self.y = build(self.x * self.w, HOW[how](self.ids))
            self.dx = hetu.gradients(self.y, self.x)
            self.train = optimizer.minimize(self.y * hetu.mean(hetu.dropout(self.w, 0.5)), name="train")

    def run(self, fetch: Any, ids: Any, **options: Any) -> Any:
        return self.graph.run(fetch, {self.ids: ids, self.x: np.ones((ROWS, CLASSES), np.float32)}, **options)
