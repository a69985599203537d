"""A training step of the example's model on one GPU, in bfloat16, against the same model under ``torch.compile``.

Each peer has a process of its own, in which it is compiled while the others are too; then they take turns on the GPU,
some steps at a time, one untimed step first. So peaks of memory are each peer's own. A step is feeds, forward,
backward, clipping and AdamW, and the GPU is waited for after it; the host's time is what passes until the step's call
returns. "In a row" are steps after which nobody waits, as in a loop that reads few losses: their host's work hides
behind the GPU's. All start from the same parameters and take the same packs; a peer whose first loss is over 1 % from
hetu's is left out.

    python benchmarks/step_gpu.py [--models small large] [--peers ...] [--turns 8] [--steps 3] [--budget 150]
        [--out DIR]

To try it out without a GPU: ``--tiny``.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import gettempdir
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import torch
from corpus import cut, make_packs, read_files
from step_peers import MAKERS, MODELS, Pack, Step
from step_profile import profiled, settle
from tables import ROOT, Row, keep, print_table
from timing import first_line

MOST_APART, PACKS = 0.01, 8


# One peer, in its own process


@contextmanager
def alone(name: str) -> Iterator[None]:
    """What only one of the processes does at a time."""
    with open(name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def choose_kernels_alone(lock: str) -> None:
    """Inductor times kernels to choose among them: not while another process does."""
    try:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        plain = CachingAutotuner.benchmark_all_configs
    except (ImportError, AttributeError):  # another release; it measures beside others then
        return

    def benchmark_all_configs(self: Any, *args: Any, **kwargs: Any) -> Any:
        with alone(lock):
            return plain(self, *args, **kwargs)

    CachingAutotuner.benchmark_all_configs = benchmark_all_configs


def serve(connection: Connection, model: str, peer: str, device: str, lock: str) -> None:
    """Makes a peer's step, says that it is there, and does what it is told until it hears None."""
    try:
        torch.set_num_threads(2)
        choose_kernels_alone(lock)
        task, begin = MODELS[model], perf_counter()
        packs = make_packs(cut(read_files(), longest=task.longest), task.tokens, PACKS)
        step = MAKERS[peer](task, packs, device)
        settle(device)
        connection.send(perf_counter() - begin)
        while (order := connection.recv()) is not None:
            first, count = order
            connection.send(profiled(step, packs[first], device) if not count else turn(step, packs, *order, device))
    except Exception as failure:
        connection.send(f"{type(failure).__name__}: {first_line(failure)}")


def turn(step: Step, packs: list[Pack], first: int, count: int, device: str) -> dict[str, Any]:
    """Steps from number ``first`` on, one untimed and ``count`` timed, twice: times in ms, the peak in GB, losses."""
    is_cuda = device == "cuda"
    losses = [float(step(packs[first % PACKS]))]
    found: dict[str, Any] = {"ms": [], "host ms": []}
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for number in range(first + 1, first + 1 + count):
        begin = perf_counter()
        loss = step(packs[number % PACKS])
        found["host ms"].append((perf_counter() - begin) * 1e3)
        if is_cuda:
            torch.cuda.synchronize()
        found["ms"].append((perf_counter() - begin) * 1e3)
        losses.append(float(loss))
    begin = perf_counter()
    for number in range(first + 1, first + 1 + count):
        step(packs[number % PACKS])
    if is_cuda:
        torch.cuda.synchronize()
    found["ms in a row"] = [(perf_counter() - begin) * 1e3 / count]
    peak = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else 0.0
    settle(device)
    return {**found, "GB": [peak], "losses": losses}


# All of them, in turns


