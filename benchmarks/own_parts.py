"""What planning costs one rank of many: the layout, and its own part of the forward and of the backward.

8 documents per rank, a long-tailed mix of about a thousand tokens each, with ``direct``. Limits are those of ``sym``;
the layout of ``balanced`` may take as much again. Times are those of this process on the processor, for planning is
done by one thread: what else runs on the machine counts less. Prints a table; ``--verify`` also proves a plan of 64
ranks.

    python benchmarks/own_parts.py [--ranks 8 64 256] [--split sym] [--verify]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from tables import Row, print_table
from tables import processor_timed as timed

from hetu.parallel import SPLITS, Heads, Layout, build_plan

LIMITS = {8: 0.5, 64: 5.0, 256: 20.0, 1024: 60.0}
"""Milliseconds for layout, forward and backward of one rank's part, by ranks."""

HEADS = Heads(num_q=8, num_kv=2, head_dim=64, itemsize=2)


class Job:
    """New documents over so many ranks, and the plan of one of these."""

    def __init__(self, ranks: int, seed: int, split: str) -> None:
        lengths = np.minimum(np.random.default_rng(seed).lognormal(6, 1.2, 8 * ranks).astype(np.int64), 16384)
        self.cu, self.ranks, self.split = np.append(0, lengths.cumsum()), ranks, split
        each, more = divmod(int(self.cu[-1]), ranks)
        self.held, self.rank = [each + (r < more) for r in range(ranks)], seed * 5 % ranks

    def lay_out(self) -> None:
        self.layout = Layout.build(self.held, [0] * self.ranks, split=self.split, cu_seqlens=self.cu)

    def forward(self) -> None:
        self.plan = build_plan(self.layout, method="direct", heads=HEADS)
        self.plan.need([self.rank])

    def backward(self) -> None:
        self.plan.backward().need([self.rank])


def own_part(ranks: int, split: str) -> Iterator[Row]:
    """The three steps of one rank, and all of them."""
    jobs = (Job(ranks, seed, split) for seed in range(max(4, 320 // ranks)))
    steps = "lay_out", "forward", "backward"
    times = [[timed(getattr(job, step), 1e3) for step in steps] for job in jobs]
    for number, step in enumerate(steps):
        yield Row.of(f"{ranks} ranks, {split}: {step}", "ms", [one[number] for one in times])
    yield Row.of(f"{ranks} ranks, {split}: all three", "ms", [sum(one) for one in times], LIMITS.get(ranks))


def proof(ranks: int, split: str) -> Row:
    """The proof of the forward of all parts, which are built beforehand."""
    job = Job(ranks, 0, split)
    job.lay_out(), job.forward()
    job.plan.need(range(ranks))
    return Row.of(f"{ranks} ranks, {split}: verify()", "s", [timed(job.plan.verify, 1)], 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--split", choices=SPLITS, default="sym")
    parser.add_argument("--verify", action="store_true", help="also prove a plan of 64 ranks")
    arguments = parser.parse_args()
    rows = [row for ranks in arguments.ranks for row in own_part(ranks, arguments.split)]
    print_table(rows + [proof(64, arguments.split)] * arguments.verify)


if __name__ == "__main__":
    main()
