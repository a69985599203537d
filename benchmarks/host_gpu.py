"""What one attention call costs the host when its kernels run on a GPU.

Calls follow each other without waiting, on inputs so small that the GPU is always done first: the time of a call is the
host's. The launch of the kernel alone is measured too, and taken off the others: what is left is what hetu adds.
Lengths are on the host, q, k and v on the device. Quartiles are over rounds, of the median call of each.

    python benchmarks/host_gpu.py [--out DIR] [--write-docs]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tables import DOCS, ROOT, Row, keep, print_table, timed

import hetu
import hetu.functional

HEADS, KV_HEADS, HEAD_DIM, TOKENS, DOCUMENTS = 8, 2, 64, 1024, 16
BATCH, WARM_UP = 40, 8
LIMITS = {"g.run, lengths seen before": 80, "g.run, new lengths": 250, "functional, lengths seen before": 30}


class Case:
    """A graph that holds one ``attn_varlen``, and lengths to run it with."""

    def __init__(self, requires_grad: bool = False) -> None:
        self.random = np.random.default_rng(0)
        rows = hetu.IntSymbol("rows")
        with hetu.graph("define_and_run", device="cuda") as self.graph:
            widths = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
            self.qkv = [hetu.placeholder(hetu.bfloat16, [rows, n, HEAD_DIM], name=name) for name, n in widths.items()]
            self.cu_seqlens = hetu.placeholder(hetu.int32, [hetu.IntSymbol("docs") + 1], name="cu_seqlens")
            cu_seqlens = self.cu_seqlens, self.cu_seqlens
            self.out = hetu.attn_varlen(*self.qkv, HEAD_DIM, *cu_seqlens, is_causal=True)[0]
        self.data = [
            torch.randn(TOKENS, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=requires_grad)
            for n in (HEADS, KV_HEADS, KV_HEADS)
        ]

    def lengths(self) -> torch.Tensor:
        """New cumulative lengths of as many documents with as many tokens."""
        lengths = self.random.multinomial(TOKENS, self.random.dirichlet(np.ones(DOCUMENTS)))
        return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)

    def run(self, cu_seqlens: torch.Tensor) -> Any:
        feeds: dict[Any, Any] = dict(zip(self.qkv, self.data, strict=True))
        return self.graph.run(self.out, feeds | {self.cu_seqlens: cu_seqlens})

    def call(self, cu_seqlens: torch.Tensor) -> Any:
        return hetu.functional.attn_varlen(*self.data, cu_seqlens, cu_seqlens, is_causal=True)


def bare_launch(case: Case, cu_seqlens: torch.Tensor) -> Callable[[], Any]:
    """The launch that a run makes of its compiled kernel, caught on its way: what no host code can save."""
    from hetu.backends.triton import launcher

    launch, caught = launcher.launch, list[Callable[[], Any]]()

    def note(*arguments: Any) -> None:
        caught.append(partial(launch, *arguments))
        launch(*arguments)

    launcher.launch = note
    try:
        case.run(cu_seqlens)
    finally:
        launcher.launch = launch
    return caught[-1]


def quick(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of a call: the median of a batch without its first ones. The device is waited for before it only."""
    torch.cuda.synchronize()
    return median([timed(call, 1e6) for call in calls][WARM_UP:])


def rows(rounds: int) -> list[Row]:
    """All are measured in turns, so that what disturbs the host for a while disturbs all of them."""
    case, learning = Case(), Case(requires_grad=True)
    seen = case.lengths()

    def known(call: Callable[[torch.Tensor], Any]) -> list[Callable[[], Any]]:
        return [partial(call, seen)] * BATCH

    def new(call: Callable[[torch.Tensor], Any]) -> list[Callable[[], Any]]:
        return [partial(call, case.lengths()) for _ in range(BATCH)]

    batches: dict[str, Callable[[], list[Callable[[], Any]]]] = {
        "g.run, lengths seen before": lambda: known(case.run),
        "g.run, new lengths": lambda: new(case.run),
        "functional, lengths seen before": lambda: known(case.call),
        "functional, new lengths": lambda: new(case.call),
        "functional with gradients, the forward": lambda: known(learning.call),
    }
    for _ in range(20):  # compiles and fills caches
        case.run(seen), case.call(seen), case.run(case.lengths()), case.call(case.lengths())
    launch = bare_launch(case, seen)
    launches: list[float] = []
    over: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(rounds):
        launches.append(quick([launch] * BATCH))
        for name, batch in batches.items():
            over[name].append(quick(batch()) - launches[-1])
    measured = [Row.of(f"{name}, less the launch", "µs", samples, LIMITS.get(name)) for name, samples in over.items()]
    return [Row.of("the kernel's launch alone", "µs", launches), *measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--write-docs", action="store_true", help=f"also write into {DOCS.relative_to(ROOT)}")
    arguments = parser.parse_args()
    measured = rows(60)
    print_table(measured)
    keep("host_gpu", measured, arguments.write_docs, arguments.out, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
