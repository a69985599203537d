"""The pages: every link leads somewhere, and every file that a page names is there."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
HISTORY = sorted((ROOT / "docs" / "history").glob("*.md"))
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
NAMED = re.compile(r"`((?:hetu|tests|docs|benchmarks|examples)/[\w/.*-]+)`")


def dead_links(page: Path) -> list[str]:
    """Links of a page to files that are not there."""
    return [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]


def unknown_files(page: Path) -> list[str]:
    """Paths from the root that a page names, and that are not there; ``*`` stands for any name."""
    return [name for name in NAMED.findall(page.read_text(encoding="utf-8")) if not any(ROOT.glob(name.rstrip("/")))]


@pytest.mark.parametrize("page", [*PAGES, *HISTORY], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_are_there(page: Path) -> None:
    """History names what there was."""
    assert not unknown_files(page)


@pytest.mark.parametrize("page", [*PAGES, *HISTORY], ids=lambda page: page.name)
def test_pages_are_whole(page: Path) -> None:
    """A merge that was not finished leaves its marks."""
    assert not re.findall(r"^(?:<{7}|={7}|>{7})(?: .*)?$", page.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if ">>>" in page.read_text("utf-8")], ids=lambda page: page.name
)
def test_examples_print_what_the_page_says(page: Path) -> None:
    failed, tried = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert tried and not failed


def test_what_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](page.md) [b](gone.md#part) [c](https://example.org/x) `hetu/ops/` `hetu/gone.py` `tests/*.py`")
    assert dead_links(page) == ["gone.md"]
    assert unknown_files(page) == ["hetu/gone.py"]
