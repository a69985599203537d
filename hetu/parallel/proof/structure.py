"""What a plan must be before it can be followed: its instructions name what exists, and transfers have two ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from hetu.errors import PlanError
from hetu.parallel.mask.segments import IntArray, QuerySpans
from hetu.parallel.plan.heads import Payload
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Runs, Send, Wait
from hetu.parallel.plan.parts import PipelinePlan, PlanData

BY_ROW = ("document", "position", "slot", "slot_row", "column")
"""What query spans say of every row."""

UNWRITTEN, LANDING = -1, -2
"""Rows of a buffer that hold no token: nothing was received there yet, or what is has not landed."""


def refuse(what: str) -> NoReturn:
    """Raises the error of a plan that is not proven."""
    fix = "build plans by hetu.parallel.build_plan and AttnPlan.backward; if this one was, please report it"
    raise PlanError(what, op="plan", fix=fix)


# Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """All tokens of all groups, numbered group after group in the order of documents and positions."""

    group: IntArray
    document: IntArray
    position: IntArray
    shards: list[IntArray]

    @classmethod
    def of(cls, plan: PlanData) -> Tokens:
        """The tokens of a plan's layout."""
        groups = plan.layout.groups
        sizes = [group.tokens for group in groups]
        base = np.cumsum([0, *sizes])
        document = [np.arange(len(group.lengths)).repeat(group.lengths) for group in groups]
        position = [
            np.arange(size) - group.offsets[owner] for size, group, owner in zip(sizes, groups, document, strict=True)
        ]
        shards = [base[plan.layout.group_index(r)] + plan.layout.columns(r) for r in range(plan.layout.num_pipelines)]
        everyone = np.arange(len(groups)).repeat(sizes)
        return cls(everyone, np.concatenate(document), np.concatenate(position), shards)

    def name(self, token: int) -> str:
        """A row's content, as messages call it."""
        if token < 0:
            return "nothing that has landed" if token == LANDING else "nothing that was ever received"
        return f"position {self.position[token]} of document {self.document[token]} of group {self.group[token]}"


# Parts and transfers


def check_part(plan: PlanData, r: int, part: PipelinePlan) -> None:
    """That a part is of its pipeline, and that its instructions name what exists."""
    check_shard(plan, r, part)
    check_spans(by_row(plan.layout.query_spans(r), part.rows, r), part, part.rows)
    if not any(isinstance(item, Attend) for item in part.instructions):
        refuse(f"pipeline {r} never attends, so its output is never written")
    for item in part.instructions:
        if not isinstance(item, Wait):
            _check_instruction(plan, part, item)


def check_shard(plan: PlanData, r: int, part: PipelinePlan) -> None:
    """That a part is of its pipeline, and of its shard."""
    if part.pipeline != r or part.rows != plan.layout.rows(r) or not part.buffers or part.buffers[0] != part.rows:
        refuse(
            f"the part of pipeline {r} says it is of pipeline {part.pipeline} with {part.rows} rows and buffers "
            f"{part.buffers}, but its shard has {plan.layout.rows(r)} rows"
        )


