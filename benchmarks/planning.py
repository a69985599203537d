"""How soon the slowest pipeline is done with a batch, by ``hetu.plan_batch`` and by other ways to spread it.

    python benchmarks/planning.py [--batches 100] [--scales 1 4] [--pipelines 8 16 64] [--tokens 8192 32768] [--out DIR]
    python benchmarks/planning.py --report FILE ... --write-docs    # of what runs with other scales have written

Batches of real document lengths (``benchmarks/data/doc_length_distribution.csv``), and of four times these, fill 0.95
of what all pipelines may hold at once; a document that is longer than that is drawn again, and counted. Times are
simulated by hetu's cost of batches and are given as multiples of a lower bound, the mean of all work or the longest
document at its best group. Nothing runs on a device. Results are written to ``benchmarks/results/planning.json``.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from time import process_time

import numpy as np
from planning_peers import PEERS, Batch
from tables import ROOT, environment, write_between

import hetu
from hetu.parallel.batch.cost import BatchCost

DISTRIBUTION = Path(__file__).parent / "data" / "doc_length_distribution.csv"
FILL = 0.95
HARDWARE = hetu.Hardware.h100()
COST = BatchCost.of(HARDWARE, 32, 8, 128, 2, 72.0 * (32 * 128) ** 2)
"""What hetu.plan_batch takes by default."""


class Lengths:
    """Draws document lengths: a range by its share of documents, and a length within it evenly."""

    def __init__(self, seed: int, scale: int) -> None:
        with DISTRIBUTION.open(newline="") as file:
            rows = [(ast.literal_eval(row["range"]), float(row["number"])) for row in csv.DictReader(file)]
        self.ranges, counts = [row[0] for row in rows], np.array([row[1] for row in rows])
        self.shares, self.scale, self.rng = counts / counts.sum(), scale, np.random.default_rng(seed)
        self.drawn_again = 0

    def one(self, longest: int) -> int:
        while True:
            low, high = self.ranges[self.rng.choice(len(self.ranges), p=self.shares)]
            length = int(self.rng.integers(low, high + 1)) * self.scale
            if length <= longest:
                return length
            self.drawn_again += 1

    def batch(self, budget: int) -> tuple[int, ...]:
        """Documents until the next one would fill more than :data:`FILL` of the budget; at least one."""
        found, left = [self.one(int(FILL * budget))], 0
        left = int(FILL * budget) - found[0]
        while (length := self.one(budget)) <= left:
            found.append(length)
            left -= length
        return tuple(found)


@dataclass(frozen=True)
class Setting:
    """One line of the table.

    Attributes:
        scale: By what lengths are multiplied.
        pipelines: How many there are.
        max_tokens: Tokens of each in a micro-batch.
        documents: Mean number of a batch's documents.
        drawn_again: Documents that were longer than the whole budget, of all batches.
        median: Of the slowest pipeline's time over the lower bound, by the way of spreading.
        p95: The same, of the slowest twentieth.
        micro_batches: Their mean number.
        worse: For each other way the share of batches that it is done with before hetu, by over 0.1 % of the time.
        worse_by_a_percent: The same, by over 1 %.
        milliseconds: Of planning: the median, on one core.
    """

    scale: int
    pipelines: int
    max_tokens: int
    documents: float
    drawn_again: int
    median: dict[str, float]
    p95: dict[str, float]
    micro_batches: dict[str, float]
    worse: dict[str, float]
    worse_by_a_percent: dict[str, float]
    milliseconds: float


def measure(scale: int, pipelines: int, max_tokens: int, count: int) -> Setting:
    """Spreads ``count`` batches in every way."""
    lengths = Lengths(seed=pipelines + scale, scale=scale)
    batches = [
        Batch(lengths.batch(pipelines * max_tokens), pipelines, max_tokens, HARDWARE, COST) for _ in range(count)
    ]
    times, used, took = {name: [] for name in PEERS}, {name: [] for name in PEERS}, []
    for batch in batches:
        least = COST.least_seconds(batch.longest_first, pipelines, max_tokens)
        for name, spread_out in PEERS.items():
            start = process_time()
            spread = spread_out(batch)
            took += [process_time() - start] * (name == "hetu")
            times[name].append(spread.seconds(batch) / least)
            used[name].append(spread.micro_batches)
    own = np.array(times["hetu"])

    def worse(by: float) -> dict[str, float]:
        return {name: float((own > np.array(x) * (1 + by)).mean()) for name, x in times.items() if name != "hetu"}

    return Setting(
        scale,
        pipelines,
        max_tokens,
        float(np.mean([len(batch.lengths) for batch in batches])),
        lengths.drawn_again,
        {name: float(np.median(x)) for name, x in times.items()},
        {name: float(np.quantile(x, 0.95)) for name, x in times.items()},
        {name: float(np.mean(x)) for name, x in used.items()},
        worse(1e-3),
        worse(1e-2),
        float(np.median(took)) * 1e3,
    )


def table(settings: Sequence[Setting]) -> Iterator[str]:
    """The settings as a table of Markdown."""
    yield f"| lengths | pipelines | tokens | documents | {' | '.join(PEERS)} | planned in |"
    yield "| --- |" + " ---: |" * (4 + len(PEERS))
    for item in settings:
        cells = [f"{item.median[name]:.3f} ({item.micro_batches[name]:.1f})" for name in PEERS]
        cells[-1] = f"**{item.median['hetu']:.3f}** ({item.micro_batches['hetu']:.1f})"
        head = f"x{item.scale} | {item.pipelines} | {item.max_tokens:,} | {item.documents:.0f}"
        yield f"| {head} | {' | '.join(cells)} | {item.milliseconds:.1f} ms |"


def summary(settings: Sequence[Setting]) -> str:
    """What the targets are about, in words."""
    again = sum(item.drawn_again for item in settings)
    slowest = max(item.p95["hetu"] for item in settings)
    shares = (
        ", ".join(f"{name} {max(getattr(item, field)[name] for item in settings):.0%}" for name in settings[0].worse)
        for field in ("worse", "worse_by_a_percent")
    )
    slight, clear = shares
    return (
        f"Of the batches of a line, at most these shares are done over 0.1 % sooner in another way: {slight}; over 1 % "
        f"sooner: {clear}. hetu's 95th percentile is at most {slowest:.3f}. {again:,} documents were drawn again."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--pipelines", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="measure nothing: join earlier results")
    parser.add_argument("--write-docs", action="store_true", help="also put the table into docs/performance.md")
    arguments = parser.parse_args()
    if arguments.report:
        kept = [json.loads(path.read_text()) for path in arguments.report]
        settings = [Setting(**item) for file in kept for item in file["settings"]]
        told = kept[0] | {"command": "; ".join(dict.fromkeys(file["command"] for file in kept))}
    else:
        cases = list(product(arguments.scales, arguments.pipelines, arguments.tokens))
        settings = [measure(*case, arguments.batches) for case in cases]
        told = environment()
    text = "\n".join([*table(settings), "", summary(settings)])
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = told | {"settings": [asdict(item) for item in settings]}
    (arguments.out / "planning.json").write_text(json.dumps(result, indent=2) + "\n")
    if arguments.write_docs:
        write_between("planning.json", f"{text}\n\n{told['device']}; {told['date']}; `{told['command']}`.")


if __name__ == "__main__":
    main()
