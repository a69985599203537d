"""Ranks that end at one of their messages, whichever it is, and what the others do meanwhile."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Collection
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from support import faults

import hetu

MESSAGES = (
    *("isend", "irecv", "all_gather", "all_to_all_single", "all_gather_into_tensor", "broadcast", "all_reduce"),
    *("all_gather_single", "new_group"),
)
"""All by which hetu reaches other ranks, and the making of process groups."""


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt


def _exit() -> NoReturn:
    raise SystemExit(3)


ENDS = {
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ends": partial(os._exit, 1),
    "is interrupted": _interrupt,
    "exits": _exit,
}
"""How a rank may end; after the last two its process lives."""


def end_at(number: int, how: str) -> None:
    """Lets this process end when it comes to its ``number``-th message from now on."""
    left = [number]

    def before(plain: Any, *arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            ENDS[how]()
        return plain(*arguments, **options)

    for name in MESSAGES:
        if hasattr(dist, name):
            setattr(dist, name, partial(before, getattr(dist, name)))


def work(ending: Collection[int], number: int, how: str, elsewhere: Collection[int] = (), warm: bool = False) -> None:
    """Trains under two strategies and gathers, until something fails.

    Args:
        ending: The ranks that end.
        number: At which of their messages.
        how: One of ``ENDS``.
        elsewhere: The ranks that do something else for a while after the first round.
        warm: Whether a round of both strategies comes before the messages are counted.
    """
    rank = hetu.init_distributed().rank
    for turn in range(2 if warm else 0):
        faults.run(fetch="train", strategy=turn)
    if rank in ending:
        end_at(number, how)
    if rank in elsewhere:
        time.sleep(4.0)
    for turn in itertools.count():
        faults.run(fetch="train", strategy=turn % 2)
        hetu.gather_shards(torch.ones(rank + 1))


def leave(ending: Collection[int]) -> None:
    """Some ranks leave in good order after a run; the others go on, until something fails."""
    faults.run()
    if hetu.init_distributed().rank in ending:
        hetu.shutdown_distributed()
    else:
        while True:
            faults.run()
