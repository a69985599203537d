"""What a run's stages say of themselves: lines with times for ``HETU_DEBUG``, whole texts for ``HETU_DUMP``."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from hetu.config import settings
from hetu.graph import Graph
from hetu.parallel import AttnPlan

if TYPE_CHECKING:
    from hetu.planning.planner import Prepared

LOG = logging.getLogger("hetu")
"""Where lines go. Whoever has set up ``logging`` gets them there; else they go to stderr as they are."""

_numbers = count()
"""Numbers of the files, in the order in which they are written."""


def are_told() -> bool:
    """Whether anybody wants to know; this is asked in every run."""
    now = settings()
    return now.debug > 0 or now.dump is not None


def tell(stage: str, seconds: float, what: str, *more: tuple[int, Callable[[], str]]) -> None:
    """Logs a stage: a line at level 1, and texts from the levels that they are given with."""
    level = settings().debug
    if not level:
        return
    _set_up()
    lines = [f"{stage:<7} {seconds * 1e3:9.3f} ms  {what}"]
    for least, text in more:
        if level >= least:
            lines += [f"    {line}" for line in text().splitlines()]
    LOG.info("%s", "\n".join(lines))


def _set_up() -> None:
    if not LOG.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("hetu %(message)s"))
        LOG.addHandler(handler)
    if LOG.level == logging.NOTSET:
        LOG.setLevel(logging.INFO)


def keep(graph: Graph, name: str, text: Callable[[], str]) -> None:
    """Writes a stage's text to a file in the folder of ``HETU_DUMP``, if there is one.

    Args:
        graph: Whose run it is: each graph of each process has a folder of its own.
        name: What it is, with an ending.
        text: Makes it.

    Raises:
        OSError: If it can't be written.
    """
    folder = settings().dump
    if folder is not None:
        place = Path(folder) / _plain(f"{graph.name}-{os.getpid()}")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{next(_numbers):04}-{_plain(name)}").write_text(text() + "\n", encoding="utf-8")


def _plain(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.-]+", "_", name)[:100]


# What the stages say


def planned(prepared: Prepared, bind: float, plan: float) -> None:
    """New lengths were bound and planned, in so many seconds each."""
    graph = prepared.subgraph.graph
    names = f"strategy {prepared.strategy} on {prepared.num_pipelines} pipelines"
    tell("bind", bind, names, (2, lambda: str(prepared)))
    keep(graph, "bind.txt", lambda: str(prepared))
    attention = {
        node.name: item for node, plans in prepared.plans.items() for item in plans if isinstance(item, AttnPlan)
    }
    said = "; ".join(f"{name}: {item.summary()}" for name, item in attention.items()) or f"{len(prepared.plans)} nodes"
    tell("plan", plan, said, *((3, item.__str__) for item in attention.values()))
    for name, item in attention.items():
        keep(graph, f"layout-{name}.txt", item.layout.__str__)
        keep(graph, f"plan-{name}.txt", item.__str__)


def selected(prepared: Prepared, wanted: object, select: float, parts: float, pipelines: Sequence[int]) -> None:
    """A micro-batch is prepared: lengths seen before were neither bound nor planned again."""
    total = prepared.subgraph.graph.num_strategy
    asked = "" if wanted is None else f", asked for {wanted!r}"
    tell("select", select, f"strategy {prepared.strategy} of {total}{asked}")
    if parts > 1e-5:
        tell("plan", parts, f"parts of pipelines {', '.join(map(str, pipelines)) or 'of others'}")


def lowered(graph: Graph, seconds: float, notes: Sequence[str], text: Callable[[], str]) -> None:
    """A structure was lowered."""
    tell("lower", seconds, "; ".join(notes) or "no attention", (3, text))
    keep(graph, "lower.py", text)


def launched(seconds: float, device: object, pipelines: Sequence[int]) -> None:
    """A micro-batch was launched; on a GPU it may not be done yet."""
    tell("launch", seconds, f"pipelines {', '.join(map(str, pipelines)) or 'of others'} on {device}, time of the host")
