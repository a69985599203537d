"""Checks which module of hetu may know which: run it as a script, or call :func:`violations`.

Every import counts, also one within a function or by ``importlib``. One under ``if TYPE_CHECKING`` brings nothing, so
it may point anywhere, but no module that is built without a framework may name one there.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Floors = Sequence[Sequence[str]]
"""A room may import what stands on an earlier line; rooms on one line don't know each other."""

FLOORS: Floors = (
    ("errors",),
    ("arguments",),
    ("dtypes",),
    ("config", "cache", "rng", "shards"),
    ("symbols",),
    ("graph", "parallel"),
    ("ops",),
    ("optim", "nn"),
    ("planning",),
    ("backends",),
    ("runtime", "functional"),
    ("distributed", "calibration", "testing"),
    ("__init__",),
    ("integrations", "cli"),
    ("__main__",),
)

INSIDE: Mapping[str, Floors] = {
    "parallel": (
        ("mask", "placement", "topology"),
        ("layout",),
        ("plan",),
        ("methods", "proof", "views"),
        ("choice",),
        ("attn_plan", "batch"),
        ("__init__",),
    ),
    "backends": (
        ("torch_private",),
        ("dtypes", "memory", "precision"),
        ("attention",),
        ("comm", "triton", "eager"),
        ("gluon",),
        ("families",),
        ("pipelines",),
        ("lower",),
        ("torch", "compile"),
        ("__init__",),
    ),
}
"""The floors inside a room; modules of rooms that are not here may know each other, but not in a circle."""

ONLY: Mapping[str, set[str]] = {"integrations": {"errors", "arguments", "functional", "__init__"}}
"""Rooms that know no more than a user's code could, whatever floor they stand on."""

FRAMEWORKS = {"torch", "triton"}
_TOPMOST = {"distributed", "calibration", "testing", "integrations", "cli"}
WITH_FRAMEWORKS = {"backends", "runtime", "functional"} | _TOPMOST
LAZY_ONLY = {"networkx", "matplotlib"}

MAY_CIRCLE = {"graph", "symbols"}
"""Rooms of which some modules define each other's types (node, tensor, op) and need each other."""

FACES = {"__init__.py", "__main__.py"}
"""What Python itself looks for in a package."""

MOST_AT_ROOT, MOST_FILES, MOST_LINES = 10, 24, 450


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module.

    Attributes:
        line: Where.
        target: Its full name.
        is_lazy: Whether it stands within a function.
        is_typing: Whether it stands under ``if TYPE_CHECKING``.
    """

    line: int
    target: str
    is_lazy: bool
    is_typing: bool


def imports(tree: ast.Module, module: str, is_package: bool, known: frozenset[str]) -> Iterator[Import]:
    """Every import of a module; ``known`` are the modules of the package."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    in_function = {id(i) for outer in ast.walk(tree) if isinstance(outer, functions) for i in ast.walk(outer)}
    in_typing = {id(i) for outer in ast.walk(tree) if is_type_checking(outer) for i in ast.walk(outer)}
    for node in ast.walk(tree):
        place = (id(node) in in_function, id(node) in in_typing)
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, *place)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for alias in node.names:  # `from hetu import graph` imports the room graph, not only hetu
                inner = f"{source}.{alias.name}"
                yield Import(node.lineno, inner if inner in known or source == "hetu" else source, *place)
        elif isinstance(node, ast.Call) and called(node.func) in ("import_module", "__import__") and node.args:
            is_text = isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
            yield Import(node.lineno, node.args[0].value if is_text else "<a computed name>", *place)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and called(node.test) == "TYPE_CHECKING"


