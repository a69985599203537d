"""Work lists: what the programs of the attention kernels are told."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layout_cases import MASKS
from support.tables_by_definition import random_case

from hetu.backends.attention.records import (
    CONTINUES,
    KEY_FIELDS,
    KEYS_ONLY,
    MERGES,
    QUERIES,
    QUERY_FIELDS,
    VALUES_ONLY,
    Int32Array,
    WorkList,
)
from hetu.backends.attention.work import key_work, query_work
from hetu.parallel import Mask
from hetu.parallel.mask.segments import QuerySpans, SegmentTable, Turn, take_turns
from hetu.parallel.mask.varlen import varlen_tables

Record = dict[str, int]


def told(work: WorkList, fields: tuple[str, ...]) -> list[tuple[Record, list[Record]]]:
    """Each item, and all records that its program reads, as the kernels find them."""
    records = work.records()

    def named(row: Int32Array) -> Record:
        return dict(zip(fields, row.tolist(), strict=True))

    items = [named(row) for row in records[: len(work.items)]]
    if len(work.further):
        assert len(records) == len(work.items) + len(work.further) + 1, "the row after the last one is read too"
        return [(item, [item, *map(named, records[item["more_begin"] : item["more_end"]])]) for item in items]
    return [(item, [item]) for item in items]


cases = given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(0, 40), max_size=4),
    mask=st.sampled_from(MASKS),
    size=st.sampled_from([1, 4, 16, 64]),
    tail=st.integers(0, 20),
    windows=st.booleans(),
)


def pairs_of_queries(work: WorkList, has_lower: bool = False) -> Counter[tuple[int, int]]:
    """All (query row, key row) pairs that the programs of query rows compute."""
    found: Counter[tuple[int, int]] = Counter()
    for item, records in told(work, QUERY_FIELDS):
        for record in records:
            for i in range(item["rows"]):
                sees = range(
                    max(record["low"] + i if has_lower else 0, 0), min(record["k_len"], record["reach"] + i + 1)
                )
                found.update((item["row"] + i, record["k_start"] + j) for j in sees)
    return found


def pairs_of_keys(work: WorkList, has_lower: bool = False) -> Counter[tuple[int, int]]:
    """All pairs that the programs of keys compute."""
    found: Counter[tuple[int, int]] = Counter()
    for item, records in told(work, KEY_FIELDS):
        for record in records:
            for j in range(item["rows"]):
                place = record["first"] + j
                if 0 <= place <= record["last_key"]:
                    past = place - record["lower"] + 1 if has_lower else record["length"]
                    sees = range(max(place - record["diagonal"], 0), min(record["length"], past))
                    found.update((record["start"] + i, item["k_row"] + j) for i in sees)
    return found


def pairs_of_table(spans: QuerySpans, table: SegmentTable) -> Counter[tuple[int, int]]:
    """The same by definition."""
    found: Counter[tuple[int, int]] = Counter()
    of_segments = zip(*map(np.ndarray.tolist, (*columns(table), table.lower_over(spans))), strict=True)
    for query, k_start, k_len, diagonal, lower in of_segments:
        for i in range(int(spans.length[query])):
            sees = range(max(i + lower, 0), min(k_len, i + diagonal + 1))
            found.update((int(spans.start[query]) + i, k_start + j) for j in sees)
    return found


def columns(table: SegmentTable) -> tuple[np.ndarray, ...]:
    return table.query, table.k_start, table.k_len, table.diagonal


def middle(spans: QuerySpans, table: SegmentTable) -> Turn:
    """Of a step between two others of the same table."""
    turn = take_turns(spans, [table] * 3)[1]
    assert turn is not None
    return turn


@cases
def test_programs_compute_every_pair_once(
    seed: int, lengths: list[int], mask: Mask, size: int, tail: int, windows: bool
) -> None:
    case = random_case(seed, lengths, is_causal=mask.hides_later, num_steps=2, tail=tail, has_windows=windows)
    spans, table = case.spans, case.steps[0].table
    expected = pairs_of_table(spans, table)
    for turn in (None, middle(spans, table)):
        assert pairs_of_queries(query_work(spans, table, size, turn), windows) == expected
    assert pairs_of_keys(key_work(spans, table, size), windows) == expected


@cases
def test_no_tile_is_visited_only_to_be_hidden(
    seed: int, lengths: list[int], mask: Mask, size: int, tail: int, windows: bool
) -> None:
    """Whatever the sides of tiles: each block of keys that a program of rows loads has a pair, and the other way."""
    case = random_case(seed, lengths, is_causal=mask.hides_later, num_steps=2, tail=tail, has_windows=windows)
    spans, table = case.spans, case.steps[0].table
    pairs = pairs_of_table(spans, table)
    for item, records in told(query_work(spans, table, size), QUERY_FIELDS):
        rows = range(item["row"], item["row"] + item["rows"])
        for record in records:
            end = min(record["k_len"], record["reach"] + item["rows"])
            for begin in range(0, end, size):
                keys = range(record["k_start"] + begin, record["k_start"] + min(begin + size, end))
                assert any((row, key) in pairs for row in rows for key in keys)
    for item, records in told(key_work(spans, table, size), KEY_FIELDS):
        keys = range(item["k_row"], item["k_row"] + item["rows"])
        for record in records:
            first = max(max(record["first"], 0) - record["diagonal"], 0) // size * size
            assert first < record["length"]
            for begin in range(first, record["length"], size):
                rows = range(begin, min(begin + size, record["length"]))
                assert any((record["start"] + row, key) in pairs for row in rows for key in keys)


@cases
def test_blocks_of_query_rows(seed: int, lengths: list[int], mask: Mask, size: int, tail: int, windows: bool) -> None:
    case = random_case(seed, lengths, is_causal=mask.hides_later, num_steps=2, tail=tail, has_windows=windows)
    spans, table = case.spans, case.steps[0].table
    items = [item for item, _ in told(query_work(spans, table, size), QUERY_FIELDS)]
    rows = sorted(item["row"] + i for item in items for i in range(item["rows"]))
    assert rows == list(range(int(spans.length.sum()))), "every row is some program's"
    for item in items:
        span = int(np.searchsorted(spans.start, item["row"], "right")) - 1
        offset = item["row"] - int(spans.start[span])
        assert 0 < item["rows"] <= size and offset % size == 0
        assert item["document"] == spans.document[span] and item["step"] == spans.step[span]
        assert item["position"] == spans.position[span] + offset * spans.step[span]
        assert item["slot"] == spans.slot[span] and item["slot_row"] == spans.slot_row[span] + offset
        assert item["column"] == spans.column[span] and item["role"] == 0
    working = [item for item, _ in told(query_work(spans, table, size, middle(spans, table)), QUERY_FIELDS)]
    seeing = {item["row"] for item in working}
    assert all(item["k_len"] > 0 for item in working)
    assert {row for row, _ in pairs_of_table(spans, table)} <= {
        item["row"] + i for item in working for i in range(item["rows"])
    }
    assert seeing <= {item["row"] for item in items}


@cases
def test_roles_of_steps(seed: int, lengths: list[int], mask: Mask, size: int, tail: int, windows: bool) -> None:
    """All rows of a span are listed where it begins and where it ends, and programs know which that is."""
    case = random_case(seed, lengths, is_causal=mask.hides_later, num_steps=3, tail=tail, has_windows=windows)
    spans = case.spans
    begun, ended = np.zeros(case.rows, int), np.zeros(case.rows, int)
    for step, turn in zip(case.steps, case.turns, strict=True):
        assert turn is not None
        for item, _ in told(query_work(spans, step.table, size, turn), QUERY_FIELDS):
            rows = slice(item["row"], item["row"] + item["rows"])
            assert item["role"] & 3 == QUERIES
            assert (begun[rows] == bool(item["role"] & MERGES)).all() and not ended[rows].any()
            begun[rows], ended[rows] = 1, not item["role"] & CONTINUES
    assert begun.all() and ended.all()


@cases
def test_blocks_of_keys(seed: int, lengths: list[int], mask: Mask, size: int, tail: int, windows: bool) -> None:
    case = random_case(seed, lengths, is_causal=mask.hides_later, num_steps=2, tail=tail, has_windows=windows)
    spans, table = case.spans, case.steps[0].table
    work = told(key_work(spans, table, size), KEY_FIELDS)
    rows = sorted(item["k_row"] + j for item, _ in work for j in range(item["rows"]))
    named = {
        row for start, count in zip(table.k_start, table.k_len, strict=True) for row in range(start, start + count)
    }
    assert rows == sorted(named), "every key that a segment names is in one block"
    for item, records in work:
        assert 0 < item["rows"] <= size and item["role"] == 1
        meets = (table.k_start < item["k_row"] + item["rows"]) & (table.k_start + table.k_len > item["k_row"])
        assert len(records) == np.count_nonzero(meets)
        for record in records:
            span = int(np.searchsorted(spans.start, record["start"], "right")) - 1
            assert record["length"] == spans.length[span] or (windows and 0 < record["length"] < spans.length[span])
            for name in ("start", "document", "position", "step", "slot", "slot_row"):
                assert record[name] == getattr(spans, name)[span], name


@pytest.mark.parametrize("make", [lambda *t: query_work(*t, 4), lambda *t: key_work(*t, 4)])
def test_a_document_stays_together_and_long_ones_come_first(make: object) -> None:
    lengths = [5, 40, 0, 17, 40, 8]
    cu_seqlens = np.cumsum([0, *lengths])
    spans, table = varlen_tables(cu_seqlens, cu_seqlens, int(cu_seqlens[-1]) + 3, Mask.causal())
    work = make(spans, table)  # type: ignore[operator]
    fields = QUERY_FIELDS if work.items[0, -1] == 0 else KEY_FIELDS
    documents = [item["document"] for item, _ in told(work, fields)]
    runs = [document for document, after in pairwise([*documents, None]) if document != after]
    assert runs == [1, 4, 3, 5, 0, -1][: len(runs)] and len(runs) >= 5


def test_both_kinds_joined() -> None:
    case = random_case(3, [30, 0, 21, 9], is_causal=True, num_steps=1, tail=4)
    spans, table = case.spans, case.steps[0].table
    keys, queries = key_work(spans, table, 4), query_work(spans, table, 8)
    assert len(keys.further) and len(queries.further), "the case shows nothing"
    both = keys.with_roles(KEYS_ONLY, VALUES_ONLY).joined(queries)
    records = both.records()
    roles = Counter(records[: len(both.items), -1].tolist())
    assert roles == {0: len(queries.items), KEYS_ONLY: len(keys.items), VALUES_ONLY: len(keys.items)}
    assert np.all(np.diff(both.documents) >= 0)

    def reads(work: WorkList, role: int) -> list[list[list[int]]]:
        """What the programs of a role read, without the places of the further records."""
        of_role = [row for row in work.records()[: len(work.items)].tolist() if row[-1] == role]
        more = work.records().tolist() if len(work.further) else []
        plain = [[row, *more[row[13] : row[14]]] for row in of_role]
        return sorted([record[:13] for record in records] for records in plain)

    assert reads(both, 0) == reads(queries, 0)
    assert reads(both, KEYS_ONLY) == reads(both, VALUES_ONLY) == reads(keys, 1)


def places(spans: QuerySpans, table: SegmentTable) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """For each span what it is sorted by, the first two of which are its document's, and its segments."""
    segments = [np.flatnonzero(table.query == span).tolist() for span in range(len(spans))]
    most = np.minimum(table.k_len, table.diagonal - table.lower_over(spans) + 1)  # keys that a row sees
    keys = [sum(most[own].tolist()) for own in segments]
    document = spans.document.tolist()
    most = {d: max(k for k, other in zip(keys, document, strict=True) if other == d) for d in document}
    return [(-most[d], d, -k, span) for span, (d, k) in enumerate(zip(document, keys, strict=True))], segments


