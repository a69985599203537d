"""What each method moves between hosts, and how long it would take: 2 to 16 hosts of 8, by the virtual clock.

    python benchmarks/hosts.py [--hosts 2 4 8 16] [--json FILE]

A device attends to its part of one causal document, or of a pack of documents, forward and backward. Links between
hosts are some times slower than those inside. Nothing is measured, so the numbers are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hetu.parallel import METHODS, AttnPlan, Hardware, Heads, Layout, Topology, build_plan

DEVICES = 8
SLOWER = (1, 8, 32)
"""How many times slower links between hosts are."""

TOKENS = (1024, 4096, 8192)
"""Of a device."""

HEADS = Heads(num_q=32, num_kv=8, head_dim=128, itemsize=2)


def main() -> None:
    """Prints a line for each case and method, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    chosen = parser.parse_args()
    rows = [row for hosts in chosen.hosts for tokens in TOKENS for row in case(hosts, tokens)]
    if chosen.json:
        chosen.json.write_text(json.dumps({"devices": DEVICES, "heads": "32/8 of 128", "rows": rows}, indent=1) + "\n")


def case(hosts: int, tokens: int) -> list[dict[str, Any]]:
    """All kinds of documents and methods on so many hosts."""
    count, rows = hosts * DEVICES, []
    topology = Topology(tuple([r // DEVICES for r in range(count)]))
    for kind, cu in (("one document", None), ("pack", pack(count * tokens))):
        layout = Layout.build([tokens] * count, [0] * count, split="sym", cu_seqlens=cu)
        for method in METHODS:
            began = time.perf_counter()
            forward = build_plan(layout, method=method, heads=HEADS, topology=topology).whole()
            rows.append({"hosts": hosts, "tokens": tokens, "documents": kind, "method": method})
            rows[-1] |= figures(forward, forward.backward().whole())
            print(json.dumps(rows[-1]), f"({time.perf_counter() - began:.1f} s)", flush=True)
    return rows


def figures(*plans: AttnPlan) -> dict[str, Any]:
    """Bytes between hosts, and ms for each ratio of links, of some plans together."""
    found: dict[str, Any] = {}
    for slower in SLOWER:
        hardware = Hardware.h100()
        hardware = replace(hardware, host_link_bytes=hardware.link_bytes / slower, host_latency=5e-6)
        costs = [plan.cost(hardware) for plan in plans]
        found["host_bytes"] = sum(cost.host_bytes for cost in costs)
        found[f"ms_{slower}"] = round(1e3 * sum(cost.time for cost in costs), 4)
    return found


def pack(tokens: int) -> np.ndarray[Any, Any]:
    """Documents of all lengths, some longer than a host's tokens: of a pack of so many tokens."""
    rng, ends = np.random.default_rng(0), [0]
    while ends[-1] < tokens:
        ends.append(min(ends[-1] + int(rng.lognormal(9, 1.5)) + 1, tokens))
    return np.array(ends)


if __name__ == "__main__":
    main()
