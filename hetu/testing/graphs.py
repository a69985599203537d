"""What all of these functions are given first."""

from __future__ import annotations

from typing import Any

from hetu.arguments import refuse
from hetu.graph import Graph


def given_graph(graph: Any, op: str) -> Graph:
    """A graph, or an error of the function that asks for one."""
    if not isinstance(graph, Graph):
        refuse(graph, "graph", "a hetu.Graph", op=op)
    return graph
