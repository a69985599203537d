"""Which token lies where: spans of documents on pipelines, and nothing about how they came there.

A document is a sequence of a batch, or one of those that a packed sequence is made of. On every pipeline the tokens
that it holds of a document are consecutive local rows in rising order of position, and documents follow each other
in order. All splits are such layouts, and so is whatever a planner invents (:meth:`Layout.from_spans`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from hetu.arguments import flag, integer, integers, is_torch, refuse, shown
from hetu.arguments import index as index_of
from hetu.errors import ShapeError, StrategyError, caller
from hetu.parallel.layout.arrays import arrays_of, check_alike, check_array
from hetu.parallel.layout.documents import PackedDocuments, batch_lists, check_spans, check_total, cu_seqlens_lists
from hetu.parallel.layout.group import GroupLayout, Spans
from hetu.parallel.layout.picture import draw_layout
from hetu.parallel.layout.printing import count
from hetu.parallel.layout.splits import SPLITS, check_mask
from hetu.parallel.layout.strategy import by_group, check_lengths, groups_of
from hetu.parallel.mask.drawing import draw_owners
from hetu.parallel.mask.mask import CAUSAL, Mask
from hetu.parallel.mask.segments import IntArray, QuerySpans


class Layout:
    """Which token of which document lies on which pipeline, for all context groups of a strategy.

    Args:
        groups: The layouts of all context groups; :meth:`build` and :meth:`from_spans` make them.

    Example:
        >>> layout = Layout.build([3, 5], [0, 0], split="sym")
        >>> [layout.positions(r).tolist() for r in range(2)]
        [[0, 6, 7], [1, 2, 3, 4, 5]]
        >>> shards = layout.scatter(np.arange(8) * 10)
        >>> shards[0].tolist(), layout.gather(shards).tolist()
        ([0, 60, 70], [0, 10, 20, 30, 40, 50, 60, 70])
    """

    def __init__(self, groups: Sequence[GroupLayout]) -> None:
        self.groups = tuple(groups)
        places = {r: (g.index, member) for g in self.groups for member, r in enumerate(g.members)}
        self._places = [places[r] for r in range(len(places))]
        self._values = tuple(group.value for group in self.groups)

    @classmethod
    def build(
        cls,
        seq_lens: Sequence[int],
        cp_groups: Sequence[int],
        *,
        split: str = "normal",
        batch: int | Sequence[int] | Mapping[int, int] = 1,
        cu_seqlens: Any = None,
        mask: Mask | None = None,
    ) -> Layout:
        """The layout of a split.

        Source: ``"sym"`` is the order of "The Llama 3 Herd of Models", 2024, section 3.3.2; ``"stripe"`` that of
        Brandon et al., "Striped Attention", 2023; ``"normal"`` and ``"balanced"`` are hetu's own, docs/layouts.md.

        Args:
            seq_lens: Tokens of each sequence on each pipeline.
            cp_groups: Each pipeline's context group.
            split: ``"normal"``, ``"sym"``, ``"stripe"`` or ``"balanced"``.
            batch: Sequences in each group's batch: one number, or one per group. 1 with packing.
            cu_seqlens: With packing, int ``(B + 1,)``, the cumulative lengths of the whole group's documents, or
                ``(R, B + 1)``, those of the pieces on each pipeline of the group: one array, or one per group.
            mask: What ``"balanced"`` weighs documents by: a document is as much work as the mask lets its tokens see
                keys. None weighs by lengths, as fits causal and full attention. No other split looks at it.

        What is given per group is a dict by the group's value in ``cp_groups``, or a list in the order in which
        ``print(layout)`` lists the groups, that of ascending values.

        Raises:
            StrategyError: If there is no such split, the lists don't fit each other, or a number of the mask is a
                symbol.
            ShapeError: If cu_seqlens has another shape.
            BindingError: If its numbers don't fit the lengths, or the mask doesn't fit the documents.
        """
        seq_lens = integers(seq_lens, "seq_lens", op="layout", error=StrategyError)
        cp_groups = integers(cp_groups, "cp_groups", op="layout", error=StrategyError)
        check_lengths(seq_lens, cp_groups)
        if not isinstance(split, str) or split not in SPLITS:
            names, what = ", ".join(SPLITS), f"there is no split {shown(split)}"
            raise StrategyError(what, op="layout", where=caller(), fix=f"use one of {names}")
        check_mask(mask)
        chosen = SPLITS[split]
        by_value = groups_of(cp_groups)
        cus = cu_seqlens_lists(cu_seqlens, tuple(by_value))
        batches = batch_lists(batch, tuple(by_value), is_packed=cu_seqlens is not None)
        groups = []
        for index, (value, members) in enumerate(by_value.items()):
            own = [seq_lens[r] for r in members]
            check_total(value, sum(own) * batches[index], batches[index])  # as Python's ints, which don't overflow
            lens = np.array(own, np.int64)
            cut_by: bytes | None = b""
            if cus is None:
                lengths = np.full(batches[index], lens.sum())
                totals = (lens[:, None] * np.arange(batches[index] + 1)).astype(np.int32)
            else:
                lengths, totals = PackedDocuments(value, members, lens, cus[index]).totals(
                    partial(chosen.cut, mask=mask)
                )
                if cus[index].ndim == 2:
                    cut_by = None
                elif chosen.weighs and mask is not None:
                    cut_by = mask.code.tobytes()
            is_packed = cus is not None
            groups.append(GroupLayout(index, value, members, lens, is_packed, lengths, totals, split, cut_by=cut_by))
        return cls(groups)

    @classmethod
    def from_spans(
        cls,
        cp_groups: Sequence[int],
        lengths: Sequence[Any] | Mapping[int, Any],
        spans: Sequence[Any] | Mapping[int, Any],
        *,
        is_packed: bool = True,
    ) -> Layout:
        """A layout that is none of the splits.

        Args:
            cp_groups: Each pipeline's context group.
            lengths: For each group its documents' lengths, ``(B,)``: a dict by the groups' values, or a list in the
                order of these.
            spans: For each group, in the same way, an int array ``(n, 5)`` of runs ``(pipeline, document, start,
                length, step)``, with pipelines numbered as in the strategy. The runs of a pipeline are its local rows,
                in order.
            is_packed: Whether the documents are one packed sequence rather than a batch.

        Raises:
            ShapeError: If the lists don't fit each other.
            StrategyError: If a token is missing or doubled, or a pipeline's rows are not in order.

        Example:
            >>> layout = Layout.from_spans([0, 0], [[6]], [[(0, 0, 0, 2, 5), (1, 0, 1, 4, 1)]])
            >>> print(layout)
            group 0: 1 document, 6 tokens on 2 pipelines
              pipeline 0: 2 tokens   0[0:6:5]
              pipeline 1: 4 tokens   0[1:5]
        """
        cp_groups = integers(cp_groups, "cp_groups", op="layout", error=StrategyError)
        is_packed = flag(is_packed, "is_packed", op="layout")
        by_value, groups = groups_of(cp_groups), []
        lengths = by_group(lengths, tuple(by_value), "lists of lengths", ShapeError)
        spans = by_group(spans, tuple(by_value), "lists of spans", ShapeError)
        for index, (value, members) in enumerate(by_value.items()):
            table, pieces = check_spans(members, lengths[index], spans[index], is_packed=is_packed)
            lens = pieces.sum(1) if is_packed or not pieces.size else pieces[:, 0]
            ends = table[:, 3].cumsum()
            before = np.concatenate([[0], pieces.sum(1).cumsum()])[table[:, 0]]
            member, document, start, length, step = table.T.copy()
            custom = Spans(member, document, start, length, step, ends - length - before)
            totals = np.zeros((len(pieces), pieces.shape[1] + 1), np.int32)
            pieces.cumsum(1, out=totals[:, 1:])
            counts = pieces.sum(0)
            groups.append(GroupLayout(index, value, members, lens, is_packed, counts, totals, None, custom))
        return cls(groups)

    @property
    def num_pipelines(self) -> int:
        return len(self._places)

    def group_index(self, pipeline: int) -> int:
        """The number of a pipeline's group, in the order of :func:`~hetu.parallel.layout.strategy.groups_of`."""
        return self.place(pipeline)[0].index

    def place(self, pipeline: int) -> tuple[GroupLayout, int]:
        """A pipeline's group, and which member of it the pipeline is."""
        if type(pipeline) is not int or not 0 <= pipeline < len(self._places):  # asked here, because it is asked often
            pipeline = _index(pipeline, "pipeline", len(self._places))
        index, member = self._places[pipeline]
        return self.groups[index], member

    def rows(self, pipeline: int) -> int:
        """Rows of a pipeline's shard."""
        group, member = self.place(pipeline)
        return group.rows[member]

    def documents(self, pipeline: int) -> IntArray:
        """``(rows,)`` document of every local row."""
        group, member = self.place(pipeline)
        return group.rows_of(member)[0]

    def positions(self, pipeline: int) -> IntArray:
        """``(rows,)`` position in its document of every local row."""
        group, member = self.place(pipeline)
        return group.rows_of(member)[1]

    def columns(self, pipeline: int) -> IntArray:
        """``(rows,)`` where every local row stands among the rows of its group: document after document."""
        group, member = self.place(pipeline)
        return group.columns_of(member)

    def query_spans(self, pipeline: int, joins: bool = False) -> QuerySpans:
        """The spans of a pipeline's rows; see :meth:`GroupLayout.query_spans`."""
        group, member = self.place(pipeline)
        return group.query_spans(member, flag(joins, "joins", op="layout"))

    def scatter(self, x: Any) -> list[Any]:
        """Cuts a whole group's rows into the pipelines' shards.

        Args:
            x: ``(tokens, ...)``, document after document: a numpy array or a torch tensor. With several groups a dict
                of one per group by the group's value, or a list in the order of ``layout.groups``, which
                ``print(layout)`` shows: that of ascending values.

        Returns:
            One array of the same kind a pipeline: ``(rows(r), ...)``.

        Raises:
            ShapeError: If the numbers of arrays or rows don't fit.
        """
        arrays = by_group([x] if is_torch(x) or hasattr(x, "shape") else x, self._values, "arrays in x", ShapeError)
        for group, array in zip(self.groups, arrays, strict=True):
            check_array(array, f"x of context group {group.value}")
            if len(array) != group.tokens:
                fix = "scatter the rows of all documents of the group, one after the other"
                if not group.is_packed and group.tokens and len(array) % group.tokens == 0:
                    fix += f"; for {len(array) // group.tokens} times as many sequences make the layout with batch=..."
                _refuse(f"context group {group.value} has {group.tokens} tokens, but {len(array)} rows came in x", fix)
        places = map(self.place, range(self.num_pipelines))
        return [group.cut(arrays[group.index], member) for group, member in places]

    def gather(self, shards: Sequence[Any]) -> Any:
        """Puts shards together again: the inverse of :meth:`scatter`.

        Args:
            shards: One array per pipeline, ``(rows(r), ...)``, numpy or torch.

        Returns:
            One array, or with several groups a list of one per group, in the order of ``layout.groups``.

        Raises:
            ShapeError: If the numbers of shards or rows don't fit.
        """
        shards = arrays_of(shards, "shards")
        if len(shards) != self.num_pipelines:
            _refuse(f"{len(shards)} shards for {self.num_pipelines} pipelines", "gather one shard a pipeline")
        for r, shard in enumerate(shards):
            check_array(shard, f"shards[{r}]")
            if len(shard) != self.rows(r):
                _refuse(
                    f"pipeline {r} holds {self.rows(r)} rows, but its shard has {len(shard)}", "gather whole shards"
                )
        for group in self.groups:
            check_alike(shards, group.members)
        whole = []
        for group in self.groups:
            first = shards[group.members[0]]
            shape = (group.tokens, *first.shape[1:])
            # A torch tensor makes its own; this package never imports torch.
            rows = first.new_empty(shape) if hasattr(first, "new_empty") else np.empty(shape, first.dtype)
            for r in group.members:
                rows[self.columns(r)] = shards[r]
            whole.append(rows)
        return whole if len(whole) > 1 else whole[0]

    def digest(self) -> str:
        """A hash of what the layout is made from: equal on every machine, and for equal arguments.

        Layouts of the same tokens that were asked for in different ways, by a split and by spans, may differ in it.
        """
        digest = hashlib.blake2b(digest_size=16)
        for item in (item for group in self.groups for item in group.inputs):
            if isinstance(item, np.ndarray):
                digest.update(repr(item.shape).encode() + item.astype("<i8").tobytes())
            else:
                digest.update(repr(item).encode() + b";")
        return digest.hexdigest()

    def draw(self, mask: Mask = CAUSAL, width: int = 48) -> str:
        """Who computes what under a mask, where keys and values move to the queries: a drawing per group.

        Args:
            mask: Which keys a query sees.
            width: Most columns; in a larger group a character stands for a square of pairs.

        Returns:
            A line per query, headed by the pipeline that holds it, and a column per key: the pipeline that computes the
            pair, ``·`` for pairs that the mask hides, ``*`` for several pipelines.

        Example:
            >>> print(Layout.build([4, 4], [0, 0], split="sym").draw())
            group 0 under Mask.causal(): 8 tokens on 2 pipelines
            held by  00111100
                  0  0·······
                  0  00······
                  1  111·····
                  1  1111····
                  1  11111···
                  1  111111··
                  0  0000000·
                  0  00000000
        """
        return self.drawn(mask, [self._holders(group) for group in self.groups], width)

    def _holders(self, group: GroupLayout) -> IntArray:
        """``(tokens,)`` which pipeline holds each token of a group, document after document."""
        holds = np.empty(group.tokens, np.int64)
        for r in group.members:
            holds[self.columns(r)] = r
        return holds

    def drawn(self, mask: Mask, computes: Sequence[IntArray], width: int) -> str:
        """As :meth:`draw`, where others compute than those who hold the queries.

        Args:
            mask: Which keys a query sees.
            computes: For each group ``(tokens,)``, which pipeline computes for each query.
            width: As of :meth:`draw`.
        """
        if not isinstance(mask, Mask):
            refuse(mask, "mask", "a hetu.Mask", op="layout", error=StrategyError)
        width, texts = integer(width, "width", least=1, op="layout"), []
        for group, who in zip(self.groups, computes, strict=True):
            whole = mask.over_pack(group.lengths)
            head = f"group {group.value} under {mask!r}: {count(group.tokens, 'token')}"
            drawing = draw_owners(whole, who, self._holders(group), width)
            texts.append(f"{head} on {count(len(group.members), 'pipeline')}\n{drawing}")
        return "\n\n".join(texts)

    def __str__(self) -> str:
        return "\n".join(line for group in self.groups for line in group.describe())

    def _repr_svg_(self) -> str:
        return draw_layout(self)

    def __repr__(self) -> str:
        return f"<Layout of {self.num_pipelines} pipelines in {len(self.groups)} groups>"


def _index(value: int, name: str, count: int) -> int:
    """The number of a pipeline, or of a member of a group, which must be there."""
    return index_of(value, name, count, op="layout", error=StrategyError)


def _refuse(what: str, fix: str) -> None:
    raise ShapeError(what, op="layout", where=caller(), fix=fix)
