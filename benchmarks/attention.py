"""Attention on a GPU: hetu against what a PyTorch user would pick instead, in one run.

Times are those of the device: the host is hidden behind a sleeping kernel, the L2 cache is flushed before each sample,
and peers take samples in turns, so that all of them meet the same clocks. Nothing is timed whose error against float64
is over twice FlashAttention-2's. FLOPs count unmasked pairs only, the backward as 2.5 forwards.

    python benchmarks/attention.py [--out DIR] [--heads 32:8:128 ...] [--tokens 32768 ...] [--lengths mix ...]
        [--mask causal full] [--peers hetu FlashAttention-2 cuDNN FlexAttention] [--samples 10]
    python benchmarks/attention.py --write-docs
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_cases import HEADS, LENGTHS, TOKENS, Case, Inputs, cases, error, reference
from attention_peers import PEERS, YARDSTICK, Calls
from tables import ROOT, environment, write_between

RESULTS = ROOT / "benchmarks" / "results"
FLUSHED = 128 * 2**20  # bytes; the L2 cache of an H100 has 50 MB
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Measured:
    """Times of a peer on a case, in milliseconds, and what they come to.

    ``ratio`` is FlashAttention-2's median over this one's.
    """

    heads: str
    tokens: int
    lengths: str
    is_causal: bool
    direction: str
    peer: str
    first_quartile: float
    median: float
    third_quartile: float
    samples: int
    tflops: float
    ratio: float | None
    error: float

    @property
    def target(self) -> float | None:
        """What hetu's ratio should be at least."""
        if self.peer != "hetu" or self.ratio is None:
            return None
        if self.tokens == 32_768 and self.lengths in ("short", "ragged") and self.is_causal:
            return 1.5
        if self.tokens == 32_768 and self.lengths in ("mix", "equal"):
            return 1.25 if self.direction == "forward" else 1.15
        return 1.0

    @property
    def is_missed(self) -> bool:
        return self.target is not None and self.ratio is not None and self.ratio < self.target


def times(calls: Sequence[Callable[[], Any]], samples: int) -> list[list[float]]:
    """Milliseconds on the device of each call, sample by sample in turns."""
    for call in calls:
        call()
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for _ in range(samples + 1):
        for call, taken in zip(calls, events, strict=True):
            flushed.zero_()
            torch.cuda._sleep(3_000_000)  # cycles, 1.6 ms: what the call queues is queued before it starts
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            taken.append((start, end))
        torch.cuda.synchronize()
    return [[start.elapsed_time(end) for start, end in taken[1:]] for taken in events]


def prepared(names: Sequence[str], inputs: Inputs) -> dict[str, Calls]:
    """The peers that take these inputs; the others with their reason on stderr."""
    ready = {}
    for name in names:
        try:
            ready[name] = PEERS[name](inputs)
        except Exception as reason:
            print(f"{inputs.case}: without {name}: {str(reason).splitlines()[0][:160]}", file=sys.stderr)
    return ready


def accepted(inputs: Inputs, peers: dict[str, Calls]) -> dict[str, dict[str, float]]:
    """The error of each peer by direction, without those over twice the yardstick's."""
    right, errors = reference(inputs), {}
    for name, calls in peers.items():
        try:
            errors[name] = {way: error(inputs, results, right) for way, results in calls.results().items()}
        except Exception as reason:
            print(f"{inputs.case}: without {name}: {str(reason).splitlines()[0][:160]}", file=sys.stderr)
    kept: dict[str, dict[str, float]] = {}
    for way in DIRECTIONS:
        limit = 2 * errors[YARDSTICK][way] if YARDSTICK in errors else 0.02
        for name, found in errors.items():
            if found[way] <= limit:
                kept.setdefault(way, {})[name] = found[way]
            else:
                print(f"{inputs.case} {way}: {name} is wrong by {found[way]:.1e}, over {limit:.1e}", file=sys.stderr)
    return kept


def measure(case: Case, names: Sequence[str], samples: int) -> Iterator[Measured]:
    """All rows of a case."""
    inputs = Inputs.draw(case, "cuda")
    peers = prepared(names, inputs)
    for way, errors in accepted(inputs, peers).items():
        taken = times([getattr(peers[name], way) for name in errors], samples)
        medians = {name: float(np.median(some)) for name, some in zip(errors, taken, strict=True)}
        for (name, wrong), some in zip(errors.items(), taken, strict=True):
            low, middle, high = (float(x) for x in np.percentile(some, (25, 50, 75)))
            yield Measured(
                **asdict(case),
                direction=way,
                peer=name,
                first_quartile=low,
                median=middle,
                third_quartile=high,
                samples=len(some),
                tflops=case.flops * (2.5 if way == "backward" else 1) / middle / 1e9,
                ratio=medians[YARDSTICK] / middle if YARDSTICK in medians else None,
                error=wrong,
            )


def warm_up(arguments: argparse.Namespace) -> None:
    """Compiles hetu's kernels in as many processes as there are cores: each case's at its first thousand tokens."""
    heads = arguments.heads or list(HEADS)
    command = [sys.executable, __file__, "--compile-only", "--heads"]
    running = [subprocess.Popen([*command, one, "--tokens", str(n)]) for one in heads for n in (4096, 32768)]
    for process in running:
        process.wait()


