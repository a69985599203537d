"""The errors that hetu raises, and the places in the user's script that they point at.

Every message answers four questions: what was expected and what came (``what``), where it was asked
for (``where``), which bound values led there (``bound``), and what to do (``fix``). A traceback ends with a
link to the page of its kind::

    BindingError: [attn_varlen] max_seqlen_q is 512, but sequence 3 of cu_seqlens_q has 700 tokens
      where:  train.py:41   out = hetu.attn_varlen(q, k, v, 64, cu, cu, max_q, max_q)
      bound:  max_q = 512   from int_symbol_dict
      fix:    bind max_q to at least 700, or leave it unbound
      more:   https://hetu-attention.readthedocs.io/en/latest/errors/#bindingerror
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType

DOCS_URL = "https://hetu-attention.readthedocs.io/en/latest/"
"""Where the documentation is published: what errors link to, and what the site is built for."""

_NOT_USERS = (os.path.dirname(os.path.abspath(__file__)) + os.sep, contextlib.__file__, "<eval_with_key>")
"""Beginnings of the names of files whose lines are not the user's: ours, what runs our context managers, and lowered
modules."""


@dataclass(frozen=True, slots=True)
class Where:
    """A line of the user's script.

    Attributes:
        filename: The file as Python names it.
        lineno: The line's number, from 1.
    """

    filename: str
    lineno: int

    @property
    def line(self) -> str:
        """The text of the line, without indentation; empty where the source is not at hand."""
        return linecache.getline(self.filename, self.lineno).strip()

    @property
    def short(self) -> str:
        """``train.py:41``."""
        return f"{os.path.basename(self.filename)}:{self.lineno}"

    def __str__(self) -> str:
        return f"{self.short}   {self.line}".rstrip()


def in_words(error: BaseException) -> str:
    """An error in one line, for whoever did not see it: its kind, and what it says.

    Example:
        >>> in_words(ValueError("no such name"))
        'ValueError: no such name'
    """
    text = str(error.what if isinstance(error, HetuError) else error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def ranks_in_words(ranks: Iterable[int]) -> str:
    """``rank 2`` or ``ranks 2, 5``.

    Example:
        >>> ranks_in_words([2]), ranks_in_words([2, 5])
        ('rank 2', 'ranks 2, 5')
    """
    names = [str(rank) for rank in ranks]
    return f"rank{'s' * (len(names) != 1)} {', '.join(names)}"


def caller() -> Where:
    """Finds the innermost line outside the hetu package: the user's line that led here."""
    return innermost(_is_users)


def innermost(is_meant: Callable[[FrameType], bool]) -> Where:
    """Finds the innermost line whose frame is meant, or the outermost of all; a Python may not know its frames."""
    frame = inspect.currentframe()
    if frame is None:
        return Where("<unknown>", 0)
    while not is_meant(frame) and frame.f_back is not None:
        frame = frame.f_back
    return Where(frame.f_code.co_filename, frame.f_lineno)


def _is_users(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    # The methods that dataclasses write have no file; their globals say whose they are.
    return not name.startswith(_NOT_USERS) and not (
        name == "<string>" and frame.f_globals.get("__name__", "")[:5] == "hetu."
    )


class HetuError(Exception):
    """The family of everything that hetu raises on purpose.

    Args:
        what: What was expected and what came, in one sentence.
        op: The op's name, put in brackets before ``what``.
        where: The line of the user's script that asked for it.
        bound: Lines such as ``"max_q = 512   from int_symbol_dict"``.
        fix: What to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        op: str | None = None,
        where: Where | None = None,
        bound: Iterable[str] = (),
        fix: str | None = None,
    ) -> None:
        self.what, self.op, self.where, self.bound, self.fix = what, op, where, tuple(bound), fix
        super().__init__(self.render())
        self.add_note(f"  more:   {self.link()}")  # a note: tracebacks end with it, and str(error) is the message alone

    def add_bound(self, text: str) -> None:
        """Adds a line to what led there, which only who passes the error on knows."""
        self.bound += (text,)
        self.args = (self.render(),)

    def render(self) -> str:
        """The whole message, one line a question."""
        lines = [f"[{self.op}] {self.what}" if self.op else self.what]
        if self.where is not None:
            lines.append(f"  where:  {self.where}")
        lines += [f"  bound:  {text}" for text in self.bound]
        if self.fix:
            lines.append(f"  fix:    {self.fix}")
        return "\n".join(lines)

    @classmethod
    def link(cls) -> str:
        """The address of what the documentation tells of this kind of error, or of the nearest that it tells of."""
        known = next(kind for kind in cls.__mro__ if kind.__module__ == __name__)
        return f"{DOCS_URL}errors/#{known.__name__.lower()}"


class ShapeError(HetuError, ValueError):
    """Shapes that do not fit an op, a feed or each other."""


class DTypeError(HetuError, TypeError):
    """An element type that an op or a feed does not take."""


class UnboundSymbolError(HetuError):
    """A symbol's value was needed and nothing gives it one."""


class BindingError(HetuError, ValueError):
    """Values of symbols that contradict each other, a range, or what an op requires."""


class StrategyError(HetuError, ValueError):
    """A parallel strategy that does not exist, or does not fit the graph or what was fed."""


class PlanError(HetuError):
    """A plan that is not proven: a pair missed or doubled, a transfer unpaired, a buffer reused."""


class LoweringError(HetuError):
    """A node that no backend takes, with each one's reason."""


class CommunicationError(HetuError):
    """Pipelines that could not exchange what the plan says."""
