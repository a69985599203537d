"""The public interface, kept in ``public_interface.txt``: it changes when somebody means it to.

Where a change is meant, ``python tests/test_public_interface.py`` writes the file anew.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEPT = Path(__file__).with_name("public_interface.txt")
MODULES = (
    "hetu",
    "hetu.functional",
    "hetu.integrations.flash_attn",
    "hetu.integrations.pku_hetu",
    "hetu.integrations.transformers",
    "hetu.nn",
    "hetu.optim",
    "hetu.parallel",
    "hetu.testing",
)


def signature(found: Any) -> str:
    """Parameters with annotations and defaults, without addresses of objects; empty where Python knows none."""
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(found)))
    except (TypeError, ValueError):
        return ""


def members(kind: type) -> Iterator[str]:
    """What a class gives its users, a line each: own and inherited from hetu."""
    if dataclasses.is_dataclass(kind):
        yield from (f"  {item.name}: {item.type}" for item in dataclasses.fields(kind) if item.name[0] != "_")
    for name in sorted(name for name in dir(kind) if name[0] != "_"):
        found = inspect.getattr_static(kind, name)
        own = next(base for base in kind.__mro__ if name in vars(base))
        if own.__module__.split(".")[0] != "hetu" or inspect.ismemberdescriptor(found):
            continue
        called = getattr(kind, name)
        if inspect.isroutine(called):
            yield f"  {name}{signature(called)}"
        elif isinstance(found, property) or hasattr(found, "func"):
            yield f"  {name}"


def interface() -> str:
    """Every public name: modules, what they have, and what that has."""
    lines = []
    for path in MODULES:
        module = importlib.import_module(path)
        lines += ["", f"# {path}"]
        for name in sorted(set(module.__all__)):
            found = getattr(module, name)
            if inspect.isclass(found):
                lines += [f"class {name}{signature(found)}", *members(found)]
            else:
                lines.append(f"{name}{signature(found)}" if callable(found) else f"{name}: {type(found).__name__}")
    return "\n".join(lines).lstrip("\n") + "\n"


def test_the_public_interface_is_what_was_kept() -> None:
    now, kept = interface().splitlines(), KEPT.read_text(encoding="utf-8").splitlines()
    gone, new = [line for line in kept if line not in now], [line for line in now if line not in kept]
    assert now == kept, f"gone: {gone}\nnew: {new}\nif that is meant: python {Path(__file__).name}, and tell CHANGELOG"


if __name__ == "__main__":
    KEPT.write_text(interface(), encoding="utf-8")
