"""The documents of one context group on its members: which rows hold which tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from hetu.arguments import index
from hetu.errors import StrategyError
from hetu.parallel.layout.pieces import Totals
from hetu.parallel.layout.printing import bracketed, count
from hetu.parallel.layout.splits import SPLITS, Ints, Parts, RunsOf
from hetu.parallel.mask.segments import IntArray, QuerySpans, count_up

_Columns = tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray]


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Runs of evenly spaced tokens, none empty. Struct of arrays, ordered by member and then by row.

    Attributes:
        member: Which member of the group holds the run.
        document: The document's number in its group.
        start: Position in the document of the first token.
        length: Tokens.
        step: Distance in positions between neighbours.
        row: Local row of the first token; neighbours follow at distance 1.

    Example:
        >>> from hetu.parallel import Layout
        >>> spans = Layout.build([2, 2], [0, 0], split="sym").groups[0].spans
        >>> spans.member.tolist(), spans.start.tolist(), spans.length.tolist()
        ([0, 0, 1], [0, 3, 1], [1, 1, 2])
    """

    member: IntArray
    document: IntArray
    start: IntArray
    length: IntArray
    step: IntArray
    row: IntArray

    def __len__(self) -> int:
        return len(self.start)

    @property
    def positions(self) -> IntArray:
        """The position of every token, span after span."""
        return self.start.repeat(self.length) + count_up(self.length) * self.step.repeat(self.length)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The documents of which some members of a group hold tokens: what these need to know of all members.

    Attributes:
        members: Which members, as a slice of step 1 with its bounds given.
        documents: ``(C,)`` the documents' numbers in the group.
        rows: int32 ``(R, C)`` local row of each piece's first token, on every member of the group.
        parts: Which tokens the pieces are.
        runs: The runs of ``members``.
    """

    members: slice
    documents: IntArray
    rows: Ints
    parts: Parts
    runs: RunsOf

    def within(self, members: slice) -> slice:
        """Which rows of ``runs`` are those of some of the members."""
        return slice(members.start - self.members.start, members.stop - self.members.start)


@dataclass(frozen=True, eq=False)
class GroupLayout:
    """The documents of one context group on its members.

    Attributes:
        index: The group's number in the layout.
        value: Its value in ``cp_groups``.
        members: Its pipelines' numbers in the strategy.
        seq_lens: ``(R,)`` tokens of each sequence on each member.
        is_packed: Whether the documents are one packed sequence rather than a batch.
        lengths: ``(B,)`` tokens of each document.
        totals: int32 ``(R, B + 1)`` tokens of each member up to each document: its own ``cu_seqlens``.
        split: Which split says what tokens these are; None where none does.
        custom_spans: The spans, where no split says it.
        cut_by: What a split cut the documents by, apart from their lengths and ``seq_lens``: a mask's code, or nothing.
            None where pieces were given. Not part of the value.

    Example:
        >>> from hetu.parallel import Layout
        >>> group = Layout.build([2, 2], [7, 7], split="sym").groups[0]
        >>> group.value, group.members, group.lengths.tolist(), group.pieces.tolist()
        (7, (0, 1), [4], [[2], [2]])
    """

    index: int
    value: int
    members: tuple[int, ...]
    seq_lens: IntArray
    is_packed: bool
    lengths: IntArray
    totals: Totals
    split: str | None
    custom_spans: Spans | None = None
    cut_by: bytes | None = field(default=None, repr=False)

    @cached_property
    def pieces(self) -> IntArray:
        """``(R, B)`` tokens of each document on each member."""
        return np.subtract(self.totals[:, 1:], self.totals[:, :-1], dtype=np.int64)

    @cached_property
    def offsets(self) -> IntArray:
        """``(B,)`` where each document begins among the rows of the group."""
        return self.lengths.cumsum() - self.lengths

    @cached_property
    def rows(self) -> list[int]:
        """Rows of each member's shard."""
        rows: list[int] = self.totals[:, -1].tolist()
        return rows

    @property
    def tokens(self) -> int:
        """Rows of all shards together."""
        return sum(self.rows)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What the layout is a function of: ints, text and arrays."""
        known = self.value, self.members, self.is_packed, self.seq_lens, self.lengths, self.split, self.cut_by
        if self.custom_spans is not None:
            return *known, *(getattr(self.custom_spans, item.name) for item in fields(Spans))
        return known if self.cut_by is not None else (*known, self.totals)

    def held_by(self, members: slice) -> Held:
        """What some members need to know of a layout that is a split."""
        assert self.split is not None
        first = self.totals[members]
        holds = first[:, 1:] > first[:, :-1]
        documents = np.flatnonzero(holds if len(holds) == 1 else holds.any(0))
        rows, pieces = (self.totals.take(each, axis=1) for each in (documents, documents + 1))
        pieces -= rows
        parts = SPLITS[self.split].parts(pieces)
        return Held(members, documents, rows, parts, parts.runs(members))

    def spans_of(self, members: slice, held: Held | None = None) -> Spans:
        """The spans of some members; of a split they are found without those of the others.

        Args:
            members: Which members.
            held: What :meth:`held_by` gives for them, or for more.
        """
        if self.custom_spans is not None:
            bounds = self.custom_spans.member.searchsorted([members.start, members.stop]).tolist()
            return Spans(*(getattr(self.custom_spans, item.name)[slice(*bounds)] for item in fields(Spans)))
        held = held or self.held_by(members)
        start, length, step = (column[held.within(members)] for column in held.runs)
        cell = (length.reshape(-1) != 0).nonzero()[0]
        member = cell // max(length.shape[1], 1)
        part = cell - member * length.shape[1]
        return Spans(
            member=member + members.start,
            document=held.documents.take(held.parts.document.take(part)),
            start=start.take(cell),
            length=length.take(cell),
            step=step.take(cell),
            row=(length.cumsum(1) - length).take(cell),
        )

    @cached_property
    def spans(self) -> Spans:
        """All members' spans."""
        return self.spans_of(slice(0, len(self.members)))

    @cached_property
    def bounds(self) -> list[int]:
        """``R + 1`` bounds between the members in :attr:`spans`."""
        bounds: list[int] = self.spans.member.searchsorted(np.arange(len(self.members) + 1)).tolist()
        return bounds

    def query_spans(self, member: int, joins: bool = False) -> QuerySpans:
        """A member's rows as query spans.

        Args:
            member: Which member.
            joins: Whether documents count as one, as for a mask that counts positions of the whole pack.
        """
        if type(member) is not int or not 0 <= member < len(self.members):
            member = index(member, "member", len(self.members), op="layout", error=StrategyError)
        return self.all_query_spans(slice(member, member + 1), joins)[0]

    def all_query_spans(self, members: slice, joins: bool = False, held: Held | None = None) -> list[QuerySpans]:
        """The query spans of each of some members; see :meth:`query_spans` and :meth:`spans_of`."""
        spans = self.spans_of(members, held)
        document, position, slot, slot_row = spans.document, spans.start, spans.document, spans.row
        column = zeros = np.zeros(len(spans), np.int64)
        if self.is_packed:
            slot, column = zeros, self.offsets.take(document)
        else:
            slot_row = slot_row - document * self.seq_lens.take(spans.member)
        if joins:
            document, position, column = zeros, position + self.offsets.take(document), zeros
        columns = spans.row, spans.length, document, position, spans.step, slot, slot_row, column
        bounds = spans.member.searchsorted(np.arange(members.start, members.stop + 1)).tolist()
        return [QuerySpans(*_cut(columns, i, j)) for i, j in pairwise(bounds)]

    @cached_property
    def _by_row(self) -> tuple[IntArray, IntArray]:
        """Document and position of every row of every member, one member after the other."""
        return self.spans.document.repeat(self.spans.length), self.spans.positions

    @cached_property
    def _columns(self) -> IntArray:
        """Where every row of every member stands among the rows of the group, one member after the other."""
        document, position = self._by_row
        return self.offsets[document] + position

    @cached_property
    def _is_in_order(self) -> bool:
        """Whether the members' rows, one member after the other, are those of the group as they come."""
        if self.split is not None and len(self.members) == 1:  # no split moves what it doesn't cut; spans take longer
            return True
        spans = self.spans
        begins = self.offsets[spans.document] + spans.start
        return bool((spans.step == 1).all() and (begins == spans.length.cumsum() - spans.length).all())

    def _own(self, member: int) -> slice:
        """A member's rows among those of all, one member after the other."""
        if type(member) is not int or not 0 <= member < len(self.members):
            member = index(member, "member", len(self.members), op="layout", error=StrategyError)
        end = sum(self.rows[: member + 1])
        return slice(end - self.rows[member], end)

    def rows_of(self, member: int) -> tuple[IntArray, IntArray]:
        """Document and position of every local row of a member."""
        own = self._own(member)
        return self._by_row[0][own], self._by_row[1][own]

    def columns_of(self, member: int) -> IntArray:
        """Where every local row of a member stands among the rows of the group."""
        return self._columns[self._own(member)]

    def cut(self, whole: Any, member: int) -> Any:
        """A member's rows of an array of all rows of the group, copied."""
        if not self._is_in_order:
            return whole[self.columns_of(member)]
        part = whole[self._own(member)]
        return part.clone() if hasattr(part, "clone") else part.copy()  # torch's, or numpy's

    def describe(self, longest: int = 6) -> list[str]:
        """The group as text: a line for each member, which lists at most ``longest`` of its spans."""
        spans = self.spans
        lines = [
            f"group {self.value}: {count(len(self.lengths), 'document')}, {count(self.tokens, 'token')} "
            f"on {count(len(self.members), 'pipeline')}"
        ]
        for member, pipeline in enumerate(self.members):
            begin, end = self.bounds[member : member + 2]
            columns = (spans.document, spans.start, spans.length, spans.step)
            shown = [bracketed(*(int(x[i]) for x in columns)) for i in range(begin, min(end, begin + longest))]
            if end - begin > longest:
                shown.append(f"... {end - begin - longest} more")
            lines.append(f"  pipeline {pipeline}: {count(self.rows[member], 'token')}   {' '.join(shown)}".rstrip())
        return lines


def _cut(columns: _Columns, begin: int, end: int) -> _Columns:
    row, length, document, position, step, slot, slot_row, column = (one[begin:end] for one in columns)
    return row, length, document, position, step, slot, slot_row, column
