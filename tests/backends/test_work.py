"""Work lists: what the programs of the attention kernels are told."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from backends.tables import random_case
from hypothesis import given
from hypothesis import strategies as st

from hetu.backends.triton.work import (
    CONTINUES,
    KEY_FIELDS,
    KEYS_ONLY,
    MERGES,
    QUERIES,
    QUERY_FIELDS,
    VALUES_ONLY,
    Int32Array,
    WorkList,
    key_work,
    query_work,
)
from hetu.parallel.segments import QuerySpans, SegmentTable, Turn, take_turns, varlen_tables

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
    is_causal=st.booleans(),
    size=st.sampled_from([1, 4, 16, 64]),
    tail=st.integers(0, 20),
)


def pairs_of_queries(work: WorkList) -> Counter[tuple[int, int]]:
    """All (query row, key row) pairs that the programs of query rows compute."""
    found: Counter[tuple[int, int]] = Counter()
    for item, records in told(work, QUERY_FIELDS):
        for record in records:
            for i in range(item["rows"]):
                last = min(record["k_len"] - 1, record["reach"] + i)
                found.update((item["row"] + i, record["k_start"] + j) for j in range(last + 1))
    return found


def pairs_of_keys(work: WorkList) -> Counter[tuple[int, int]]:
    """All pairs that the programs of keys compute."""
    found: Counter[tuple[int, int]] = Counter()
    for item, records in told(work, KEY_FIELDS):
        for record in records:
            for j in range(item["rows"]):
                place = record["first"] + j
                if 0 <= place <= record["last_key"]:
                    sees = range(max(place - record["diagonal"], 0), record["length"])
                    found.update((record["start"] + i, item["k_row"] + j) for i in sees)
    return found


def pairs_of_table(spans: QuerySpans, table: SegmentTable) -> Counter[tuple[int, int]]:
    """The same by definition."""
    found: Counter[tuple[int, int]] = Counter()
    for query, k_start, k_len, diagonal in zip(*map(np.ndarray.tolist, columns(table)), strict=True):
        for i in range(int(spans.length[query])):
            found.update((int(spans.start[query]) + i, k_start + j) for j in range(min(k_len, i + diagonal + 1)))
    return found


def columns(table: SegmentTable) -> tuple[np.ndarray, ...]:
    return table.query, table.k_start, table.k_len, table.diagonal


def middle(spans: QuerySpans, table: SegmentTable) -> Turn:
    """Of a step between two others of the same table."""
    turn = take_turns(spans, [table] * 3)[1]
    assert turn is not None
    return turn


@cases
def test_programs_compute_every_pair_once(seed: int, lengths: list[int], is_causal: bool, size: int, tail: int) -> None:
    case = random_case(seed, lengths, is_causal=is_causal, num_steps=2, tail=tail)
    spans, table = case.spans, case.steps[0].table
    expected = pairs_of_table(spans, table)
    for turn in (None, middle(spans, table)):
        assert pairs_of_queries(query_work(spans, table, size, turn)) == expected
    assert pairs_of_keys(key_work(spans, table, size)) == expected


@cases
def test_blocks_of_query_rows(seed: int, lengths: list[int], is_causal: bool, size: int, tail: int) -> None:
    case = random_case(seed, lengths, is_causal=is_causal, num_steps=2, tail=tail)
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
def test_roles_of_steps(seed: int, lengths: list[int], is_causal: bool, size: int, tail: int) -> None:
    """All rows of a span are listed where it begins and where it ends, and programs know which that is."""
    case = random_case(seed, lengths, is_causal=is_causal, num_steps=3, tail=tail)
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
def test_blocks_of_keys(seed: int, lengths: list[int], is_causal: bool, size: int, tail: int) -> None:
    case = random_case(seed, lengths, is_causal=is_causal, num_steps=2, tail=tail)
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
            for name in ("start", "length", "document", "position", "step", "slot", "slot_row"):
                assert record[name] == getattr(spans, name)[span], name


@pytest.mark.parametrize("make", [lambda *t: query_work(*t, 4), lambda *t: key_work(*t, 4)])
def test_a_document_stays_together_and_long_ones_come_first(make: object) -> None:
    lengths = [5, 40, 0, 17, 40, 8]
    cu_seqlens = np.cumsum([0, *lengths])
    spans, table = varlen_tables(cu_seqlens, cu_seqlens, int(cu_seqlens[-1]) + 3, True)
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


def test_work_of_nothing() -> None:
    spans, table = varlen_tables(np.array([0]), np.array([0]), 0, True)
    assert query_work(spans, table, 64).records().shape == (0, 16)
    spans, table = varlen_tables(np.array([0, 0]), np.array([0, 4]), 3, True)
    assert len(key_work(spans, table, 16).items) == 0
    assert len(key_work(spans, table, 16).joined(query_work(spans, table, 16)).items) == 1
    assert len(query_work(spans, table, 16, middle(spans, table)).items) == 0


def test_overlapping_segments_share_blocks_of_keys() -> None:
    spans, _ = varlen_tables(np.array([0, 3, 6]), np.array([0, 3, 6]), 6, True)
    table = SegmentTable(*(np.array(x) for x in ([0, 1, 1], [2, 2, 9], [3, 6, 2], [2, 5, 1])))
    found = {
        (item["k_row"], item["rows"]): len(records) for item, records in told(key_work(spans, table, 4), KEY_FIELDS)
    }
    assert found == {(2, 4): 2, (6, 2): 1, (9, 2): 1}
