"""Segment tables against their definition, pair by pair."""

from __future__ import annotations

import itertools
from dataclasses import fields

import numpy as np
import pytest
from support.layout_cases import DEFINITIONS, MASKS, random_case, random_custom_layout

from hetu.parallel import SPLITS, GroupLayout, Layout, Mask, QuerySpans, SegmentTable
from hetu.parallel.mask.segments import take_turns
from hetu.parallel.mask.varlen import varlen_tables
from hetu.parallel.methods.tables import extents, see


def columns(spans: QuerySpans, table: SegmentTable) -> list[list[int]]:
    """All that both hold."""
    both = [(x, item.name) for x in (spans, table) for item in fields(x) if item.repr]
    return [np.ravel(getattr(x, name)).tolist() for x, name in both]


def test_lengths_of_both_sides_in_one_array() -> None:
    """What both sides share is computed once, with the same result."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        cu = np.concatenate([[0], rng.integers(0, 4, rng.integers(0, 6)).cumsum()]).astype(np.int64)
        for tail, mask, packed in itertools.product((0, 1), MASKS, (False, True)):
            request = (int(cu[-1]) + tail, mask, packed)
            assert columns(*varlen_tables(cu, cu, *request)) == columns(*varlen_tables(cu, cu.copy(), *request))


def dense(spans: QuerySpans, table: SegmentTable, rows: int, keys: int) -> np.ndarray:
    """How often each row sees each key of the buffer, straight from the docstring of ``SegmentTable``."""
    times = np.zeros((rows, keys), np.int64)
    columns = (table.query, table.k_start, table.k_len, table.diagonal, table.lower_over(spans))
    for s, k_start, k_len, diagonal, low in zip(*columns, strict=True):
        i, j = np.arange(spans.length[s])[:, None], np.arange(k_len)
        seen = (i + low <= j) & (j <= i + diagonal)
        times[spans.start[s] : spans.start[s] + spans.length[s], k_start : k_start + k_len] += seen
    return times


def check_normal_form(spans: QuerySpans, table: SegmentTable) -> None:
    """As the docstring of ``SegmentTable`` says, but for what the order of steps decides."""
    length = spans.length[table.query]
    assert (table.k_len > 0).all() and (np.diff(table.query) >= 0).all()
    assert (table.k_len <= length + table.diagonal).all() and (table.diagonal < table.k_len).all()
    if table.lower is not None:
        assert (table.lower <= np.minimum(0, table.diagonal)).all() and (table.lower >= 1 - length).all()
        assert (table.lower > 1 - length).any(), "nothing is hidden, so there should be none"


def test_pairs_of_every_small_segment() -> None:
    for length in range(1, 7):
        one = np.array([length])
        spans = QuerySpans(*[np.zeros(1, np.int64)] * 1, one, *[np.zeros(1, np.int64)] * 6)
        for k_len in range(1, 9):
            for diagonal in range(-9, 12):  # not only those in normal form
                table = SegmentTable(
                    np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([k_len]), np.array([diagonal])
                )
                assert table.pairs(spans) == dense(spans, table, length, k_len).sum(), (length, k_len, diagonal)
                for lower in range(-9, min(diagonal, 0) + 1):
                    table.lower, table.keys_per_row = np.array([lower]), None
                    assert table.pairs(spans) == dense(spans, table, length, k_len).sum()


def test_pairs_add_up() -> None:
    group = Layout.build([5, 8, 3], [0, 0, 0], split="sym", batch=2).groups[0]
    reach = see(group, slice(1, 2), slice(0, 3), mask=Mask.causal())
    tables = reach.tables(reach.rows[None], reach.rows)
    spans = group.query_spans(1)
    assert [t.pairs(spans) for t in tables] == [dense(spans, t, 16, 16).sum() for t in tables]


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_varlen_tables(mask: Mask) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        batch, tail = int(rng.integers(1, 6)), int(rng.integers(0, 3))
        q_cu, k_cu = (np.concatenate([[0], rng.integers(0, 9, batch).cumsum()]) for _ in range(2))
        rows = int(q_cu[-1]) + tail
        spans, table = varlen_tables(q_cu.astype(np.int32), k_cu.astype(np.int32), rows, mask)
        allowed = np.zeros((rows, k_cu[-1]), np.int64)
        for b in range(batch):
            n, m = q_cu[b + 1] - q_cu[b], k_cu[b + 1] - k_cu[b]
            i, j = np.arange(n)[:, None], np.arange(m)
            allowed[q_cu[b] : q_cu[b + 1], k_cu[b] : k_cu[b + 1]] = DEFINITIONS[mask](i + m - n, j)
        assert np.array_equal(dense(spans, table, rows, int(k_cu[-1])), allowed)
        check_normal_form(spans, table)
        assert (spans.length > 0).all() and spans.length.sum() == rows
        assert np.array_equal(spans.start, spans.length.cumsum() - spans.length)
        is_tail = spans.start >= q_cu[-1]
        assert is_tail.sum() == min(tail, 1) and (spans.document[is_tail] == -1).all()
        assert (spans.slot[is_tail] == -1).all()
        own = spans.document[~is_tail]
        assert np.array_equal(spans.slot[~is_tail], own) and np.array_equal(
            np.unique(own), np.flatnonzero(np.diff(q_cu))
        )
        assert np.array_equal(spans.slot_row[~is_tail], spans.position[~is_tail])
        assert np.array_equal(spans.start[~is_tail], q_cu[own] + spans.position[~is_tail])
        packed, same = varlen_tables(q_cu, k_cu, rows, mask, packed_lse=True)
        assert (packed.slot == 0).all() and np.array_equal(packed.slot_row, packed.start)
        others = ("start", "length", "document", "position", "step", "column")
        assert all(np.array_equal(getattr(packed, name), getattr(spans, name)) for name in others)
        assert all(np.array_equal(getattr(same, name), getattr(table, name)) for name in ("query", "k_start", "k_len"))


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("packed", [True, False])
def test_tables_known_to_be_plain(mask: Mask, packed: bool) -> None:
    """They are what the docstring says, and what is derived from it is what is derived from any table."""
    rng = np.random.default_rng(0)
    plain = 0
    for _ in range(300):
        batch, tail = int(rng.integers(1, 6)), int(rng.integers(0, 2))
        q_cu, k_cu = (np.concatenate([[0], rng.integers(0, 9, batch).cumsum()]) for _ in range(2))
        k_cu = q_cu if rng.integers(2) else k_cu
        spans, table = varlen_tables(q_cu, k_cu, int(q_cu[-1]) + tail, mask, packed)
        assert spans.rows_with_lse == spans.length[spans.slot >= 0].sum()
        other = SegmentTable(table.query, table.k_start, table.k_len, table.diagonal, table.lower)
        assert table.pairs(spans) == other.pairs(spans)
        others = QuerySpans(*(getattr(spans, item.name) for item in fields(spans) if item.repr))
        assert others.rows_with_lse == spans.rows_with_lse
        assert not table.is_plain_over(others) and not other.is_plain_over(spans)
        if not table.is_plain_over(spans):
            is_odd = tail or (table.diagonal < 0).any() or len(table) < len(spans) or not len(spans)
            assert is_odd or not mask.is_plain
            continue
        plain += 1
        assert np.array_equal(table.query, np.arange(len(spans)))
        assert (spans.position == 0).all() and (spans.step == 1).all() and (spans.column == 0).all()
        assert (np.diff(spans.document) > 0).all() and (spans.document >= 0).all()
        assert (table.diagonal >= 0).all()
        assert (table.k_start[1:] >= (table.k_start + table.k_len)[:-1]).all()
        by_one, all_ = table.k_len == spans.length + table.diagonal, table.k_len == table.diagonal + 1
        assert (by_one | all_).all()
        begins, ends = table.stretches()
        assert table.k_len.sum() == (ends - begins).sum()
    assert (plain > 50) == mask.is_plain, "the cases show nothing"


def check_reach(group: GroupLayout, mask: Mask) -> None:
    """Tables, extents and normal form of all pairs of members against the mask."""
    R = len(group.members)
    everyone = slice(0, R)
    reach = see(group, everyone, everyone, mask=mask)
    used, cells = extents(group, everyone, everyone, mask=mask)
    assert np.array_equal(used, reach.needed) and np.array_equal(cells, reach.rows)
    tables = reach.tables(np.broadcast_to(cells, used.shape).copy(), cells)
    for r in range(R):
        spans, (q_document, q_position) = reach.spans[r], group.rows_of(r)
        for c in range(R):
            table, (document, position) = tables[r * R + c], group.rows_of(c)
            allowed = q_document[:, None] == document
            allowed &= DEFINITIONS[mask](q_position[:, None], position)
            assert np.array_equal(dense(spans, table, group.rows[r], group.rows[c]), allowed)
            check_normal_form(spans, table)
            if r != c:  # what lies at home is not asked for
                assert np.array_equal(rows_in(cells[c], used[r, c], group.rows[c]), allowed.any(0))
        one = slice(r, r + 1)
        for part, others, at in (
            (extents(group, one, everyone, mask=mask), range(R), lambda c: (0, c)),
            (extents(group, everyone, one, mask=mask), [r], lambda c: (slice(None), 0)),
        ):
            for c in others:
                whole = used[one, c] if len(others) == R else used[:, c]
                for mine, full, other in zip(np.atleast_2d(part[0][at(c)]), whole, range(R), strict=False):
                    if (other if len(others) < R else r) != c:
                        rows = rows_in(part[1][c if len(others) == R else 0], mine, group.rows[c])
                        assert np.array_equal(rows, rows_in(cells[c], full, group.rows[c]))
        alone = see(group, one, everyone, mask=mask)
        for mine, full in zip(alone.tables(alone.rows[None], alone.rows), tables[r * R : (r + 1) * R], strict=True):
            assert same(mine, full)


def rows_in(begins: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """Which rows of a shard are the first so many of its cells."""
    rows = np.zeros(size, bool)
    for begin, count in zip(begins.tolist(), counts.tolist(), strict=True):
        assert not rows[begin : begin + count].any() and begin + count <= size
        rows[begin : begin + count] = True
    return rows


def same(a: SegmentTable, b: SegmentTable) -> bool:
    names = ("query", "k_start", "k_len", "diagonal", "lower")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_tables_of_splits(mask: Mask) -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        for group in random_case(rng, longest=20, most=6).layout().groups:
            check_reach(group, mask)


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_tables_of_custom_layouts(mask: Mask) -> None:
    rng = np.random.default_rng(2)
    for _ in range(80):
        for group in random_custom_layout(rng).groups:
            check_reach(group, mask)


def test_the_general_path_finds_the_tables_of_the_splits() -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        case = random_case(rng, longest=20, most=6)
        layout = case.layout()
        spans = [
            np.stack(
                [np.take(g.members, g.spans.member), g.spans.document, g.spans.start, g.spans.length, g.spans.step], 1
            )
            for g in layout.groups
        ]
        lengths = [group.lengths for group in layout.groups]
        custom = Layout.from_spans(case.cp_groups, lengths, spans, is_packed=case.cu_seqlens is not None)
        assert str(custom) == str(layout)
        for mine, general in zip(layout.groups, custom.groups, strict=True):
            everyone = slice(0, len(mine.members))
            for mask in MASKS:
                fast, slow = (see(group, everyone, everyone, mask=mask) for group in (mine, general))
                both = [reach.tables(np.broadcast_to(reach.rows, reach.shape), reach.rows) for reach in (fast, slow)]
                assert all(same(*tables) for tables in zip(*both, strict=True))


def test_one_segment_a_span_and_owner_under_every_split() -> None:
    for split in SPLITS:
        group = Layout.build([9, 4, 7], [0] * 3, split=split, cu_seqlens=[0, 11, 12, 20]).groups[0]
        reach = see(group, slice(0, 3), slice(0, 3), mask=Mask.causal())
        pair = np.arange(9).repeat(np.diff(reach.bounds))
        assert len(np.unique(np.stack([pair, reach.query]), axis=1).T) == len(pair)


def test_unequal_steps_become_stairs() -> None:
    """Queries 0 2 4 6 on one pipeline, keys 1 3 5 7 and a lone run of step 1 on others."""
    layout = Layout.from_spans([0, 0], [[8]], [[(0, 0, 0, 4, 2), (1, 0, 1, 4, 2)]])
    reach = see(layout.groups[0], slice(0, 1), slice(1, 2), mask=Mask.causal())
    assert (reach.k_len.tolist(), reach.diagonal.tolist()) == ([3], [-1])
    layout = Layout.from_spans([0, 0], [[7]], [[(0, 0, 0, 3, 3), (1, 0, 1, 2, 1), (1, 0, 4, 2, 1)]])
    reach = see(layout.groups[0], slice(0, 1), slice(1, 2), mask=Mask.causal())  # sees 0, 2, 4 keys
    assert reach.k_len.sum() == 4 and (reach.query == 0).all()
    check_reach(layout.groups[0], Mask.causal())


def test_turns() -> None:
    """Each span has a first step that begins, a last one that ends, and those that name it in between."""
    rng = np.random.default_rng(5)
    spans, _ = varlen_tables(np.arange(7), np.arange(7), 6, mask=Mask.full())
    for steps in range(2, 5):
        for _ in range(30):
            named = rng.random((steps, 6)) < rng.random()
            tables = [SegmentTable(row.nonzero()[0], *np.zeros((3, row.sum()), np.int64)) for row in named]
            turns = take_turns(spans, tables)
            for span in range(6):
                mine = named[:, span].nonzero()[0].tolist() or [0]
                for number, turn in enumerate(turns):
                    assert turn is not None and turn.attends[span] == (number in mine)
                    if turn.attends[span]:
                        assert (turn.merges[span], turn.continues[span]) == (number != mine[0], number != mine[-1])
                    assert turn.covers[span] == (number in (mine[0], mine[-1]))
            assert any(turn is not None and turn.runs_on for turn in turns) == (named.sum(0) > 1).any()


def test_a_single_step_has_no_turn() -> None:
    spans, table = varlen_tables(np.arange(7), np.arange(7), 6, mask=Mask.full())
    assert take_turns(spans, [table]) == [None] and take_turns(spans, []) == []
