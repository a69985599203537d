"""What the benchmark of several GPUs measured, against its targets, and as tables.

Writes the tables into ``docs/performance.md``, from ``benchmarks/results/parallel_h200.json`` or another file; if there
is none, it says so there. Of several commands on one machine it first makes one file:

    python benchmarks/parallel_report.py [FILE ...]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import attention_report
from attention_cases import document_lengths
from attention_report import RESULTS, colophon, header, read_all
from parallel_cases import ALONE, BOTH, DIRECTIONS, PACKS, Spread
from tables import write_between

LEAST_OF_IDEAL = {8_192: 0.88, 32_768: 0.95, 131_072: 0.98}
"""What hetu's forward and backward should reach of the ideal on one document, by its tokens."""

LEAST_OF_IDEAL_ON_MIX = 0.85


@dataclass(frozen=True)
class Row(Spread):
    """What all rows have: the case, what was computed and by whom."""

    direction: str
    peer: str

    @property
    def is_hetu(self) -> bool:
        """Whether it is one of hetu's methods over all GPUs."""
        return self.peer.startswith("hetu ")

    def __str__(self) -> str:
        return f"{super().__str__()} {self.direction:<16} {self.peer:<21}"


@dataclass(frozen=True)
class Measured(Row):
    """Times of a peer on a case, and what they come to. Each time is that of the slowest rank.

    Attributes:
        first_quartile: Milliseconds on the devices, which start together; what hosts do is hidden.
        median: Likewise.
        third_quartile: Likewise.
        samples: How many times there are.
        queued: Milliseconds a call where several are queued, one after the other, and nobody waits: the larger of what
            hosts and what devices take.
        host: Milliseconds until a call returns to the host.
        of_ideal: The ideal, one GPU's median in the same run over the number of GPUs, over this one's median; None
            where that has none.
        error: Against float64, of all ranks' results together; see ``parallel_cases.joint_error``.
        note: What has to be said of it.
        load: FLOPs of the busiest rank over their mean, by the plan; None where there is no plan.
        planned: Bytes that each rank sends, by the plan; None likewise.
        counted: Bytes that each rank's communicator was given to send.
    """

    first_quartile: float
    median: float
    third_quartile: float
    samples: int
    queued: float
    host: float
    of_ideal: float | None
    error: float
    note: str
    load: float | None
    planned: list[int] | None
    counted: list[int] | None

    @property
    def target(self) -> float | None:
        """What it should reach of the ideal at least."""
        if not self.is_hetu or self.direction != BOTH or self.of_ideal is None:
            return None
        return LEAST_OF_IDEAL.get(self.tokens) if self.lengths == "one" else LEAST_OF_IDEAL_ON_MIX

    @property
    def is_missed(self) -> bool:
        return self.target is not None and self.of_ideal is not None and self.of_ideal < self.target

    @property
    def moves_as_planned(self) -> bool:
        """Whether the bytes that were sent are those of the plan."""
        return self.counted == self.planned

    def __str__(self) -> str:
        ratio = "" if self.of_ideal is None else f"  {self.of_ideal:.2f} of the ideal"
        missed = f", under {self.target}" if self.is_missed else ""
        moved = "" if self.moves_as_planned else f"  SENT {self.counted}, PLANNED {self.planned}"
        times = f"{self.median:8.3f} ms ({self.first_quartile:.3f} .. {self.third_quartile:.3f})"
        others = f"queued {self.queued:.3f}  host {self.host:.3f}  error {self.error:.1e}"
        return f"{super().__str__()} {times}  {others}{ratio}{missed}{moved}"


@dataclass(frozen=True)
class LeftOut(Row):
    """A peer that has no times on a case, and why."""

    reason: str

    def __str__(self) -> str:
        return f"{super().__str__()} left out: {self.reason}"


@dataclass
class Run(attention_report.Run):
    """All that a run of this benchmark found; ``about`` also has ``ranks``, how many GPUs there were."""

    benchmark: ClassVar[str] = "parallel"
    kinds: ClassVar[tuple[Any, Any]] = Measured, LeftOut

    @property
    def astray(self) -> list[Measured]:
        """Rows whose bytes are not those of the plan."""
        return [row for row in self.rows if not row.moves_as_planned]

    @property
    def faults(self) -> list[str]:
        """Why the run as a whole failed, if it did."""
        missing = sum(row.is_hetu or row.peer == ALONE for row in self.left_out)
        said = {"rows sent other bytes than planned": len(self.astray), "of hetu's rows are missing": missing}
        return [f"{count} {what}" for what, count in said.items() if count]


Found = Mapping[tuple[str, str, int, str], Measured]


def report(run: Run) -> str:
    """Markdown: a table for each pack and direction, what they say of the targets, and what was moved."""
    found = {(row.lengths, row.direction, row.tokens, row.peer): row for row in run.rows}
    tokens, size = sorted({row.tokens for row in run.rows}), int(run.about["ranks"])
    lines: list[str] = []
    for pack, direction in product(PACKS, reversed(DIRECTIONS)):
        lines += _times(found, pack, direction, tokens, size)
    lines += [*_verdicts(run), ""]
    lines += _mixes({row.tokens: row for row in run.rows if row.lengths == "mix"}.values())
    lines += _moved(run.rows)
    lines += _by_reason("Left out", ((row.reason, row) for row in run.left_out))
    lines += _by_reason("Notes", ((row.note, row) for row in run.rows if row.note))
    return "\n".join([*lines, f"{size} x {colophon(run.about)}"])