def _check_instruction(plan: PlanData, part: PipelinePlan, item: Send | Receive | Attend | Accumulate | Copy) -> None:
    what = f"pipeline {part.pipeline}: {instruction_name(item)}"
    if isinstance(item, Copy) or item.heads is not None:
        refuse(f"{what} is about some heads, but the pipeline attends for all")
    if isinstance(item, (Send, Receive)) and item.payload not in (Payload.KV, Payload.KV_GRADS):
        refuse(f"{what} is of {item.payload.label}, but only keys and values and their gradients travel")
    if not plan.is_backward and (isinstance(item, Accumulate) or (not isinstance(item, Attend) and item.grads)):
        refuse(f"{what} is about gradients, but the plan is no backward")
    is_landing = isinstance(item, Accumulate) or (isinstance(item, Receive) and item.grads)
    sizes, kind = (part.landing, "landing buffer") if is_landing else (part.buffers, "buffer")
    if not 0 <= item.buffer < len(sizes):
        refuse(f"pipeline {part.pipeline} has no {kind} {item.buffer}, which {instruction_name(item)} names")
    size, place = sizes[item.buffer], f"{kind} {item.buffer}"
    if isinstance(item, Send):
        check_runs(item.runs, size, f"{what} sends", place)
        if item.grads and item.buffer == 0:
            refuse(f"{what} sends gradients of buffer 0, the pipeline's own shard")
    elif isinstance(item, Receive):
        if item.buffer == 0 and not item.grads:
            refuse(f"{what} lands in buffer 0, the pipeline's own shard")
        check_rows(item.offset, item.rows, size, f"{what} lands in", place)
    elif isinstance(item, Accumulate):
        check_rows(item.offset, item.runs.rows, size, f"{what} adds", place)
        check_runs(item.runs, part.rows, f"{what} adds to", "the shard")
        # Rows that are added to twice at once would be so in an order that nothing fixes.
        row, times = np.unique(item.runs.indices(), return_counts=True)
        if (times > 1).any():
            refuse(f"{what} adds to row {row[(times > 1).argmax()]} of the shard twice")
    else:
        check_table(item, plan, part)


def check_rows(offset: int, rows: int, size: int, what: str, place: str) -> None:
    if rows <= 0 or offset < 0 or offset + rows > size:
        refuse(f"{what} rows {offset} to {offset + rows} of {place}, which has {size}")


def check_spans(expected: Sequence[IntArray], part: PipelinePlan, rows: int) -> None:
    """That the query spans say of every row what they should, see ``BY_ROW``, however they are cut."""
    r = part.pipeline
    for name, mine, layouts in zip(BY_ROW, by_row(part.spans, rows, r), expected, strict=True):
        if not np.array_equal(mine, layouts):
            row = int((mine != layouts).argmax())
            refuse(f"pipeline {r}: {name} of query row {row} is {mine[row]}, but {layouts[row]} in the layout")


def by_row(spans: QuerySpans, rows: int, r: int) -> list[IntArray]:
    ends = spans.length.cumsum()
    if (spans.length <= 0).any() or not np.array_equal(spans.start, ends - spans.length) or spans.length.sum() != rows:
        refuse(f"pipeline {r}: its query spans don't cover its {rows} rows one after the other")
    if (spans.step < 1).any():  # can't be seen by row where a span has one row, and the proof divides by it
        refuse(f"pipeline {r}: query span {int((spans.step < 1).argmax())} has a step below 1")
    i = np.arange(rows) - spans.start.repeat(spans.length)
    slopes: tuple[Any, ...] = (0, spans.step.repeat(spans.length), 0, 1, 0)
    return [getattr(spans, name).repeat(spans.length) + i * slope for name, slope in zip(BY_ROW, slopes, strict=True)]


def check_runs(runs: Runs, size: int, what: str, place: str) -> None:
    bad = (runs.start < 0) | (runs.length <= 0) | (runs.start + runs.length > size)
    if bad.any():
        start, length = runs.start[bad][0], runs.length[bad][0]
        refuse(f"{what} rows {start} to {start + length} of {place}, which has {size}")


def check_table(item: Attend, plan: PlanData, part: PipelinePlan) -> None:
    table, what = item.table, f"pipeline {part.pipeline}: attending to buffer {item.buffer}"
    if not len(table.query) == len(table.k_start) == len(table.k_len) == len(table.diagonal):
        refuse(f"{what}: the columns of the segment table differ in length")
    for source in item.sources:
        if not 0 <= source.owner < len(plan.pipelines):
            refuse(f"{what}: there is no pipeline {source.owner}, of which a source is")
        shard = f"the shard of pipeline {source.owner}"
        check_runs(source.runs, plan.layout.rows(source.owner), f"{what}: a source is", shard)
    if item.rows > part.buffers[item.buffer]:
        refuse(f"{what}: its sources have {item.rows} rows, but the buffer only {part.buffers[item.buffer]}")
    if len(table) == 0:
        return
    if table.query.min() < 0 or table.query.max() >= len(part.spans) or (np.diff(table.query) < 0).any():
        refuse(f"{what}: its segments are not ordered by query span, or name one that does not exist")
    check_runs(Runs(table.k_start, table.k_len), item.rows, f"{what}: a segment sees", f"buffer {item.buffer}")
    unseen = table.k_len > part.spans.length[table.query] + table.diagonal
    if unseen.any():
        refuse(f"{what}: segment {int(unseen.argmax())} has keys that no row of its query span sees")


