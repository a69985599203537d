"""What a layout is asked for: batches, cumulative lengths and custom spans, checked before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hetu.arguments import array as array_of
from hetu.arguments import int_of, integers, is_torch, refuse, shown
from hetu.errors import BindingError, HetuError, ShapeError, StrategyError, caller
from hetu.parallel.layout.pieces import Totals
from hetu.parallel.layout.strategy import by_group
from hetu.parallel.mask.segments import IntArray, count_up

MAX_TOKENS = 2**31 - 1
"""Kernels count rows in int32; products of two such numbers fit int64 exactly."""

MAX_BATCH = 2**24
"""The most sequences in a batch: layouts have a table of them."""

_PAD = "count padding as a document of its own"


def batch_lists(batch: int | Sequence[int] | Mapping[int, int], groups: Sequence[int], *, is_packed: bool) -> list[int]:
    """One batch size per group, for one number, a dict by the groups' values, or a list in their order.

    Args:
        batch: What was given.
        groups: The groups' values, ascending.
        is_packed: Whether each group's documents are one packed sequence.

    Raises:
        StrategyError: If a group is left out or doesn't exist, a number is below 1, or not 1 with packing.
    """
    one = int_of(batch)
    given: Any = [one] * len(groups) if one is not None else by_group(batch, groups, "batch sizes")  # type: ignore[arg-type]
    batches = list(integers(given, "batch", op="layout", error=StrategyError))
    for size in batches:
        if size < 1 or (is_packed and size != 1):
            limit = "1 with packing" if is_packed else "at least 1"
            _refuse(
                StrategyError,
                f"batch is {shown(size)}, expected {limit}",
                "pack documents, or batch sequences, not both",
            )
    return batches


def check_total(group: int, tokens: int, batch: int = 1) -> None:
    """Refuses a group of more tokens than rows can be counted.

    Raises:
        StrategyError: If there are more than :data:`MAX_TOKENS`.
    """
    if tokens > MAX_TOKENS:
        of_batch = f", for batch {shown(batch)}" if batch > 1 else ""
        what = f"context group {group} holds {shown(tokens)} tokens, expected at most {MAX_TOKENS}{of_batch}"
        _refuse(StrategyError, what, "use shorter sequences, smaller batches, or more groups")
    if batch > MAX_BATCH:
        _refuse(StrategyError, f"batch is {batch}, expected at most {MAX_BATCH}", "use a smaller batch")


def cu_seqlens_lists(cu_seqlens: Any, groups: Sequence[int]) -> list[IntArray] | None:
    """One int64 array per group, for one array, a dict by the groups' values, or a list in their order.

    Args:
        cu_seqlens: What was given; None without packing.
        groups: The groups' values, ascending.

    Returns:
        The arrays; None without packing.

    Raises:
        ShapeError: If a group is left out or doesn't exist, or a number of dimensions is wrong.
    """
    if cu_seqlens is None:
        return None
    several = isinstance(cu_seqlens, (list, tuple)) and len(cu_seqlens) > 0 and _has_items(cu_seqlens[0])
    if several or isinstance(cu_seqlens, Mapping):
        given = by_group(cu_seqlens, groups, "cu_seqlens", ShapeError)
    else:
        given = [cu_seqlens] * len(groups)
    arrays = []
    for item in given:
        array = _ints(item, "cu_seqlens")
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.shape[-1] == 0:
            shape = "(B + 1,) or (R, B + 1)"
            _refuse(ShapeError, f"cu_seqlens is {array.dtype}{list(array.shape)}, expected ints of shape {shape}", _PAD)
        arrays.append(array.astype(np.int64))
    return arrays


def _has_items(item: Any) -> bool:
    return isinstance(item, (list, tuple)) or getattr(item, "ndim", 0) > 0


def _ints(item: Any, name: str) -> NDArray[Any]:
    """An array of ints, which an empty list is too."""
    if type(item) is np.ndarray and item.dtype == np.int64:
        return item
    found = array_of(item, name, op="layout")
    numbers: NDArray[Any] = np.asarray(found.cpu()) if is_torch(found) else found
    return numbers if numbers.size else numbers.astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class PackedDocuments:
    """Cumulative lengths of the documents of one group.

    Attributes:
        value: The group's value in ``cp_groups``, for messages.
        members: Its pipelines.
        seq_lens: ``(R,)`` tokens of each.
        cu_seqlens: ``(B + 1,)``, or ``(R, B + 1)``.
    """

    value: int
    members: tuple[int, ...]
    seq_lens: IntArray
    cu_seqlens: IntArray

    def totals(self, cut: Callable[[IntArray, IntArray], Totals]) -> tuple[IntArray, Totals]:
        """``(B,)`` tokens of each document, and ``(R, B + 1)`` each member's own cumulative lengths.

        Args:
            cut: Makes the latter of 1-D cu_seqlens and lengths; 2-D cu_seqlens are that already.

        Raises:
            ShapeError: If 2-D cu_seqlens has not one row a member.
            BindingError: If cu_seqlens doesn't start at 0, decreases, or doesn't end at the members' tokens.
            StrategyError: If there are too many tokens.
        """
        cu, total = self.cu_seqlens, int(self.seq_lens.sum())
        lengths = cu[..., 1:] - cu[..., :-1]
        if cu[..., 0].any() or (lengths < 0).any():
            self._refuse(f"is {cu.tolist()}, expected to start at 0 and never to decrease", "pass cumulative lengths")
        check_total(self.value, total)
        if cu.ndim == 1:
            if cu[-1] != total:
                self._refuse(
                    f"ends at {cu[-1]}, but pipelines {list(self.members)} hold {total} tokens together: with packing "
                    "every token of parallel_attn belongs to a document",
                    f"make the last entry {total}; {_PAD}",
                )
            return lengths, cut(cu, self.seq_lens)
        if len(cu) != len(self.members):
            _refuse(
                ShapeError,
                f"cu_seqlens of context group {self.value} has {len(cu)} rows, but the group has {len(self.members)} "
                "pipelines",
                "give one row a pipeline of the group, or the 1-D form",
            )
        for r, end, length in zip(self.members, cu[:, -1].tolist(), self.seq_lens.tolist(), strict=True):
            if end != length:
                self._refuse(
                    f"gives pipeline {r} {end} tokens, but the strategy gives it {length}: with packing every token of "
                    "parallel_attn belongs to a document",
                    f"make the last entry of its row {length}; {_PAD}",
                )
        return lengths.sum(0), cu.astype(np.int32)

    def _refuse(self, what: str, fix: str) -> NoReturn:
        _refuse(BindingError, f"cu_seqlens of context group {self.value} {what}", fix)


def check_spans(members: tuple[int, ...], lengths: Any, spans: Any, *, is_packed: bool) -> tuple[IntArray, IntArray]:
    """Checks a custom layout of one group: every token once, each pipeline's rows in order.

    Args:
        members: The group's pipelines.
        lengths: ``(B,)`` tokens of each document.
        spans: ``(n, 5)`` runs ``(pipeline, document, start, length, step)``.
        is_packed: Without packing a pipeline must hold as many tokens of each document.

    Returns:
        The runs without empty ones, ordered by member, with members' indices instead of pipelines; and the pieces.

    Raises:
        ShapeError: If an array has another shape.
        StrategyError: If the runs are no layout.
    """
    counts, table = _ints(lengths, "lengths"), _ints(spans, "spans")
    for name, given in (("lengths", counts), ("spans", table)):
        if given.dtype.kind not in "iu":
            refuse(given, name, "an array of ints", op="layout", error=ShapeError)
    counts, table = counts.astype(np.int64), table.astype(np.int64)  # our own: the table is changed below
    table = table.reshape(len(table), -1) if table.size else table.reshape(0, 5)
    if counts.ndim != 1 or (counts < 0).any() or table.shape[1] != 5:
        _refuse(ShapeError, "lengths must be (B,) from 0 and spans (n, 5)", "see Layout.from_spans")
    if not np.isin(table[:, 0], members).all() or (table[:, 1] < 0).any() or (table[:, 1] >= len(counts)).any():
        _refuse(StrategyError, f"a span is not of pipelines {list(members)} or documents 0 to {len(counts) - 1}", "")
    if (table[:, 2:4] < 0).any() or (table[:, 4] < 1).any():
        _refuse(StrategyError, "a span has a negative start or length, or a step below 1", "give runs of tokens")
    table[:, 0] = np.searchsorted(members, table[:, 0])
    table = table[table[:, 3] > 0]
    table = table[np.argsort(table[:, 0], kind="stable")]
    member, document, start, length, step = table.T
    last = start + (length - 1) * step
    same = member[1:] == member[:-1]
    out_of_order = same & (
        (document[1:] < document[:-1]) | ((document[1:] == document[:-1]) & (start[1:] <= last[:-1]))
    )
    if out_of_order.any():
        i = int(out_of_order.argmax())
        _refuse(
            StrategyError,
            f"on pipeline {members[member[i]]} document {document[i + 1]} from position {start[i + 1]} "
            f"follows document {document[i]} up to position {last[i]}",
            "order each pipeline's spans by document and position",
        )
    _check_partition(counts, document, start, length, step, last)
    pieces = np.zeros((len(members), len(counts)), np.int64)
    np.add.at(pieces, (member, document), length)
    if not is_packed and pieces.size and (pieces != pieces[:, :1]).any():
        _refuse(StrategyError, "a pipeline holds more of one sequence of a batch than of another", "pack them instead")
    return table, pieces


def _check_partition(
    counts: IntArray, document: IntArray, start: IntArray, length: IntArray, step: IntArray, last: IntArray
) -> None:
    beyond = last >= counts[document]
    if beyond.any():
        i = int(beyond.argmax())
        what = f"document {document[i]} has {counts[document[i]]} tokens, but a span reaches position {last[i]}"
        _refuse(StrategyError, what, "give spans within their documents")
    offsets = counts.cumsum() - counts
    number = count_up(length)
    tokens = (offsets[document] + start).repeat(length) + number * step.repeat(length)
    times = np.bincount(tokens, minlength=int(counts.sum()))
    if (times != 1).any():
        token = int((times != 1).argmax())
        owner = int(offsets.searchsorted(token, "right")) - 1
        what = f"position {token - offsets[owner]} of document {owner} lies on {times[token]} pipelines, expected 1"
        _refuse(StrategyError, what, "make the spans a partition of every document")


def _refuse(kind: type[HetuError], what: str, fix: str) -> NoReturn:
    raise kind(what, op="layout", where=caller(), fix=fix)
