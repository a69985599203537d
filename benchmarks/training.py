"""A training step of the example's model by hetu and by the same model in torch, both compiled and not, on the CPU.

All start from the same parameters and take the same packs in turns; that they compute the same is checked first. Time
is that of a whole step: feeds, forward, backward, clipping, AdamW. Memory is what a process takes at its peak over what
it held before its first step, in a process of its own for each.

    python benchmarks/training.py [--tokens 2048] [--steps 30] [--write-docs]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from corpus import cut, make_packs, read_files
from llama import Config, build, flat
from tables import DOCS, ROOT, Row, keep, print_table, timed
from torch_llama import Llama, tensors

import hetu

Pack = list[np.ndarray]
Step = Callable[[Pack], float]
RATE, NORM = 3e-3, 1.0


PEERS = ("torch", "torch.compile", "hetu", "compiled")
TIMED_ONLY = ("torch.compile",)
"""Peers whose memory is not told: the peak of a process that compiles is its compiler's."""


def hetu_step(config: Config, compiles: bool = False) -> tuple[Step, hetu.Graph]:
    """A step of the example on one pipeline."""
    model = build(config, device="cpu")
    train = hetu.optim.AdamW(lr=RATE, max_grad_norm=NORM).minimize(model.loss)

    def step(pack: Pack) -> float:
        feeds, symbols = model.feeds(0, pack)
        with hetu.config(compile=compiles):
            return float(model.graph.run(train, feeds, int_symbol_dict=symbols, strategy=0))

    return step, model.graph


def torch_step(config: Config, values: dict[str, torch.Tensor], compiles: bool = False) -> Step:
    """The same by plain torch, or by ``torch.compile``, once for all lengths."""
    model = Llama(config)
    model.take(values)
    if compiles:
        model.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def step(pack: Pack) -> float:
        optimizer.zero_grad()
        loss = model(*tensors(pack, flat(pack)[1]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
        optimizer.step()
        return float(loss.detach())

    return step


def steps_of(config: Config) -> dict[str, Step]:
    """All steps, from the same parameters."""
    hetu.manual_seed(0)
    by_hetu, graph = hetu_step(config)
    values = graph.state_dict()["parameters"]
    hetu.manual_seed(0)
    return {
        "torch": torch_step(config, values),
        "torch.compile": torch_step(config, values, compiles=True),
        "hetu": by_hetu,
        "compiled": hetu_step(config, compiles=True)[0],
    }


def time_rows(config: Config, packs: list[Pack], warmup: int = 3) -> list[Row]:
    """Times of all, in turns, and their ratios."""
    steps = steps_of(config)
    losses = {name: [step(pack) for pack in packs[:warmup]] for name, step in steps.items()}
    for name in PEERS[1:]:
        np.testing.assert_allclose(losses[name], losses["torch"], rtol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in PEERS}
    for i, pack in enumerate(packs[warmup:]):
        for name in PEERS if i % 2 else PEERS[::-1]:
            times[name].append(timed(lambda name=name, pack=pack: steps[name](pack), 1e3))
    return [
        Row.of("training step, by torch", "ms", times["torch"]),
        Row.of("training step, by torch.compile", "ms", times["torch.compile"]),
        Row.of("training step, by hetu", "ms", times["hetu"]),
        Row.of("training step, by hetu compiled", "ms", times["compiled"]),
        Row.of("training step, hetu over torch", "times", ratios(times["hetu"], times["torch"]), limit=1.15),
        Row.of("training step, compiled over torch", "times", ratios(times["compiled"], times["torch"]), limit=0.9),
        Row.of(
            "training step, compiled over torch.compile", "times", ratios(times["compiled"], times["torch.compile"])
        ),
    ]


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Of what was measured in turns."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def peak(name: str, config: Config, packs: list[Pack]) -> float:
    """MB that this process takes at its peak over what it held before the first step."""
    hetu.manual_seed(0)
    step, graph = hetu_step(config, compiles=name == "compiled")
    if name == "torch":
        step = torch_step(config, graph.state_dict()["parameters"])
    step([packs[0][-1][:64]])  # libraries load and optimisers make their state
    before = memory("VmRSS")
    for pack in packs:
        step(pack)
    return memory("VmHWM") - before


def memory(field: str) -> float:
    """MB that the process holds now (VmRSS), or held at its peak (VmHWM).

    Not by getrusage: what it tells of a new process includes what its parent held.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


def memory_rows(arguments: list[str], repeats: int = 3) -> list[Row]:
    """Peaks of all, each in a process of its own."""
    peaks: dict[str, list[float]] = {name: [] for name in PEERS if name not in TIMED_ONLY}
    for _ in range(repeats):
        for name, own in peaks.items():
            command = [sys.executable, __file__, *arguments, "--peak", name]
            own.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return [
        Row.of("peak memory of steps, by torch", "MB", peaks["torch"]),
        Row.of("peak memory of steps, by hetu", "MB", peaks["hetu"]),
        Row.of("peak memory of steps, by hetu compiled", "MB", peaks["compiled"]),
        Row.of("peak memory of steps, hetu over torch", "times", ratios(peaks["hetu"], peaks["torch"]), limit=1.1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a pack")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed")
    parser.add_argument("--peak", choices=PEERS, help="print the peak of one, and nothing else")
    parser.add_argument("--write-docs", action="store_true", help=f"also write into {DOCS.relative_to(ROOT)}")
    arguments = parser.parse_args()
    packs = make_packs(cut(read_files(), longest=1024), arguments.tokens, arguments.steps + 3)
    if arguments.peak:
        print(peak(arguments.peak, Config(), packs[:5]))
        return
    rows = time_rows(Config(), packs) + memory_rows(["--tokens", str(arguments.tokens)])
    print_table(rows)
    keep("training", rows, arguments.write_docs)


if __name__ == "__main__":
    main()
