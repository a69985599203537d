"""Attention over several GPUs: hetu's methods against one GPU alone and against torch's ``context_parallel``.

    torchrun --nproc-per-node 2 benchmarks/parallel.py [--out DIR] [--tokens 8192 32768 131072] [--packs one mix]
        [--direction forward forward+backward] [--peers "one GPU" "hetu ring" ...] [--shares 3:2] [--split balanced]
        [--heads 32:8:128] [--samples 20]

To try it out without GPUs, on gloo in float32: ``torchrun --nproc-per-node 2 benchmarks/parallel.py --tiny``.

``hetu.parallel_attn`` through ``g.run``, each rank feeding its own shard, and ``hetu.functional.parallel_attn`` by the
method of the graph's ``"auto"``. The ideal is one GPU's time with all tokens,
divided by the number of GPUs; both GPUs are timed alone at the same time.

A sample is the devices' time from a barrier on them to the end of the slowest. The hosts are hidden behind a sleeping
kernel before that barrier, as in ``attention.py``: a run of a few ms would else be timed by how fast Python is, whereas
in a step of training the host runs ahead of the device. That figure is told apart: ``queued`` is what a call takes of
several that are queued back to back, ``host`` how long the call keeps the host. Peers take samples in turns. Nothing
is timed whose error against float64 is over twice that of hetu's kernel on one GPU.

Bytes that ranks send are counted by ``hetu.trace()`` in a run of its own; the program fails if they are not the plan's,
or if hetu itself has no times.
Results are written after every case to ``benchmarks/results/parallel_<device>.json``; ``parallel_report.py`` makes the
docs of them.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from attention_cases import Inputs, Results, reference
from attention_report import RESULTS
from parallel_cases import ALONE, DIRECTIONS, HEADS, PACKS, TOKENS, Ranks, Spread, joint_error, spread_cases, squares
from parallel_peers import PEERS, Peer, load_of
from parallel_report import LeftOut, Measured, Run, report
from timing import Call, DeviceTimer, HostTimer, WaitsForDevice, about, attempt, take_turns

import hetu
from hetu.parallel import SPLITS

# Timing


class RanksTimer(DeviceTimer):
    """Times of a call on the devices of all ranks, which start together; the slowest counts.

    Of a call that waits for the device the host's time is part: one rank's sleep can't hide it.

    Attributes:
        note: Says so.
        returns: Milliseconds that each call took to return.
    """

    def __init__(self, peer: Peer, direction: str, ranks: Ranks) -> None:
        self.peer, self.ranks, self.returns, self.note = peer, ranks, list[float](), ""
        super().__init__(_noting(partial(peer.call, direction), self.returns))

    def sample(self) -> float:
        if not self.note:
            try:
                return super().sample()
            except WaitsForDevice:  # on all ranks, for they all heard that it was not hidden
                self.note, self.sleep = "its host's time is part of its time, as it waits for the device", 0.0
        return self._take()[0]

    def _host_time(self) -> float:
        with self.peer.around():
            return max(self.ranks.exchange(super()._host_time()))

    def _take(self) -> tuple[float, bool]:
        with self.peer.around():
            self.ranks.meet()
            taken = super()._take()
        times, hidden = zip(*self.ranks.exchange(taken), strict=True)
        return max(times), all(hidden)

    def _meet(self) -> None:
        self.ranks.meet_on_device()

    def queue(self, count: int) -> float:
        """Milliseconds that so many calls take one after the other."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            self.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


class RanksHostTimer(HostTimer):
    """Times of a call on the CPUs of all ranks; has what :class:`RanksTimer` has."""

    note = ""

    def __init__(self, peer: Peer, direction: str, ranks: Ranks) -> None:
        self.peer, self.ranks, self.returns = peer, ranks, list[float]()
        super().__init__(_noting(partial(peer.call, direction), self.returns))

    def sample(self) -> float:
        with self.peer.around():
            self.ranks.meet()
            taken = super().sample()
        return max(self.ranks.exchange(taken))

    def queue(self, count: int) -> float:
        """Milliseconds that so many calls take one after the other."""
        start = perf_counter()
        for _ in range(count):
            self.call()
        return (perf_counter() - start) * 1e3


