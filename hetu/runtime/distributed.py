"""Several processes: joining the others, and leaving them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from hetu import rng
from hetu.arguments import choice, is_dense, real, refuse
from hetu.backends.comm.compare import refuse_differences, refuse_errors
from hetu.backends.comm.control import Control
from hetu.backends.comm.distributed import DistributedWorld
from hetu.backends.comm.world import LocalWorld, Named, World, current_world, set_world
from hetu.backends.torch_private import count_process_groups
from hetu.errors import CommunicationError, caller, in_words
from hetu.parallel import Hardware
from hetu.parallel.choice.setting import chosen, set_hardware
from hetu.runtime.ranks.joining import Others
from hetu.shards import Shards

BACKENDS = ("gloo", "nccl")

SHORTEST, LONGEST = 0.1, 300_000_000
"""Bounds of a timeout, in seconds: below there is no time to answer, and ten years are within what torch can count."""

_attempts = count(1)
"""Numbers the attempts to join, so that what was written into the store in one is not read in the next."""

_made: list[Any] = []
"""Torch's world, if it was made here."""


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
    timeout = real(
        timeout,
        "timeout",
        f"a number of seconds from {SHORTEST:g} to {LONGEST:,}",
        lambda seconds: SHORTEST <= seconds <= LONGEST,
        op="init_distributed",
    )
    if backend is not None:
        choice(backend, "backend", BACKENDS, op="init_distributed")
    if current_world().is_distributed:
        return current_world()
    others = Others.find()
    if others is None:
        return current_world()
    own = chosen().hardware
    carrier = backend or others.backend()
    device = others.device(carrier)
    store: Any = PrefixStore(f"hetu {next(_attempts)}", others.store(timeout))
    # The control plane has a connection of its own: torch blocks all threads that use one while one of them waits.
    control = Control(store.clone(), others.rank, others.size, timeout, others.holder)
    said = {"backend": carrier, "generator": rng.get_state(), "hardware": own.to_json()}
    met = control.meet("init_distributed", said)
    fix = {"the backend": "give init_distributed the same backend on all ranks"}
    refuse_differences([{"the backend": one["backend"]} for one in met], "init_distributed", "init_distributed", fix)
    try:
        if not others.is_torchs:
            options: dict[str, Any] = {"rank": others.rank, "world_size": others.size}
            wait = timedelta(seconds=timeout)
            dist.init_process_group(carrier, store=PrefixStore("torch", store), timeout=wait, **options)
            _made[:] = [dist.group.WORLD]
        world = DistributedWorld(control, device, carrier)
    except (RuntimeError, ValueError) as error:
        control.lost("connecting to the other ranks", error)
    rng.set_state(*met[0]["generator"])  # what nobody fixed is that of rank 0
    _take_hardware(met[0]["hardware"])
    set_world(world)
    atexit.register(_leave_at_exit, world, os.getpid())
    return world


def use_hardware(hardware: Hardware) -> Hardware:
    """From now on ``strategy="auto"`` and ``method="auto"`` choose for this hardware.

    Before it is set, and unless the variable ``HETU_HARDWARE`` names a file of :meth:`Hardware.save`, they choose for
    an H100. After ``init_distributed`` all ranks call it, and all take that of rank 0, so that all choose the same.

    Args:
        hardware: The hardware.

    Returns:
        What is in force: that of rank 0.

    Raises:
        HetuError: If it is no hardware, on this rank; on the others a CommunicationError.
        CommunicationError: If a rank doesn't come.

    Example:
        >>> import hetu
        >>> hetu.use_hardware(hetu.Hardware.h100()).name
        'H100 SXM, NVLink 4'
    """
    failure, world = None, current_world()
    try:
        if not isinstance(hardware, Hardware):
            refuse(hardware, "hardware", "a hetu.Hardware", op="use_hardware", fix="pass hetu.Hardware.h100(), say")
        said = {"hardware": hardware.to_json()}
    except Exception as error:
        failure, said = error, {"error": in_words(error)}
    if isinstance(world, DistributedWorld):
        with world.lock, world.hanging_up():
            heard = world.control.tell(said, "use_hardware")
        if failure is None:
            refuse_errors(heard, "use_hardware", "use_hardware")
            said = heard[0]
    if failure is not None:
        raise failure
    return _take_hardware(said["hardware"])


def _take_hardware(text: str) -> Hardware:
    """Sets the hardware of a text, if that is another one than is set."""
    hardware = Hardware.from_json(text, "what rank 0 said")
    if hardware != chosen().hardware:
        set_hardware(hardware)
    return hardware


def _leave_at_exit(world: DistributedWorld, process: int) -> None:
    """The others shall not take the end of this script for the death of its process."""
    if os.getpid() == process:  # and not a fork of it
        world.leave()


def shutdown_distributed() -> None:
    """Leaves the other processes: later runs take place in this one alone.

    Process groups that hetu didn't make are left alone. So is torch's world if it was there before hetu, or if other
    process groups have been made in it since.

    Example:
        >>> import hetu
        >>> hetu.shutdown_distributed()  # nothing to leave in a process alone
    """
    world = current_world()
    set_world(LocalWorld())
    if isinstance(world, DistributedWorld):
        world.finish()
        world.leave()
        world.close()
        atexit.unregister(_leave_at_exit)
        if _made and _made.pop() is dist.group.WORLD and count_process_groups() == 1:
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
    by_rank = current_world().gather_values(partial(_values_of, value), "gather_shards", _check_counts)
    size, total = len(by_rank), sum(map(len, by_rank))
    return Shards([by_rank[r % size][r // size][1] for r in range(total)])


def _check_counts(counts: Sequence[int]) -> None:
    """Demands that the ranks hold the values of a strategy's pipelines."""
    if all(count == len(range(rank, sum(counts), len(counts))) for rank, count in enumerate(counts)):
        return
    raise CommunicationError(
        "the ranks hold values of different things: pipeline r runs on the rank of its number modulo their count",
        op="gather_shards",
        where=caller(),
        bound=[f"rank {rank}: {count} value{'s' * (count != 1)}" for rank, count in enumerate(counts)],
        fix="give what one run gave of one tensor, on all ranks; None where it gave None",
    )


def _values_of(value: Any) -> list[Named]:
    """The tensors of the pipelines that run here; their order is name enough."""
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
    return [(None, item) for item in own]
