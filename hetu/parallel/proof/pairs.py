"""Proves that what segments say is what the mask allows: every pair once, and no other.

Both are written down alike: which rows of a query span, from one to another, see a key. Of segments that follows from
their diagonals; of the mask from its bands, by the positions of queries and keys. Where segments name runs of
neighbouring tokens that is compared for a run at once (:mod:`hetu.parallel.proof.tiles`), else key by key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.mask.bands import cut_spans
from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable, count_up
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.proof.tiles import are_tiled
from hetu.parallel.proof.transfers import Tokens, refuse


class Seen(NamedTuple):
    """Rows ``since .. until`` of query spans see keys; struct of arrays.

    Attributes:
        span: The query span.
        key: The key's token, or its position.
        since: First row.
        until: Last row.
    """

    span: IntArray
    key: IntArray
    since: IntArray
    until: IntArray


def seen_by(table: SegmentTable, spans: QuerySpans, buffer: IntArray) -> Seen:
    """What an attend to a buffer of token numbers sees."""
    span = table.query.repeat(table.k_len)
    number = count_up(table.k_len)
    keys = buffer[table.k_start.repeat(table.k_len) + number]
    since, until = np.maximum(number - table.diagonal.repeat(table.k_len), 0), spans.length[span] - 1
    if table.lower is not None:
        until = np.minimum(until, number - table.lower.repeat(table.k_len))
    return Seen(span, keys, since, until)


def prove_pairs(
    plan: PlanData,
    r: int,
    group: GroupLayout,
    spans: QuerySpans,
    attends: Sequence[tuple[SegmentTable, IntArray]],
    tokens: Tokens,
) -> None:
    """That the pairs of some query spans on pipeline ``r`` are those of the mask, each once.

    Args:
        plan: The plan.
        r: The pipeline.
        group: Its group.
        spans: The query spans.
        attends: The table of each attend, and the token of each row of its buffer.
        tokens: All tokens.
    """
    if are_tiled(plan.mask.bands(group.lengths, group.lengths), spans, attends, tokens, group):
        return
    seen = [seen_by(table, spans, said) for table, said in attends]
    said = Seen(*(np.concatenate(columns) for columns in zip(*seen, strict=True)))

    def name(span: int, row: int, key: str, what: str) -> str:
        query = spans.position[span] + row * spans.step[span]
        return (
            f"pipeline {r}, document {spans.document[span]}: query position {query} and key {key} are attended {what}"
        )

    foreign = (tokens.group[said.key] != group.index) | (tokens.document[said.key] != spans.document[said.span])
    if foreign.any():
        i = int(foreign.argmax())
        key = tokens.name(int(said.key[i]))
        refuse(name(int(said.span[i]), int(said.since[i]), key, "though they belong to different documents"))
    given, twice = _united(said._replace(key=tokens.position[said.key]))
    if twice is not None:
        refuse(name(*_pair(given, twice), "2 times, expected once"))
    wanted, _ = _united(_allowed(plan, group, spans))
    if all(np.array_equal(one, other) for one, other in zip(given, wanted, strict=True)):
        return
    hidden, missing = _beyond(given, wanted), _beyond(wanted, given)
    if hidden is not None:
        refuse(name(*_pair(given, *hidden), "though the mask hides the key"))
    assert missing is not None, "they differ"
    refuse(name(*_pair(wanted, *missing), "never, expected once"))


def _pair(seen: Seen, i: int, row: int | None = None) -> tuple[int, int, str]:
    """A span, a row of it and a key, in words."""
    return int(seen.span[i]), int(seen.since[i]) if row is None else row, f"position {seen.key[i]}"


def _allowed(plan: PlanData, group: GroupLayout, spans: QuerySpans) -> Seen:
    """What the mask lets query spans see: keys are positions."""
    bands = plan.mask.bands(group.lengths, group.lengths)
    cut, of, part, band = cut_spans(spans, spans.document, bands)
    position, step, rows = cut.position[part], cut.step[part], cut.length[part]
    lower, upper, last = bands.lower[band], bands.upper[band], position + (rows - 1) * step
    first = np.maximum(bands.k_start[band], position + lower)
    count = np.maximum(np.minimum(bands.k_stop[band], last + upper + 1) - first, 0)
    number, before = count_up(count), (cut.start - spans.start[of])[part]  # rows of the span that were cut off before
    since = _in_steps(number + (first - position - upper).repeat(count) - 1, step, count) + 1
    until = _in_steps(number + (first - position - lower).repeat(count), step, count)
    np.maximum(since, 0, out=since)
    np.minimum(until, (rows - 1).repeat(count), out=until)
    shift, span, key = before.repeat(count), of[part].repeat(count), number + first.repeat(count)
    since += shift
    until += shift
    live = since <= until  # steps may lead past what a narrow band shows
    allowed = Seen(span, key, since, until)
    return allowed if live.all() else Seen(*(column[live] for column in allowed))


def _in_steps(apart: IntArray, step: IntArray, count: IntArray) -> IntArray:
    """Distances in steps, rounded down; where all steps are 1 they are that already."""
    return apart if (step == 1).all() else apart // step.repeat(count)


def _united(seen: Seen) -> tuple[Seen, int | None]:
    """The same, ordered by span, key and row, with rows that follow each other as one entry.

    Returns:
        What is seen; and an entry of which some row sees the key twice, if there is one.
    """
    span, key, since, until = seen
    place = span * (1 + int(key.max(initial=0))) + key
    if (place[1:] <= place[:-1]).any():
        order = place.argsort(kind="stable")  # of stretches that are in order: they are merged
        place = place[order]
        if (place[1:] == place[:-1]).any():
            order = order[np.lexsort((since[order], place))]
        span, key, since, until = (column[order] for column in seen)
    is_same = place[1:] == place[:-1]
    if not is_same.any():
        return Seen(span, key, since, until), None
    twice = is_same & (since[1:] <= until[:-1])
    if twice.any():
        return Seen(span, key, since, until), int(twice.argmax()) + 1
    first = np.append(True, ~(is_same & (since[1:] == until[:-1] + 1))).nonzero()[0]
    last = np.append(first[1:], len(span)) - 1
    return Seen(span[first], key[first], since[first], until[last]), None


def _beyond(seen: Seen, other: Seen) -> tuple[int, int] | None:
    """An entry and a row of it that the other does not have; both are united."""
    wide = 1 + max(int(seen.key.max(initial=0)), int(other.key.max(initial=0)))
    high = 2 + max(int(seen.until.max(initial=0)), int(other.until.max(initial=0)))
    begins = ((other.span * wide + other.key) * high + other.since).astype(np.int64)
    place = seen.span * wide + seen.key
    found = begins.searchsorted(place * high + seen.since, "right") - 1
    at = np.maximum(found, 0)
    is_there = np.zeros(len(seen.span), bool)
    if len(begins):
        is_there = (found >= 0) & (other.span[at] == seen.span) & (other.key[at] == seen.key)
    # Rows that the other's entry has from the first one on.
    upto = (
        np.where(is_there & (other.until[at] >= seen.since), other.until[at], seen.since - 1)
        if len(begins)
        else seen.since - 1
    )
    lacks = upto < seen.until
    return (int(lacks.argmax()), int(upto[lacks.argmax()]) + 1) if lacks.any() else None
