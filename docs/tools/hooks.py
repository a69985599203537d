"""What mkdocs does beside its own: the site's address, pages made from other files, and roles in docstrings."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import reference  # noqa: E402

from hetu.errors import DOCS_URL  # noqa: E402

ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):<code>~?(?:[\w.]+\.)?(\w+)</code>")
OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "LICENSE": "license.md"}
"""Files beside ``docs/`` that are pages of the site."""


def from_root(text: str) -> str:
    """A page of the repository's root with its links as seen from ``docs/``."""
    for file, page in OUTSIDE.items():
        text = text.replace(f"]({file})", f"]({page})")
    return text.replace("](docs/", "](").replace("](examples/", "](../examples/")


def on_config(config: Any) -> Any:
    """The site is built for the address that errors link to."""
    config.site_url = DOCS_URL
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the front page, which is README, the pages beside ``docs/``, and the API reference."""
    made = reference.pages()
    made["index.md"] = from_root((ROOT / "README.md").read_text(encoding="utf-8"))
    for file, page in OUTSIDE.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        made[page] = from_root(text) if file.endswith(".md") else f"# License\n\n```text\n{text}\n```\n"
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files beside ``docs/`` lead to their pages."""
    up = "../" * page.file.src_uri.count("/")
    for file, name in OUTSIDE.items():
        markdown = markdown.replace(f"](../{up}{file}", f"]({up}{name}")
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Roles of docstrings, such as ``:func:`save```, are shown as code."""
    return ROLE.sub(r"<code>\1</code>", html)
