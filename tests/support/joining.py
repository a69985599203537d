"""Ranks that join in other ways than torchrun's, and what else they do with torch's process groups."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from support import faults

import hetu

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


def start_torch(how: str, place: str, backend: str = "gloo") -> None:
    """Makes torch's world as other launchers do.

    Args:
        how: What the environment tells: ``"environment"`` for all, ``"no environment"`` for nothing, ``"another"`` for
            numbers of something else.
        place: Where the processes meet, for torch; the environment may tell that, too.
        backend: Torch's own.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if how == "environment":
        place = "env://"
    else:
        for name in LAUNCHERS:
            os.environ.pop(name, None)
    if how == "another":
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    wait = timedelta(seconds=60)
    dist.init_process_group(backend, init_method=place, rank=rank, world_size=size, timeout=wait)


def joined(how: str, place: str, backend: str = "gloo") -> Any:
    """Joins torch's world, runs and leaves: its rank and size, what the run gave, and whether torch's is whole."""
    start_torch(how, place, backend)
    world = hetu.init_distributed(timeout=30)
    found = world.rank, world.size, faults.run()
    hetu.shutdown_distributed()
    return *found, is_whole()


def is_whole() -> bool:
    """Whether messages get through torch's own world."""
    if not dist.is_initialized():
        return False
    summed = torch.ones(1)
    dist.all_reduce(summed)
    return int(summed) == dist.get_world_size()


def torchs_alone() -> Any:
    """A world of torch's of one process is none."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return hetu.init_distributed(timeout=1).size, dist.is_initialized()


def groups_outlive(breaks: bool) -> list[bool]:
    """Process groups of the user's, in a world that hetu made: whether they work after hetu has left."""
    hetu.init_distributed("gloo", timeout=30)
    rank = dist.get_rank()
    everyone, pair = dist.new_group([0, 1, 2]), dist.new_group([0, 2])
    faults.run()
    if breaks:
        made = faults.script()
        try:
            faults.run({1: faults.at_the_transfer("raises", 1)}, tokens=13)
        except hetu.HetuError:
            pass
        else:
            raise AssertionError(f"{made} ran")
    hetu.shutdown_distributed()
    numbers = [torch.ones(1), torch.ones(1)]
    dist.all_reduce(numbers[0], group=everyone)
    if rank != 1:
        dist.all_reduce(numbers[1], group=pair)
    return [int(numbers[0]) == 3, rank == 1 or int(numbers[1]) == 2, dist.is_initialized()]


def in_and_out(times: int) -> list[bool]:
    """Joins, runs and leaves several times: whether torch has a world afterwards."""
    found = []
    for _ in range(times):
        hetu.init_distributed("gloo", timeout=30)
        faults.run()
        hetu.shutdown_distributed()
        found.append(dist.is_initialized())
    return found


def again(timeout: float, who: int) -> float:
    """All leave, and one rank joins once more: the seconds until that is refused."""
    hetu.shutdown_distributed()
    return refused(lambda: hetu.init_distributed("gloo", timeout=timeout)) if rank() == who else 0.0


def refused(join: Callable[[], Any]) -> tuple[str, float]:
    """The error of joining, and after how many seconds it came."""
    start = time.monotonic()
    try:
        join()
    except hetu.HetuError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("it was not refused")


def rank() -> int:
    return int(os.environ["RANK"])


def with_backends(backends: list[str]) -> tuple[str, float]:
    """Each rank asks for a backend of its own, as if all were there."""
    from hetu.runtime.ranks.joining import Others

    Others.device = lambda self, backend: torch.device("cpu")  # type: ignore[method-assign]
    return refused(lambda: hetu.init_distributed(backends[rank()], timeout=30))


def as_rank(number: int) -> tuple[str, float]:
    """Joins under a number that another process may have."""
    os.environ["RANK"] = str(number)
    return refused(lambda: hetu.init_distributed("gloo", timeout=3))