def queries_by_definition(
    spans: QuerySpans, table: SegmentTable, tokens: int, turn: Turn | None
) -> list[tuple[list[int], list[list[int]]]]:
    """Fields of each item but those of its segment, and its segments, one after the other in plain Python."""
    found = []
    lower = table.lower_over(spans)
    place, segments = places(spans, table)
    for *_, span in sorted(place):
        for offset in reversed(range(0, int(spans.length[span]), tokens)):
            rows = min(tokens, int(spans.length[span]) - offset)
            first = {s: offset + lower[s] for s in segments[span]}  # key that the block's first row may see
            seen = [
                s for s in segments[span] if offset + rows - 1 + table.diagonal[s] >= 0 and first[s] < table.k_len[s]
            ]
            if turn is not None and not seen and not turn.covers[span]:
                continue
            role = QUERIES if turn is None else MERGES * turn.merges[span] + CONTINUES * turn.continues[span]
            moved = (offset, None, 0, offset * spans.step[span], 0, 0, offset, 0)
            names = ("start", "length", "document", "position", "step", "slot", "slot_row", "column")
            fields = [getattr(spans, name)[span] + by for name, by in zip(names, moved, strict=True) if by is not None]
            own = []
            for s in seen:
                cut = max(first[s], 0)
                low = 0 if table.lower is None else first[s] - cut
                own.append([table.k_start[s] + cut, table.k_len[s] - cut, offset + table.diagonal[s] - cut, low])
            found.append(([*fields[:1], rows, *fields[1:], role], own or [[0, 0, 0, 0]]))
    return found


