"""Tensors by their names, in what a run is asked for and in what it is fed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hetu.errors import BindingError, caller
from hetu.graph import Graph, Tensor


def find_fetches(graph: Graph, fetches: Any) -> tuple[Any, tuple[Any, ...] | None]:
    """What is fetched with tensors in the place of names, and the keys of a dict.

    Args:
        graph: The graph that runs.
        fetches: A tensor, a name, a list of them, or a dict of them.

    Returns:
        The tensor or the list, and None; for a dict a tuple of its values, and its keys.

    Raises:
        HetuError: If the graph has no tensor of a name.
    """
    if isinstance(fetches, Mapping):
        return tuple([_find(graph, item) for item in fetches.values()]), tuple(fetches)
    if isinstance(fetches, (list, tuple)):
        return [_find(graph, item) for item in fetches], None
    return _find(graph, fetches), None


def _find(graph: Graph, item: Any) -> Any:
    return graph.find(item, "fetches") if isinstance(item, str) else item


def find_feeds(graph: Graph, feeds: Any) -> Any:
    """What is fed, with placeholders in the place of names. All else is left to who reads it.

    Raises:
        BindingError: If a placeholder is fed twice.
        HetuError: If the graph has no tensor of a name.
    """
    if not isinstance(feeds, Mapping) or not any(isinstance(key, str) for key in feeds):
        return feeds
    found: dict[Any, Any] = {}
    for key, value in feeds.items():
        tensor = graph.find(key, "feed_dict") if isinstance(key, str) else key
        if isinstance(tensor, Tensor) and tensor in found:
            what = f"{tensor.name} stands in feed_dict twice, as a tensor and by its name"
            raise BindingError(what, op="run", where=caller(), fix="feed it once")
        found[tensor] = value
    return found
