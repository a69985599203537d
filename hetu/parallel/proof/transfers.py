"""What all parts of the proof know: how a plan is refused, its tokens, and both ends of its transfers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from hetu.errors import PlanError
from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.mask.segments import IntArray
from hetu.parallel.plan.instructions import Accumulate, Attend, Copy, Receive, Send, Source
from hetu.parallel.plan.parts import PlanData

UNWRITTEN, LANDING = -1, -2
"""Rows of a buffer that hold no token: nothing was received there yet, or what is has not landed."""


def refuse(what: str) -> NoReturn:
    """Raises the error of a plan that is not proven."""
    fix = "build plans by hetu.parallel.build_plan and AttnPlan.backward; if this one was, please report it"
    raise PlanError(what, op="plan", fix=fix)


# Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """All tokens of all groups, numbered group after group in the order of documents and positions.

    Documents and positions are those that the mask counts: of one document, if it counts positions of the whole pack.
    """

    group: IntArray
    document: IntArray
    position: IntArray
    shards: list[IntArray]
    joins: bool = False
    _of_sources: dict[int, tuple[tuple[Source, ...], IntArray]] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: PlanData) -> Tokens:
        """The tokens of a plan's layout."""
        groups = plan.layout.groups
        sizes = [group.tokens for group in groups]
        base = np.cumsum([0, *sizes])
        shards = [base[plan.layout.group_index(r)] + plan.layout.columns(r) for r in range(plan.layout.num_pipelines)]
        everyone = np.arange(len(groups)).repeat(sizes)
        if plan.mask.joins:
            return cls(everyone, np.zeros_like(everyone), np.arange(len(everyone)) - base[everyone], shards, joins=True)
        document = [np.arange(len(group.lengths)).repeat(group.lengths) for group in groups]
        position = [
            np.arange(size) - group.offsets[owner] for size, group, owner in zip(sizes, groups, document, strict=True)
        ]
        return cls(everyone, np.concatenate(document), np.concatenate(position), shards)

    def first_of(self, group: GroupLayout) -> IntArray:
        """Number of the token at position 0 of each document of a group, as the mask counts documents."""
        base = int(self.group.searchsorted(group.index))
        return np.full(1, base) if self.joins else base + group.offsets

    def of_sources(self, item: Attend) -> IntArray:
        """The tokens that the keys of an attend are, as it says, by row; found once where attends share sources."""
        known = self._of_sources.get(id(item.sources))
        if known is None:
            runs = [self.shards[source.owner][source.runs.indices()] for source in item.sources]
            tokens = np.concatenate(runs) if runs else np.empty(0, np.int64)
            places = [source.place.indices() for source in item.sources if source.place is not None]
            if places:
                tokens[np.concatenate(places)] = tokens.copy()
            known = self._of_sources[id(item.sources)] = item.sources, tokens
        return known[1]

    def name(self, token: int) -> str:
        """A row's content, as messages call it."""
        if token < 0:
            return "nothing that has landed" if token == LANDING else "nothing that was ever received"
        return f"position {self.position[token]} of document {self.document[token]} of group {self.group[token]}"


# Transfers


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
    """Both ends of a transfer, and what it carries once it is sent: numbers by kind of value."""

    source: int
    send: Send
    target: int
    receive: Receive
    content: dict[str, IntArray] | None = None
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
    return f"{item.payload.label} of {item.heads}"


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
