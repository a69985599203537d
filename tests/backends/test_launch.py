"""The host side of the Triton backend: work lists and tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backends.tables import random_case
from hypothesis import given
from hypothesis import strategies as st

from hetu.backends.triton import Tile, Variant, tile, variants, work_list
from hetu.backends.triton.variants import DTYPES, HEAD_DIMS, INTERPRETER
from hetu.parallel.segments import varlen_tables


@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(0, 40), max_size=4),
    is_causal=st.booleans(),
    block_m=st.sampled_from([1, 4, 16, 64]),
    tail=st.integers(0, 20),
)
def test_work_list(seed: int, lengths: list[int], is_causal: bool, block_m: int, tail: int) -> None:
    case = random_case(seed, lengths, is_causal=is_causal, num_steps=2, tail=tail)
    spans, table = case.spans, case.steps[0].table
    items = work_list(spans, table, block_m, cover=True)
    assert items.dtype == np.int32 and items.shape[1] == 4
    rows = sorted(
        (span, offset + i)
        for span, offset, _, _ in items.tolist()
        for i in range(min(block_m, int(spans.length[span]) - offset))
    )
    assert rows == [(span, i) for span, length in enumerate(spans.length.tolist()) for i in range(length)]
    weights = []
    for span, offset, begin, end in items.tolist():
        assert np.flatnonzero(table.query == span).tolist() == list(range(begin, end))
        last = min(offset + block_m, int(spans.length[span])) - 1
        weights.append(
            sum(min(max(last + int(table.diagonal[s]) + 1, 0), int(table.k_len[s])) for s in range(begin, end))
        )
    assert weights == sorted(weights, reverse=True)
    working = work_list(spans, table, block_m, cover=False)
    assert np.array_equal(working, items[: np.count_nonzero(weights)])


def test_work_list_of_nothing() -> None:
    spans, table = varlen_tables(np.array([0]), np.array([0]), 0, True)
    assert work_list(spans, table, 64, cover=True).shape == (0, 4)


def test_tables_are_put_on_the_device_once() -> None:
    from hetu.backends.triton.launch import items_on, segments_on, spans_on

    spans, table = varlen_tables(np.array([0, 9]), np.array([0, 9]), 9, True)
    cpu = torch.device("cpu")
    assert items_on(spans, table, 4, True, cpu) is items_on(spans, table, 4, True, cpu)
    assert items_on(spans, table, 4, True, cpu) is not items_on(spans, table, 8, True, cpu)
    assert spans_on(spans, cpu) is spans_on(spans, cpu) and segments_on(table, cpu) is segments_on(table, cpu)


@pytest.mark.parametrize("capability", [INTERPRETER, 80, 86, 90, 100])
def test_tiles_are_what_triton_takes(capability: int) -> None:
    for variant in variants():
        shape = tile(variant, capability)
        for size in (shape.block_m, shape.block_n):
            assert size >= 16 and size & (size - 1) == 0, "dots take powers of two from 16 on"
        assert shape.num_warps in (1, 2, 4, 8) and shape.num_stages >= 1
        assert variant.head_dim <= variant.block_d and variant.block_d & (variant.block_d - 1) == 0


def test_tiles_that_were_tuned() -> None:
    assert tile(Variant(64, torch.bfloat16), 80) == Tile(128, 64, 8, 3)
    assert tile(Variant(128, torch.bfloat16), 80) == Tile(128, 32, 8, 3)
    assert tile(Variant(128, torch.float16), 90) == Tile(128, 64, 8, 2)
    assert tile(Variant(128, torch.float16, dropout=True), 90) == Tile(128, 32, 8, 2)


def test_variants_are_all_there() -> None:
    every = list(variants())
    assert len(set(every)) == len(every) == len(HEAD_DIMS) * len(DTYPES) * 16