def _by_reason(title: str, told: Iterable[tuple[str, Row]]) -> list[str]:
    """Each reason once, with the peers and in how many rows it is theirs."""
    counts: dict[str, Counter[str]] = {}
    for reason, row in told:
        counts.setdefault(reason, Counter())[row.peer] += 1
    if not counts:
        return []
    lines = [
        f"- {', '.join(f'{peer} ({count})' for peer, count in peers.items())}: {reason}"
        for reason, peers in counts.items()
    ]
    return [f"{title} (in so many rows):", "", *lines, ""]


def _times(found: Found, pack: str, direction: str, tokens: Sequence[int], size: int) -> list[str]:
    """A table of a pack and a direction: peers by tokens."""
    rows = [row for row in found.values() if (row.lengths, row.direction) == (pack, direction)]
    if not rows:
        return []
    what = "one document" if pack == "one" else f"mix, tokens {rows[0].shares}"
    lines = header(f"{direction}, {what}", [f"{total:,}" for total in tokens])
    for peer in dict.fromkeys(row.peer for row in rows):
        own = [found.get((pack, direction, total, peer)) for total in tokens]
        lines.append(_line(peer, [_cell(row) for row in own]))
        if peer == ALONE:
            ideal = [None if row is None else row.median / size for row in own]
            lines.append(_line(f"the ideal: 1/{size} of it", [_time(time) for time in ideal]))
    best = [_times_as_fast(rows, total) for total in tokens]
    if any(best):
        lines.append(_line("hetu's best against torch's best", best))
    return [*lines, ""]


def _line(first: str, cells: Iterable[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |"


def _time(time: float | None) -> str:
    return "" if time is None else f"{time:.3g} ms"


def _cell(row: Measured | None) -> str:
    """The time, and what it is of the ideal."""
    if row is None:
        return ""
    if row.of_ideal is None or row.peer == ALONE:
        return _time(row.median)
    return f"{_time(row.median)} **{row.of_ideal:.2f}**{' ✗' if row.is_missed else ''}"


def _fastest(rows: Iterable[Measured]) -> Measured | None:
    return min(rows, key=lambda row: row.median, default=None)


def _times_as_fast(rows: Iterable[Measured], tokens: int) -> str:
    here = [row for row in rows if row.tokens == tokens]
    own, other = (_fastest(row for row in here if row.peer.startswith(name)) for name in ("hetu ", "torch "))
    return "" if own is None or other is None else f"{other.median / own.median:.2f} times as fast"


def _verdicts(run: Run) -> list[str]:
    """Whether the best method of each case keeps its target, and how many of all rows do."""
    counted = [row for row in run.rows if row.target is not None]
    if not counted:
        return ["No targets: nothing was measured that has one."]
    kept = sum(not row.is_missed for row in counted)
    refused = sum(row.is_hetu and row.direction == BOTH for row in run.left_out)
    said = []
    for pack, total in dict.fromkeys((row.lengths, row.tokens) for row in counted):
        best = _fastest(row for row in counted if (row.lengths, row.tokens) == (pack, total))
        assert best is not None and best.of_ideal is not None and best.target is not None
        verdict = "below" if best.is_missed else "kept"
        method = best.peer.removeprefix("hetu ")
        said.append(f"*{pack}*, {total:,} tokens: {best.of_ideal:.2f} by `{method}`, {best.target:g} {verdict}")
    return [
        "Best of the ideal, forward and backward, and its target: " + "; ".join(said) + ".",
        f"Of all methods' rows {kept} of {len(counted) + refused} keep it (✗: not).",
    ]


def _mixes(rows: Iterable[Measured]) -> list[str]:
    """What ``mix`` is."""
    drawn = {row.tokens: document_lengths("mix", row.tokens) for row in sorted(rows, key=lambda row: row.tokens)}
    told = [f"{len(some)} documents of {min(some)} to {max(some):,} tokens at {n:,}" for n, some in drawn.items()]
    return [f"*mix* is {', '.join(told)}.", ""] if told else []


def _moved(rows: Sequence[Measured]) -> list[str]:
    """A table of what hetu's methods send, what the busiest GPU computes, and what calls cost hosts."""
    shown = [row for row in rows if row.is_hetu and row.direction == BOTH and row.planned is not None]
    if not shown:
        return []
    columns = ["sent by each GPU, MB", "as planned", "busiest GPU's work", "of the ideal at that", "queued", "host"]
    lines = header(BOTH, columns)
    for row in shown:
        assert row.planned is not None and row.counted is not None and row.load is not None
        sent = " + ".join(f"{bytes_ / 1e6:.4g}" for bytes_ in row.counted)
        name = f"{row.lengths}, {row.tokens:,}: {row.peer.removeprefix('hetu ')}"
        at_load = "" if row.of_ideal is None else f"{row.of_ideal * row.load:.2f}"
        cells = [sent, "yes" if row.moves_as_planned else "NO", f"{row.load:.2f} of the mean", at_load]
        lines.append(_line(name, [*cells, _time(row.queued), _time(row.host)]))
    return [*lines, ""]


NO_RESULTS = "No results are kept yet."


def main() -> None:
    run = read_all(Run, RESULTS / "parallel_h200.json")
    write_between("parallel.json", NO_RESULTS if run is None else report(run))


if __name__ == "__main__":
    main()
