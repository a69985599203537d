"""What ``test_benchmark_parallel.py`` starts with torchrun: the benchmark, with peers that must not get away with it.

Writes into the folder that is its first argument, besides the benchmark's results, ``checks.json``.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any


def main(folder: str, *arguments: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import parallel
    import parallel_peers
    import torch
    from attention_cases import Inputs, Results, reference
    from parallel_cases import BOTH, DIRECTIONS, Ranks, Spread, check_rows
    from torch.nn.attention import SDPBackend

    import hetu

    ranks = Ranks(hetu.init_distributed("gloo"))

    class Wrong(parallel_peers.Hetu):
        """One rank's last row is wrong."""

        def results(self, direction: str) -> Results:
            found = super().results(direction)
            if ranks.rank == 1:
                found["out"][-1] *= 1.01
            return found

    class Astray(parallel_peers.Hetu):
        """Tells only half of its plans."""

        def plans(self, direction: str) -> Any:
            return super().plans(direction)[:1] if direction == BOTH else []

    class Ungrouped(parallel_peers.ContextParallel):
        """Wants as many key heads as query heads."""

        def _attend(self) -> torch.Tensor:
            if self.repeats == 1:
                raise NotImplementedError("knows no groups")
            return super()._attend()

    def missing(x: Inputs, ranks: Ranks) -> Any:
        return 1 / ranks.rank

    parallel_peers.PEERS |= {
        "wrong": partial(Wrong, method="direct"),
        "astray": partial(Astray, method="direct"),
        "missing": missing,
    }
    checks: dict[str, Any] = {}

    # torch's dispatcher has no kernel of a ring on CPUs; without a mask its DTensors do the same on their own.
    inputs = Inputs.draw(Spread("4:2:16", 64, "one", False, "1:1", "sym"), "cpu", torch.float32)
    right = reference(inputs)
    kinds = {rotation: (parallel_peers.ContextParallel, rotation) for rotation in parallel_peers.ROTATIONS}
    for name, (kind, rotation) in (kinds | {"ungrouped": (Ungrouped, "allgather")}).items():
        peer = kind(inputs, ranks, SDPBackend.MATH, rotation)
        for direction in DIRECTIONS:
            errors, reasons = parallel.judge(inputs, {"torch": peer}, direction, right, ranks)
            checks[f"{name} {direction}"] = [errors, reasons, peer.note]

    held = torch.arange(5)[ranks.rank :: 2]
    checks["copies"] = [check_rows(held, 5, ranks), check_rows(torch.arange(5), 5, ranks)]
    for name, rows in {"twice": held.clamp(max=3), "missing": held[1:]}.items():
        try:
            check_rows(rows, 5, ranks)
        except ValueError as error:
            checks[name] = str(error)

    try:
        parallel.main(["--tiny", "--out", folder, *arguments])
    except SystemExit as end:
        checks["end"] = str(end)
    Path(folder, f"checks{ranks.rank}.json").write_text(json.dumps(checks))


if __name__ == "__main__":
    main(*sys.argv[1:])
