"""What the host does for a layer's attention over several ranks: how long it is busy, forward and backward.

Run it with torchrun, one process per GPU (or over gloo on CPUs, where the numbers are those of gloo):

    torchrun --nproc-per-node 2 benchmarks/host_ranks.py [--profile] [--one-gpu]

The GPU is kept busy meanwhile, so that the host never waits for it; what is timed is the time until a call returns. All
layers are one model's: one call does the backward of all of them. With ``--one-gpu`` the processes share a GPU, which
NCCL refuses: in its place is a group of torch's that moves nothing, so that only the host's times mean anything.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import hetu

LAYERS = 32
HEADS, KV_HEADS, HEAD_DIM = 16, 4, 128


def main() -> None:
    """Prints medians in µs, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of all ranks together")
    parser.add_argument("--one-gpu", action="store_true", help="all processes on one GPU, between which no row travels")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    chosen = parser.parse_args()
    with_gpu = torch.cuda.is_available()
    if with_gpu:
        torch.cuda.set_device(0 if chosen.one_gpu else int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if with_gpu and not chosen.one_gpu else "gloo")
    if chosen.one_gpu:
        move_nothing()
    found = measure(torch.device("cuda" if with_gpu else "cpu"), chosen.tokens)
    if chosen.profile:
        with cProfile.Profile() as profile:
            layers(*make(torch.device("cuda" if with_gpu else "cpu"), chosen.tokens))
        if dist.get_rank() == 0:
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    if dist.get_rank() == 0:
        for name, value in found.items():
            print(f"{name:45} {value:8.1f} us")
        if chosen.json:
            chosen.json.write_text(json.dumps(found, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def move_nothing() -> None:
    """Puts torch's group for tests, whose transfers are done at once, in the place of NCCL's; the hosts' stays gloo."""
    from torch._C._distributed_c10d import FakeProcessGroup

    from hetu.backends.comm import connect, groups, peers

    plain = connect.connect

    def connected(store: Any, rank: int, size: int, backend: str, timeout: Any) -> Any:
        is_for_hosts = backend == "gloo"
        return plain(store, rank, size, backend, timeout) if is_for_hosts else _fake(FakeProcessGroup, rank, size)

    connect.connect = peers.connect = connected
    groups._carrier = lambda group: ("nccl", torch.device("cuda", 0))
    peers.Peers.open_links = lambda *_, **__: None  # type: ignore[method-assign]


def _fake(kind: Any, rank: int, size: int) -> Any:
    create = getattr(kind, "_create_internal", kind)  # which one depends on the version of torch
    return create(rank, size)


def make(device: torch.device, tokens: int) -> tuple[Any, ...]:
    """A context parallelism, and q, k, v and the output's gradient."""
    cp = hetu.functional.ContextParallel(torch.tensor([0, tokens // 3, tokens]))
    rows, dtype = len(cp.position_ids), torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, dout = (
        torch.randn(rows, heads, HEAD_DIM, device=device, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    return cp, *(x.requires_grad_() for x in (q, k, v)), dout


def layers(cp: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> tuple[float, float]:
    """Seconds that the host is busy with the forward and the backward of a layer, the mean of many."""
    start = time.perf_counter()
    outs = [hetu.functional.parallel_attn(q, k, v, cp) for _ in range(LAYERS)]
    between = time.perf_counter()
    torch.autograd.grad(outs, (q, k, v), [dout] * LAYERS)
    return (between - start) / LAYERS, (time.perf_counter() - between) / LAYERS


def measure(device: torch.device, tokens: int) -> dict[str, float]:
    """Medians of many steps, in µs."""
    given = make(device, tokens)
    for _ in range(3):
        layers(*given)
    times = []
    for _ in range(15):
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(layers(*given))
    seen, new = [], []
    for i in range(20):
        for lengths, kept in ((tokens // 3, seen), (17 + i, new)):
            dist.barrier()
            if device.type == "cuda":
                torch.cuda.synchronize()
            cu = torch.tensor([0, lengths, tokens])
            start = time.perf_counter()
            cp = hetu.functional.ContextParallel(cu)
            kept.append(time.perf_counter() - start)
            hetu.functional.parallel_attn(*given[1:4], cp)
    values = {
        "forward of a layer": [x for x, _ in times],
        "backward of a layer": [x for _, x in times],
        "ContextParallel of seen lengths": seen[1:],
        "ContextParallel of new lengths": new[1:],
    }
    return {name: statistics.median(of) * 1e6 for name, of in values.items()}


if __name__ == "__main__":
    main()
