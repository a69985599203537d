"""Predicted against measured: how well the virtual clock knows this machine, on two or more processes.

    torchrun --nproc-per-node 2 benchmarks/predict.py [--cases 30] [--json FILE]

It calibrates first. A case has random documents, lengths of the pipelines, and a mask; its strategies are splits and
methods.
What a run costs the host beside the plan is measured once, on a run of a few tokens, and added to every prediction.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hetu
from hetu.parallel import Heads, Layout, build_plan

NUM_Q, NUM_KV, HEAD_DIM = 8, 4, 64
STRATEGIES = (("normal", "direct"), ("sym", "direct"), ("balanced", "direct"), ("sym", "ulysses"), ("sym", "ring"))
MASKS = (hetu.Mask.causal(), hetu.Mask.full())


def main() -> None:
    """Prints the errors and the share of pairs in the right order, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--longest", type=int, default=2048, help="tokens of all pipelines together, at most")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    world = hetu.init_distributed()
    hardware = hetu.calibrate()
    overhead = 0.0
    rows = []
    for number in range(-1, chosen.cases):
        case = random_case(np.random.default_rng(number + 1), world.size, chosen.longest if number >= 0 else 16)
        for split, method in STRATEGIES[: 1 if number < 0 else None]:
            measured, predicted = measure(case, split, method, hardware, chosen.samples)
            if number < 0:
                overhead = max(measured - predicted, 0.0)
                continue
            rows.append(
                {
                    "case": number,
                    "split": split,
                    "method": method,
                    "tokens": sum(case["lengths"]),
                    "measured": measured,
                    "predicted": predicted + overhead,
                }
            )
    if world.rank == 0:
        found = summary(rows) | {"overhead": overhead, "ranks": world.size, "hardware": json.loads(hardware.to_json())}
        print(json.dumps({name: value for name, value in found.items() if name != "hardware"}, indent=1))
        if chosen.json:
            chosen.json.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")
    hetu.shutdown_distributed()


def random_case(rng: np.random.Generator, count: int, longest: int) -> dict[str, Any]:
    """Documents, tokens of each pipeline, and a mask; the same on all ranks."""
    total = int(rng.integers(longest // 4, longest + 1))
    shares = rng.uniform(0.6, 1.4, count) if rng.random() < 0.5 else np.ones(count)
    lengths = np.floor(shares / shares.sum() * total).astype(int).tolist()
    lengths[0] += total - sum(lengths)
    cuts = np.sort(rng.integers(0, total + 1, rng.integers(0, 8)))
    return {"lengths": lengths, "cu": np.array([0, *cuts, total], np.int32), "mask": MASKS[rng.integers(len(MASKS))]}


def measure(
    case: dict[str, Any], split: str, method: str, hardware: hetu.Hardware, samples: int
) -> tuple[float, float]:
    """Seconds of a run on the slowest rank, the least of some, and what is predicted of the plan."""
    layout = Layout.build(case["lengths"], [0] * len(case["lengths"]), split=split, cu_seqlens=case["cu"])
    plan = build_plan(layout, method=method, mask=case["mask"], heads=Heads(NUM_Q, NUM_KV, HEAD_DIM, 4))
    strategy = hetu.Strategy(case["lengths"], [0] * len(case["lengths"]))
    width = (NUM_Q + 2 * NUM_KV) * HEAD_DIM
    with hetu.graph("define_and_run", strategies=[strategy]) as g:
        qkv = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), width], name="qkv")
        cu = hetu.placeholder(hetu.int32, [hetu.IntSymbol("n")], name="cu")
        options: dict[str, Any] = {"packing": True, "cu_seqlens_q": cu, "mask": case["mask"]}
        out, *_ = hetu.parallel_attn(
            qkv, HEAD_DIM, NUM_Q // NUM_KV, split=split, method=method, name="attention", **options
        )
    rank = min(hetu.init_distributed().rank, len(case["lengths"]) - 1)
    own = torch.randn(layout.rows(rank), width)
    times = []
    for _ in range(samples + 2):
        hetu.gather_shards(torch.zeros(1))  # all ranks start together
        start = time.perf_counter()
        g.run(out, {qkv: own, cu: case["cu"]})
        own_time = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        times.append(max(float(one) for one in hetu.gather_shards(own_time)))
    return min(times[2:]), plan.cost(
        hardware
    ).time  # what else runs here only adds; calibrate() takes the least as well


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median error, its quartiles, and the share of pairs of a case that differ by over 10% and are in order."""
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    right = []
    for _, of_case in itertools.groupby(rows, key=lambda row: row["case"]):
        for a, b in itertools.combinations(list(of_case), 2):
            if abs(a["measured"] - b["measured"]) > 0.1 * max(a["measured"], b["measured"]):
                right.append((a["measured"] < b["measured"]) == (a["predicted"] < b["predicted"]))
    quartiles = statistics.quantiles(errors, n=4)
    return {
        "runs": len(rows),
        "error quartiles": quartiles,
        "pairs": len(right),
        "in order": sum(right) / max(len(right), 1),
    }


if __name__ == "__main__":
    main()
