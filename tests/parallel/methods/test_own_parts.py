"""A pipeline's own part of a plan, built alone, is its part of the whole plan."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layout_cases import HEADS, MASKS, random_case, random_custom_layout, sparse_layout
from support.plans import holding_back

import hetu
from hetu.parallel import METHODS, SPLITS, Layout, Mask, build_plan
from hetu.parallel.attn_plan import AttnPlan
from hetu.parallel.methods import exchange
from hetu.parallel.plan.parts import Parts, PipelinePlan

SEEDS = st.integers(0, 2**32 - 1)
KINDS = {
    "any split": lambda rng: random_case(rng, longest=9, most=6).layout(),
    "sparse": lambda rng: sparse_layout(rng, most=8),
    "any tokens": lambda rng: random_custom_layout(rng, longest=10),
    "packed": lambda rng: packed(rng),
}


def packed(rng: np.random.Generator) -> Layout:
    """A few documents per pipeline, of all lengths, as training has them; cut by any split."""
    count = int(rng.integers(2, 9))
    lengths = rng.lognormal(2, 1.3, int(rng.integers(0, 3 * count))).astype(np.int64)
    each, more = divmod(int(lengths.sum()), count)
    held = [each + (r < more) for r in range(count)]
    return Layout.build(held, [0] * count, split=str(rng.choice(list(SPLITS))), cu_seqlens=[0, *lengths.cumsum()])


def built(plan: AttnPlan) -> list[int]:
    """The pipelines whose parts are built."""
    assert isinstance(plan.pipelines, Parts)
    return sorted(plan.pipelines._built)


@pytest.mark.parametrize("method", METHODS)
@given(
    kind=st.sampled_from(list(KINDS)),
    seed=SEEDS,
    mask=st.sampled_from(MASKS),
    held=st.booleans(),
    cells=st.sampled_from([1, 40, 2**17]),
)
def test_own_parts_are_those_of_the_whole(
    method: str, kind: str, seed: int, mask: Mask, held: bool, cells: int
) -> None:
    """Of any layout under any mask, and however large the blocks are in which a member looks at the others."""
    layout = KINDS[kind](np.random.default_rng(seed))

    def make() -> AttnPlan:
        return build_plan(layout, method=method, mask=mask, heads=HEADS)

    with holding_back(held):
        whole = make()
        whole.need(range(layout.num_pipelines))
        wholes, own = [whole.whole(), whole.backward().whole()], list[list[PipelinePlan]]([[], []])
        for r in range(layout.num_pipelines):
            plan = make()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(exchange, "_CELLS", cells)
                own[1].append(plan.backward().part(r))  # the backward first: it takes of the forward what it needs
                own[0].append(plan.part(r))
    for plan, parts in zip(wholes, own, strict=True):
        assert dataclasses.replace(plan, pipelines=tuple(parts)).hash() == plan.hash()


@pytest.mark.parametrize("method", ["direct", "ulysses"])
def test_nobody_builds_what_others_do(method: str) -> None:
    """Neither to follow a part and its backward, nor to agree with others on the plan."""
    layout = Layout.build([8] * 6, [0, 0, 1, 0, 1, 0], split="sym")
    plan = build_plan(layout, method=method, heads=HEADS)
    backward = plan.backward()
    assert (built(plan), built(backward)) == ([], [])
    assert plan.digest() != backward.digest()
    assert backward.part(3).pipeline == plan.pipelines[3].pipeline == 3
    assert (built(plan), built(backward)) == ([3], [3])
    plan.verify()
    assert built(plan) == list(range(6))


def test_a_part_is_built_once() -> None:
    plan = build_plan(Layout.build([8] * 4, [0] * 4), heads=HEADS)
    alone = plan.pipelines[2]
    plan.need([1, 3])
    assert built(plan) == [1, 2, 3]  # those of the members between them come along
    assert plan.pipelines[-2] is alone and plan.pipelines[1:3][1] is alone and list(plan.pipelines)[2] is alone
    with pytest.raises(IndexError):
        plan.pipelines[4]


@pytest.mark.parametrize("method", METHODS)
def test_digests_tell_what_plans_are_made_from(method: str) -> None:
    def digest(lens: list[int], split: str = "sym", mask: Mask = MASKS[0], num_q: int = 2) -> str:
        heads = dataclasses.replace(HEADS, num_q=num_q)
        return build_plan(Layout.build(lens, [0] * 3, split=split), method=method, mask=mask, heads=heads).digest()

    kinds = [digest([4, 4, 4]), digest([3, 5, 4]), digest([4, 4, 4], "normal"), digest([4, 4, 4], num_q=1)]
    kinds.append(digest([4, 4, 4], mask=Mask.window(2, 0)))
    assert len(set(kinds)) == len(kinds) and digest([4, 4, 4]) == kinds[0]


def test_a_mask_that_fits_another_group_only_is_refused_by_all() -> None:
    layout = Layout.build([4, 4], [0, 1], cu_seqlens=[np.array([0, 4]), np.array([0, 2, 4])])
    with pytest.raises(hetu.BindingError, match="prefixes of 1 documents, but there are 2"):
        build_plan(layout, mask=Mask.prefix([2]), heads=HEADS)
