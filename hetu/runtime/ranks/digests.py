"""Digests: short names of what graphs and states say, equal where these are equal on all ranks.

Values are digested to the bit, the contents of constants and of arrays that weights start from included.
Functions, which have none, are told apart by what Python calls them; what they make is digested once it is made.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from hetu.graph import Graph, Tensor
from hetu.optim import Optimizer
from hetu.symbols import IntSymbol

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Of functions and objects: not the same anywhere."""

_DIGITS = 8
"""Bytes of a digest: enough to tell apart what differs by accident."""


def digest_of(text: str) -> str:
    """A short name of a text."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_DIGITS).hexdigest()


def array_text(array: NDArray[Any] | torch.Tensor) -> str:
    """The dtype, the shape, and a digest of the contents. Of a tensor on a GPU that takes a copy to the host.

    Example:
        >>> array_text(np.array([1, 2], "int8"))
        'int8[2] 2d8c377aedfc6330'
    """
    if isinstance(array, torch.Tensor):
        dtype = str(array.dtype).removeprefix("torch.")
        raw = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        dtype, raw = str(array.dtype), np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{dtype}{list(array.shape)} {hashlib.blake2b(raw.data, digest_size=_DIGITS).hexdigest()}"


class GraphDigest:
    """The digest of a graph. It grows with the graph, so that nothing is digested twice.

    Places in the user's script are no part of it, nor are the symbols' default values: runs tell these.

    Attributes:
        whole: The digest.
        leaves: All unknowns of the graph, in the order in which they came up.
    """

    def __init__(self) -> None:
        self.whole = ""
        self.leaves: list[IntSymbol] = []
        self._numbers: dict[IntSymbol, int] = {}
        self._seen: tuple[int, int] | None = None
        self._running = hashlib.blake2b(digest_size=_DIGITS)
        self._done = 0

    def grow(self, graph: Graph) -> list[str]:
        """Takes in what was added to the graph since the last time; gives a line for each part of that."""
        if self._seen == graph.version:
            return []
        lines = []
        if self._seen is None:
            own = [graph.name, graph.kind, graph.num_strategy, graph.strategies]
            lines.append(f"the graph itself: {self._text(own)}")
        for node in graph.nodes[self._done :]:
            what = [node.inputs, node.attrs, node.symbols]
            lines.append(f"{node.name}: {node.definition.name} {self._text(what)}")
        self._done, self._seen = len(graph.nodes), graph.version
        for line in lines:
            self._running.update(digest_of(line).encode())
        numbers, leaves = dict(self._numbers), list(self.leaves)
        required = [f"require: {self._text(item)}" for item in graph.constraints]
        # Unknowns that only these know are numbered anew next time, after those of nodes that are added until then:
        # otherwise the numbers would depend on when the graph was looked at.
        self._numbers, self.leaves = numbers, leaves
        whole = self._running.copy()
        whole.update(digest_of("\n".join(required)).encode())
        self.whole = whole.hexdigest()
        return lines + required

    def _text(self, value: Any) -> str:
        return value_text(value, self._symbol)

    def _symbol(self, symbol: IntSymbol) -> str:
        """A symbol with the numbers of its unknowns, for several may have one name; new ones with their ranges."""
        words = [str(symbol)]
        for leaf in symbol.leaves:
            if leaf not in self._numbers:
                self._numbers[leaf] = len(self.leaves)
                self.leaves.append(leaf)
                words.append(f"{leaf.name} in {leaf.min}..{leaf.max} by {leaf.multiple_of}")
            words.append(f"#{self._numbers[leaf]}")
        return " ".join(words)


_digests: WeakKeyDictionary[Graph, GraphDigest] = WeakKeyDictionary()


def graph_digest(graph: Graph) -> GraphDigest:
    """The digest of a graph as it is now; equal for graphs that the same script built."""
    found = _digests.get(graph)
    if found is None:
        found = _digests[graph] = GraphDigest()
    found.grow(graph)
    return found


def graph_lines(graph: Graph) -> list[str]:
    """All that the digest of a graph is made of, a line for each node: what to look at where digests differ."""
    return GraphDigest().grow(graph)


def value_text(value: Any, symbol: Callable[[IntSymbol], str] = str) -> str:
    """All of a value as text.

    Args:
        value: What nodes and states hold: numbers, strings, arrays, symbols, containers of them, and objects.
        symbol: Gives the text of an :class:`IntSymbol`.
    """

    def text(value: Any) -> str:
        match value:
            case None | bool() | int() | float() | str():
                return repr(value)
            case IntSymbol():
                return f"<{symbol(value)}>"
            case Tensor():
                return f"%{value.name}"
            case np.ndarray():
                return array_text(value)
            case Mapping():
                return f"{{{', '.join(sorted(f'{text(key)}: {text(item)}' for key, item in value.items()))}}}"
            case list() | tuple():
                return f"[{', '.join(map(text, value))}]"
            case Set():
                return f"{{{', '.join(sorted(map(text, value)))}}}"
            case functools.partial():
                return f"partial({text([value.func, value.args, value.keywords])})"
            case Optimizer():
                return f"{value.kind}({text([value.options, value.max_grad_norm, value.schedule, value.zero_stage])})"
        if isinstance(value, torch.Tensor):
            return array_text(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [getattr(value, item.name) for item in dataclasses.fields(value) if item.compare]
            return f"{type(value).__name__}({text(fields)})"
        return _ADDRESS.sub("", str(value))

    return text(value)


def state_parts(state: Mapping[str, Any]) -> list[str]:
    """What a nested dict of a state says, one line for each value: numbers as they are, and tensors by their digests.

    Example:
        >>> state_parts({"groups": [{"lr": 0.5}], "w": torch.zeros(())})
        ['groups/0/lr = 0.5', 'w = float32 0.0']
    """
    found = list(_leaves("", state))
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return [f"{path} = {text}" for (path, _), text in zip(found, pool.map(_leaf_text, found), strict=True)]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        pairs: Sequence[tuple[Any, Any]] = sorted(value.items(), key=lambda item: str(item[0]))
    elif isinstance(value, (list, tuple)) and value:
        pairs = list(enumerate(value))
    else:
        yield path, value
        return
    for key, item in pairs:
        yield from _leaves(f"{path}/{key}" if path else str(key), item)


def _leaf_text(found: tuple[str, Any]) -> str:
    value = found[1]
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return f"{str(value.dtype).removeprefix('torch.')} {value.item()!r}"
    return value_text(value)
