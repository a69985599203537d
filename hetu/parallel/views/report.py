"""Plans as text: a line, a table of the pipelines, and what each does step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hetu.parallel.layout.printing import count
from hetu.parallel.mask.segments import IntArray
from hetu.parallel.plan.heads import Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Instruction, Receive, Runs, Send
from hetu.parallel.plan.memory import peak_bytes
from hetu.parallel.plan.parts import PipelinePlan, PlanData

MAX_STEPS = 64
"""Step by step is printed for plans up to so many steps a pipeline, and for so many pipelines."""
MAX_PIPELINES = 16


def summary(plan: PlanData) -> str:
    """See :meth:`hetu.parallel.attn_plan.AttnPlan.summary`."""
    layout, pipelines = plan.layout, range(len(plan.pipelines))
    work = [plan.head_pairs(r) for r in pipelines]  # those who share a group's heads compute the same pairs
    pairs = sum(work) // plan.heads.num_q
    tokens, documents = sum(g.tokens for g in layout.groups), sum(len(g.lengths) for g in layout.groups)
    mean = sum(work) / len(work)
    load = f", largest share {max(work) / mean:.2f} of the mean" if mean and len(work) > 1 else ""
    moved = sum(plan.bytes_sent(r) for r in pipelines)
    return (
        f"{plan.method}{' backward' * plan.is_backward}, {plan.mask.name}: "
        f"{tokens:,} tokens of {count(documents, 'document')} "
        f"on {count(len(work), 'pipeline')} in {count(len(layout.groups), 'group')}; {pairs:,} pairs{load}; "
        f"{as_bytes(moved)} sent"
    )


def table(plan: PlanData) -> str:
    """See ``print(plan)``."""
    has_heads = any(part.heads != plan.heads.all for part in plan.pipelines)
    moved = ("rows sent", "rows received", *(("gradients sent", "gradients received") if plan.is_backward else ()))
    lines: list[tuple[str, ...]] = [
        ("pipeline", "group", "tokens", *(["heads"] * has_heads), "pairs", "steps", *moved, "sent", "held at most")
    ]
    for r, part in enumerate(plan.pipelines):
        group, _ = plan.layout.place(r)
        counts: tuple[int, ...] = (part.rows, *([part.heads.num_q] * has_heads))
        counts += (plan.pairs(r), part.attends, plan.rows_sent(r), plan.rows_received(r))
        if plan.is_backward:
            counts += (plan.grad_rows_sent(r), plan.grad_rows_received(r))
        sizes = (as_bytes(plan.bytes_sent(r)), as_bytes(peak_bytes(plan, part)))
        lines.append((str(r), str(group.value), *(f"{count:,}" for count in counts), *sizes))
    text = [summary(plan), "", *as_table(lines)]
    for part in plan.pipelines[:MAX_PIPELINES]:
        text += ["", *_steps(part)]
    hidden = len(plan.pipelines) - MAX_PIPELINES
    return "\n".join([*text, *([f"\n... and the steps of {hidden} more pipelines"] if hidden > 0 else [])])


def computing(plan: PlanData, head: int) -> list[IntArray]:
    """For each group ``(tokens,)``, which pipeline computes for each query: for one query head."""
    layout = plan.layout
    found: list[IntArray] = [np.full(group.tokens, group.members[0]) for group in layout.groups]
    for part in plan.pipelines:
        heads, group = part.heads, layout.group_index(part.pipeline)
        if part.queries == 0:
            found[group][layout.columns(part.pipeline)] = part.pipeline
        elif heads.first_q <= head < heads.first_q + heads.num_q:
            found[group][:] = part.pipeline
    return found


def _steps(part: PipelinePlan) -> list[str]:
    sizes = ", ".join(f"{buffer.rows:,}" for buffer in part.buffers if buffer.holds_keys)
    landing = ", ".join(f"{buffer.rows:,}" for buffer in part.buffers if not buffer.holds_keys)
    lines = [f"pipeline {part.pipeline}: {count(len(part.spans), 'query span')}, buffers of {sizes} rows"]
    lines[0] += f", landing buffers of {landing} rows" if landing else ""
    ends = _ends(part)
    lines += [f"  {_step(item, ends, part)}" for item in part.instructions[:MAX_STEPS]]
    hidden = len(part.instructions) - MAX_STEPS
    return lines + ([f"  ... {hidden} more"] if hidden > 0 else [])


def step_names(part: PipelinePlan) -> list[str]:
    """What traces call each of a pipeline's instructions: its line of ``print(plan)``."""
    ends = _ends(part)
    return [" ".join(_step(item, ends, part).split()) for item in part.instructions]


