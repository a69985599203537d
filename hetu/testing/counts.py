"""Counts of what a graph made anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hetu.graph import Graph
from hetu.testing.graphs import given_graph


@dataclass
class Counted:
    """What the runs of a block made. Runs under other lengths make no executable.

    Attributes:
        executables: Modules that were lowered: one per set of fetches, strategy's structure, dtypes and device.
        plans: Plans that were made: one per op and set of lengths.
        bindings: Sets of lengths that were bound.
    """

    executables: int = 0
    plans: int = 0
    bindings: int = 0


@contextmanager
def counting(graph: Graph) -> Iterator[Counted]:
    """Counts what the runs of a graph lower, plan and bind anew within a ``with`` block.

    Args:
        graph: The graph. Runs of other threads count too.

    Yields:
        The counts, complete when the block is left.

    Example:
        >>> import hetu
        >>> n = hetu.IntSymbol("n")
        >>> with hetu.graph("define_and_run") as g:
        ...     x = hetu.placeholder(hetu.float32, [n])
        ...     y = hetu.relu(x)
        >>> with hetu.testing.counting(g) as counted:
        ...     for length in (3, 0, 5, 3):
        ...         _ = g.run(y, {x: [1.0] * length})
        >>> counted
        Counted(executables=1, plans=0, bindings=3)
    """
    graph = given_graph(graph, "counting")
    counted, before = Counted(), _misses(graph)
    try:
        yield counted
    finally:
        after = _misses(graph)
        for name, count in after.items():
            setattr(counted, name, count - before[name])


def _misses(graph: Graph) -> dict[str, int]:
    return {name: stats.misses for name, stats in graph.executor.stats().items()}
