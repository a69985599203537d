"""Plans as pictures: when pipelines compute and wait, and who computes which pairs of the mask."""

from __future__ import annotations

import io
import os
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from hetu.errors import HetuError, PlanError, caller
from hetu.parallel.mask.drawing import edges
from hetu.parallel.mask.segments import IntArray
from hetu.parallel.mask.svg import HIDDEN, colour_of
from hetu.parallel.plan.instructions import Receive, Wait
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.views.cost import Timeline, simulate
from hetu.parallel.views.hardware import Hardware
from hetu.parallel.views.report import computing, summary, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")

IDLE, MOVED = "#d7dce2", "#5b6570"
"""Colours of waiting and of transfers."""

CELLS = 240
"""Most cells of the mask's picture along a side."""

MOST_LABELLED = 16
"""So many pipelines have a label each; of more, every second, fourth or so has one."""

BESIDE = 8
"""Most groups whose masks are drawn; the rest is counted."""


def save(plan: PlanData, path: str, hardware: Hardware) -> None:
    """See :meth:`hetu.parallel.attn_plan.AttnPlan.visualize`."""
    kind = os.path.splitext(path)[1].lstrip(".").lower()
    if kind not in FORMATS:
        names = ", ".join(f".{name}" for name in FORMATS)
        what = f"a picture of a plan is written as one of {names}, got {path!r}"
        raise HetuError(what, op="plan", where=caller(), fix="name the file plan.svg, say")
    figure(plan, hardware).savefig(path, format=kind)


def svg(plan: PlanData, hardware: Hardware) -> str:
    """The picture as the text of an SVG."""
    text = io.StringIO()
    figure(plan, hardware).savefig(text, format="svg")
    return text.getvalue()


def html(plan: PlanData) -> str:
    """What a notebook shows: the picture where there is matplotlib, and the table to unfold."""
    try:
        drawn = svg(plan, Hardware.h100())
    except (HetuError, PlanError):  # without matplotlib, and of a plan that can't be followed, there is the table
        drawn = ""
    drawn = drawn[max(drawn.find("<svg"), 0) :]
    text = f"<details><summary>{escape(summary(plan))}</summary><pre>{escape(table(plan))}</pre></details>"
    return f"<div>{drawn}{text}</div>"


