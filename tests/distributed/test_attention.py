"""parallel_attn in several processes: the very bits of one process, forward and backward, under every strategy."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_cases import Case, cases
from support.jobs import attention, attention_on_hosts, holding
from support.longer import LONGER, grid
from support.plans import KV_METHODS
from support.pool import Pool
from support.same import assert_own

from hetu.parallel import METHODS, SPLITS, Mask

World = Callable[..., Pool]
SIZES = (2, 3, 4)


def check(
    world: World,
    size: int,
    case: Case,
    backend: str = "torch",
    own_shard: bool = False,
    job: Callable[..., Any] = attention,
) -> None:
    """Each rank gives, to the bit, what its pipelines gave in one process; ranks without any give nothing."""
    (alone,) = world(1).run(job, case, backend)
    ranks = world(size).run(job, case, backend, own_shard=own_shard)
    assert all(len(values) == len(case.lens) for values in alone)
    for rank, values in enumerate(ranks):
        for mine, whole in zip(values, alone, strict=True):
            assert_own(mine, whole, rank, size)


LENGTHS = {1: [13], 2: [9, 4], 3: [0, 11, 5], 4: [7, 0, 1, 12], 5: [3, 8, 0, 2, 6], 6: [1, 5, 0, 4, 9, 2]}


@pytest.mark.parametrize(
    ("size", "method", "split", "packing", "more"), grid(SIZES, METHODS, SPLITS, ["", "1d", "2d"], [-1, 0, 2])
)
def test_every_method_and_split(world: World, size: int, method: str, split: str, packing: str, more: int) -> None:
    """With fewer pipelines than processes, as many, and more; packed and not; empty shards."""
    lens = LENGTHS[size + more]
    check(world, size, Case(lens, [0] * len(lens), split, method, packing, cut=[0.3, 0.4], dtype=torch.float64))


def test_four_ranks_on_two_hosts(world: World) -> None:
    for split, packing in grid(SPLITS, ["", "1d"]):
        case = Case(LENGTHS[4], [0] * 4, split, "hierarchical", packing, cut=[0.3, 0.4], dtype=torch.float64)
        check(world, 4, case, job=attention_on_hosts)


MASKS = {
    "window": Mask.window(3, 1),
    "chunked": Mask.chunked(5),
    "slices": Mask.slices([(0, 8), (8, 13), (8, 13)], [(0, 13), (0, 4), (4, 9)], ["causal", "full", "bicausal"]),
}


@pytest.mark.parametrize(("method", "split", "mask", "count"), grid(METHODS, SPLITS, MASKS, [2, 3]))
def test_masks_caps_and_sinks(world: World, method: str, split: str, mask: str, count: int) -> None:
    """Every split on as many pipelines as processes, or more; windows, and slices that cross documents."""
    lens = LENGTHS[count]
    case = Case(lens, [0] * len(lens), split, method, "1d", cut=[0.3], dtype=torch.float64, mask=MASKS[mask])
    case.softcap, case.has_sinks, case.p, case.return_softmax = 2.0, True, 0.2, True
    check(world, 2, case)


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=15 * LONGER)
@given(case=cases(), dtype=st.sampled_from([torch.float64, torch.float32]), own_shard=st.booleans())
def test_any_strategy_on_torch(world: World, size: int, case: Case, dtype: torch.dtype, own_shard: bool) -> None:
    case.dtype = dtype
    check(world, size, case, own_shard=own_shard and len(case.lens) <= size)


@pytest.mark.parametrize(
    "case",
    [
        Case([9, 4], [0, 0], "stripe", "ring"),
        Case([3, 0, 6], [0, 0, 0], "sym", "direct", "1d", cut=[0.5], p=0.3),
        Case(
            [5, 2, 0, 4], [0, 1, 1, 0], "normal", "all_gather", "2d", cut=[0.3], dtype=torch.bfloat16, is_causal=False
        ),
    ],
    ids=lambda case: case.method,
)
def test_on_triton(world: World, case: Case) -> None:
    check(world, 3, case, "triton")


@pytest.mark.parametrize(("method", "split", "dtype"), grid(METHODS, SPLITS, [torch.bfloat16, torch.float16]))
def test_half_precision(world: World, method: str, split: str, dtype: torch.dtype) -> None:
    check(world, 3, Case([13, 0, 1, 15], [0] * 4, split, method, "1d", dtype=dtype, cut=[0.5, 0.51], p=0.2))


HELD_BACK = {"one group": ([9, 14], [0, 0]), "two groups": ([5, 8, 7, 6], [0, 1, 1, 0])}


@pytest.mark.parametrize(
    ("size", "method", "split", "packing", "strategy"), grid([2, 3], KV_METHODS, SPLITS, ["", "1d"], HELD_BACK)
)
def test_rows_that_are_held_back(world: World, size: int, method: str, split: str, packing: str, strategy: str) -> None:
    """In groups of two: gradients travel while the rest of the own rows is attended to."""
    lens, groups = HELD_BACK[strategy]
    case = Case(lens, groups, split, method, packing, cut=[0.3, 0.4], dtype=torch.float64)
    check(world, size, case, job=holding)


@pytest.mark.parametrize("method", KV_METHODS)
@pytest.mark.parametrize("size", [2, 3])
def test_rows_that_are_held_back_on_triton(world: World, size: int, method: str) -> None:
    check(world, size, Case([9, 14], [0, 0], "sym", method), "triton", job=holding)


def test_several_groups_that_lie_across_processes(world: World) -> None:
    for size in SIZES:
        check(world, size, Case([5, 3, 0, 7, 4, 1], [2, 0, 2, 0, 1, 0], "sym", dtype=torch.float64))


def test_eight_processes(world: World) -> None:
    """As many pipelines, one and five of them, and more."""
    lengths = [3, 1, 0, 7, 2, 0, 5, 4], [9], [4, 0, 3, 8, 1], [2, 1, 3, 0, 2, 5, 1, 1, 4, 3]
    # Each of them meets each method in fewer processes, see above.
    for lens, method in itertools.product(lengths, METHODS) if LONGER > 1 else zip(itertools.cycle(lengths), METHODS):
        check(world, 8, Case(lens, [0] * len(lens), "sym", method, "1d", cut=[0.3, 0.6], p=0.2))
    check(world, 8, Case([3, 1, 4, 7, 2, 0, 5, 4], [0, 1, 0, 1, 2, 2, 0, 1], "stripe", dtype=torch.float64))
