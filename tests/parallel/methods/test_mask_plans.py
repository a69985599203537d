"""Plans under random masks of all kinds: every pair once, nothing travels that nobody sees, and proofs that hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.masks import random_mask, random_slices
from support.same import assert_same

import hetu
from hetu.parallel import METHODS, SPLITS, AttnPlan, Heads, Layout, Mask, build_pipeline_plan, build_plan
from hetu.parallel.plan.instructions import Attend, Receive
from hetu.testing import allowed_pairs

HEADS = Heads(num_q=4, num_kv=2, head_dim=8, itemsize=2)


def random_layout(rng: np.random.Generator) -> Layout:
    """Up to four documents on up to four pipelines, packed or a batch; some are empty."""
    members, split = int(rng.integers(1, 5)), str(rng.choice(list(SPLITS)))
    if rng.random() < 0.3:
        lens = rng.integers(0, 6, members).tolist()
        return Layout.build(lens, [0] * members, split=split, batch=int(rng.integers(1, 4)))
    lengths = rng.integers(0, 12, rng.integers(1, 5))
    cuts = np.sort(rng.integers(0, lengths.sum() + 1, members - 1))
    lens = np.diff([0, *cuts, lengths.sum()]).tolist()
    return Layout.build(lens, [0] * members, split=split, cu_seqlens=np.append(0, lengths.cumsum()))


def attended(plan: AttnPlan) -> np.ndarray:
    """How often each query of the group sees each key, for the first head, read off the tables."""
    layout, tokens = plan.layout, plan.layout.groups[0].tokens
    times = np.zeros((tokens, tokens), int)
    for r, part in enumerate(plan.pipelines):
        for item in part.instructions:
            if not isinstance(item, Attend) or item.heads.first_q:
                continue
            keys = np.concatenate(
                [layout.columns(x.owner)[x.runs.indices()] for x in item.sources] or [np.empty(0, int)]
            )
            places = [x.place.indices() for x in item.sources if x.place is not None]
            if places:
                keys[np.concatenate(places)] = keys.copy()
            queries = layout.columns(r) if part.queries == 0 else keys
            table, spans = item.table, part.spans
            columns = (table.query, table.k_start, table.k_len, table.diagonal, table.lower_over(spans))
            for span, k_start, k_len, diagonal, lower in zip(*(x.tolist() for x in columns), strict=True):
                rows = queries[spans.start[span] : spans.start[span] + spans.length[span]]
                for i, j in itertools.product(range(len(rows)), range(k_len)):
                    times[rows[i], keys[k_start + j]] += i + lower <= j <= i + diagonal
    return times


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_pair_is_attended_once(method: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = random_layout(rng)
    group = layout.groups[0]
    lengths = group.lengths.tolist()
    mask = random_mask(rng, lengths, lengths)
    plan, seen = build_plan(layout, method=method, mask=mask, heads=HEADS), allowed_pairs(mask, lengths, lengths)
    assert np.array_equal(attended(plan), seen)
    if method != "ulysses":
        assert sum(plan.pairs(r) for r in group.members) == seen.sum()
    plan.verify()
    plan.backward().verify()
    for r in group.members:
        alone = build_pipeline_plan(layout, r, method=method, mask=mask, heads=HEADS)
        assert_same(alone, plan.pipelines[r])


@given(seed=st.integers(0, 2**32 - 1))
def test_nothing_travels_that_nobody_sees(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = random_layout(rng)
    group = layout.groups[0]
    lengths = group.lengths.tolist()
    mask = random_mask(rng, lengths, lengths)
    seen = allowed_pairs(mask, lengths, lengths)
    for method in ("direct", "all_gather"):
        plan = build_plan(layout, method=method, mask=mask, heads=HEADS)
        for r, c in itertools.permutations(group.members, 2):
            needed = seen[np.ix_(layout.columns(r), layout.columns(c))].any(0).sum()
            received = [x.rows for x in plan.pipelines[r].instructions if isinstance(x, Receive) and x.peer == c]
            assert sum(received) == needed


@pytest.mark.parametrize("method", ["direct", "all_gather", "ring"])
def test_a_window_moves_no_more_than_its_tokens(method: str) -> None:
    """However long the document: at most w rows of each neighbour's piece, of which ``sym`` has two.

    A ring goes round one way, so what ``sym``'s back pieces need passes all others.
    """
    window, tokens, members = 100, 2**20, 8
    for split, pieces in (("normal", 1), ("sym", 2))[: 1 if method == "ring" else 2]:
        layout = Layout.build([tokens // members] * members, [0] * members, split=split)
        plan = build_plan(layout, method=method, mask=Mask.window(window, 0), heads=HEADS)
        for part in plan.pipelines:
            received = [item for item in part.instructions if isinstance(item, Receive)]
            assert len(received) <= pieces and all(item.rows <= window for item in received)
        plan.verify()


def test_a_mask_moves_no_tokens() -> None:
    """One layout serves all layers, whatever their masks."""
    layout = Layout.build([7, 9], [0, 0], split="balanced", cu_seqlens=[0, 4, 16])
    digests = {build_plan(layout, mask=mask, heads=HEADS).layout.digest() for mask in (Mask.full(), Mask.window(2, 0))}
    assert digests == {layout.digest()}


def test_plans_of_other_masks_have_other_hashes() -> None:
    layout = Layout.build([4, 4], [0, 0])
    masks = [Mask.causal(), Mask.full(), Mask.window(2, 0), Mask.window(3, 0), Mask.chunked(2), Mask.prefix(2)]
    assert len({build_plan(layout, mask=mask, heads=HEADS).hash() for mask in masks}) == len(masks)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_proof_sees_a_wrong_mask(seed: int) -> None:
    """The plan of one mask is refused for another one, unless both say the same for these lengths."""
    rng = np.random.default_rng(seed)
    layout = random_layout(rng)
    lengths = layout.groups[0].lengths.tolist()
    one, other = random_slices(rng, sum(lengths), sum(lengths)), random_slices(rng, sum(lengths), sum(lengths))
    plan = build_plan(layout, mask=one, heads=HEADS)
    claimed = AttnPlan(layout, plan.method, other, plan.heads, plan.pipelines)
    if np.array_equal(*(allowed_pairs(mask, lengths, lengths) for mask in (one, other))):
        claimed.verify()
    else:
        with pytest.raises(hetu.PlanError, match=r"attended|its rows"):
            claimed.verify()
