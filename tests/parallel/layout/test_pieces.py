"""How many tokens of each document lie on each member of a group."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.masks import random_mask

import hetu
from hetu.parallel import Layout, Mask
from hetu.parallel.layout.pieces import SLACK, balance, deal


def balance_pieces(*given: np.ndarray) -> np.ndarray:
    return np.diff(balance(*given))


def deal_pieces(*given: np.ndarray) -> np.ndarray:
    return np.diff(deal(*given))


def work(pieces: np.ndarray) -> np.ndarray:
    """Tokens of each member times their documents' lengths."""
    return (pieces * pieces.sum(0)).sum(1)


def balanced(lengths: list[int], seq_lens: list[int]) -> np.ndarray:
    pieces = balance_pieces(np.cumsum([0, *lengths]), np.array(seq_lens))
    assert (pieces >= 0).all() and pieces.sum(0).tolist() == lengths and pieces.sum(1).tolist() == seq_lens
    return pieces


@given(
    lengths=st.lists(st.integers(0, 3) | st.integers(0, 5000), max_size=25),
    cuts=st.lists(st.floats(0, 1), max_size=8),
)
def test_nobody_has_more_to_do_than_if_documents_were_dealt(lengths: list[int], cuts: list[float]) -> None:
    """Or than the mean and some slack, whichever is more; members of any size, some without tokens."""
    total = sum(lengths)
    seq_lens = np.diff([0, *sorted(int(c * total) for c in cuts), total]).tolist()
    pieces = balanced(lengths, seq_lens)
    dealt = work(deal_pieces(np.cumsum([0, *lengths]), np.array(seq_lens))).max()
    mean = work(pieces).sum() / max(sum(length > 0 for length in seq_lens), 1)
    assert work(pieces).max() <= max(dealt, (1 + 2 * SLACK) * mean) * (1 + 1e-9)


def test_documents_are_dealt_where_choosing_is_no_better() -> None:
    """A pipeline has no room for what it would have to do, and who has room is left with too much."""
    seq_lens = [15, 3, 16]
    dealt = deal_pieces(np.array([0, 7, 34]), np.array(seq_lens))
    assert (balanced([7, 27], seq_lens) == dealt).all() and work(dealt).max() > (1 + 2 * SLACK) * work(dealt).mean()


