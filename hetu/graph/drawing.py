"""Graphs as pictures: DOT text, and what graphviz makes of it."""

from __future__ import annotations

import ast
import linecache
import os
import shutil
import subprocess
from functools import cache
from html import escape

from hetu.arguments import path as as_path
from hetu.errors import HetuError, Where, caller
from hetu.graph.node import Node
from hetu.graph.opdef import Role
from hetu.graph.printing import type_of

TEXTS, PICTURES = ("dot", "gv"), ("svg", "png", "pdf")

STYLE = """\
  graph [bgcolor="white", rankdir="TB", newrank="true", labeljust="l", nodesep="0.3", ranksep="0.45"];
  graph [fontname="Helvetica", fontsize="12"];
  node [shape="box", style="rounded,filled", color="#8c959f", fillcolor="#ffffff", fontname="Helvetica", fontsize="11"];
  edge [color="#57606a", fontcolor="#57606a", fontname="Helvetica", fontsize="9"];"""
"""A white card is drawn behind the graph, so that a dark page changes nothing."""

FUNCTION = 'style="rounded,filled"; margin="14"; color="#d0d7de"; fillcolor="#f6f8fa";'
SOURCE, ATTENTION, AGAIN = 'fillcolor="#ddf4ff"', 'fillcolor="#fff1d6"', 'style="rounded,filled,dashed"'

MOST_SHOWN = 200
"""A notebook shows the picture of a graph with so many nodes; of a larger one the text."""


class Drawn:
    """What a graph can be drawn by.

    Attributes:
        name: The graph's name.
        nodes: Its nodes, in an order in which they can be computed.
    """

    name: str
    nodes: list[Node]

    def to_dot(self) -> str:
        """The graph in graphviz' language: a box per node, in a frame per function of the user's code.

        Edges tell dtypes and symbolic shapes. What is fed or kept is blue, attention is yellow, and what a backward
        computes again (``hetu.recompute``) is dashed.

        Example:
            >>> import hetu
            >>> n = hetu.IntSymbol("n")
            >>> with hetu.graph("define_and_run") as g:
            ...     y = hetu.relu(hetu.placeholder(hetu.float32, [n, 2], name="x"))
            >>> print(g.to_dot().splitlines()[-2])
              "x" -> "relu_0" [label="float32[n, 2]"];
        """
        frames: dict[str, list[Node]] = {}
        for node in self.nodes:
            frames.setdefault(function_of(node.where), []).append(node)
        lines = [f"digraph {quoted(self.name)} {{", STYLE]
        for number, (name, nodes) in enumerate(frames.items()):
            boxes = [_box(node) for node in nodes]
            if name:
                head = f'  subgraph "cluster_{number}" {{ label={quoted(name)}; {FUNCTION}'
                boxes = [head, *(f"  {box}" for box in boxes), "  }"]
            lines += boxes
        for node in self.nodes:
            for tensor in node.tensors:
                label = quoted(type_of(tensor))
                lines.append(f"  {quoted(tensor.op.name)} -> {quoted(node.name)} [label={label}];")
        return "\n".join([*lines, "}"])

    def visualize(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture of the graph, or its text in graphviz' language.

        Args:
            path: A file that ends in ``.svg``, ``.png`` or ``.pdf``, which graphviz' program ``dot`` draws, or in
                ``.dot`` or ``.gv``, which needs no program.

        Raises:
            HetuError: If ``dot`` is not installed, or the file has another ending.
            OSError: If it can't be written.
        """
        name = as_path(path, op="visualize")
        kind = os.path.splitext(name)[1].lstrip(".").lower()
        if kind not in TEXTS + PICTURES:
            endings = ", ".join(f".{ending}" for ending in PICTURES + TEXTS)
            what = f"a picture of a graph is written as one of {endings}, got {name!r}"
            raise HetuError(what, op="visualize", where=caller(), fix="name the file g.svg, say")
        drawn = self.to_dot().encode() if kind in TEXTS else drawn_by_dot(self.to_dot(), kind)
        with open(name, "wb") as file:
            file.write(drawn)

    def __repr__(self) -> str:
        return f"<hetu.graph {self.name} of {len(self.nodes)} nodes>"

    def _repr_html_(self) -> str:
        text = f"<pre>{escape(str(self))}</pre>"
        if len(self.nodes) > MOST_SHOWN or shutil.which("dot") is None:
            return text
        picture = drawn_by_dot(self.to_dot(), "svg").decode()
        folded = f"<details><summary>{escape(self.name)}: {len(self.nodes)} nodes</summary>{text}</details>"
        return f"<div>{picture[max(picture.find('<svg'), 0) :]}{folded}</div>"


def drawn_by_dot(text: str, kind: str) -> bytes:
    """What graphviz makes of a text.

    Raises:
        HetuError: If its program is not installed, or fails.
    """
    program = shutil.which("dot")
    if program is None:
        what = "a picture of a graph is drawn by graphviz' program dot, which is not installed"
        fix = 'install graphviz (apt install graphviz, brew install graphviz), or write the text: g.visualize("g.dot")'
        raise HetuError(what, op="visualize", where=caller(), fix=fix)
    done = subprocess.run([program, f"-T{kind}"], input=text.encode(), capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise HetuError(f"graphviz' program dot failed: {said}", op="visualize", where=caller())
    return done.stdout


def quoted(text: str) -> str:
    r"""A string of graphviz' language.

    Example:
        >>> print(quoted('a "b"'))
        "a \"b\""
    """
    plain = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{plain}"'


def _box(node: Node) -> str:
    op, place = node.definition.name, node.where.short
    label = "\n".join([node.name if node.name.startswith(op) else f"{node.name}: {op}", place])
    if node.original is not None:
        look = AGAIN
    elif node.role is not Role.COMPUTATION:
        look = SOURCE
    else:
        look = ATTENTION if "attn" in op else ""
    return f"  {quoted(node.name)} [label={quoted(label)}{', ' * bool(look)}{look}];"


def function_of(where: Where) -> str:
    """The function of the user's that a line stands in, as ``Block.forward``; empty at the top of a script."""
    inside = [(start, name) for start, end, name in _functions(where.filename) if start <= where.lineno <= end]
    return max(inside, default=(0, ""))[1]


@cache
def _functions(filename: str) -> list[tuple[int, int, str]]:
    """Every function of a file: its first line, its last one, and its name with those of what it stands in."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):  # a notebook's cell may hold what is not Python
        return []
    found: list[tuple[int, int, str]] = []

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = f"{name}.{child.name}" if name else child.name
                if not isinstance(child, ast.ClassDef):
                    found.append((child.lineno, child.end_lineno or child.lineno, inner))
            visit(child, inner)

    visit(tree, "")
    return found