JointTimer = RanksTimer | RanksHostTimer


def _noting(call: Call, times: list[float]) -> Call:
    """The call, which notes how many milliseconds it took to return."""

    def noting() -> None:
        start = perf_counter()
        call()
        times.append((perf_counter() - start) * 1e3)

    return noting


QUEUED = 100.0  # milliseconds of calls that are queued back to back, but 2 to 20 of them
LONG = 50.0  # milliseconds of a call, from which on how fast the host is plays no part


def queued(timer: JointTimer) -> float:
    """Milliseconds a call where several are queued back to back."""
    count = min(max(int(QUEUED / timer.cost), 2), 20)
    taken = []
    for _ in range(1 if timer.cost > LONG else 3):
        with timer.peer.around():
            timer.ranks.meet()
            time = timer.queue(count)
        taken.append(max(timer.ranks.exchange(time)) / count)
    return statistics.median(taken)


# A case

MOST_WRONG = 0.05
"""What an error may be at most, also if it is larger on one GPU or missing there."""
ROUNDING = 1e-6
"""What it may be in any case: float32 in another order."""


def together(ranks: Ranks, made: dict[str, Any], reasons: dict[str, str], name: str, make: Callable[[], Any]) -> None:
    """As ``attempt``, but what fails on one rank counts as failed on all."""
    own: dict[str, Any] = {}
    failed: dict[str, str] = {}
    attempt(own, failed, name, make)
    said = {rank: reason for rank, reason in enumerate(ranks.exchange(failed.get(name))) if reason is not None}
    if said:
        same = set(said.values()) if len(said) == ranks.size else ()
        reasons[name] = next(iter(same)) if len(same) == 1 else "; ".join(f"rank {r}: {why}" for r, why in said.items())
    else:
        made.update(own)


def judge(
    inputs: Inputs, peers: dict[str, Peer], direction: str, right: Results, ranks: Ranks
) -> tuple[dict[str, float], dict[str, str]]:
    """The errors of the peers that are right, and why the others are not."""
    found: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def compare(peer: Peer) -> dict[str, tuple[float, float]]:
        return squares(inputs.case, peer.results(direction), right, peer.rows.to(inputs.q.device))

    for name, peer in peers.items():
        together(ranks, found, reasons, name, partial(compare, peer))
    errors = {name: joint_error(ranks.exchange(own), peers[name].copies) for name, own in found.items()}
    limit = min(max(2 * errors.get(ALONE, float("inf")), ROUNDING), MOST_WRONG)
    for name, error in errors.items():
        if error > limit:
            reasons[name] = f"its error is {error:.1e}, over {limit:.1e}"
    return {name: error for name, error in errors.items() if name not in reasons}, reasons


def count_sent(call: Call, rank: int) -> int:
    """Bytes that this rank's communicator is given to send in a run."""
    with hetu.trace() as trace:
        call()
    lanes = {
        (event["pid"], event["tid"])
        for event in trace.events
        if event["name"] == "thread_name" and event["args"]["name"].startswith("to ")
    }
    assert all(pid == rank for pid, _ in lanes)
    return sum(e["args"]["bytes"] for e in trace.events if e["ph"] == "X" and (e["pid"], e["tid"]) in lanes)


def follows(peer: Peer, direction: str, ranks: Ranks) -> dict[str, Any]:
    """What a peer's plans say, and what it really sends."""
    plans = peer.plans(direction)
    if not plans:
        return {"load": None, "planned": None, "counted": None}
    planned = [sum(plan.bytes_sent(r) for plan in plans) for r in range(ranks.size)]
    counted = ranks.exchange(count_sent(partial(peer.call, direction), ranks.rank))
    return {"load": load_of(plans), "planned": planned, "counted": counted}


