"""Reads the command line, runs a command, and prints what it answers."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape

import hetu
from hetu.cli.answer import Answer, Exit, Unavailable
from hetu.errors import HetuError

COMMANDS = {
    "doctor": "shows what is installed and what will run where, and tests both ops",
    "plan": "shows who holds and computes what, and how long it will take",
    "verify": "proves the plans of every split and method, forward and backward",
    "trace": "writes the predicted timeline as a Chrome trace",
    "bench": "times both ops on this machine",
    "autotune": "searches for the fastest tiles of the Triton kernels on this GPU",
}
"""Commands with what they do; each is the module of its name, imported when it is asked for, since some bring torch."""


WIDTH = 120
"""Columns of what is printed into a file or a pipe."""


class _UsageError(Exception):
    """What argparse finds wrong."""


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}; see {self.prog} --help")


def _parser(command: str | None) -> ArgumentParser:
    """The parser, with the options of the command that is asked for."""
    parser = _Parser(prog="hetu", description="Context-parallel attention: what is here, what would run, and proofs.")
    parser.add_argument("--version", action="version", version=f"hetu {hetu.__version__}")
    chosen = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, what in COMMANDS.items():
        sub = chosen.add_parser(name, help=what, description=f"hetu {name} {what}.")
        sub.add_argument("--json", action="store_true", help="one JSON document on stdout, and nothing else")
        if name == command:
            import_module(f"hetu.cli.{name}").add_options(sub)
    return parser


def _answer(argv: Sequence[str]) -> Answer:
    command = next((item for item in argv if item in COMMANDS), None)
    try:
        args = _parser(command).parse_args(argv)
        answer: Answer = import_module(f"hetu.cli.{args.command}").run(args)
    except _UsageError as error:
        return _failure(str(error), None, Exit.REFUSED)
    except HetuError as error:
        return _failure(error.what, error.fix, Exit.REFUSED)
    except Unavailable as error:
        return _failure(str(error), None, Exit.UNAVAILABLE)
    except OSError as error:
        return _failure(str(error), None, Exit.UNAVAILABLE)
    return answer


def _failure(what: str, fix: str | None, code: Exit) -> Answer:
    told: list[Any] = [f"[bold]hetu:[/bold] {escape(what)}", *([f"  fix: {escape(fix)}"] if fix else [])]
    return Answer({"error": what, "fix": fix}, told, code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: What follows the program's name; None for that of the process.

    Returns:
        0 if it was done, 1 if a check did not hold, 2 if the arguments were refused, 3 if this machine lacks what the
        command needs.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if "--json" not in given:
        answer = _answer(given)
        file = sys.stderr if "error" in answer.data else sys.stdout
        console = Console(file=file, highlight=False, width=None if file.isatty() else WIDTH)
        for item in answer.shown:
            console.print(item, soft_wrap=isinstance(item, str))
        return int(answer.code)
    with redirect_stdout(sys.stderr):  # what libraries print is no part of the document
        answer = _answer(given)
    print(json.dumps(answer.data, indent=1))
    return int(answer.code)
