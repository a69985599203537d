"""What the host does for a layer's attention over several ranks: how long it is busy, forward and backward.

Run it with torchrun, one process per GPU (or over gloo on CPUs, where the numbers are those of gloo):

    torchrun --nproc-per-node 2 benchmarks/host_ranks.py [--profile]

The GPU is kept busy meanwhile, so that the host never waits for it; what is timed is the time until a call returns.
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
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    chosen = parser.parse_args()
    with_gpu = torch.cuda.is_available()
    if with_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if with_gpu else "gloo")
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
    for out in outs:
        torch.autograd.grad(out, (q, k, v), dout)
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