def keys_by_definition(spans: QuerySpans, table: SegmentTable, block_n: int) -> list[tuple[list[int], list[list[int]]]]:
    """The same of key blocks."""
    regions: list[list[int]] = []
    for start, length in sorted(zip(table.k_start.tolist(), table.k_len.tolist(), strict=True)):
        if not regions or start >= regions[-1][1]:
            regions.append([start, start])
        regions[-1][1] = max(regions[-1][1], start + length)
    place, _ = places(spans, table)
    found = []
    blocks = [(start, stop) for begin, stop in regions for start in range(begin, stop, block_n)]
    for number, (start, end) in enumerate(blocks):
        rows, records, weight = min(block_n, end - start), [], 0
        named = [
            s for s in range(len(table))
            if table.k_start[s] < start + rows and start < table.k_start[s] + table.k_len[s]
        ]  # fmt: skip
        for s in named:
            span, first = table.query[s], start - table.k_start[s]
            names = ("start", "length", "document", "position", "step", "slot", "slot_row")
            of_span = [getattr(spans, name)[span] for name in names]
            if table.lower is not None:  # without the rows that are past the block's keys
                of_span[1] = min(of_span[1], min(first + rows, table.k_len[s]) - table.lower[s])
            diagonals = [table.diagonal[s], 0 if table.lower is None else table.lower[s]]
            records.append([*of_span, first, table.k_len[s] - 1, *diagonals])
            weight += max(of_span[1] - max(max(first, 0) - table.diagonal[s], 0), 0)
        found.append((place[table.query[named[0]]][:2], -weight, number, [start, rows, 1], records))
    return [(head, records) for *_, head, records in sorted(found)]


