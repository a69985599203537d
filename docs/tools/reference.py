"""The pages of the API reference: every public name, on the page of what it is."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import hetu

TITLES = {
    "graphs": ("Graphs and runs", "What makes graphs, runs them and keeps their state."),
    "symbols": ("Symbols", "Lengths as symbols: `hetu.IntSymbol`, what is computed with it, and what binds it."),
    "ops": ("Ops", "What computes in a graph. Each checks shapes and dtypes when it is built."),
    "nn": ("Modules", "Parameters with PyTorch's names, and the ops that use them."),
    "training": ("Optimisers", "What `minimize` adds to a graph: the optimisers of `torch.optim`, by name."),
    "functional": ("PyTorch functions", "Attention without a graph, on one device and over a process group."),
    "parallel": ("Layouts, masks and plans", "Integers only: which token lies where, who sees what, who sends what."),
    "distributed": ("Several processes", "Joining the processes that a launcher started."),
    "integrations": ("Integrations", "Adapters to other libraries."),
    "testing": ("Testing", "For tests of one's own graphs: what binds to what, oracles, strategies compared, counts."),
}
"""Pages of ``reference/``, in order: title and what is there."""

MODULES = {
    "hetu.nn": "nn",
    "hetu.optim": "training",
    "hetu.functional": "functional",
    "hetu.parallel": "parallel",
    "hetu.integrations.flash_attn": "integrations",
    "hetu.integrations.transformers": "integrations",
    "hetu.integrations.pku_hetu": "integrations",
    "hetu.testing": "testing",
}
"""Public modules beside ``hetu`` itself, each with the page of its names."""

ROOMS = {
    "hetu.ops": "ops",
    "hetu.symbols": "symbols",
    "hetu.parallel": "parallel",
    "hetu.runtime.distributed": "distributed",
}
"""Which page a name of ``hetu`` stands on, by where it is defined; all others are on ``graphs``."""


def public(module: ModuleType) -> list[str]:
    """The public names of a module, in the order of its ``__all__``, each once."""
    return list(dict.fromkeys(module.__all__))


def is_value(found: Any) -> bool:
    """Whether a name is a value, such as a dtype or a table, and neither a class nor a function."""
    return not (inspect.isclass(found) or inspect.isroutine(found))


def address(found: Any) -> str:
    """Where a class or a function is defined."""
    return f"{found.__module__}.{found.__qualname__}"


def page_of(name: str, found: Any) -> str | None:
    """The page of a name of ``hetu``; errors and values have other pages, and get None."""
    if is_value(found) or (inspect.isclass(found) and issubclass(found, hetu.HetuError)):
        return None
    where = found.__module__
    return next((page for room, page in ROOMS.items() if where == room or where.startswith(f"{room}.")), "graphs")


def entries() -> dict[str, list[tuple[str, Any]]]:
    """For each page the names on it, each with what it names; a thing with two names stands under the first."""
    found: dict[str, list[tuple[str, Any]]] = {page: [] for page in TITLES}
    for name in public(hetu):
        if page := page_of(name, getattr(hetu, name)):
            found[page].append((f"hetu.{name}", getattr(hetu, name)))
    for path, page in MODULES.items():
        module = importlib.import_module(path)
        found[page] += [(f"{path}.{name}", getattr(module, name)) for name in public(module)]
    first: dict[int, tuple[str, Any]] = {}
    for item in (item for items in found.values() for item in items):
        first.setdefault(id(item[1]), item)
    return {page: [item for item in items if first[id(item[1])] is item] for page, items in found.items()}


def _entry(name: str, found: Any) -> list[str]:
    if is_value(found):
        return ["", f"## {name}", "", f"`{', '.join(found)}`" if isinstance(found, dict) else f"`{found!r}`"]
    options = f'{{heading: "{name}", toc_label: "{name}", heading_level: 2}}'
    return ["", f"::: {address(found)}", f"    options: {options}"]


def anchor(name: str, found: Any) -> str:
    """The anchor of a name on its page."""
    return name.lower().replace(".", "") if is_value(found) else address(found)


def pages() -> dict[str, str]:
    """Every page of the reference by its name, as Markdown for mkdocstrings."""
    named = entries()
    made = {}
    for page, items in named.items():
        title, about = TITLES[page]
        made[page] = "\n".join([f"# {title}", "", about, *(line for item in items for line in _entry(*item))])
    made["index"] = index(named)
    return {f"reference/{page}.md": text + "\n" for page, text in made.items()}


def index(named: dict[str, list[tuple[str, Any]]]) -> str:
    """The page of all names, with the values that have no entry of their own."""
    dtypes = ", ".join(f"`hetu.{name}`" for name in public(hetu) if isinstance(getattr(hetu, name), hetu.DType))
    kinds = ", ".join(f"`{name}`" for name in public(hetu) if name.endswith("Error"))
    lines = ["# API reference", "", "Made from the docstrings. Every public name is here.", ""]
    lines += [
        f"**Element types**: {dtypes}.",
        "",
        "`hetu.tensor` is `hetu.Tensor`; `hetu.graph(...)` makes a `hetu.Graph`.",
        "",
    ]
    lines += [f"**Errors**: {kinds}; see [errors](../errors.md).", ""]
    for page, (title, about) in TITLES.items():
        links = ", ".join(f"[`{name}`]({page}.md#{anchor(name, found)})" for name, found in named[page])
        lines += [f"**[{title}]({page}.md)**: {about} {links}", ""]
    return "\n".join(lines)
