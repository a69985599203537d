"""The documents of one context group on its members: which rows hold which tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from hetu.arguments import index
from hetu.errors import StrategyError
from hetu.parallel.layout.printing import bracketed, count
from hetu.parallel.layout.splits import Parts
from hetu.parallel.mask.segments import IntArray, QuerySpans, count_up


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


@dataclass(frozen=True, eq=False)
class GroupLayout:
    """The documents of one context group on its members.

    Attributes:
        index: The group's number in the layout.
        value: Its value in ``cp_groups``.
        members: Its pipelines' numbers in the strategy.
        seq_lens: ``(R,)`` tokens of each sequence on each member.
        is_packed: Whether the documents are one packed sequence rather than a batch.
        pieces: ``(R, B)`` tokens of each document on each member.
        parts: The spans as a regular table, where the layout is one of the splits.
        custom_spans: The spans, where it is not.
    """

    index: int
    value: int
    members: tuple[int, ...]
    seq_lens: IntArray
    is_packed: bool
    pieces: IntArray
    parts: Parts | None
    custom_spans: Spans | None = None

    @cached_property
    def lengths(self) -> IntArray:
        """``(B,)`` tokens of each document."""
        return self.pieces.sum(0)

    @cached_property
    def offsets(self) -> IntArray:
        """``(B,)`` where each document begins among the rows of the group."""
        return self.lengths.cumsum() - self.lengths

    @cached_property
    def rows(self) -> list[int]:
        """Rows of each member's shard."""
        rows: list[int] = self.pieces.sum(1).tolist()
        return rows

    @property
    def tokens(self) -> int:
        """Rows of all shards together."""
        return sum(self.rows)

    @cached_property
    def piece_row(self) -> IntArray:
        """``(R, B)`` local row of each piece's first token."""
        return self.pieces.cumsum(1) - self.pieces

    @cached_property
    def part_offset(self) -> IntArray:
        """``(R, K)`` tokens of the member's piece that lie in earlier parts of the document."""
        assert self.parts is not None
        row = self.parts.length.cumsum(1)
        row -= self.parts.length
        row -= self.piece_row.take(self.parts.document, axis=1)
        return row

    @cached_property
    def spans(self) -> Spans:
        """All members' spans."""
        parts = self.parts
        if parts is None:
            assert self.custom_spans is not None
            return self.custom_spans
        cell = np.flatnonzero(parts.length != 0)
        member = cell // max(parts.length.shape[1], 1)
        return Spans(
            member=member,
            document=parts.document.take(cell - member * parts.length.shape[1]),
            start=parts.start.take(cell),
            length=parts.length.take(cell),
            step=parts.step.take(cell),
            row=(parts.length.cumsum(1) - parts.length).take(cell),
        )

    @cached_property
    def bounds(self) -> list[int]:
        """``R + 1`` bounds between the members in :attr:`spans`."""
        bounds: list[int] = self.spans.member.searchsorted(np.arange(len(self.members) + 1)).tolist()
        return bounds

    def spans_of(self, member: int) -> Spans:
        """A member's spans; of a split they are found without those of the others."""
        parts = self.parts
        if parts is None:
            own = slice(self.bounds[member], self.bounds[member + 1])
            return Spans(*(getattr(self.spans, item.name)[own] for item in fields(Spans)))
        length = parts.length[member]
        part = length.nonzero()[0]
        return Spans(
            member=np.full(len(part), member),
            document=parts.document.take(part),
            start=parts.start[member].take(part),
            length=length.take(part),
            step=parts.step[member].take(part),
            row=(length.cumsum() - length).take(part),
        )

    def query_spans(self, member: int, joins: bool = False) -> QuerySpans:
        """A member's rows as query spans.

        Args:
            member: Which member.
            joins: Whether documents count as one, as for a mask that counts positions of the whole pack.
        """
        if type(member) is not int or not 0 <= member < len(self.members):
            member = index(member, "member", len(self.members), op="layout", error=StrategyError)
        spans = self.spans_of(member)
        document, position, slot, slot_row = spans.document, spans.start, spans.document, spans.row
        column = zeros = np.zeros(len(spans), np.int64)
        if self.is_packed:
            slot, column = zeros, self.offsets.take(document)
        else:
            slot_row = slot_row - document * self.seq_lens[member]
        if joins:
            document, position, column = zeros, position + self.offsets.take(document), zeros
        return QuerySpans(
            start=spans.row,
            length=spans.length,
            document=document,
            position=position,
            step=spans.step,
            slot=slot,
            slot_row=slot_row,
            column=column,
        )

    @cached_property
    def _by_row(self) -> tuple[IntArray, IntArray]:
        """Document and position of every row of every member, one member after the other."""
        return self.spans.document.repeat(self.spans.length), self.spans.positions

    def rows_of(self, member: int) -> tuple[IntArray, IntArray]:
        """Document and position of every local row of a member."""
        if type(member) is not int or not 0 <= member < len(self.members):
            member = index(member, "member", len(self.members), op="layout", error=StrategyError)
        end = sum(self.rows[: member + 1])
        own = slice(end - self.rows[member], end)
        return self._by_row[0][own], self._by_row[1][own]

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
