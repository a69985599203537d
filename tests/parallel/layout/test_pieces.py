"""How many tokens of each document lie on each member of a group."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hetu.parallel import Layout
from hetu.parallel.layout.pieces import SLACK, balance_pieces, deal_pieces


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
