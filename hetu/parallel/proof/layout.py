"""Checks that the layout of a plan is one: every token lies once where the plan's shards have room for it."""

from __future__ import annotations

import numpy as np

from hetu.errors import HetuError
from hetu.parallel.layout.documents import check_spans
from hetu.parallel.layout.group import GroupLayout
from hetu.parallel.layout.splits import SPLITS
from hetu.parallel.plan.parts import PlanData
from hetu.parallel.proof.transfers import refuse


def check_layout(plan: PlanData) -> None:
    """Demands that groups share the pipelines out, that spans hold each token once, and that the mask fits them.

    It looks at the numbers of rows first, which have to be those of the shards, so that no more is allocated than for
    what the plan holds.

    Raises:
        PlanError: If they don't; says which group.
    """
    layout, rows = plan.layout, [part.buffers[0].rows if part.buffers else 0 for part in plan.pipelines]
    if not plan.pipelines or len(plan.pipelines) != layout.num_pipelines:
        refuse(f"{len(plan.pipelines)} parts for {layout.num_pipelines} pipelines")
    if sorted(r for group in layout.groups for r in group.members) != list(range(layout.num_pipelines)):
        refuse(f"the context groups don't share out pipelines 0 to {layout.num_pipelines - 1}")
    if len({group.value for group in layout.groups}) != len(layout.groups):
        refuse("two context groups have one value")
    for index, group in enumerate(layout.groups):
        name = f"context group {group.value}"
        if group.index != index or list(group.members) != sorted(group.members):
            refuse(
                f"{name} is number {group.index} of pipelines {group.members}, expected {index} and rising pipelines"
            )
        _check_pieces(group, name, [rows[r] for r in group.members])
        _check_spans(group, name)
        try:
            plan.mask.bands(group.lengths, group.lengths)
        except HetuError as error:
            refuse(f"the plan's mask doesn't fit {name}: {error.what}")


def _check_pieces(group: GroupLayout, name: str, rows: list[int]) -> None:
    totals, lens = group.totals, group.seq_lens
    if (
        totals.ndim != 2
        or totals.shape != (len(group.members), group.lengths.size + 1)
        or lens.shape != totals.shape[:1]
    ):
        what = f"totals of shape {totals.shape} and lengths of shape {lens.shape}"
        refuse(f"{name} has {what}, expected a row per member of {len(group.members)}")
    pieces, held = group.pieces, totals[:, -1].tolist()
    if (pieces < 0).any() or held != rows:
        refuse(f"the documents of {name} have {held} tokens on its pipelines, but their shards have {rows} rows")
    if totals[:, 0].any() or not np.array_equal(pieces.sum(0), group.lengths):
        refuse(f"the documents of {name} have {group.lengths.tolist()} tokens, but {pieces.sum(0).tolist()} lie on it")
    if (lens != held).any() if group.is_packed else (pieces != lens[:, None]).any():
        refuse(f"{name} has sequences of {lens.tolist()} tokens, which is not what its documents have")


def _check_spans(group: GroupLayout, name: str) -> None:
    if (group.split is None) == (group.custom_spans is None):
        refuse(f"{name} says which tokens lie where by a split and by spans, expected one of the two")
    if group.split not in (None, *SPLITS):
        refuse(f"{name} is cut by the split {group.split!r}, which there is not: {', '.join(SPLITS)}")
    spans, members = group.spans, np.array(group.members, np.int64)
    if (spans.member < 0).any() or (spans.member >= len(members)).any() or (np.diff(spans.member) < 0).any():
        refuse(f"a span of {name} is of no member, or they are not in the order of the members")
    if (spans.length < 1).any() or spans.length.sum() != group.pieces.sum():
        refuse(f"the spans of {name} have {spans.length.sum()} tokens, but its documents {group.pieces.sum()}")
    table = np.stack([members[spans.member], spans.document, spans.start, spans.length, spans.step], axis=1)
    try:
        _, pieces = check_spans(group.members, group.lengths, table, is_packed=group.is_packed)
    except HetuError as error:
        refuse(f"{name} is no layout: {error.what}")
    ends = spans.length.cumsum()
    before = (pieces.sum(1).cumsum() - pieces.sum(1))[spans.member]
    if not np.array_equal(pieces, group.pieces) or not np.array_equal(spans.row, ends - spans.length - before):
        refuse(f"the spans of {name} don't cover its pieces row after row")