def parts(work: WorkList, segment: slice) -> list[tuple[list[int], list[list[int]]]]:
    """A work list as the definitions give it."""
    found = []
    for item, records in told(work, QUERY_FIELDS if segment.start == 8 else KEY_FIELDS):
        values = list(item.values())
        assert item.get("", 0) == 0
        own = [list(record.values())[segment] for record in records]
        found.append(([*values[: segment.start], values[-1]], own))
    return found


@cases
def test_lists_are_in_the_order_of_their_definition(
    seed: int, lengths: list[int], mask: Mask, size: int, tail: int, windows: bool
) -> None:
    """All records and their order, for tables of several steps."""
    case = random_case(
        seed, lengths, is_causal=mask.hides_later, num_steps=1 + seed % 3, tail=tail, has_windows=windows
    )
    tables = [step.table for step in case.steps]
    for table, turn in zip(tables, take_turns(case.spans, tables), strict=True):
        for own in (turn, None):
            got = parts(query_work(case.spans, table, size, own), slice(8, 12))
            assert got == queries_by_definition(case.spans, table, size, own)
        assert parts(key_work(case.spans, table, size), slice(2, 13)) == keys_by_definition(case.spans, table, size)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=8),
    is_self=st.booleans(),
    mask=st.sampled_from(MASKS),
    size=st.sampled_from([1, 16, 64]),
    tail=st.sampled_from([0, 0, 5]),
    which=st.integers(0, 255),
)
def test_lists_of_plain_attention_are_in_the_same_order(
    lengths: list[tuple[int, int]], is_self: bool, mask: Mask, size: int, tail: int, which: int
) -> None:
    """They are made in a shorter way where each span has one segment and none shares its keys."""
    cu_q, cu_k = (np.cumsum([0, *side]) for side in ([n for n, _ in lengths], [m for _, m in lengths]))
    spans, table = varlen_tables(cu_q, cu_q if is_self else cu_k, int(cu_q[-1]) + tail, mask)
    is_early = (which >> table.query % 8) % 2 == 1
    columns = (table.query, table.k_start, table.k_len, table.diagonal)
    both = [SegmentTable(*(column[own] for column in columns)) for own in (is_early, ~is_early)]
    for one, turn in [(table, None), *zip(both, take_turns(spans, both), strict=True)]:
        assert parts(query_work(spans, one, size, turn), slice(8, 12)) == queries_by_definition(spans, one, size, turn)
        assert parts(key_work(spans, one, size), slice(2, 13)) == keys_by_definition(spans, one, size)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=12),
    is_self=st.booleans(),
    mask=st.sampled_from(MASKS),
    packed=st.booleans(),
    size=st.sampled_from([1, 16, 64]),
    tail=st.sampled_from([0, 0, 0, 5]),
)
def test_plain_tables_are_cut_as_any_other(
    lengths: list[tuple[int, int]], is_self: bool, mask: Mask, packed: bool, size: int, tail: int
) -> None:
    """The short way gives the records of the long one, to the bit, and their documents."""
    cu_q, cu_k = (np.cumsum([0, *side]) for side in ([n for n, _ in lengths], [m for _, m in lengths]))
    spans, table = varlen_tables(cu_q, cu_q if is_self else cu_k, int(cu_q[-1]) + tail, mask, packed)
    other = SegmentTable(*columns(table), table.lower)
    assert not other.is_plain_over(spans)
    for cut in (query_work, key_work):
        short, long = cut(spans, table, size), cut(spans, other, size)
        assert np.array_equal(short.records(), long.records()) and short.records().dtype == np.int32
        assert np.array_equal(short.documents, long.documents)
        assert short.records().flags.c_contiguous