def instruction_name(item: Send | Receive | Attend | Accumulate | Copy) -> str:
    """An instruction, as messages call it."""
    if isinstance(item, Copy):
        return "a copy"
    if isinstance(item, Attend):
        return "an attend"
    if isinstance(item, Accumulate):
        return "an accumulate"
    what = f"transfer {item.transfer}{' of gradients' if item.grads else ''}"
    return f"{what} {'to' if isinstance(item, Send) else 'from'} pipeline {item.peer}"


@dataclass(slots=True, eq=False)
class Transfer:
    """Both ends of a transfer, and what it carries once it is sent."""

    source: int
    send: Send
    target: int
    receive: Receive
    content: IntArray | None = None
    is_expected: bool = False


def pair_transfers(plan: PlanData) -> dict[int, Transfer]:
    """Finds both ends of every transfer, and that they agree."""
    sends: dict[int, tuple[int, Send]] = {}
    receives: dict[int, tuple[int, Receive]] = {}
    for r, part in enumerate(plan.pipelines):
        for item in part.instructions:
            if isinstance(item, Send):
                if item.transfer in sends:
                    refuse(f"transfer {item.transfer} is sent twice, by pipelines {sends[item.transfer][0]} and {r}")
                sends[item.transfer] = r, item
            elif isinstance(item, Receive):
                if item.transfer in receives:
                    first = receives[item.transfer][0]
                    refuse(f"transfer {item.transfer} is received twice, by pipelines {first} and {r}")
                receives[item.transfer] = r, item
    for number in sends.keys() ^ receives.keys():
        done, missing = ("sent by", "received") if number in sends else ("received by", "sent")
        r = (sends if number in sends else receives)[number][0]
        refuse(f"transfer {number} is {done} pipeline {r}, but never {missing}")
    transfers = {}
    for number, (source, send) in sends.items():
        target, receive = receives[number]
        if (send.peer, receive.peer) != (target, source):
            refuse(
                f"transfer {number} is sent by pipeline {source} to {send.peer}, "
                f"but received by pipeline {target} from {receive.peer}"
            )
        if send.rows != receive.rows:
            refuse(
                f"transfer {number} from pipeline {source} to {target} sends {send.rows} rows, "
                f"but {receive.rows} are received"
            )
        if (send.payload, send.heads) != (receive.payload, receive.heads):
            refuse(
                f"transfer {number} from pipeline {source} to {target} sends {_content(send)}, "
                f"but {_content(receive)} are received"
            )
        transfers[number] = Transfer(source, send, target, receive)
    _check_order(plan)
    return transfers


def _content(item: Send | Receive) -> str:
    return f"{item.payload.label}{'' if item.heads is None else f' of {item.heads}'}"


def _check_order(plan: PlanData) -> None:
    """Process groups match the messages of two ranks by their order, so it must be the same at both ends."""
    orders: dict[tuple[int, int, type], list[int]] = {}
    for r, part in enumerate(plan.pipelines):
        for item in part.instructions:
            if isinstance(item, (Send, Receive)):
                ends = (r, item.peer) if isinstance(item, Send) else (item.peer, r)
                orders.setdefault((*ends, type(item)), []).append(item.transfer)
    for (source, target, kind), numbers in orders.items():
        if kind is Send and numbers != orders[source, target, Receive]:
            refuse(
                f"pipeline {source} sends transfers {numbers} to pipeline {target}, which receives them in another "
                f"order: {orders[source, target, Receive]}"
            )