def called(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def rooms_of(module: str) -> tuple[str, str]:
    """The room, and what inside it: ``hetu.graph.node`` is of graph and node, ``hetu`` itself of ``__init__``."""
    _, room, inside, *_ = [*module.split("."), "__init__", "__init__"]
    return room, inside


def not_below(floors: Floors, own: str, other: str) -> str | None:
    """Why what stands at ``own`` may not import what stands at ``other``; None if it may."""
    floor_of = {room: level for level, rooms in enumerate(floors) for room in rooms}
    for room in (own, other):
        if room not in floor_of:
            return f"{room} stands on no floor: give it one in {Path(__file__).name}"
    return None if other == own or floor_of[other] < floor_of[own] else f"{own} may not know {other}"


def complaint(module: str, item: Import) -> str | None:
    """Why a module may not import something; None if it may."""
    room, inside = rooms_of(module)
    top = item.target.split(".")[0]
    if top in FRAMEWORKS and room not in WITH_FRAMEWORKS:
        return f"{room} is built without {top}"
    if top in LAZY_ONLY and not (item.is_lazy or item.is_typing):
        return f"{top} is imported only in the functions that use it"
    if item.target == "<a computed name>" and room not in WITH_FRAMEWORKS:
        return f"{room} imports by names that can be read"
    if top != "hetu" or item.is_typing:
        return None
    other_room, other_inside = rooms_of(item.target)
    if why := not_below(FLOORS, room, other_room):
        return why
    if other_room != room:
        if other_room not in ONLY.get(room, {other_room}):
            return f"{room} may not know {other_room}"
        hidden = next((part for part in item.target.split(".")[2:] if part.startswith("_")), None)
        return f"{hidden} of {other_room} is not for other rooms" if hidden else None
    return not_below(INSIDE[room], inside, other_inside) if room in INSIDE else None


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import each other in a circle, largest first (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in sorted(edges.get(module, ())):
            if other not in number:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], number[other])
        if low[module] == number[module]:
            at = stack.index(module)
            found.append(sorted(stack[at:]))
            del stack[at:]

    for module in sorted(edges):
        if module not in number:
            visit(module)
    return sorted((circle for circle in found if len(circle) > 1), key=len, reverse=True)


def modules_of(package: Path) -> dict[str, Path]:
    """Every module of a package, by its full name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def violations(package: Path) -> list[str]:
    """Every import in the package that points the wrong way, as ``path:line: why``, and what is too large."""
    modules, found = modules_of(package), []
    known = frozenset(modules)
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        if why := not_below(FLOORS, rooms_of(module)[0], rooms_of(module)[0]):
            found.append(f"{path}:1: {why}")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for item in imports(tree, module, path.name == "__init__.py", known):
            if why := complaint(module, item):
                found.append(f"{path}:{item.line}: {why}  (import of {item.target})")
            # A package's face gathers its modules; who imports one of these doesn't depend on the face.
            if not item.is_typing and item.target in known and path.name != "__init__.py":
                edges.setdefault(module, set()).add(item.target)
    for circle in circles(edges):
        if {rooms_of(module)[0] for module in circle} - MAY_CIRCLE:
            found.append(f"{modules[circle[0]]}:1: these import each other in a circle: {', '.join(circle)}")
    return found + oversized(package, modules)


def oversized(package: Path, modules: Mapping[str, Path]) -> list[str]:
    """What nobody finds their way in: a folder of too many files, or a file of too many lines."""
    found = []
    for folder in sorted({path.parent for path in modules.values()}):
        files = sum(path.parent == folder and path.name not in FACES for path in modules.values())
        most = MOST_AT_ROOT if folder == package else MOST_FILES
        if files > most:
            found.append(f"{folder}:1: {files} modules in a folder, expected at most {most}")
    for path in modules.values():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            found.append(f"{path}:{lines}: a file of {lines} lines, expected at most {MOST_LINES}")
    return found


def main() -> int:
    """Prints what is wrong, and returns the exit status."""
    package = Path(__file__).resolve().parent.parent / "hetu"
    found = violations(package)
    print("\n".join(found) or f"import direction: {len(modules_of(package))} modules, all imports point one way")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
