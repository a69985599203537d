"""Several processes: joining those that torchrun started, and leaving them."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from hetu import rng
from hetu.arguments import is_dense, refuse
from hetu.backends.comm.control import Control
from hetu.backends.comm.distributed import DistributedWorld
from hetu.backends.comm.world import LocalWorld, World, current_world, set_world
from hetu.errors import CommunicationError, HetuError, caller
from hetu.shards import Shards

BACKENDS = ("gloo", "nccl")
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun puts into the environment, among others."""

NCCL_ENVIRONMENT = {
    # Read when CUDA starts: messages of all peers at a time must be able to be under way.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # Our own watch stops messages that nobody answers. torch's would end the process, or go on with what was in memory.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}
"""Set where the user set nothing."""


def init_distributed(backend: str | None = None, timeout: float = 300.0) -> World:
    """Joins the other processes that ``torchrun`` started; every process calls it, before its first run.

    Afterwards each process runs the pipeline of its rank: it feeds its own shard, or ``hetu.Shards`` of all pipelines,
    and gets its own result. Under a strategy with fewer pipelines than processes the ranks past the last take no part,
    but their parameters follow; with more pipelines than processes, process k runs pipelines k, k + size, and so on.

    Not started by torchrun, it changes nothing: all pipelines run in this process, so a script can always call it.

    Args:
        backend: ``"nccl"`` or ``"gloo"``; None for nccl where there is CUDA, else gloo. With nccl a process uses the
            GPU of its ``LOCAL_RANK``; several may share one, to try things out, where the environment says
            ``NCCL_MULTI_RANK_GPU_ENABLE=1`` and NCCL is 2.30 or later.
        timeout: Seconds that a rank waits for another before it gives up.

    Returns:
        The world: its ``rank``, ``size`` and ``device``, and whether it ``is_distributed``.

    Raises:
        HetuError: If there is no such backend, the environment is not whole, or there are fewer GPUs than processes.
        CommunicationError: If not all processes come in time; it names those that didn't.

    Example:
        >>> import hetu
        >>> world = hetu.init_distributed()
        >>> world.rank, world.size
        (0, 1)
    """
    if current_world().is_distributed:
        return current_world()
    given = [name for name in LAUNCHED if name in os.environ]
    if not given or os.environ.get("WORLD_SIZE") == "1":
        return current_world()
    if len(given) < len(LAUNCHED):
        missing = ", ".join(name for name in LAUNCHED if name not in given)
        _refuse(f"the environment has {', '.join(given)}, but not {missing}", "start the script with torchrun")
    if not timeout > 0:
        _refuse(f"timeout is {timeout!r}", "give a positive number of seconds")
    chosen = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if chosen not in BACKENDS:
        _refuse(f"there is no backend {chosen!r}", f"use one of {', '.join(BACKENDS)}")
    device = _own_device(chosen)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _connect(rank, timeout)
    control = Control(PrefixStore("hetu", store), rank, size, timeout)
    control.meet("init_distributed")
    if not dist.is_initialized():
        dist.init_process_group(
            chosen,
            store=PrefixStore("torch", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    world = DistributedWorld(control, device, chosen)
    said = control.tell({"generator": rng.get_state()}, "init_distributed")
    rng.set_state(*said[0]["generator"])  # what nobody fixed is that of rank 0
    set_world(world)
    return world


def shutdown_distributed() -> None:
    """Leaves the other processes: later runs take place in this one alone."""
    world = current_world()
    set_world(LocalWorld())
    if isinstance(world, DistributedWorld):
        world.finish()
        world.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def gather_shards(value: Any) -> Shards:
    """All pipelines' values of something that was fetched, on every rank.

    Args:
        value: What a run gave here: a tensor, ``hetu.Shards`` of the pipelines that run here, or None on a rank without
            any. All ranks call it.

    Returns:
        One tensor per pipeline, in order. In one process that is what was fetched.

    Raises:
        HetuError: If it is something else, on this rank; on the others a CommunicationError.
        CommunicationError: If a rank doesn't come, or the ranks give values of different things.

    Example:
        >>> import hetu, torch
        >>> len(hetu.gather_shards(torch.ones(2)))
        1
    """
    world = current_world()
    read = partial(_values_of, value)
    return Shards(world.gather_values(read) if isinstance(world, DistributedWorld) else read())


def _values_of(value: Any) -> list[torch.Tensor]:
    """The tensors of the pipelines that run here."""
    own = list(value) if isinstance(value, Shards) else [] if value is None else [value]
    for item in own:
        if not isinstance(item, torch.Tensor) or not is_dense(item) or item.is_complex():
            refuse(
                item,
                "value",
                "what a run gave of one tensor: a tensor, hetu.Shards of them, or None",
                op="gather_shards",
                fix="fetch it by g.run(...); of several tensors, or several micro-batches, gather each by itself",
            )
    return own


def _own_device(backend: str) -> torch.device:
    """The CPU for gloo; for NCCL the GPU of this process's number on its host, which becomes torch's current one.

    NCCL lets several processes share a GPU, from version 2.30 on and if the environment asks for it. They take turns.
    """
    if backend == "gloo":
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
    if local >= count and not (count and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"):
        _refuse(
            f"this is process {local} of its host, which has {count} GPUs",
            "start one process a GPU, or pass backend='gloo'",
        )
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        _refuse(
            "CUDA_DEVICE_MAX_CONNECTIONS is 1, with which messages to several peers wait for each other for ever",
            "unset it, or set it to 32",
        )
    for name, value in NCCL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.cuda.set_device(local % count)
    return torch.device("cuda", local % count)


def _connect(rank: int, timeout: float) -> Any:
    """The store of torchrun's agent, or that of rank 0; doesn't wait for the others."""
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = rank == 0 and not has_agent
    try:
        if not is_master:
            _wait_for_port(address, port, timeout)
        wait = timedelta(seconds=timeout)
        store = TCPStore(address, port, is_master=is_master, wait_for_workers=False, timeout=wait)
    except (RuntimeError, OSError) as error:
        what = f"the store at {address}:{port} can't be reached within {timeout:g} s"
        fix = "see that rank 0 has started, and that its address can be reached from here"
        raise CommunicationError(what, op="init_distributed", where=caller(), bound=[str(error)], fix=fix) from error
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_port(address: str, port: int, timeout: float) -> None:
    """Waits until somebody listens there; torch's own attempts may take twice the time they are given."""
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), max(until - time.monotonic(), 0.01)).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def _refuse(what: str, fix: str) -> Any:
    raise HetuError(what, op="init_distributed", where=caller(), fix=fix)
