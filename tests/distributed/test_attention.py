"""parallel_attn in several processes: the very bits of one process, forward and backward, under every strategy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention.cases import SPLITS, Case, cases
from distributed.jobs import attention
from distributed.pool import Pool
from hypothesis import given, settings
from hypothesis import strategies as st

from hetu.parallel import METHODS

World = Callable[..., Pool]
SIZES = (2, 3, 4)


def check(world: World, size: int, case: Case, backend: str = "torch", own_shard: bool = False) -> None:
    """Each rank gives, to the bit, what its pipelines gave in one process; ranks without any give nothing."""
    (alone,) = world(1).run(attention, case, backend)
    ranks = world(size).run(attention, case, backend, own_shard=own_shard)
    assert all(len(values) == len(case.lens) for values in alone)
    for rank, values in enumerate(ranks):
        for mine, whole in zip(values, alone, strict=True):
            assert_same(mine, whole[rank::size])


def assert_same(mine: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(mine) == len(wanted)
    for got, want in zip(mine, wanted, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


LENGTHS = {1: [13], 2: [9, 4], 3: [0, 11, 5], 4: [7, 0, 1, 12], 5: [3, 8, 0, 2, 6], 6: [1, 5, 0, 4, 9, 2]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_every_method_and_split(world: World, size: int, method: str) -> None:
    """With fewer pipelines than processes, as many, and more; packed and not; empty shards."""
    for split in SPLITS:
        for packing in ("", "1d", "2d"):
            for count in (size - 1, size, size + 2):
                case = Case(LENGTHS[count], [0] * count, split, method, packing, cut=[0.3, 0.4], dtype=torch.float64)
                check(world, size, case)


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=40)
@given(case=cases(), dtype=st.sampled_from([torch.float64, torch.float32]), own_shard=st.booleans())
def test_any_strategy_on_torch(world: World, size: int, case: Case, dtype: torch.dtype, own_shard: bool) -> None:
    case.dtype = dtype
    check(world, size, case, own_shard=own_shard and len(case.lens) <= size)
