"""Attention on a GPU: hetu against what a PyTorch user would pick instead, in one run.

Times are those of the device: the host is hidden behind a sleeping kernel, the L2 cache is flushed before each sample,
and peers take samples in turns, so that all of them meet the same clocks. Nothing is timed whose error against float64
is over twice FlashAttention-2's. FLOPs count unmasked pairs only, the backward as 2.5 forwards. Results are written
after every case to ``benchmarks/results/attention_<device>.json``; ``attention_report.py`` makes the docs of them.

    python benchmarks/attention.py [--out DIR] [--heads 32:8:128 ...] [--tokens 32768 ...] [--lengths mix ...]
        [--mask causal full window-1024 ...] [--direction forward backward]
        [--peers hetu FlashAttention-2 cuDNN FlexAttention] [--samples 12] [--warm-up-processes 15]

To try it out without a GPU: ``--device cpu --heads 4:2:16 --tokens 300``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from attention_cases import (
    DIRECTIONS,
    HEADS,
    LENGTHS,
    MASKS,
    TOKENS,
    Case,
    Inputs,
    Results,
    cases,
    error,
    mask_name,
    reference,
)
from attention_peers import PEERS, YARDSTICK, Calls
from attention_report import RESULTS, LeftOut, Measured, Run, report
from timing import DeviceTimer, HostTimer, Timer, about, attempt, take_turns

# A case

MOST_WRONG = 0.05
"""What an error may be at most, also if FlashAttention-2's is larger or missing."""


def error_of(peer: Calls, inputs: Inputs, direction: str, right: Results) -> float:
    return error(inputs.case, peer.results(direction), right)


def judge(
    inputs: Inputs, calls: dict[str, Calls], direction: str, right: Results
) -> tuple[dict[str, float], dict[str, str]]:
    """The errors of the peers that are right, and why the others are not."""
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, peer in calls.items():
        attempt(errors, reasons, name, partial(error_of, peer, inputs, direction, right))
    limit = min(2 * errors.get(YARDSTICK, float("inf")), MOST_WRONG)
    for name, found in errors.items():
        if found > limit:
            reasons[name] = f"its error is {found:.1e}, over {limit:.1e}"
    return {name: found for name, found in errors.items() if name not in reasons}, reasons


def measure(
    case: Case, names: Iterable[str], directions: Iterable[str], samples: int, device: str
) -> Iterator[Measured | LeftOut]:
    """All rows of a case."""
    inputs = Inputs.draw(case, device)
    calls: dict[str, Calls] = {}
    failed: dict[str, str] = {}
    for name in names:
        attempt(calls, failed, name, partial(PEERS[name], inputs))
    right = reference(inputs)
    for direction in directions:
        errors, reasons = judge(inputs, calls, direction, right)
        timers: dict[str, Timer] = {}
        for name in errors:
            timer = HostTimer if device == "cpu" else DeviceTimer
            attempt(timers, reasons, name, partial(timer, calls[name].of(direction)))
        for name, reason in (failed | reasons).items():
            yield LeftOut(**asdict(case), direction=direction, peer=name, reason=reason)
        taken = take_turns(timers, samples)
        yardstick = float(np.median(taken[YARDSTICK])) if YARDSTICK in taken else None
        for name, times in taken.items():
            low, middle, high = (float(time) for time in np.percentile(times, (25, 50, 75)))
            yield Measured(
                **asdict(case),
                direction=direction,
                peer=name,
                first_quartile=low,
                median=middle,
                third_quartile=high,
                samples=len(times),
                tflops=case.flops(direction) / middle / 1e9,
                ratio=None if yardstick is None else yardstick / middle,
                error=errors[name],
                host=timers[name].host,
            )


# Compiling beforehand


def compiled_cases(arguments: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Cases that between them compile all that the peers compile."""
    if "hetu" in arguments.peers:  # a kernel for rows that see few keys, some, and many
        for tokens, lengths in ((4_096, "short"), (4_096, "one"), (16_384, "one")):
            windows = [mask for mask in arguments.mask if mask not in MASKS]
            for case in cases(arguments.heads, [tokens], [lengths], ["causal", *windows[:1]]):
                yield "hetu", case
    if "FlexAttention" in arguments.peers:  # static shapes
        for case in cases(arguments.heads, arguments.tokens, ["short"], arguments.mask):
            yield "FlexAttention", case


LONGEST_COMPILATION = 240  # seconds


def warm_up(arguments: argparse.Namespace) -> None:
    """Compiles in processes of their own, all at once, into the caches on disk that this process reads then."""

    def compile_one(peer: str, case: Case) -> None:
        command = [sys.executable, __file__, "--compile-only", "--peers", peer, "--heads", case.heads]
        command += ["--tokens", str(case.tokens), "--lengths", case.lengths, "--mask", case.mask]
        # What fails here fails again later, and is told then.
        subprocess.run(command, capture_output=True, timeout=LONGEST_COMPILATION, check=False)

    with ThreadPoolExecutor(arguments.warm_up_processes) as pool:
        for peer, case in compiled_cases(arguments):
            pool.submit(compile_one, peer, case)


def compile_only(chosen: Iterable[Case], peers: Iterable[str], device: str) -> None:
    """Calls the peers once on each case."""
    for case in chosen:
        inputs = Inputs.draw(case, device)
        for name in peers:
            calls = PEERS[name](inputs)
            for direction in DIRECTIONS:
                calls.of(direction)()


# The script


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--heads", nargs="+", default=list(HEADS), help="query heads:key heads:head_dim")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--mask", nargs="+", type=mask_name, default=list(MASKS), help="causal, full, window-N")
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--samples", type=int, default=12, help="of each row at most; long kernels get fewer")
    parser.add_argument("--warm-up-processes", type=int, default=min((os.cpu_count() or 1) - 1, 15))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    device, chosen = arguments.device, cases(arguments.heads, arguments.tokens, arguments.lengths, arguments.mask)
    if arguments.compile_only:
        compile_only(chosen, arguments.peers, device)
        return
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("this needs a CUDA device; --device cpu tries the script out")
    start = perf_counter()
    if device == "cuda" and arguments.warm_up_processes > 1:
        warm_up(arguments)
        print(f"compiled in {perf_counter() - start:.0f} s", flush=True)
    run = Run(about("benchmarks/attention.py", device, argv))
    for case in chosen:
        for row in measure(case, arguments.peers, arguments.direction, arguments.samples, device):
            run.add(row)
            print(row, flush=True)
        kept = run.write(arguments.out)  # after every case, so that nothing is lost
    print(f"\n{report(run)}\n\n{kept}, after {perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
