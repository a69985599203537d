"""The program that is interpreted now; there is one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from support.gluon_interpreter.scheduler import Scheduler
from support.gluon_interpreter.values import KernelError

_running: list[Scheduler] = []


def now() -> Scheduler:
    """The program."""
    if not _running:
        raise KernelError("no kernel runs")
    return _running[-1]


@contextmanager
def running(scheduler: Scheduler) -> Iterator[None]:
    """Makes it this one."""
    _running.append(scheduler)
    try:
        yield
    finally:
        _running.pop()
