"""The names in a graph, each that of one node or of one tensor, and what takes back nodes with theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hetu.graph.graph import Graph


class Names:
    """Names that are taken, and those that are made up.

    A tensor of an op with several outputs is called by the node's name and a word, ``topk_0.values``; so a node's name
    is made up only where no name begins with it and a dot.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._begun: set[str] = set()
        self._counts: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._taken

    def take(self, names: Iterable[str]) -> None:
        """Makes them somebody's."""
        for name in names:
            self._taken.add(name)
            place = name.find(".")
            while place >= 0:
                self._begun.add(name[:place])
                place = name.find(".", place + 1)

    def release(self, names: Iterable[str]) -> None:
        """Makes them nobody's again."""
        self._taken.difference_update(names)

    def free(self, op: str) -> str:
        """A name for a node of an op: ``add_0``, ``add_1``."""
        while (name := f"{op}_{self._counts.get(op, 0)}") in self._taken or name in self._begun:
            self._counts[op] = self._counts.get(op, 0) + 1
        return name


@contextmanager
def all_or_nothing(graph: Graph) -> Iterator[None]:
    """A block that leaves none of the nodes that it has added if it ends with an error."""
    count, listing = len(graph.nodes), graph.listing
    try:
        yield
    except BaseException:
        added, graph.listing = graph.nodes[count:], listing
        del graph.nodes[count:]
        for node in added:
            graph._names.release(node.names)
            if graph.eager is not None:
                graph.eager.forget(node.outputs)
        raise
