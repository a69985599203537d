"""Checks which module of hetu may know which: run it as a script, or call :func:`violations`.

Every import counts, also one within a function, under ``if TYPE_CHECKING`` or by ``importlib``.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

# A room may import what stands on an earlier line; rooms on one line don't know each other.
FLOORS = (
    ("errors",),
    ("dtypes",),
    ("config", "cache", "rng", "shards"),
    ("symbols",),
    ("graph", "parallel"),
    ("ops",),
    ("optim",),
    ("planner",),
    ("backends",),
    ("executor", "functional"),
    ("distributed",),
    ("__init__",),
)
FLOOR_OF = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# Modules beside a room's own that are part of it.
PART_OF = {
    **dict.fromkeys(("binder", "feeds", "subgraph"), "planner"),
    **dict.fromkeys(("agreement", "checkpoint", "state", "step"), "executor"),
}

FRAMEWORKS = {"torch", "triton"}
WITHOUT_FRAMEWORKS = {room for room, level in FLOOR_OF.items() if level < FLOOR_OF["backends"]} | {"__init__"}
LAZY_ONLY = {"networkx"}


def room_of(module: str) -> str:
    """The room of ``hetu.graph.node`` is ``graph``; that of ``hetu`` itself is ``__init__``."""
    name = module.split(".")[1] if "." in module else "__init__"
    return PART_OF.get(name, name)


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str, bool]]:
    """Every imported module as ``(line, name, whether within a function)``."""
    in_function = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(outer)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        lazy = id(node) in in_function
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, lazy
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for alias in node.names:  # `from hetu import graph` imports the room graph, not only hetu
                yield node.lineno, f"{source}.{alias.name}" if source == "hetu" else source, lazy
        elif isinstance(node, ast.Call) and called(node.func) in ("import_module", "__import__") and node.args:
            if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value, lazy
            elif room_of(module) in WITHOUT_FRAMEWORKS:
                yield node.lineno, "<a computed name>", lazy


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and called(node.test) == "TYPE_CHECKING"


def called(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def complaint(room: str, target: str, lazy: bool) -> str | None:
    """Why a module of ``room`` may not import ``target``; None if it may."""
    top = target.split(".")[0]
    if top in FRAMEWORKS and room in WITHOUT_FRAMEWORKS:
        return f"{room} is built without {top}"
    if top in LAZY_ONLY and not lazy:
        return f"{top} is imported only in the functions that use it"
    if target == "<a computed name>":
        return f"{room} imports by names that can be read"
    if top != "hetu":
        return None
    other = room_of(target)
    if other not in FLOOR_OF:
        return f"{other} stands on no floor: give it one in {Path(__file__).name}"
    if other == room or FLOOR_OF[other] < FLOOR_OF[room]:
        return None
    return f"{room} may not know {other}"


def violations(package: Path) -> list[str]:
    """Every import in the package that points the wrong way, as ``path:line: why``."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        room = room_of(module)
        if room not in FLOOR_OF:
            found.append(f"{path}:1: {room} stands on no floor: give it one in {Path(__file__).name}")
            continue
        for line, target, lazy in imports(ast.parse(path.read_text(encoding="utf-8")), module, is_package):
            if why := complaint(room, target, lazy):
                found.append(f"{path}:{line}: {why}  (import of {target})")
    return found


def main() -> int:
    """Prints what is wrong, and returns the exit status."""
    package = Path(__file__).resolve().parent.parent / "hetu"
    found = violations(package)
    print(
        "\n".join(found) or f"import direction: {len(list(package.rglob('*.py')))} modules, all imports point one way"
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
