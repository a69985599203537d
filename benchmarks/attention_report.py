"""What the attention benchmark measured, kept as JSON, against its targets, and as tables.

Writes the tables into ``docs/performance.md``, from ``benchmarks/results/attention_h100.json`` or another file. Runs
with windows have their own place there. Of several commands on one machine, one a GPU say, it makes one file first:

    python benchmarks/attention_report.py [FILE ...]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from attention_cases import DIRECTIONS, LENGTHS, MASKS, Case, document_lengths
from attention_peers import YARDSTICK
from tables import ROOT, write_between

RESULTS = ROOT / "benchmarks" / "results"
AnyRun = TypeVar("AnyRun", bound="Run")


@dataclass(frozen=True)
class Row(Case):
    """What all rows have: the case, what was computed and by whom."""

    direction: str
    peer: str

    def __str__(self) -> str:
        return f"{super().__str__()} {self.direction:<8} {self.peer:<16}"


@dataclass(frozen=True)
class Measured(Row):
    """Times of a peer on a case, and what they come to.

    Attributes:
        first_quartile: Milliseconds on the device.
        median: Likewise.
        third_quartile: Likewise.
        samples: How many times there are.
        tflops: 10**12 floating point operations a second, by the median.
        ratio: FlashAttention-2's median in the same run over this one's; None where it has none.
        error: Against float64; see ``attention_cases.error``.
        host: Milliseconds that the host takes for the call, not part of the others; None where they are not apart.
    """

    first_quartile: float
    median: float
    third_quartile: float
    samples: int
    tflops: float
    ratio: float | None
    error: float
    host: float | None = None

    @property
    def target(self) -> float | None:
        """What hetu's ratio should be at least."""
        if self.peer != "hetu" or self.ratio is None:
            return None
        if self.window is not None:
            return 1.3 if self.direction == "forward" else 1.2
        if self.tokens == 32_768 and self.lengths in ("short", "ragged") and self.is_causal:
            return 1.5
        if self.tokens == 32_768 and self.lengths in ("mix", "equal"):
            return 1.25 if self.direction == "forward" else 1.15
        return 1.0

    @property
    def is_missed(self) -> bool:
        return self.target is not None and self.ratio is not None and self.ratio < self.target

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f"  {self.ratio:.2f}"
        missed = f" under {self.target}" if self.is_missed else ""
        times = f"{self.median:8.3f} ms ({self.first_quartile:.3f} .. {self.third_quartile:.3f})"
        return f"{super().__str__()} {times} {self.tflops:4.0f} TFLOP/s  error {self.error:.1e}{ratio}{missed}"


@dataclass(frozen=True)
class LeftOut(Row):
    """A peer that has no times on a case, and why."""

    reason: str

    def __str__(self) -> str:
        return f"{super().__str__()} left out: {self.reason}"


