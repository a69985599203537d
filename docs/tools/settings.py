"""Writes the tables of ``docs/settings.md`` from ``hetu/config.py``: ``python docs/tools/settings.py``."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from hetu.config import VARIABLES, Settings

PAGE = Path(__file__).resolve().parent.parent / "settings.md"
ENTRY = re.compile(r"^ {8}(\w+): ((?:.+\n?)(?: {12}.+\n?)*)", re.MULTILINE)


def meanings() -> dict[str, str]:
    """What each field of ``Settings`` means, as its docstring tells it."""
    found = {name: " ".join(text.split()) for name, text in ENTRY.findall(Settings.__doc__ or "")}
    return {name: text.replace(":data:`BACKENDS`", "`hetu.config.BACKENDS`") for name, text in found.items()}


def settings_table() -> str:
    """A line per setting."""
    lines = ["| `hetu.config(...)` | default | variable | what it does |", "| --- | --- | --- | --- |"]
    variables = {variable.setting: name for name, variable in VARIABLES.items() if variable.setting}
    for item in dataclasses.fields(Settings):
        variable = f"`{variables[item.name]}`" if item.name in variables else ""
        lines.append(f"| `{item.name}` | `{item.default!r}` | {variable} | {meanings()[item.name]} |")
    return "\n".join(lines)


def variables_table() -> str:
    """A line per environment variable."""
    lines = ["| variable | values | default | what it does |", "| --- | --- | --- | --- |"]
    for name, variable in VARIABLES.items():
        lines.append(f"| `{name}` | {variable.values} | {variable.default} | {variable.meaning} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with its tables as they should be."""
    for marker, table in (("settings", settings_table()), ("variables", variables_table())):
        before, rest = page.split(begin := f"<!-- {marker}: begin -->")
        after = rest.split(end := f"<!-- {marker}: end -->")[1]
        page = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
