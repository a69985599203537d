"""What the benchmarks share: rows of a table, the machine they were measured on, and where both are kept."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

import hetu

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "performance.md"


@dataclass(frozen=True)
class Row:
    """One line of the table. ``limit`` is what the median may be at most."""

    name: str
    unit: str
    first_quartile: float
    median: float
    third_quartile: float
    samples: int
    limit: float | None

    @classmethod
    def of(cls, name: str, unit: str, samples: list[float], limit: float | None = None) -> Row:
        low, middle, high = (float(value) for value in np.percentile(samples, (25, 50, 75)))
        return cls(name, unit, low, middle, high, len(samples), limit)

    @property
    def cells(self) -> tuple[str, ...]:
        numbers = (f"{value:.4g} {self.unit}" for value in (self.first_quartile, self.median, self.third_quartile))
        return self.name, *numbers, *(self.verdict if self.limit is not None else ("", ""))

    @property
    def verdict(self) -> tuple[str, str]:
        assert self.limit is not None
        return f"{self.limit:g} {self.unit}", "yes" if self.median <= self.limit else "NO"


HEADER = ("", "q1", "median", "q3", "at most", "kept")


def timed(call: Callable[[], Any], scale: float, clock: Callable[[], float] = perf_counter) -> float:
    """Time of one call, in units of ``1 / scale`` seconds."""
    start = clock()
    call()
    return (clock() - start) * scale


processor_timed = partial(timed, clock=process_time)
"""The same of this process on the processor, which others don't disturb."""


def environment(command: Sequence[str] | None = None) -> dict[str, str]:
    """What the numbers depend on. ``command``: a script under ROOT and its arguments; None means this process's.

    Where results were put is left out of it.
    """
    script, *arguments = command or (str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:])
    folder = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    folder.add_argument("--out")
    arguments = folder.parse_known_args(arguments)[1]
    versions = {"hetu": hetu.__version__} | {name: version(name) for name in ("torch", "triton", "numpy", "sympy")}
    return {
        "device": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", script, *arguments]),
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_table(rows: list[Row]) -> None:
    lines = [HEADER, *(row.cells for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *numbers in lines:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells]).rstrip())


def keep(
    name: str, rows: Sequence[Row], in_docs: bool, folder: Path = ROOT / "benchmarks" / "results", device: str = ""
) -> None:
    """Writes ``<name>.json`` into the folder, and ``in_docs`` the table into ``docs/performance.md``.

    There it stands between ``<!-- <name>.json: begin -->`` and ``<!-- <name>.json: end -->``. ``device`` is a GPU that
    took part.
    """
    told = environment()
    told |= {"device": f"{device} beside {told['device']}"} if device else {}
    folder.mkdir(parents=True, exist_ok=True)
    kept = {**told, "rows": [asdict(row) for row in rows]}
    (folder / f"{name}.json").write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    if in_docs:
        document(name, rows, told)


def document(name: str, rows: Sequence[Row], told: Mapping[str, str]) -> None:
    """Writes a table into ``docs/performance.md``."""
    lines = [f"| {' | '.join(HEADER)} |", "| --- |" + " ---: |" * (len(HEADER) - 1)]
    lines += [f"| {' | '.join(row.cells)} |" for row in rows]
    versions = ", ".join(f"{name} {told[name]}" for name in ("python", "torch", "triton", "numpy", "sympy"))
    lines += ["", f"{told['device']}; {versions}; {told['date']}; `{told['command']}`."]
    write_between(f"{name}.json", "\n".join(lines))


def write_between(marker: str, text: str) -> None:
    """Replaces what stands between a marker's two comments in ``docs/performance.md``."""
    before, rest = DOCS.read_text(encoding="utf-8").split(begin := f"<!-- {marker}: begin -->")
    after = rest.split(end := f"<!-- {marker}: end -->")[1]
    DOCS.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