def test_a_ranking_is_of_its_own_spans() -> None:
    """One table over other spans is ranked anew."""
    spans, table = varlen_tables(np.array([0, 5, 10]), np.array([0, 5, 10]), 10, Mask.causal())
    query_work(spans, table, 4)
    columns = [item.name for item in fields(spans) if item.repr]
    other = QuerySpans(*(getattr(spans, name)[[1, 0]] for name in columns))
    assert parts(query_work(other, table, 4), slice(8, 12)) == queries_by_definition(other, table, 4, None)


def test_work_of_nothing() -> None:
    spans, table = varlen_tables(np.array([0]), np.array([0]), 0, Mask.causal())
    assert query_work(spans, table, 64).records().shape == (0, 16)
    spans, table = varlen_tables(np.array([0, 0]), np.array([0, 4]), 3, Mask.causal())
    assert len(key_work(spans, table, 16).items) == 0
    assert len(key_work(spans, table, 16).joined(query_work(spans, table, 16)).items) == 1
    assert len(query_work(spans, table, 16, middle(spans, table)).items) == 0


def test_overlapping_segments_share_blocks_of_keys() -> None:
    spans, _ = varlen_tables(np.array([0, 3, 6]), np.array([0, 3, 6]), 6, Mask.causal())
    table = SegmentTable(*(np.array(x) for x in ([0, 1, 1], [2, 2, 9], [3, 6, 2], [2, 5, 1])))
    found = {
        (item["k_row"], item["rows"]): len(records) for item, records in told(key_work(spans, table, 4), KEY_FIELDS)
    }
    assert found == {(2, 4): 2, (6, 2): 1, (9, 2): 1}