def measure(
    case: Spread, names: Iterable[str], directions: Iterable[str], samples: int, ranks: Ranks, dtype: torch.dtype
) -> Iterator[Measured | LeftOut]:
    """All rows of a case, on every rank."""
    inputs = Inputs.draw(case, ranks.device.type, dtype)
    peers: dict[str, Peer] = {}
    failed: dict[str, str] = {}
    for name in names:
        together(ranks, peers, failed, name, partial(PEERS[name], inputs, ranks))
    right = reference(inputs, block=512)
    for direction in directions:
        errors, reasons = judge(inputs, peers, direction, right, ranks)
        timers: dict[str, JointTimer] = {}
        for name in errors:
            timer = RanksTimer if ranks.device.type == "cuda" else RanksHostTimer
            together(ranks, timers, reasons, name, partial(timer, peers[name], direction, ranks))
        for name, reason in (failed | reasons).items():
            yield LeftOut(**asdict(case), direction=direction, peer=name, reason=reason)
        taken = take_turns(timers, samples)
        ideal = float(np.median(taken[ALONE])) / ranks.size if ALONE in taken else None
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
                host=max(ranks.exchange(statistics.median(timers[name].returns[1:]))),
                queued=queued(timers[name]),
                of_ideal=None if ideal is None else ideal / middle,
                error=errors[name],
                note="; ".join(filter(None, (peers[name].note, timers[name].note))),
                **follows(peers[name], direction, ranks),
            )


# The script

TINY = {"heads": "4:2:16", "tokens": [98, 200], "samples": 5}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--heads", default=HEADS, help="query heads:key heads:head_dim")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--packs", nargs="+", choices=PACKS, default=list(PACKS))
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--split", choices=list(SPLITS), default="balanced")
    parser.add_argument("--shares", default="3:2", help="of the tokens of mix, one a GPU")
    parser.add_argument("--window", type=int, help="how many keys before its own a query sees; all if not given")
    parser.add_argument("--samples", type=int, default=20, help="of each row at most; long ones get fewer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="few tokens and heads, on gloo in float32")
    if "--tiny" in argv:
        parser.set_defaults(**TINY)
    return parser.parse_args(argv)


def told(ranks: Ranks, argv: Sequence[str]) -> dict[str, str]:
    """The machine, the versions and the command, and how many GPUs took part."""
    said = about("benchmarks/parallel.py", ranks.device.type, argv)
    script = shlex.split(said["command"])[1:]
    said |= {
        "command": shlex.join(["torchrun", "--nproc-per-node", str(ranks.size), *script]),
        "ranks": str(ranks.size),
    }
    return said | {"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if ranks.device.type == "cuda" else said


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        sys.exit("this needs CUDA devices; --tiny tries the script out")
    world = hetu.init_distributed("gloo" if arguments.tiny else "nccl")
    if not world.is_distributed:
        sys.exit("start this with torchrun --nproc-per-node 2")
    ranks, start = Ranks(world), perf_counter()
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    run = Run(told(ranks, argv))
    speak: Callable[..., None] = partial(print, flush=True) if ranks.rank == 0 else lambda *_: None
    lines = arguments.heads, arguments.tokens, arguments.packs, arguments.shares, arguments.split
    for case in spread_cases(*lines, ranks.size, window=arguments.window):
        for row in measure(case, arguments.peers, arguments.direction, arguments.samples, ranks, dtype):
            run.add(row)
            speak(row)
        if ranks.rank == 0:
            run.write(arguments.out)  # after every case, so that nothing is lost
    speak(f"\n{report(run)}\n\nafter {perf_counter() - start:.0f} s")
    ranks.meet()
    hetu.shutdown_distributed()
    if run.faults:
        sys.exit("; ".join(run.faults))


if __name__ == "__main__":
    main()
