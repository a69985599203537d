"""The names in a graph: each is that of one node or of one tensor."""

from __future__ import annotations

from collections.abc import Iterable


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
