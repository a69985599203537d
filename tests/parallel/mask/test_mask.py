"""Masks as values, each against its definition written once more in the tests."""

from __future__ import annotations

import numpy as np
import pytest
from support.layout_cases import DEFINITIONS, MASKS

from hetu.parallel import Mask

LENGTH = 7


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_what_it_says_is_what_its_definition_says(mask: Mask) -> None:
    query, key = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    wanted = DEFINITIONS[mask](query, key)
    assert np.array_equal(np.broadcast_to(mask.allows(query, key), wanted.shape), wanted)
    assert np.array_equal(np.broadcast_to(mask.keys_seen(query[:, 0], np.full(LENGTH, LENGTH)), LENGTH), wanted.sum(1))


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_the_first_row_that_sees_a_key(mask: Mask, step: int) -> None:
    for start in range(LENGTH):
        rows = start + step * np.arange(2 * LENGTH)
        for key in range(LENGTH):
            found = int(mask.first_row(np.array(key), np.array(start), np.array(step)))
            sees = DEFINITIONS[mask](rows, key)
            assert not sees[:found].any() and sees[found:].all()


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_diagonals_are_aligned_to_the_bottom_right(mask: Mask) -> None:
    for n in range(1, 6):
        for m in range(6):
            i, j = np.arange(n)[:, None], np.arange(m)
            seen = i + int(mask.diagonal(np.array(n), np.array(m))) >= j
            assert np.array_equal(seen, np.broadcast_to(DEFINITIONS[mask](i + m - n, j), seen.shape))


def test_they_compare_hash_and_print_by_value() -> None:
    assert Mask.of(is_causal=True) == Mask.causal() != Mask.full() == Mask.of(is_causal=False)
    assert len({*MASKS, *MASKS, Mask.causal()}) == len(MASKS)
    assert [str(mask) for mask in (Mask.causal(), Mask.full())] == ["causal", "full"]
    assert [repr(mask) for mask in (Mask.causal(), Mask.full())] == ["Mask.causal()", "Mask.full()"]
