"""What each method moves between hosts, and how long it would take: 2 to 16 hosts of 8, by the virtual clock.

    python benchmarks/hosts.py [--hosts 2 4 8 16] [--tokens 1024 4096 8192] [--heads 32:8] [--methods ...] [--json FILE]

A device attends to its part of one causal document, forward and backward. Links between hosts are some times slower
than those inside. Rows are added to those of the file. Nothing is measured, so the numbers are the
same on every machine.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hetu.parallel import METHODS, AttnPlan, Hardware, Heads, Layout, Topology, build_plan

DEVICES = 8
SLOWER = (1, 8, 32)
"""How many times slower links between hosts are."""


def main() -> None:
    """Prints a line for each case and method, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192], help="of a device")
    parser.add_argument("--heads", default="32:8", help="of queries and of keys, of 128 numbers each")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    chosen = parser.parse_args()
    num_q, num_kv = map(int, chosen.heads.split(":"))
    heads = Heads(num_q, num_kv, head_dim=128, itemsize=2)
    cases = [(hosts, tokens) for hosts in chosen.hosts for tokens in chosen.tokens]
    rows = [row for hosts, tokens in cases for row in case(hosts, tokens, heads, chosen.methods)]
    if chosen.json:
        before = json.loads(chosen.json.read_text())["rows"] if chosen.json.exists() else []
        chosen.json.write_text(json.dumps({"devices": DEVICES, "rows": before + rows}, indent=1) + "\n")


def case(hosts: int, tokens: int, heads: Heads, methods: list[str]) -> list[dict[str, Any]]:
    """All methods on so many hosts, and which one ``"auto"`` takes."""
    count, rows = hosts * DEVICES, []
    topology = Topology(tuple([r // DEVICES for r in range(count)]))
    layout = Layout.build([tokens] * count, [0] * count, split="sym")
    said = {"hosts": hosts, "tokens": tokens, "heads": f"{heads.num_q}:{heads.num_kv}"}
    for method in methods:
        began = time.perf_counter()
        forward = build_plan(layout, method=method, heads=heads, topology=topology).whole()
        rows.append({**said, "method": method})
        rows[-1] |= figures(forward, forward.backward().whole())
        print(json.dumps(rows[-1]), f"({time.perf_counter() - began:.1f} s)", flush=True)
    takes = {
        f"takes_{slower}": build_plan(layout, heads=heads, topology=topology, hardware=hardware(slower)).method
        for slower in SLOWER
    }
    rows.append({**said, "method": "auto", **takes})
    print(json.dumps(rows[-1]), flush=True)
    return rows


def hardware(slower: int) -> Hardware:
    """H100 in hosts between which links are so many times slower than NVLink."""
    device = Hardware.h100()
    return replace(device, host_link_bytes=device.link_bytes / slower, host_latency=5e-6)


def figures(*plans: AttnPlan) -> dict[str, Any]:
    """Bytes between hosts, and ms for each ratio of links, of some plans together."""
    found: dict[str, Any] = {}
    for slower in SLOWER:
        costs = [plan.cost(hardware(slower)) for plan in plans]
        found["host_bytes"] = sum(cost.host_bytes for cost in costs)
        found[f"ms_{slower}"] = round(1e3 * sum(cost.time for cost in costs), 4)
    return found


if __name__ == "__main__":
    main()