@dataclass
class Peer:
    """A peer's process and what it has told."""

    model: str
    name: str
    process: Any
    connection: Connection
    told: dict[str, list[float]] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, model: str, name: str, device: str, lock: str) -> Peer:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, model, name, device, lock), daemon=True)
        process.start()
        there.close()
        return cls(model, name, process, here)

    def ask(self, first: int, count: int, until: float) -> Any:
        """What it tells of steps; raises RuntimeError if it fails or is late."""
        self.connection.send((first, count))
        if not self.connection.poll(max(0.0, until - perf_counter())):
            raise RuntimeError("it was late")
        if isinstance(answer := self.connection.recv(), str):
            raise RuntimeError(answer)
        return answer

    def take(self, first: int, count: int, until: float) -> None:
        """Lets it make steps."""
        for name, values in self.ask(first, count, until).items():
            self.told.setdefault(name, []).extend(values)

    def end(self) -> None:
        self.process.terminate()
        self.process.join()


def ready_ones(peers: list[Peer], until: float) -> list[Peer]:
    """Those that are made in time; says of each how long it took, or why it isn't there."""
    left, ready = {peer.connection: peer for peer in peers}, []
    while left and (found := wait(list(left), max(0.0, until - perf_counter()))):
        for connection in found:
            peer = left.pop(connection)  # type: ignore[call-overload]
            answer = told_by(peer)
            is_ready = isinstance(answer, float)
            print(f"{peer.model}, {peer.name}:", f"ready after {answer:.0f} s" if is_ready else answer, flush=True)
            ready += [peer] * is_ready
    for peer in left.values():
        print(f"{peer.model}, {peer.name}: left out, not ready in time", flush=True)
    for peer in peers:
        if peer not in ready:
            peer.end()
    return [peer for peer in peers if peer in ready]


def told_by(peer: Peer) -> float | str:
    """What it says of itself at first."""
    try:
        answer: float | str = peer.connection.recv()
    except EOFError:
        return "left out, its process has ended"
    return answer if isinstance(answer, float) else f"left out, {answer}"


def measure(peers: list[Peer], turns: int, steps: int, until: float) -> list[Peer]:
    """Turns of all peers of a model; gives those that went through with the right losses."""
    for number in range(turns):
        for peer in list(peers):
            if number and perf_counter() > until:
                break
            try:
                peer.take(number * (steps + 1), steps, until + 20)
            except (RuntimeError, EOFError) as failure:
                print(f"{peer.model}, {peer.name}: left out, {failure}", flush=True)
                peers.remove(peer)
    right = peers[0].told["losses"][0] if peers else 0.0
    for peer in list(peers):
        if not abs(peer.told["losses"][0] - right) <= MOST_APART * abs(right):
            print(f"{peer.model}, {peer.name}: left out, its loss is {peer.told['losses'][0]:.4f}, not {right:.4f}")
            peers.remove(peer)
    for peer in peers:
        if perf_counter() < until + 5:
            try:
                peer.kernels = peer.ask(0, 0, until + 20)
            except (RuntimeError, EOFError) as failure:
                print(f"{peer.model}, {peer.name}: not profiled, {failure}", flush=True)
    return peers


RATIOS = (
    ("hetu compiled", "torch.compile, hetu.functional", 0.95),
    ("hetu compiled", "torch.compile, FlashAttention-2", None),
    ("hetu", "torch.compile, FlashAttention-2", 1.0),
    ("hetu", "torch.compile, hetu.functional", None),
)
"""Whose time over whose, and what it may be at most."""


def rows_of(model: str, peers: Sequence[Peer]) -> list[Row]:
    """What was measured of a model."""
    rows, by_name = [], {peer.name: peer.told for peer in peers}
    for kind, key in (("step", "ms"), ("steps in a row", "ms in a row")):
        rows += [Row.of(f"{model}: {kind}, {name}", "ms", told[key]) for name, told in by_name.items()]
        for ours, theirs, limit in RATIOS:
            if ours in by_name and theirs in by_name:
                ratios = [a / b for a, b in zip(by_name[ours][key], by_name[theirs][key], strict=False)]
                rows.append(Row.of(f"{model}: {kind}, {ours} over {theirs}", "times", ratios, limit))
    for name, told in by_name.items():
        shares = [host / ms for host, ms in zip(told["host ms"], told["ms"], strict=True)]
        rows.append(Row.of(f"{model}: host, {name}", "ms", told["host ms"]))
        rows.append(Row.of(f"{model}: host over step, {name}", "times", shares, 0.5 if "hetu" in name[:4] else None))
    rows += [Row.of(f"{model}: peak memory, {name}", "GB", [max(told["GB"])]) for name, told in by_name.items()]
    return rows


