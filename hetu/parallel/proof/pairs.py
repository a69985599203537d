"""Proves that what segments say is what the mask allows: every pair once, and no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from hetu.parallel.layout.layout import GroupLayout
from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.proof.transfers import Tokens, refuse

Seen = tuple[IntArray, IntArray, IntArray]
"""For every key of every segment: the query span, the key's token, the first row of the span that sees it."""


def seen_by(table: SegmentTable, buffer: IntArray) -> Seen:
    """What an attend to a buffer of token numbers sees."""
    span = table.query.repeat(table.k_len)
    number = np.arange(len(span)) - (table.k_len.cumsum() - table.k_len).repeat(table.k_len)
    keys = buffer[table.k_start.repeat(table.k_len) + number]
    return span, keys, np.maximum(number - table.diagonal.repeat(table.k_len), 0)


def prove_pairs(
    plan: PlanData, r: int, group: GroupLayout, spans: QuerySpans, seen: Sequence[Seen], tokens: Tokens
) -> None:
    """That the pairs of some query spans on pipeline ``r`` are those of the mask, each once."""
    span, key, since = (np.concatenate(columns) for columns in zip(*seen, strict=True))
    position, step, length = spans.position, spans.step, spans.length
    k = tokens.position[key]

    def pair(i: int, row: int, what: str) -> NoReturn:
        query = position[span[i]] + row * step[span[i]]
        refuse(f"pipeline {r}, document {spans.document[span[i]]}: query position {query} and key {what}")

    foreign = (tokens.group[key] != group.index) | (tokens.document[key] != spans.document[span])
    if foreign.any():
        i = int(foreign.argmax())
        pair(i, int(since[i]), f"{tokens.name(int(key[i]))} are attended, though they belong to different documents")
    # The first row of the span that the mask lets see the key.
    allowed = plan.mask.first_row(k, position[span], step[span])
    early, late = since < allowed, since > allowed
    if early.any():
        i = int(early.argmax())
        pair(i, int(since[i]), f"position {k[i]} are attended, though the mask hides the key")
    if late.any():
        i = int(late.argmax())
        pair(i, int(allowed[i]), f"position {k[i]} are not attended by the segment that should")

    last = position + (length - 1) * step
    number = plan.mask.keys_seen(last, group.lengths[spans.document])
    first = number.cumsum() - number
    times = np.bincount(first[span] + k, minlength=int(number.sum()))
    if (times != 1).any():
        place = int((times != 1).argmax())
        owner = int(first.searchsorted(place, "right")) - 1
        missing = int(place - first[owner])
        how = "never" if times[place] == 0 else f"{times[place]} times"
        refuse(
            f"pipeline {r}, document {spans.document[owner]}: query position {last[owner]} and key position "
            f"{missing} are attended {how}, expected once"
        )