def test_short_documents_stay_whole_and_long_ones_are_cut() -> None:
    """Lengths as documents have them: two pipelines of 3:2 of the tokens do as much, and few documents are cut."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        lengths = np.minimum(rng.lognormal(6.5, 1.4, 60).astype(int) + 1, 8192)
        total = int(lengths.sum())
        pieces = balanced(lengths.tolist(), [total * 3 // 5, total - total * 3 // 5])
        assert work(pieces).max() <= (1 + 2 * SLACK) * work(pieces).mean()
        assert ((pieces > 0).sum(0) > 1).sum() <= 4


def test_equal_documents_are_shared_out_whole() -> None:
    pieces = balanced([64] * 32, [512] * 4)
    assert ((pieces > 0).sum(0) == 1).all()


def test_one_document_is_dealt() -> None:
    for seq_lens in ([10, 10, 10], [1, 0, 40, 7]):
        assert balanced([sum(seq_lens)], seq_lens)[:, 0].tolist() == seq_lens


def test_a_whole_document_is_one_span() -> None:
    """On whichever member it lies: nothing is computed in two halves that meet."""
    layout = Layout.build([8, 8, 8], [0] * 3, split="balanced", cu_seqlens=[0, 8, 16, 24])
    assert [len(layout.query_spans(r)) for r in range(3)] == [1, 1, 1]
    assert [len(Layout.build([6, 0], [0, 0], split="sym").query_spans(r)) for r in range(2)] == [1, 0]


# Weights


@given(lengths=st.lists(st.integers(0, 3) | st.integers(0, 5000), max_size=25), seed=st.integers(0, 99))
def test_no_weights_are_the_lengths(lengths: list[int], seed: int) -> None:
    cu, total = np.cumsum([0, *lengths]), sum(lengths)
    seq_lens = np.diff([0, *np.sort(np.random.default_rng(seed).integers(0, total + 1, 3)), total])
    for weights in (np.diff(cu), np.diff(cu).astype(float)):
        assert np.array_equal(balance_pieces(cu, seq_lens), balance_pieces(cu, seq_lens, weights))


@given(
    lengths=st.lists(st.integers(0, 600), min_size=1, max_size=20),
    seed=st.integers(0, 2**32),
    cuts=st.lists(st.floats(0, 1), max_size=5),
)
def test_nobody_has_more_to_do_under_a_mask_than_if_documents_were_dealt(
    lengths: list[int], seed: int, cuts: list[float]
) -> None:
    """Weighed by any mask: as many tokens as the strategy says, and no more work than dealt pieces are, or the mean."""
    mask, total = random_mask(np.random.default_rng(seed), lengths, lengths), sum(lengths)
    seq_lens = np.diff([0, *sorted(int(c * total) for c in cuts), total])
    cu = np.cumsum([0, *lengths])
    layout = Layout.build(seq_lens, [0] * len(seq_lens), split="balanced", cu_seqlens=cu, mask=mask)
    pieces, weights = layout.groups[0].pieces, mask.pairs(np.array(lengths)) / np.maximum(lengths, 1)
    assert (pieces >= 0).all() and pieces.sum(0).tolist() == lengths and pieces.sum(1).tolist() == seq_lens.tolist()
    work, dealt = ((each * weights).sum(1) for each in (pieces, deal_pieces(cu, seq_lens)))
    mean = work.sum() / max((seq_lens > 0).sum(), 1)
    assert work.max() <= max(dealt.max(), (1 + 2 * SLACK) * mean) * (1 + 1e-9)


def test_a_mask_weighs_documents_by_the_keys_that_their_tokens_see() -> None:
    """Under a window a long document is no more work per token, so that all stay whole; by lengths it has to be cut."""
    pack = {"split": "balanced", "cu_seqlens": np.array([0, 512, 768, 1024])}
    by_length, by_window, by_causal = (
        Layout.build([512, 512], [0, 0], mask=mask, **pack).groups[0].pieces.tolist()
        for mask in (None, Mask.window(16, 0), Mask.causal())
    )
    assert by_window == [[512, 0, 0], [0, 256, 256]]
    assert by_length == by_causal == [[280, 0, 232], [232, 256, 24]]


def test_no_other_split_and_no_pieces_that_are_given_look_at_a_mask() -> None:
    cu = np.array([0, 512, 768, 1024])
    digests = [
        {
            Layout.build([512, 512], [0, 0], split=split, cu_seqlens=given, mask=mask).digest()
            for mask in (None, Mask.window(16, 0))
        }
        for split, given in (("normal", cu), ("sym", cu), ("stripe", cu), ("balanced", np.stack([cu // 2, cu // 2])))
    ]
    assert all(len(one) == 1 for one in digests)


def test_what_is_no_mask_to_weigh_by() -> None:
    cu = np.array([0, 5, 8])
    symbol = hetu.IntSymbol("w")
    for mask, error, message in (
        ("causal", hetu.StrategyError, "expected mask to be a hetu.Mask or None, got 'causal'"),
        (Mask.window(symbol, 0), hetu.StrategyError, r"the mask window\(w, 0\) has no value for w"),
        (Mask.prefix([1]), hetu.BindingError, "prefixes of 1 documents, but there are 2"),
    ):
        with pytest.raises(error, match=message):
            Layout.build([4, 4], [0, 0], split="balanced", cu_seqlens=cu, mask=mask)
    with pytest.raises(hetu.StrategyError, match=r"expected mask to be a hetu\.Mask or None, got 3"):
        hetu.Strategy([4], [0], mask=3)


def test_strategies_compare_hash_and_print_with_what_they_weigh_by() -> None:
    window = hetu.Strategy([4, 4], [0, 0], "two", mask=Mask.window(2, 0))
    same, plain = hetu.Strategy([4, 4], [0, 0], "two", Mask.window(2, 0)), hetu.Strategy([4, 4], [0, 0], "two")
    assert window == same != plain and hash(window) == hash(same)
    assert str(window) == "two: [4, 4] in groups [0, 0], weighed by window(2, 0)"
    assert str(plain) == "two: [4, 4] in groups [0, 0]"
    s, w = hetu.IntSymbol("s"), hetu.IntSymbol("w")
    assert hetu.Strategy([s, 4], [0, 0], mask=Mask.window(w, s)).symbols == (s, w)