def figure(plan: PlanData, hardware: Hardware) -> Figure:
    """The timeline, and beside it each group's mask coloured by who computes it.

    Raises:
        HetuError: If matplotlib is not installed.
        PlanError: If the plan deadlocks.
    """
    try:
        import matplotlib  # noqa: F401 # asked for by its own name, so that the error below has it
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        fix = 'pip install "hetu-attention[demo]", or see print(plan) and plan.draw(), which need nothing'
        raise HetuError("a picture of a plan needs matplotlib", op="plan", where=caller(), fix=fix) from error
    timeline, groups = simulate(plan, hardware), min(len(plan.layout.groups), BESIDE)
    columns = 1 if groups < 2 else 2
    rows = -(-groups // columns)
    height = min(max(3.4, 0.34 * len(plan.pipelines) + 1.6, 1.9 * rows), 12.0)
    drawn = Figure(figsize=(11.5, height), layout="constrained", facecolor="white")
    cells = drawn.add_gridspec(rows, 1 + columns, width_ratios=[6.2, *([4.2 / columns] * columns)])
    draw_timeline(drawn.add_subplot(cells[:, 0]), plan, timeline)
    for number, owners in enumerate(computing(plan, 0)[:groups]):
        draw_owners(drawn.add_subplot(cells[number // columns, 1 + number % columns]), plan, number, owners)
    _legend(drawn)
    hidden = len(plan.layout.groups) - groups
    more = f" ({hidden} more groups)" if hidden else ""
    direction = " backward" if plan.is_backward else ""
    drawn.suptitle(f"{plan.method}{direction}, {plan.mask.name}, {len(plan.pipelines)} pipelines{more}", fontsize=11)
    return drawn


def draw_timeline(axes: Axes, plan: PlanData, timeline: Timeline) -> None:
    """Pipelines by time: what each computes, what comes to it meanwhile, and where it waits."""
    last = max(timeline.finish, default=0.0)
    unit, scale = ("s", 1.0) if last >= 1 else ("ms", 1e3) if last >= 1e-3 else ("µs", 1e6)
    busy = 0.0
    for part, ends in zip(plan.pipelines, timeline.ends, strict=True):
        steps = list(zip(part.instructions, pairwise([0.0, *ends]), strict=True))
        works = [(a * scale, (b - a) * scale) for item, (a, b) in steps if b > a and not isinstance(item, Wait)]
        waits = [(a * scale, (b - a) * scale) for item, (a, b) in steps if b > a and isinstance(item, Wait)]
        finish = ends[-1] if ends else 0.0
        waits.append((finish * scale, (last - finish) * scale))
        comes = [
            timeline.transfers[i.transfer]
            for i, _ in steps
            if isinstance(i, Receive)
            if i.transfer in timeline.transfers
        ]
        place, colour = part.pipeline, colour_of(part.pipeline)
        axes.broken_barh(works, (place - 0.42, 0.56), facecolor=colour, edgecolor="white", linewidth=0.4)
        axes.broken_barh(waits, (place - 0.42, 0.56), facecolor=IDLE)
        axes.broken_barh([(a * scale, (b - a) * scale) for a, b in comes], (place + 0.2, 0.18), facecolor=MOVED)
        busy += sum(width for _, width in works)
    count = len(plan.pipelines)
    share = busy / (count * last * scale) if last else 1.0
    axes.set(
        xlim=(0, last * scale or 1), ylim=(count - 0.45, -0.55), xlabel=f"predicted time ({unit})", ylabel="pipeline"
    )
    axes.set_yticks(range(0, count, max(1, -(-count // MOST_LABELLED))))
    axes.set_title(f"{last * scale:.3g} {unit}, computing {share:.0%} of the time", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(drawn: Figure) -> None:
    from matplotlib.patches import Patch

    named = {"computes (a colour per pipeline)": colour_of(0), "waits or is done": IDLE, "rows arrive": MOVED}
    patches = [Patch(facecolor=colour, label=name) for name, colour in named.items()]
    drawn.legend(handles=patches, ncols=3, loc="outside lower left", frameon=False, fontsize=8)


def draw_owners(axes: Axes, plan: PlanData, number: int, owners: IntArray) -> None:
    """A group's pairs: queries down, keys across, each in the colour of the pipeline that computes it."""
    group = plan.layout.groups[number]
    axes.imshow(
        owned(plan, number, owners), interpolation="nearest", extent=(0, group.tokens or 1, group.tokens or 1, 0)
    )
    is_alone = len(plan.layout.groups) == 1
    axes.set_title("queries down, keys across" if is_alone else f"group {group.value}", fontsize=9)
    axes.locator_params(nbins=4 if is_alone else 2)
    axes.ticklabel_format(style="plain")
    axes.tick_params(labelsize=8)


def owned(plan: PlanData, number: int, owners: IntArray) -> Any:
    """``(cells, cells, 3)`` colours in 0 .. 1; where a cell has some of its pairs only, its colour is paler."""
    group = plan.layout.groups[number]
    whole = plan.mask.over_pack(group.lengths)
    sides = edges(group.tokens, CELLS)
    if len(sides) < 2:
        return np.ones((1, 1, 3))
    sizes = np.diff(sides)
    share = (whole.pairs_in(sides, sides) / (sizes[:, None] * sizes))[..., None]
    colours = np.array([_rgb(colour_of(r)) for r in owners[sides[:-1]].tolist()])[:, None]
    shade = np.where(share > 0, 0.35 + 0.65 * share, 0.0)
    return shade * colours + (1 - shade) * _rgb(HIDDEN)


def _rgb(colour: str) -> Any:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
