"""What the documentation is made of: pictures, tables and the reference are those of the code as it is now."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from types import ModuleType

import pictures
import pytest
import reference
import settings

import hetu
from hetu.config import VARIABLES, Settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_pictures_are_those_of_the_code_and_of_the_results() -> None:
    made = pictures.pictures()
    assert {path.name for path in pictures.IMAGES.iterdir()} == set(made)
    changed = [name for name, text in made.items() if (pictures.IMAGES / name).read_text(encoding="utf-8") != text]
    assert not changed, "run python docs/tools/pictures.py, and look at them"


def test_the_tables_of_settings_are_those_of_the_config() -> None:
    page = settings.PAGE.read_text(encoding="utf-8")
    assert settings.written(page) == page, "run python docs/tools/settings.py"
    assert all(f"| `{item.name}` |" in page for item in dataclasses.fields(Settings))


def test_every_variable_that_is_read_is_listed() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "hetu").rglob("*.py")]
    named = {name for text in sources for name in re.findall(r"\bHETU_[A-Z_]+\b", text)}
    assert named == set(VARIABLES)


def test_the_reference_has_every_public_name() -> None:
    pages = "\n".join(reference.pages().values())
    modules = {f"hetu.{name}" for name in hetu.__all__ if type(getattr(hetu, name)) is ModuleType}
    assert modules <= set(reference.MODULES)
    for path in ("hetu", *reference.MODULES):
        for name in reference.public(importlib.import_module(path)):
            found = getattr(importlib.import_module(path), name)
            if reference.is_value(found):
                assert name in pages, f"{path}.{name}"
            elif not (isinstance(found, type) and issubclass(found, hetu.HetuError)):
                assert pages.count(f"::: {reference.address(found)}\n") == 1, f"{path}.{name}"


def test_every_error_has_its_place() -> None:
    told = re.findall(r"^## (\w+)$", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(told) == sorted(name for name in hetu.__all__ if name.endswith("Error"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_python_escapes_the_tests(page: Path) -> None:
    """Blocks that test_examples.py runs begin with ```` ```python ```` at the beginning of a line; no other runs."""
    fences = re.findall(r"^(.*)```([\w ]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert not [fence for fence in fences if "py" in fence[1].lower() and fence != ("", "python")]
    assert {kind for _, kind in fences} <= {"python", "text", "sh", "mermaid"}
