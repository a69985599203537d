"""Measuring what predictions are made for: how fast this machine, or this group of processes, attends and sends."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from hetu import functional
from hetu.arguments import path as as_path
from hetu.backends.comm.compare import refuse_errors
from hetu.backends.comm.distributed import DistributedWorld
from hetu.backends.comm.world import World, current_world
from hetu.errors import HetuError, in_words
from hetu.parallel import Hardware, Mask, Rate
from hetu.runtime.distributed import use_hardware
from hetu.runtime.modes import in_own_modes

HEADS = 8
_SMALL, _LARGE = 1 << 10, 1 << 22
"""Bytes of the messages that tell a link's latency and bandwidth."""

_MASKS = {"causal": Mask.causal(), "full": Mask.full(), "window": None}


@in_own_modes
def calibrate(path: str | os.PathLike[str] | None = None) -> Hardware:
    """Measures this machine in seconds, or a group of processes, and takes what it found for choices from here on.

    It times attention forward and backward on packs of documents of several lengths, for some sizes of heads and kinds
    of masks, the smallest launch, and, after ``hetu.init_distributed()``, messages between two ranks that share a host
    and between two that don't, as far as there are such. Bfloat16 on a GPU, float32 on a CPU.

    Under several processes all ranks call it, and all get what rank 0 measured.

    Args:
        path: Where to write the result, as JSON: on rank 0. None writes nothing.

    Returns:
        The hardware; ``hetu.Hardware.load(path)`` reads it again, and ``HETU_HARDWARE=path`` makes it the process's.

    Raises:
        HetuError: If the path is none, on this rank; on the others a CommunicationError.
        CommunicationError: If a rank doesn't come.
        OSError: If the file can't be written.
    """
    world = current_world()
    name, hosts = _meet(path, world)
    device = world.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    launch, rates = _rates(device)
    base = Hardware.h100() if device.type == "cuda" else Hardware.cpu()
    inside, between = _links(world, device, hosts)
    found = Hardware(
        flops=max(rate.flops for rate in rates if not rate.is_backward),
        link_bytes=base.link_bytes if inside is None else inside[1],
        latency=base.latency if inside is None else inside[0],
        memory_bytes=_memory(device, world.size),
        launch=launch,
        host_latency=None if between is None else between[0],
        host_link_bytes=None if between is None else between[1],
        rates=tuple(rates),
        name=f"{_name_of(device)}, measured on {time.strftime('%Y-%m-%d')} with torch {torch.__version__}",
    )
    found = use_hardware(found)
    if name is not None and world.rank == 0:
        found.save(name)
    return found


def _meet(path: Any, world: World) -> tuple[str | None, list[str]]:
    """The path, and the host of each rank. What one of them refuses is told to all, before anything is measured."""
    name, said = None, {"host": socket.gethostname()}
    failure: HetuError | None = None
    try:
        name = None if path is None else as_path(path, op="calibrate")
    except HetuError as error:
        failure, said = error, {"error": in_words(error)}
    heard = [said]
    if isinstance(world, DistributedWorld):
        with world.lock, world.hanging_up():
            heard = world.control.tell(said, "calibrate")
        if failure is None:
            refuse_errors(heard, "calibrate", "calibrate")
    if failure is not None:
        raise failure
    return name, [one["host"] for one in heard]


# Attention


def _rates(device: torch.device) -> tuple[float, list[Rate]]:
    """Seconds of the smallest attention, and the rates of larger ones without that."""
    is_gpu = device.type == "cuda"
    tokens, lengths, dims = (32768, (512, 2048, 8192, 32768), (64, 128)) if is_gpu else (1024, (64, 256, 1024), (64,))
    spent = {is_backward: _attend(device, 8, 8, 64, "causal", is_backward) for is_backward in (False, True)}
    rates = []
    for head_dim in dims:
        for kind in _MASKS:
            for length in lengths:
                for is_backward in (False, True):
                    seconds, pairs = _attend(device, tokens, length, head_dim, kind, is_backward)
                    flops = (10 if is_backward else 4) * head_dim * HEADS * pairs
                    seconds = max(seconds - spent[is_backward][0], seconds / 4)  # a launch is counted by itself
                    rates.append(Rate(pairs / tokens, flops / seconds, head_dim, kind, is_backward))
    return spent[False][0], rates


def _attend(
    device: torch.device, tokens: int, length: int, head_dim: int, kind: str, is_backward: bool
) -> tuple[float, int]:
    """Seconds of an attention to documents of a length, and its pairs."""
    mask = _MASKS[kind] or Mask.window(max(length // 4, 1), 0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = torch.Generator(device).manual_seed(0)  # torch's own are the user's
    shape = (tokens, HEADS, head_dim)
    q, k, v = (torch.randn(shape, generator=draw, device=device, dtype=dtype) for _ in range(3))
    cu = torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cpu")

    def attend() -> Any:
        return functional.attn_varlen(q, k, v, cu, cu, mask=mask)

    if is_backward:
        with torch.enable_grad():
            inputs = [x.requires_grad_() for x in (q, k, v)]
            out = attend()
        grad = torch.ones_like(out)
        seconds = _least(device, lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
    else:
        with torch.no_grad():
            seconds = _least(device, attend)
    return seconds, int(mask.pairs(torch.diff(cu).numpy().astype("int64")).sum())


def _least(device: torch.device, call: Callable[[], Any], samples: int = 4) -> float:
    """The least seconds of some calls, after one that may compile."""
    times = []
    for _ in range(samples):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Links


def _links(world: World, device: torch.device, hosts: Sequence[str]) -> Iterator[tuple[float, float] | None]:
    """Latency and bytes per second inside a host and between hosts; None where no two ranks are such."""
    pairs: list[tuple[int, int] | None] = [None, None]
    if isinstance(world, DistributedWorld):
        for r in range(1, world.size):
            for other in range(r):
                kind = int(hosts[r] != hosts[other])
                pairs[kind] = pairs[kind] or (other, r)
        for pair in pairs:
            yield None if pair is None else _ping(world, device, *pair)
    else:
        yield from (None, None)


def _ping(world: DistributedWorld, device: torch.device, low: int, high: int) -> tuple[float, float]:
    """Latency and bytes per second of messages between two ranks, there and back; all ranks hear of them."""
    times = [0.0, 0.0]
    with world.lock, world.hanging_up():
        for i, size in enumerate((_SMALL, _LARGE)):
            if world.rank in (low, high):
                message = torch.zeros(size, dtype=torch.uint8, device=device)
                times[i] = _least(device, partial(_there_and_back, world, message, low, high), 8) / 2
        said = world.control.tell({"times": times}, "calibrate")
    small, large = said[low]["times"]
    return small, (_LARGE - _SMALL) / max(large - small, 1e-9)


def _there_and_back(world: DistributedWorld, message: torch.Tensor, low: int, high: int) -> None:
    other = high if world.rank == low else low
    for sender in (low, high):
        connection = world.up if sender == low else world.down
        call = connection.send if world.rank == sender else connection.recv
        call([message], other, 0).wait()
        _wait(message.device)


# What it is


def _memory(device: torch.device, processes: int) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / processes


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)