def compile_only(arguments: argparse.Namespace) -> None:
    """Calls hetu on a short and a long case, which between them use every tile."""
    for heads in arguments.heads:
        lengths = "short" if arguments.tokens[0] == 4096 else "one"
        calls = PEERS["hetu"](Inputs.draw(Case(heads, 4096, lengths, True), "cuda"))
        calls.results()
    torch.cuda.synchronize()


def told(row: Measured) -> str:
    """A line for the terminal."""
    mask = "causal" if row.is_causal else "full"
    name = f"{row.heads} {row.tokens:>6} {row.lengths:<6} {mask:<6} {row.direction:<8} {row.peer:<16}"
    ratio = "" if row.ratio is None else f"{row.ratio:5.2f}"
    missed = f"  under {row.target}" if row.is_missed else ""
    return f"{name} {row.median:8.3f} ms {row.tflops:6.0f} TFLOP/s {ratio} error {row.error:.1e}{missed}"


def keep(rows: Sequence[Measured], folder: Path) -> Path:
    """Writes all rows with the machine and the versions as JSON."""
    device = torch.cuda.get_device_name()
    path = folder / f"attention_{device.split()[1].lower()}.json"
    folder.mkdir(parents=True, exist_ok=True)
    about = environment() | {"device": device}
    path.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    return path


def table(rows: Sequence[Measured], tokens: int, direction: str) -> list[str]:
    """Lines of Markdown: hetu's TFLOP/s and its ratio, by heads and mask, for each kind of lengths."""
    lines = [f"| {direction}, {tokens:,} tokens | {' | '.join(LENGTHS)} |", "| --- |" + " ---: |" * len(LENGTHS)]
    own = {
        (r.heads, r.is_causal, r.lengths): r
        for r in rows
        if (r.tokens, r.direction, r.peer) == (tokens, direction, "hetu")
    }
    for heads in HEADS:
        for is_causal in (True, False):
            cells = []
            for lengths in LENGTHS:
                row = own.get((heads, is_causal, lengths))
                ratio = "" if row is None or row.ratio is None else f", {row.ratio:.2f}{' ✗' if row.is_missed else ''}"
                cells.append("" if row is None else f"{row.tflops:.0f}{ratio}")
            if any(cells):
                lines.append(f"| {heads} {'causal' if is_causal else 'full'} | {' | '.join(cells)} |")
    return [*lines, ""]


def others(rows: Sequence[Measured]) -> list[str]:
    """Lines of Markdown: the geometric mean of each other peer's ratio, over the cases that it takes."""
    lines = []
    for peer in dict.fromkeys(row.peer for row in rows):
        for direction in DIRECTIONS:
            ratios = [r.ratio for r in rows if (r.peer, r.direction) == (peer, direction) and r.ratio]
            if peer != YARDSTICK and ratios:
                mean = float(np.exp(np.mean(np.log(ratios))))
                lines.append(
                    f"| {peer} | {direction} | {len(ratios)} | {mean:.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"
                )
    head = ["| peer | direction | cases | geometric mean | least | most |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    return [*head, *lines, ""]


def write_docs(path: Path) -> None:
    """Makes the section of docs/performance.md from the JSON."""
    told_by = json.loads(path.read_text(encoding="utf-8"))
    rows = [Measured(**row) for row in told_by["rows"]]
    lines: list[str] = []
    for tokens in TOKENS:
        for direction in DIRECTIONS:
            lines += table(rows, tokens, direction)
    missed = [row for row in rows if row.is_missed]
    counted = [row for row in rows if row.target is not None]
    lines += [f"{len(counted) - len(missed)} of {len(counted)} rows keep their target; ✗ marks the others.", ""]
    lines += others(rows)
    versions = ", ".join(f"{name} {told_by[name]}" for name in ("python", "torch", "triton", "numpy"))
    lines.append(f"{told_by['device']}; {versions}; {told_by['date']}; `{told_by['command']}`.")
    write_between("attention.json", "\n".join(lines))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--mask", nargs="+", choices=("causal", "full"), default=["causal", "full"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[YARDSTICK, "hetu"])
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write-docs", action="store_true", help="write docs/performance.md from the kept results")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.write_docs:
        write_docs(RESULTS / "attention_h100.json")
        return
    if arguments.compile_only:
        compile_only(arguments)
        return
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA device")
    if (os.cpu_count() or 1) >= 8:
        warm_up(arguments)
    rows: list[Measured] = []
    for case in cases(arguments.heads, arguments.tokens, arguments.lengths, arguments.mask):
        for row in measure(case, arguments.peers, arguments.samples):
            rows.append(row)
            print(told(row), flush=True)
        keep(rows, arguments.out)  # after every case, so that nothing is lost
    missed = [row for row in rows if row.is_missed]
    print(
        f"{len(missed)} of {sum(row.target is not None for row in rows)} rows of hetu miss their target",
        *map(told, missed),
        sep="\n",
    )


if __name__ == "__main__":
    main()