def _ends(part: PipelinePlan) -> dict[int, Send | Receive]:
    """What begins each transfer at this pipeline's end."""
    return {item.transfer: item for item in part.instructions if isinstance(item, (Send, Receive))}


def _step(item: Instruction, ends: dict[int, Send | Receive], part: PipelinePlan) -> str:
    if isinstance(item, Send):
        what = "send home gradients of" if item.grads else "send    "
        return f"{what} {_rows(item.runs)}{_values(item, part)} of buffer {item.buffer} to {item.peer}"
    if isinstance(item, Receive):
        what = "receive gradients of" if item.grads else "receive "
        into = _buffer(part, item.buffer) + (_offset(item) if item.runs is None else f", {_runs(item.runs)}")
        return f"{what} {item.rows:,} rows{_values(item, part)} from {item.peer} into {into}"
    if isinstance(item, Copy):
        into = f"{'add to' if item.payload is Payload.KV_GRADS else 'to'} buffer {item.target}, {_runs(item.place)}"
        return f"copy     {_rows(item.runs)}{_values(item, part)} of buffer {item.buffer} {into}"
    if isinstance(item, Accumulate):
        heads = _heads(item, part)
        place = f"{_buffer(part, item.buffer)}{_offset(item)}"
        return f"add      {_rows(item.runs)}{heads}{',' * bool(heads)} of {place} to the own"
    if isinstance(item, Attend):
        owners = ", ".join(str(source.owner) for source in item.sources)
        segments, pairs = count(len(item.table), "segment"), item.table.pairs(part.spans)
        part_of = f"{item.buffer}{_part_of_own(item)}"
        return f"attend   buffer {part_of} (rows of {owners}){_heads(item, part)}: {segments}, {pairs:,} pairs"
    end = ends.get(item.transfer)
    if end is None:
        return f"wait     transfer {item.transfer}, which is none of this pipeline's"
    values = "" if end.payload is Payload.KV else end.payload.label
    if isinstance(end, Send):
        what = "home gradients " if end.grads else f"{values} " if values else ""
        return f"wait     to have sent {what}to {end.peer}"
    return f"wait     for {values or 'what comes'} from {end.peer}"


def _part_of_own(item: Attend) -> str:
    """Between which own rows the keys lie, if an attend is to a part of them: others are to the rest."""
    begins, ends = item.table.stretches()
    if item.buffer or len(begins) == 0 or (begins[0], ends[-1]) == (0, item.rows):
        return ""
    return f", rows {begins[0]:,} to {ends[-1]:,}"


def _rows(runs: Runs) -> str:
    return f"{runs.rows:,} rows ({_runs(runs)})"


def _runs(runs: Runs) -> str:
    return count(len(runs.start), "run")


def _values(item: Send | Receive | Copy, part: PipelinePlan) -> str:
    """Which values of the rows, if these are not keys and values, or their gradients, of all heads."""
    heads = _heads(item, part)
    if item.payload in (Payload.KV, Payload.KV_GRADS):
        return f"{heads}," if heads else ""
    return f", {item.payload.label} of {item.heads},"


def _heads(item: Send | Receive | Copy | Attend | Accumulate, part: PipelinePlan) -> str:
    """Of which heads, if not of all."""
    return "" if item.heads == part.buffers[0].heads else f", {item.heads}"


def _buffer(part: PipelinePlan, number: int) -> str:
    return f"{'landing ' * (not part.buffers[number].holds_keys)}buffer {number}"


def _offset(item: Receive | Accumulate) -> str:
    return f" from row {item.offset}" if item.offset else ""


def as_table(lines: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Lines of columns.

    Args:
        lines: Cells of each; the last cell of a line with fewer than the first one may be as long as it likes.
        left: How many columns, from the left, begin at their left edge; the others end at their right one.
    """
    whole = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    for line in lines:
        own = line if len(line) == len(widths) else line[:-1]
        widths[: len(own)] = [max(width, len(cell)) for width, cell in zip(widths, own, strict=False)]
    text = []
    for line in lines:
        is_whole, cells = len(line) == len(widths), list[str]()
        for i, (cell, width) in enumerate(zip(line, widths, strict=False)):
            is_text = i < left or (not is_whole and i == len(line) - 1)
            cells.append(cell.ljust(width) if is_text else cell.rjust(width))
        text.append("  ".join(cells).rstrip())
    return text


def as_time(seconds: float) -> str:
    """A time in words.

    Example:
        >>> as_time(2.5e-3), as_time(12e-6), as_time(0)
        ('2.5 ms', '12 µs', '0 µs')
    """
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def as_bytes(number: float) -> str:
    """Bytes in words, by powers of 1000.

    Example:
        >>> as_bytes(1500), as_bytes(12)
        ('1.5 kB', '12 B')
    """
    size, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{number:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
