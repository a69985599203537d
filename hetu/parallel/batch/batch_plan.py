"""A planned batch as a value: groups, micro-batches and pieces, and what graphs and PyTorch models take of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetu.arguments import refuse
from hetu.errors import ShapeError, StrategyError, caller
from hetu.parallel.batch.finish import Place
from hetu.parallel.layout.arrays import arrays_of, check_array, kind_of
from hetu.parallel.layout.layout import Layout
from hetu.parallel.layout.printing import count
from hetu.parallel.layout.strategy import Strategy, groups_of
from hetu.parallel.views.report import as_table
from hetu.shards import Shards
from hetu.symbols import IntSymbol

_OP = "BatchPlan"

SPLIT = "balanced"
"""The split whose pieces do as much as the plan says: a front and a back part of the document, as in ``sym``."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What the pipelines hold of one micro-batch.

    Attributes:
        groups: The context group of each pipeline.
        lengths: Tokens that each pipeline holds.
        documents: The numbers of the documents of each group, ascending, by the group's value.
        cu_seqlens: For each group int32 ``(R, B + 1)``, the cumulative lengths of the pieces of its B documents on each
            of its R pipelines, by the group's value.
    """

    groups: tuple[int, ...]
    lengths: tuple[int, ...]
    documents: Mapping[int, tuple[int, ...]]
    cu_seqlens: Mapping[int, NDArray[np.int32]]

    @cached_property
    def layout(self) -> Layout:
        """Which token lies where."""
        return Layout.build(self.lengths, self.groups, split=SPLIT, cu_seqlens=dict(self.cu_seqlens))


@dataclass(frozen=True)
class BatchPlan:
    """Who holds which documents of a batch; :func:`hetu.plan_batch` makes it.

    Plans print as a table, and compare and hash by what they say.

    Attributes:
        lengths: Tokens of each document.
        groups: The context group of each pipeline, from 0. A group's pipelines are neighbours.
        max_tokens: The most tokens of a pipeline in a micro-batch.
        num_micro_batches: How many micro-batches there are.
        places: Where each document is: its micro-batch, and the pipelines that hold pieces of it with their tokens.
        seconds: When each pipeline is done with forward and backward of one layer, as it is predicted.
        least_seconds: What no plan is faster than.

    Example:
        >>> import hetu
        >>> plan = hetu.plan_batch([3000, 500], 2, hetu.Hardware.h100(), max_tokens=2048)
        >>> plan.groups, plan.num_micro_batches, plan.places[0].pieces
        ((0, 0), 1, ((0, 1500), (1, 1500)))
    """

    lengths: tuple[int, ...]
    groups: tuple[int, ...]
    max_tokens: int
    num_micro_batches: int
    places: tuple[Place, ...]
    seconds: tuple[float, ...]
    least_seconds: float

    @property
    def num_pipelines(self) -> int:
        return len(self.groups)

    @cached_property
    def members(self) -> dict[int, tuple[int, ...]]:
        """The pipelines of each group, by the group's value."""
        return groups_of(self.groups)

    @cached_property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """What the pipelines hold of each micro-batch."""
        return tuple(map(self._micro_batch, range(self.num_micro_batches)))

    def _micro_batch(self, number: int) -> MicroBatch:
        documents: dict[int, list[int]] = {value: [] for value in self.members}
        for d, place in enumerate(self.places):
            if place.micro_batch == number:
                documents[self.groups[place.pieces[0][0]]].append(d)
        cu_seqlens, lengths = {}, [0] * self.num_pipelines
        for value, members in self.members.items():
            row = {r: i for i, r in enumerate(members)}
            ends = np.zeros((len(members), len(documents[value]) + 1), np.int32)
            for column, d in enumerate(documents[value], 1):
                for r, tokens in self.places[d].pieces:
                    ends[row[r], column] = tokens
            cu_seqlens[value] = ends.cumsum(1, dtype=np.int32)
            for r, end in zip(members, cu_seqlens[value][:, -1].tolist(), strict=True):
                lengths[r] = end
        return MicroBatch(
            self.groups, tuple(lengths), {value: tuple(held) for value, held in documents.items()}, cu_seqlens
        )

    # For a graph

    @property
    def cu_seqlens(self) -> Any:
        """The ``(R, B + 1)`` cumulative lengths that ``g.run`` is fed: a dict by group, or a list of such dicts."""
        return self._fed([dict(item.cu_seqlens) for item in self.micro_batches])

    def symbols(self, strategy: Strategy) -> dict[IntSymbol, Any]:
        """The ``int_symbol_dict`` of a run of this batch.

        Args:
            strategy: A strategy with as many pipelines. Its lengths and groups are symbols, or this plan's numbers.

        Returns:
            A number for each symbol, or a list with one per micro-batch.

        Raises:
            StrategyError: If the strategy has another number of pipelines, an entry is an expression, or a number or a
                symbol that stands there twice would have to have two values.

        Example:
            >>> import hetu
            >>> n0, n1, g0, g1 = map(hetu.IntSymbol, ["n0", "n1", "g0", "g1"])
            >>> plan = hetu.plan_batch([3, 5], 2, hetu.Hardware.h100(), max_tokens=8)
            >>> plan.symbols(hetu.Strategy([n0, n1], [g0, g1])) == {n0: 5, n1: 3, g0: 0, g1: 1}
            True
        """
        if not isinstance(strategy, Strategy) or strategy.num_pipelines != self.num_pipelines:
            wanted = f"a hetu.Strategy of {count(self.num_pipelines, 'pipeline')}"
            refuse(strategy, "strategy", wanted, op=_OP, error=StrategyError)
        lengths = zip(*(item.lengths for item in self.micro_batches), strict=True)
        groups = ((value,) * self.num_micro_batches for value in self.groups)
        wanted_of = [*zip(strategy.lengths, lengths, strict=True), *zip(strategy.groups, groups, strict=True)]
        found: dict[IntSymbol, Any] = {}
        for entry, values in wanted_of:
            if isinstance(entry, IntSymbol) and not entry.is_leaf:
                fix = "give each pipeline symbols of its own"
                refuse(entry, "an entry of the strategy", "a symbol or an int", op=_OP, error=StrategyError, fix=fix)
            given = self._fed(list(values))
            known = found.setdefault(entry, given) if isinstance(entry, IntSymbol) else self._fed([entry] * len(values))
            if known != given:
                what = f"{entry} of the strategy would have to be {known} and {given}"
                fix = "give each pipeline a symbol of its own for its length, and one for its group"
                raise StrategyError(what, op=_OP, where=caller(), fix=fix)
        return found

    def scatter(self, documents: Sequence[Any]) -> Any:
        """The rows of all documents as what ``g.run`` is fed.

        Args:
            documents: One array per document, ``(tokens, ...)``: numpy's or torch's, all of one kind.

        Returns:
            ``hetu.Shards`` with one array per pipeline; with several micro-batches a list of one per micro-batch.

        Raises:
            ShapeError: If they are not as many as there are documents, one has another number of rows, or they differ
                in more than that.
        """
        arrays = arrays_of(documents, "documents")
        if len(arrays) != len(self.lengths) or not arrays:
            what = f"{count(len(arrays), 'array')} for a batch of {count(len(self.lengths), 'document')}"
            raise ShapeError(what, op=_OP, where=caller(), fix="give one array per document, at least one")
        for d, (array, length) in enumerate(zip(arrays, self.lengths, strict=True)):
            check_array(array, f"documents[{d}]")
            if len(array) != length:
                what = f"documents[{d}] has {len(array)} rows, but was planned with {length} tokens"
                raise ShapeError(what, op=_OP, where=caller(), fix="plan the batch that is scattered")
            if kind_of(array) != kind_of(arrays[0]):
                what = f"documents 0 and {d} have rows of {kind_of(arrays[0])} and {kind_of(array)}, expected the same"
                raise ShapeError(what, op=_OP, where=caller(), fix="give all documents one dtype and width")
        shards = []
        for item in self.micro_batches:
            whole = {value: _joined([arrays[d] for d in own], arrays[0]) for value, own in item.documents.items()}
            shards.append(Shards(item.layout.scatter(whole)))
        return self._fed(shards)

    def gather(self, shards: Any) -> list[Any]:
        """The rows of each document, of what ``g.run`` gave: the inverse of :meth:`scatter`.

        Args:
            shards: One array per pipeline; with several micro-batches a list of as many of these. With one pipeline its
                array instead of a list of one.

        Returns:
            One array per document.

        Raises:
            ShapeError: If the numbers of micro-batches, shards or rows don't fit.
        """
        given = [shards] if self.num_micro_batches == 1 else arrays_of(shards, "shards")
        if len(given) != self.num_micro_batches:
            what = f"shards of {count(len(given), 'micro-batch')} for {self.num_micro_batches}"
            raise ShapeError(what, op=_OP, where=caller(), fix="gather what a run of the whole batch gave")
        found: list[Any] = [None] * len(self.lengths)
        for item, own in zip(self.micro_batches, given, strict=True):
            is_bare = self.num_pipelines == 1 and hasattr(own, "shape")
            whole = item.layout.gather([own] if is_bare else own)
            for group, rows in zip(item.layout.groups, whole if len(item.layout.groups) > 1 else [whole], strict=True):
                for d, start in zip(item.documents[group.value], group.offsets.tolist(), strict=True):
                    found[d] = rows[start : start + self.lengths[d]]
        return found

    def _fed(self, values: list[Any]) -> Any:
        """One value per micro-batch as a run takes them."""
        return values if self.num_micro_batches > 1 else values[0]

    # Printing

    def __str__(self) -> str:
        head = (
            f"{count(len(self.lengths), 'document')}, {count(sum(self.lengths), 'token')} on "
            f"{count(self.num_pipelines, 'pipeline')} in {count(len(self.members), 'context group')}, "
            f"{self.num_micro_batches} micro-batch{'es' * (self.num_micro_batches > 1)}"
        )
        slowest = max(self.seconds)
        over = slowest / self.least_seconds if self.least_seconds else 1.0
        time = f"slowest pipeline: {slowest * 1e3:.3f} ms per layer, {over:.3f} of the least"
        rows: list[tuple[str, ...]] = [("micro-batch", "group", "pipelines", "tokens per pipeline", "whole", "cut")]
        rows += [row for number, item in enumerate(self.micro_batches) for row in self._rows(number, item)]
        return "\n".join([head, time, *as_table(rows)])

    def _rows(self, number: int, item: MicroBatch) -> list[tuple[str, ...]]:
        """A line of the table per group that holds something."""
        rows: list[tuple[str, ...]] = []
        for value, own in item.documents.items():
            if own:
                held = sorted({item.lengths[r] for r in self.members[value]})
                tokens = " to ".join(f"{n:,}" for n in dict.fromkeys((held[0], held[-1])))
                cut = sum(len(self.places[d].pieces) > 1 for d in own)
                pipelines = in_ranges(self.members[value])
                rows.append((str(number), str(value), pipelines, tokens, str(len(own) - cut), str(cut)))
        return rows


def in_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in a few characters.

    Example:
        >>> in_ranges([0, 1, 2, 5, 7, 8])
        '0-2, 5, 7-8'
    """
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda item: item[1] - item[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _joined(arrays: Sequence[Any], like: Any) -> Any:
    """The rows of several arrays in one, of the kind of another; torch is not imported for that."""
    shape = (sum(map(len, arrays)), *like.shape[1:])
    rows = like.new_empty(shape) if hasattr(like, "new_empty") else np.empty(shape, like.dtype)
    start = 0
    for array in arrays:
        rows[start : start + len(array)] = array
        start += len(array)
    return rows