def kernel_rows(peers: Sequence[Peer]) -> list[Row]:
    """How many kernels of each kind a step of each launches, and how long they take."""
    rows = []
    for peer in peers:
        for kind, count in peer.kernels.get("launches", {}).items():
            name = f"{peer.model}: {peer.name}, {kind}"
            rows += [Row.of(f"{name}, launches", "", [count])]
            rows += [Row.of(f"{name}, kernels", "ms", [peer.kernels["kernel ms"][kind]])]
    return rows


def kernels_text(peer: Peer) -> str:
    """The kinds of a peer's kernels on a line, and where its host waits."""
    launches, times = peer.kernels.get("launches", {}), peer.kernels.get("kernel ms", {})
    kinds = [f"{kind} {count} ({times[kind]:.1f} ms)" for kind, count in launches.items()]
    lines = [f"{peer.model}, {peer.name}: {sum(launches.values())} kernels: {', '.join(sorted(kinds))}"]
    return "\n  ".join([*lines, *peer.kernels.get("waits", [])[:4]])


def details(peer: Peer) -> str:
    """What takes longest of a peer, on the device and on the host."""
    kernels = [f"{ms:8.2f} ms {count:5d}  {name}" for ms, count, name in peer.kernels.get("longest", ())]
    parts = peer.kernels.get("waits", ()), peer.kernels.get("host", ())
    losses = f"losses {[round(x, 4) for x in peer.told['losses'][:4]]}"
    return "\n  ".join([f"{peer.model}, {peer.name}: {losses}", *kernels, *(line for part in parts for line in part)])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["small", "large"])
    parser.add_argument("--peers", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds that all of it may take")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    out = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    parser.add_argument("--out", type=Path, default=out, help="folder of the results; $OUT if it is set")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.models = ["tiny"]
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments, begin = parse(argv), perf_counter()
    device = "cpu" if arguments.tiny else "cuda"
    lock = str(Path(gettempdir()) / f"hetu_step_gpu_{os.getpid()}.lock")
    started = [
        Peer.start(model, name, device, lock)
        for model in reversed(arguments.models)  # large ones take longest to compile
        for name in arguments.peers
    ]
    rows: list[Row] = []
    measured: list[Peer] = []
    try:
        ready = ready_ones(started, begin + arguments.budget * 0.75)
        for place, model in enumerate(arguments.models, 1):
            until = perf_counter() + (begin + arguments.budget - perf_counter()) / (len(arguments.models) - place + 1)
            peers = measure([p for p in ready if p.model == model], arguments.turns, arguments.steps, until - 5)
            rows += rows_of(model, peers)
            measured += peers
            for peer in [p for p in ready if p.model == model]:
                peer.end()
    finally:
        for peer in started:
            peer.end()
        Path(lock).unlink(missing_ok=True)
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    print(f"\n{gpu or 'CPU'}, torch {torch.__version__}, {perf_counter() - begin:.0f} s in all\n")
    print_table(rows)
    print("", *map(kernels_text, measured), sep="\n")
    name, kept = f"step_{gpu.split()[-1].lower() if gpu else 'tiny'}", [*rows, *kernel_rows(measured)]
    keep(name, kept, in_docs=False, folder=arguments.out, device=gpu)
    (arguments.out / f"{name}.txt").write_text("\n\n".join(map(details, measured)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
