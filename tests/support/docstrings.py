"""Docstrings in Google's style, read into their entries, and what is wrong with one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

Sections = dict[str, dict[str, str]]
"""Section to its entries; the text of a section that has no names (Returns, Example) is the entry ``""``."""

NAMED = ("Args", "Attributes", "Raises")
"""Sections whose entries have names."""

HEADING = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):$", re.MULTILINE)

NAME = re.compile(r"^ {4}\*{0,2}(\w+):", re.MULTILINE)


def sections(doc: str) -> Sections:
    """The sections of a docstring with their entries, each with its text."""
    found: Sections = {}
    parts = HEADING.split(inspect.cleandoc(doc))
    for section, body in zip(parts[1::2], parts[2::2], strict=True):
        assert section not in found, f"two sections {section}"
        if section in NAMED:
            entries = NAME.split(body)
            assert not entries[0].strip(), f"a text before the first entry of {section}: {entries[0]}"
            found[section] = {name: text.strip() for name, text in zip(entries[1::2], entries[2::2], strict=True)}
        else:
            found[section] = {"": body.strip()}
    return found


def without_each_entry(doc: str) -> Iterator[tuple[str, str]]:
    """The docstring without one of its entries, for every entry; each with what is missing."""
    lines = inspect.cleandoc(doc).splitlines()
    section = ""
    for number, line in enumerate(lines):
        if heading := HEADING.fullmatch(line):
            section = heading[1]
        is_entry = section in NAMED and NAME.match(line)
        if is_entry or (heading and section not in NAMED):
            after = re.compile(r"( {4})?[\w*]" if is_entry else r"\w")  # the next entry or section
            end = next((i for i in range(number + 1, len(lines)) if after.match(lines[i])), len(lines))
            yield f"{section} {line.strip()}", "\n".join([*lines[:number], *lines[end:]])


def faults(function: Callable[..., Any], errors: set[str], doc: str | None = None) -> list[str]:
    """What is missing in a function's docstring, or is too much.

    Args:
        function: A public function.
        errors: The names of the errors that it is known to raise.
        doc: A docstring to read in the place of its own.
    """
    found = sections(doc or function.__doc__ or "")
    signature = inspect.signature(function)
    wrong = [f"no text in {section} {name}" for section, of in found.items() for name, text in of.items() if not text]
    for section in ("Returns", "Example"):
        wrong += [] if section in found else [f"no section {section}"]
    told, parameters = list(found.get("Args", {})), list(signature.parameters)
    if told != parameters:
        wrong.append(f"Args are {told}, but the parameters are {parameters}")
    raised = set(found.get("Raises", {}))
    if raised != errors:
        wrong.append(f"Raises has {sorted(raised)}, but it is known to raise {sorted(errors)}")
    return wrong
