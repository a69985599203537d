"""What a command answers: a value for programs, tables for people, and an exit code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import track
from rich.table import Table

Item = TypeVar("Item")


class Exit(IntEnum):
    """What the process ends with."""

    DONE = 0
    FAILED = 1  # a check did not hold
    REFUSED = 2  # of arguments, as argparse has it
    UNAVAILABLE = 3  # this machine lacks what the command needs


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command answers.

    Attributes:
        data: What ``--json`` prints: dicts, lists, strings, numbers, booleans and None.
        shown: What is printed without it.
        code: What the process ends with.
    """

    data: dict[str, Any]
    shown: Sequence[RenderableType]
    code: Exit = Exit.DONE


class Unavailable(Exception):  # noqa: N818 - not a fault of anybody's
    """This machine lacks what a command needs."""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> Table:
    """A table: its first ``left`` columns hold words, the others numbers."""
    made = Table(title=title or None, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    return made


def steps(items: Sequence[Item], what: str) -> Iterable[Item]:
    """The items, with a bar on stderr while they are gone through."""
    console = Console(stderr=True)
    return track(items, description=what, console=console, transient=True, disable=not console.is_terminal)
