"""What attention over several GPUs costs but for the links: all pipelines of a plan in one process on one GPU.

    python benchmarks/parallel_work.py [--out DIR] [--tokens 8192 32768 131072] [--size 2] [--shares 3:2]
        [--methods direct ...] [--samples 10]

Without GPUs: ``--tiny``, on the CPU in float32.

A run attends and copies for all pipelines, one after the other. It takes longer than attention to all tokens at once,
because steps are merged and rows are packed. The quotient, over the busiest pipeline's work by the mean one's, is a
bound: no more of the ideal is reached by as many GPUs, however fast their links. ``parallel.py`` measures what is.
Nothing is timed whose error against float64 is over twice that of hetu's kernel over all tokens at once.
Results are written to ``benchmarks/results/parallel_work_<device>.json``, and as a table into ``docs/performance.md``
by ``--report FILE``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import attention_report
import numpy as np
import torch
from attention_cases import Inputs, error, reference
from attention_report import RESULTS, colophon, header
from parallel_cases import BOTH, DIRECTIONS, HEADS, TOKENS, Spread, spread_cases
from parallel_peers import Attention, load_of
from tables import write_between
from timing import DeviceTimer, HostTimer, about, take_turns

import hetu
from hetu.parallel import METHODS

WHOLE = "whole"
"""All tokens at once."""


@dataclass(frozen=True)
class Worked(Spread):
    """Times of a method on a case.

    Attributes:
        direction: What was computed.
        method: How keys and values move, or WHOLE.
        median: Milliseconds on the device, of all pipelines together.
        work: WHOLE's median in the same run over this one's.
        load: FLOPs of the busiest pipeline over their mean, by the plan.
        sent: Bytes that each pipeline sends, by the plan.
    """

    direction: str
    method: str
    median: float
    work: float
    load: float
    sent: list[int]

    @property
    def bound(self) -> float:
        """What part of the ideal can be reached at most."""
        return self.work / self.load

    def __str__(self) -> str:
        said = f"{super().__str__()} {self.direction:<16} {self.method:<10} {self.median:8.3f} ms"
        return f"{said}  work {self.work:.3f}  load {self.load:.3f}  bound {self.bound:.3f}"


@dataclass
class Run(attention_report.Run):
    """All that a run of this benchmark found."""

    benchmark: ClassVar[str] = "parallel_work"
    kinds: ClassVar[tuple[Any, Any]] = Worked, dict


class Pipelines:
    """A method's pipelines in this process; WHOLE is a single one."""

    def __init__(self, x: Inputs, case: Spread, method: str) -> None:
        lens = [case.tokens] if method == WHOLE else case.seq_lens
        self.attention = Attention(x, lens, [0] * len(lens), "auto" if method == WHOLE else method)
        own = [self.attention.feeds(rows) for rows in self.attention.rows]
        self.feeds = {key: hetu.Shards([feeds[key] for feeds in own]) for key in own[0]}
        self.feeds[self.attention.documents] = x.cu_seqlens

    def call(self, direction: str) -> Any:
        return self.attention.run(direction, self.feeds)

    def error(self, direction: str, right: dict[str, torch.Tensor]) -> float:
        """Of the results of all pipelines, against float64."""
        found, size = self.call(direction), len(self.attention.rows)
        by_pipeline = [found] if size == 1 else list(zip(*found, strict=True)) if direction == BOTH else list(found)
        shards = [self.attention.named(direction, one) for one in by_pipeline]
        order = torch.cat(self.attention.rows).argsort().to(right["out"].device)
        whole = {name: torch.cat([shard[name] for shard in shards])[order] for name in shards[0]}
        return error(self.attention.case, whole, right)


def measure(case: Spread, methods: Sequence[str], samples: int, device: str, dtype: torch.dtype) -> Iterator[Worked]:
    """All rows of a case.

    Raises:
        AssertionError: If a method's results are wrong.
    """
    inputs = Inputs.draw(case, device, dtype)
    right = reference(inputs, block=512)
    peers = {method: Pipelines(inputs, case, method) for method in (WHOLE, *methods)}
    timer = DeviceTimer if device == "cuda" else HostTimer
    for direction in DIRECTIONS:
        errors = {method: peer.error(direction, right) for method, peer in peers.items()}  # compiles, too
        assert max(errors.values()) <= 2 * errors[WHOLE] <= 0.1, errors
        timers = {method: timer(partial(peer.call, direction)) for method, peer in peers.items()}
        medians = {method: float(np.median(times)) for method, times in take_turns(timers, samples).items()}
        for method, median in medians.items():
            plans = peers[method].attention.plans(direction)
            sent = [sum(plan.bytes_sent(r) for plan in plans) for r in range(len(plans[0].pipelines))]
            said = {"median": median, "work": medians[WHOLE] / median, "load": load_of(plans), "sent": sent}
            yield Worked(**asdict(case), direction=direction, method=method, **said)


def report(run: Run) -> str:
    """Markdown: the bounds, by case and direction."""
    tokens = sorted({row.tokens for row in run.rows})
    found = {(row.lengths, row.split, row.direction, row.method, row.tokens): row for row in run.rows}
    lines = header("bound, and the busiest one's work", [f"{total:,}" for total in tokens])
    for key in dict.fromkeys(key[:4] for key in found if key[3] != WHOLE):
        cells = [found.get((*key, total)) for total in tokens]
        told = ["" if row is None else f"**{row.bound:.2f}** at {row.load:.2f}" for row in cells]
        pack, split, direction, method = key
        lines.append(f"| {direction}, {pack}, `{split}`, `{method}` | {' | '.join(told)} |")
    return "\n".join([*lines, "", colophon(run.about)])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--heads", default=HEADS, help="query heads:key heads:head_dim")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--size", type=int, default=2, help="how many pipelines")
    parser.add_argument("--shares", default="3:2", help="of the tokens of mix, one a pipeline")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--samples", type=int, default=10, help="of each row at most; long ones get fewer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--report", type=Path, help="only make the docs of this file")
    parser.add_argument("--tiny", action="store_true", help="few tokens and heads, on the CPU in float32")
    if "--tiny" in argv:
        parser.set_defaults(heads="4:2:16", tokens=[98], samples=3)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if arguments.report:
        write_between("parallel_work.json", report(Run.read(arguments.report)))
        return
    device, dtype = ("cpu", torch.float32) if arguments.tiny else ("cuda", torch.bfloat16)
    run = Run(about("benchmarks/parallel_work.py", device, argv))
    for split, packs in {"sym": ["one", "mix"], "balanced": ["mix"]}.items():
        for case in spread_cases(arguments.heads, arguments.tokens, packs, arguments.shares, split, arguments.size):
            for row in measure(case, arguments.methods, arguments.samples, device, dtype):
                run.add(row)
                print(row, flush=True)
            run.write(arguments.out)  # after every case, so that nothing is lost
    print(report(run))


if __name__ == "__main__":
    main()