@dataclass
class Run:
    """All that a run of the benchmark found.

    Attributes:
        benchmark: How its files are called.
        kinds: The class of rows that were measured, and of those that were not.
        about: Device, versions, date and command.
        rows: What was measured.
        left_out: What was not.
    """

    benchmark: ClassVar[str] = "attention"
    kinds: ClassVar[tuple[Any, Any]] = Measured, LeftOut

    about: dict[str, str]
    rows: list[Any] = field(default_factory=list)
    left_out: list[Any] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Self:
        kept = json.loads(path.read_text(encoding="utf-8"))
        rows, left_out = kept.pop("rows"), kept.pop("left_out", [])
        measured, missing = cls.kinds
        return cls(kept, [measured(**row) for row in rows], [missing(**row) for row in left_out])

    @classmethod
    def joined(cls, runs: Sequence[Self]) -> Self:
        """What several commands found, each another part of it.

        Raises:
            ValueError: If machines, versions or dates differ, or if two measured the same.
        """
        first, *others = runs
        for other in others:
            compared = {*first.about, *other.about} - {"command"}
            differing = [key for key in compared if first.about.get(key) != other.about.get(key)]
            if differing:
                raise ValueError(f"they differ in {', '.join(sorted(differing))}")
        commands = dict.fromkeys(run.about["command"] for run in runs)
        whole = cls({**first.about, "command": "; ".join(commands)})
        for run in runs:
            whole.rows += run.rows
            whole.left_out += run.left_out
        same = [key for key, count in Counter(map(_key, whole.rows)).items() if count > 1]
        if same:
            raise ValueError(f"measured twice: {same[0]}")
        return whole

    def add(self, row: Any) -> None:
        """A row of one of the two kinds."""
        (self.rows if isinstance(row, self.kinds[0]) else self.left_out).append(row)

    @property
    def marker(self) -> str:
        """What marks its place in ``docs/performance.md``: runs with windows don't overwrite the others' tables."""
        return (
            f"{self.benchmark}_masks.json"
            if any(row.mask not in MASKS for row in self.rows)
            else f"{self.benchmark}.json"
        )

    def write(self, folder: Path) -> Path:
        """Writes ``<benchmark>_<device>.json``, whole or not at all: a run may be killed at any time."""
        maker, _, device = self.about["device"].partition(" ")
        name = device.split()[0].lower() if maker == "NVIDIA" else "cpu"
        path, unfinished = folder / f"{self.benchmark}_{name}.json", folder / f".{self.benchmark}_{name}.json"
        folder.mkdir(parents=True, exist_ok=True)
        lists = {"rows": [asdict(row) for row in self.rows], "left_out": [asdict(row) for row in self.left_out]}
        unfinished.write_text(json.dumps({**self.about, **lists}, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return unfinished.replace(path)


def report(run: Run) -> str:
    """Markdown: tables of hetu against FlashAttention-2, what they say of the targets, and the other peers."""
    found = {(r.tokens, r.direction, r.heads, r.mask, r.lengths, r.peer): r for r in run.rows}
    lines: list[str] = []
    tokens = sorted({row.tokens for row in run.rows}, reverse=True)
    for total, direction in product(tokens, DIRECTIONS):
        lines += _against_yardstick(found, total, direction)
    lines += [_verdict(run), "", *_mixes(tokens)]
    lines += _other_peers(run.rows)
    lines += _left_out(run.left_out)
    return "\n".join([*lines, colophon(run.about)])


def colophon(about: Mapping[str, str]) -> str:
    """What it was measured on, when, and how."""
    names = ("python", "torch", "triton", "cuda", "cudnn", "nccl")
    versions = ", ".join(f"{name} {about[name]}" for name in names if name in about)
    return f"{about['device']}; {versions}; {about['date']}; `{about['command']}`."


Found = dict[tuple[int, str, str, str, str, str], Measured]


def _against_yardstick(found: Found, tokens: int, direction: str) -> list[str]:
    """A table for a number of tokens and a direction: heads and masks by lengths."""
    heads = dict.fromkeys(key[2] for key in found if key[:2] == (tokens, direction))
    if not heads:
        return []
    lengths = [kind for kind in LENGTHS if any(key[4] == kind for key in found)]
    lines = header(f"{direction}, {tokens:,} tokens", lengths)
    masks = dict.fromkeys([*MASKS, *(key[3] for key in found)])
    for one, mask in product(heads, masks):
        keys = [(tokens, direction, one, mask, kind) for kind in lengths]
        cells = [_cell(found.get((*key, "hetu")), found.get((*key, YARDSTICK))) for key in keys]
        if any(cells):
            lines.append(f"| {one} {mask} | {' | '.join(cells)} |")
    return [*lines, ""]


def header(first: str, others: Iterable[str]) -> list[str]:
    others = list(others)
    return [f"| {first} | {' | '.join(others)} |", "| --- |" + " ---: |" * len(others)]


def _cell(own: Measured | None, yardstick: Measured | None) -> str:
    """TFLOP/s of both, and the ratio."""
    if own is None and yardstick is None:
        return ""
    speeds = " / ".join("-" if row is None else f"{row.tflops:.0f}" for row in (own, yardstick))
    if own is None or own.ratio is None:
        return speeds
    return f"{speeds} **{own.ratio:.2f}**{' ✗' if own.is_missed else ''}"


def _verdict(run: Run) -> str:
    """How many rows keep their target. One of hetu's that was refused doesn't."""
    counted = [row for row in run.rows if row.target is not None]
    refused = sum(row.peer == "hetu" for row in run.left_out)
    if not counted and not refused:
        return f"No targets: hetu was not measured together with {YARDSTICK}."
    kept = sum(not row.is_missed for row in counted)
    means = [
        f"{direction} {mean:.2f}"
        for direction in DIRECTIONS
        if (mean := _mean(row for row in counted if row.direction == direction)) is not None
    ]
    of = f"; geometric mean of the ratio: {', '.join(means)}" if means else ""
    return f"{kept} of {len(counted) + refused} rows keep their target (✗: not){of}."


def _mean(rows: Iterable[Measured]) -> float | None:
    """The geometric mean of ratios."""
    ratios = [row.ratio for row in rows if row.ratio is not None]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else None


def _mixes(tokens: Iterable[int]) -> list[str]:
    """What ``mix`` is."""
    drawn = {total: document_lengths("mix", total) for total in tokens}
    told = [f"{len(some)} documents of {min(some)} to {max(some):,} tokens at {n:,}" for n, some in drawn.items()]
    return [f"*mix* is {', '.join(told)}.", ""] if told else []


def _other_peers(rows: Sequence[Measured]) -> list[str]:
    """A table of all peers: the geometric means of their ratios over heads and masks."""
    peers = [peer for peer in dict.fromkeys(row.peer for row in rows) if peer not in ("hetu", YARDSTICK)]
    if not peers:
        return []
    lines = header(f"times the speed of {YARDSTICK}, on average", [*LENGTHS, "rows"])
    tokens = sorted({row.tokens for row in rows}, reverse=True)
    for total, direction, peer in product(tokens, DIRECTIONS, ["hetu", *peers]):
        own = [row for row in rows if (row.tokens, row.direction, row.peer) == (total, direction, peer)]
        means = [_mean(row for row in own if row.lengths == kind) for kind in LENGTHS]
        cells = ["" if mean is None else f"{mean:.2f}" for mean in means]
        if any(cells):
            lines.append(f"| {direction}, {total:,} tokens: {peer} | {' | '.join(cells)} | {len(own)} |")
    return [*lines, ""]


def _key(row: Any) -> tuple[Any, ...]:
    """What was measured: a row without its numbers."""
    return tuple(
        getattr(row, name, None) for name in (*Case.__dataclass_fields__, "direction", "peer", "method", "split")
    )


def _left_out(rows: Sequence[LeftOut]) -> list[str]:
    """Each peer and reason once."""
    counts = Counter((row.peer, row.direction, row.reason) for row in rows)
    if not counts:
        return []
    lines = [f"- {peer}, {direction}, {count} cases: {reason}" for (peer, direction, reason), count in counts.items()]
    return ["Left out:", "", *lines, ""]


def read_all(kind: type[AnyRun], default: Path) -> AnyRun | None:
    """The results that the command line names; several are joined, and kept as one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", type=Path, nargs="*", default=[default])
    files = parser.parse_args().files
    if not all(path.exists() for path in files):
        return None
    run = kind.joined([kind.read(path) for path in files])
    if len(files) > 1:
        print(run.write(RESULTS))
    return run


def main() -> None:
    run = read_all(Run, RESULTS / "attention_h100.json")
    assert run is not None, "there is no such file"
    write_between(run.marker, report(run))


if __name__ == "__main__":
    main()
