"""Masks as values, each against its definition written once more in the tests."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
from support.layout_cases import DEFINITIONS, MASKS

import hetu
from hetu.parallel import Mask
from hetu.parallel.mask.bands import Bands


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_masks_are_aligned_to_the_bottom_right(mask: Mask) -> None:
    for n, m in itertools.product(range(9), range(9)):
        query, key = np.arange(n)[:, None] + m - n, np.arange(m)
        wanted = np.broadcast_to(DEFINITIONS[mask](query, key), (n, m)) & (key >= 0)
        assert np.array_equal(mask.matrix(n, m), wanted), (n, m)


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_pairs_are_those_of_the_matrix(mask: Mask) -> None:
    lengths = np.array([0, 1, 7, 12, 3])
    assert mask.pairs(lengths).tolist() == [int(mask.matrix(n, n).sum()) for n in lengths.tolist()]


def test_pairs_of_long_documents_are_exact() -> None:
    n = 2**31 - 1  # whose pairs have more than the 53 bits of a float
    assert hetu.Mask.causal().pairs(np.array([n, 3])).tolist() == [n * (n + 1) // 2, 6]
    assert hetu.Mask.full().pairs(np.array([n, 3])).tolist() == [n * n, 9]


def test_they_compare_hash_and_print_by_value() -> None:
    assert Mask.of(is_causal=True) == Mask.causal() == Mask.window(-1, 0) != Mask.full() == Mask.of(is_causal=False)
    assert Mask.window(-1, -1) == Mask.full() and Mask.of(True, (4, 2)) == Mask.window(4, 0)
    assert len({*MASKS, *MASKS, Mask.causal(), Mask.window(np.int32(2), 0)}) == len(MASKS)
    assert [mask.name for mask in (Mask.causal(), Mask.full(), Mask.window(2, 1))] == ["causal", "full", "window(2, 1)"]
    slices = Mask.slices([(0, 2), (2, 4)], [(0, 2), (0, 4)], ["causal", "full"])
    for mask in (*MASKS, slices, Mask.prefix([3, 0])):
        assert eval(repr(mask), {"Mask": Mask}) == mask
        assert str(mask).startswith(repr(mask) + "\n")


# Slices


def slice_by_definition(q: tuple[int, int], k: tuple[int, int], kind: str, size: int) -> np.ndarray:
    """A slice as MagiAttention means it: causal ones end at the lower right, inverse ones begin at the upper left."""
    seen = np.zeros((size, size), bool)
    for i in range(*q):
        for j in range(*k):
            before_end = (j - (k[1] - 1)) <= (i - (q[1] - 1))
            after_begin = (j - k[0]) >= (i - q[0])
            seen[i, j] = (before_end or "causal" != kind != "bicausal") and (
                after_begin or "inverse_causal" != kind != "bicausal"
            )
    return seen


def test_slices_mean_what_magi_attention_means() -> None:
    ranges = [(0, 0), (0, 4), (2, 5), (1, 8)]
    for q, k, kind in itertools.product(ranges, ranges, ("full", "causal", "inverse_causal", "bicausal")):
        assert np.array_equal(Mask.slices([q], [k], [kind]).matrix(8, 8), slice_by_definition(q, k, kind, 8)), (
            q,
            k,
            kind,
        )


def test_slices_that_share_a_pair_are_refused_and_no_others() -> None:
    rng, refused = np.random.default_rng(0), 0
    kinds = ("full", "causal", "inverse_causal", "bicausal")
    for _ in range(400):
        q, k = ([tuple(sorted(rng.integers(0, 9, 2).tolist())) for _ in range(3)] for _ in range(2))
        chosen = [kinds[i] for i in rng.integers(0, 4, 3)]
        parts = [slice_by_definition(*item, 8) for item in zip(q, k, chosen, strict=True)]
        if sum(part.astype(int) for part in parts).max() > 1:
            refused += 1
            with pytest.raises(hetu.HetuError, match="two slices let one query see one key"):
                Mask.slices(q, k, chosen)
        else:
            assert np.array_equal(Mask.slices(q, k, chosen).matrix(8, 8), np.logical_or.reduce(parts))
    assert 50 < refused < 350


def test_the_slices_that_share_a_pair_are_named_by_their_places() -> None:
    q_ranges, k_ranges = [(0, 0), (4, 6), (0, 2), (5, 6)], [(0, 0), (0, 6), (0, 2), (3, 4)]
    with pytest.raises(hetu.HetuError, match=r"one key: slices 1 and 3"):
        Mask.slices(q_ranges, k_ranges, ["full", "causal", "full", "causal"])


def test_slices_count_pairs_by_the_document_of_the_query() -> None:
    mask = Mask.slices([(0, 5), (3, 7)], [(0, 5), (5, 7)], ["causal", "full"])
    rows = mask.matrix(7, 7).sum(1)
    assert mask.pairs(np.array([2, 0, 4, 1])).tolist() == [rows[:2].sum(), 0, rows[2:6].sum(), rows[6:].sum()]


# Symbols


def test_symbols_are_bound_later() -> None:
    w, s = hetu.IntSymbol("w"), hetu.IntSymbol("s")
    mask = Mask.window(2 * w, s)
    assert set(mask.symbols) == {w, s} and str(mask) == repr(mask)
    assert mask.bound(lambda size: size.evaluate({w: 2, s: 1})) == Mask.window(4, 1)
    with pytest.raises(hetu.HetuError, match="has no value for"):
        mask.matrix(4, 4)
    for given in (Mask.chunked(w), Mask.prefix(w), Mask.prefix([1, w]), Mask.slices([(0, w)], [(0, 4)], ["full"])):
        assert given.symbols == (w,)
        assert not given.bound(lambda size: size.evaluate({w: 3})).symbols
    with pytest.raises(hetu.HetuError, match="size of a chunk is 0"):
        Mask.chunked(w - 3).bound(lambda size: size.evaluate({w: 3}))


def test_errors_say_what_to_do() -> None:
    with pytest.raises(hetu.HetuError, match=r"(?s)expected rule to be a rule, got 'causal'.*hetu.Mask.causal\(\)"):
        Mask("causal")  # type: ignore[arg-type]
    with pytest.raises(
        hetu.HetuError, match=r"(?s)q_ranges\[0\] to be \(start, stop\), got 0.*give the first position"
    ):
        Mask.slices([0, 4], [(0, 4)], ["full"])  # type: ignore[list-item]
    with pytest.raises(hetu.HetuError, match=r"expected mask to be a hetu\.Mask, got 'causal'"):
        hetu.Layout.build([2, 2], [0, 0]).draw("causal")  # type: ignore[arg-type]


# Refusals


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Mask.window(-2, 0), "left bound is -2"),
        (lambda: Mask.window(0, -3), "right bound is -3"),
        (lambda: Mask.window(True, 0), "left to be an int or an IntSymbol"),
        (lambda: Mask.window(1.0, 0), "left to be an int or an IntSymbol"),
        (lambda: Mask.chunked(0), "size of a chunk is 0"),
        (lambda: Mask.prefix(-1), "lengths is -1"),
        (lambda: Mask.prefix([1, -1]), "lengths[1] is -1"),
        (lambda: Mask.prefix("3"), "lengths"),
        (lambda: Mask.slices([(0, 2)], [(0, 2)], ["diagonal"]), "kinds"),
        (lambda: Mask.slices([(0, 2)], [(0, 2), (2, 3)], ["full"]), "1 q_ranges, 2 k_ranges and 1 kinds"),
        (lambda: Mask.slices([(2, 0)], [(0, 2)], ["full"]), "queries end at 0, before they begin at 2"),
        (lambda: Mask.slices([(0, 2, 3)], [(0, 2)], ["full"]), "q_ranges"),
        (lambda: Mask.slices([(-1, 2)], [(0, 2)], ["full"]), "bound is -1"),
        (lambda: Mask.slices([(0, 2)], [(0, 5)], ["full"]).matrix(4, 4), "reach to position 5 of the keys"),
        (lambda: Mask.prefix([1, 2]).matrix(4, 4), "prefixes of 2 documents, but there are 1"),
    ],
)
def test_what_is_no_mask_is_refused_with_the_users_line(make: object, what: str) -> None:
    with pytest.raises(hetu.HetuError) as caught:
        make()  # type: ignore[operator]
    assert what in str(caught.value) and "test_mask.py" in str(caught.value) and "fix:" in str(caught.value)


# Bands


def test_bands_are_tight_and_count_their_pairs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        q, k = (np.sort(rng.integers(0, 9, (2, 4)), axis=0) for _ in range(2))
        lower, upper = np.sort(rng.integers(-10, 11, (2, 4)), axis=0)
        apart = np.arange(9) - np.arange(9)[:, None]
        bands = Bands.of(np.arange(4), tuple(q), tuple(k), lower, upper)
        for i in range(4):
            inside = np.zeros((9, 9), bool)
            inside[q[0, i] : q[1, i], k[0, i] : k[1, i]] = True
            wanted, place = inside & (lower[i] <= apart) & (apart <= upper[i]), np.flatnonzero(bands.sequence == i)
            assert len(place) == wanted.any()
            if len(place):
                (at,) = place
                one = Bands(*(getattr(bands, field.name)[at : at + 1] for field in dataclasses.fields(Bands)))
                assert np.array_equal(one.matrix(9, 9), wanted) and bands.pairs()[at] == wanted.sum()
                rows, columns = wanted.nonzero()
                assert (rows.min(), rows.max() + 1) == (bands.q_start[at], bands.q_stop[at])
                assert (columns.min(), columns.max() + 1) == (bands.k_start[at], bands.k_stop[at])


# Drawing


def test_a_drawing_of_many_tokens_shows_what_is_whole_and_what_is_not() -> None:
    for mask in MASKS:
        matrix, lines = mask.matrix(50, 50), mask.draw(50, width=10).splitlines()
        for i, j in itertools.product(range(10), range(10)):
            cell = matrix[5 * i : 5 * i + 5, 5 * j : 5 * j + 5]
            assert lines[i][j] == ("█" if cell.all() else "▒" if cell.any() else "·")


def test_a_drawing_takes_no_memory_for_pairs() -> None:
    assert len(Mask.window(2**29, 0).draw().splitlines()) <= 24
    assert Mask.full().draw(0) == ""


def test_a_drawing_of_many_bands_takes_no_memory_for_all_their_cells() -> None:
    tracemalloc.start()
    drawing = Mask.chunked(1).draw(2000, width=50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6 and drawing.count("▒") == 50 and drawing.count("·") == 2450


def test_a_drawing_counts_exactly_however_large_it_is() -> None:
    assert Mask.window(2**29, 0).draw(2**31, width=8) == Mask.window(2**19, 0).draw(2**21, width=8)
    assert Mask.full().draw(2**31, width=1) == "█"
    assert Mask.slices([(0, 2**31), (0, 1)], [(0, 2**31 - 1), (2**31 - 1, 2**31)], ["full"] * 2).draw(width=1) == "▒"
    for lengths in (2**31 + 1, [2**30, 2**30 + 1]):
        with pytest.raises(hetu.HetuError, match="to be an int from 0 to 2147483648"):
            Mask.full().draw(lengths)


@pytest.mark.parametrize(
    "mask",
    [
        Mask.chunked(2**40),
        Mask.window(2**53, 2**53),
        Mask.prefix([1, 2**53]),
        Mask.slices([(0, 9)], [(0, 2**53)], ["full"]),
    ],
)
def test_a_mask_too_large_to_draw_prints_its_numbers(mask: Mask) -> None:
    assert str(mask) == repr(mask)
