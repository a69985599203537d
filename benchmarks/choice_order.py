"""Whether estimates put strategies into the order of the virtual clock: pairs of strategies of random cases.

    python benchmarks/choice_order.py [--cases 40] [--json FILE]

A case has a number of pipelines, tokens, perhaps documents, a mask, heads and hardware; its strategies are all splits
with even and uneven lengths under three methods. Nothing is measured, so the numbers are the same on every machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from hetu.parallel import SPLITS, Hardware, Heads, Layout, Mask, build_plan
from hetu.parallel.choice.price import Attention, Pricer, layout_loads

HARDWARE = [Hardware.h100(), Hardware.h200(), Hardware.cpu(), Hardware.hosts(link_bytes=450e9)]
HEADS = [Heads(32, 8, 128, 2), Heads(16, 16, 64, 2), Heads(8, 2, 128, 4)]
METHODS = ("direct", "ulysses", "ring")


def main() -> None:
    """Prints the share of pairs that are in the right order, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    chosen = parser.parse_args()
    pairs = [pair for case in range(chosen.cases) for pair in case_pairs(np.random.default_rng(case))]
    found = {"cases": chosen.cases, "pairs": len(pairs), "right": sum(pairs) / max(len(pairs), 1)}
    print(f"{found['right']:.1%} of {found['pairs']:,} pairs of {chosen.cases} cases are in the virtual clock's order")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


def case_pairs(rng: np.random.Generator) -> list[bool]:
    """For each two strategies of a random case whose times differ whether estimates differ the same way."""
    times = case_times(rng)
    apart = [(a, b) for a, b in itertools.combinations(times, 2) if abs(a[0] - b[0]) > 1e-3 * max(a[0], b[0])]
    return [(a[0] < b[0]) == (a[1] < b[1]) for a, b in apart]


def case_times(rng: np.random.Generator) -> list[tuple[float, float]]:
    """The virtual clock's time and the estimate of each strategy of a random case."""
    count, total = int(rng.choice([2, 4, 8])), int(2 ** rng.uniform(10, 17))
    hardware, heads = HARDWARE[rng.integers(len(HARDWARE))], HEADS[rng.integers(len(HEADS))]
    mask = Mask.causal() if rng.random() < 0.8 else Mask.full()
    cu = None
    if rng.random() < 0.5:
        cu = np.array([0, *np.sort(rng.integers(0, total + 1, rng.integers(1, 40))), total])
    shares, times = rng.uniform(0.5, 1.5, count), []
    for weights in (np.ones(count), shares):
        lengths = np.floor(weights / weights.sum() * total).astype(int).tolist()
        lengths[0] += total - sum(lengths)
        for split in SPLITS:
            layout = Layout.build(lengths, [0] * count, split=split, cu_seqlens=cu)
            for method in METHODS:
                clock = build_plan(layout, method=method, mask=mask, heads=heads).cost(hardware).time
                attention = Attention(mask, heads, method)
                times.append((clock, Pricer(attention, hardware).price(layout_loads(layout, attention)).estimate.time))
    return times


if __name__ == "__main__":
    main()
