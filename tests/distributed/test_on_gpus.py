"""Several processes over NCCL, each on a GPU: what the other tests here check over gloo, to the bit of one process.

Where there are fewer GPUs than ranks, ``NCCL_MULTI_RANK_GPU_ENABLE=1`` lets ranks share one (NCCL 2.30 and later).
Starting a world takes ten seconds, and on a shared GPU each message waits some milliseconds for its turn: so tests
share their worlds, which are given many cases at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from llama import Model, build
from support import faults
from support.attention_cases import Case
from support.devices import ON_CUDA
from support.faults import Change
from support.jobs import REDUCED, attention, float64_model, gathered, holding, in_turn, reduced, train
from support.plans import KV_METHODS
from support.pool import Pool, assert_lost
from support.same import assert_own, assert_same
from support.training import SMALL, steps
from support.unseen import check_unseen_ids

from hetu.parallel import METHODS, SPLITS

pytestmark = ON_CUDA

World = Callable[..., Pool]
BACKEND, DEVICE = "nccl", "cuda"


def ranks(size: int) -> Any:
    """A world of so many processes, if there are GPUs for them."""
    is_shared = torch.cuda.is_available() and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    is_possible = is_shared or torch.cuda.device_count() >= size
    reason = f"{size} ranks need {size} GPUs, or NCCL_MULTI_RANK_GPU_ENABLE=1"
    return pytest.param(size, marks=pytest.mark.skipif(not is_possible, reason=reason))


TWO = pytest.mark.parametrize("size", [ranks(2)])
MORE = pytest.mark.parametrize("size", [ranks(3), ranks(4)])
ALL = pytest.mark.parametrize("size", [ranks(2), ranks(3), ranks(4)])


def check(
    world: World,
    size: int,
    cases: Sequence[Case],
    backend: str,
    repeats: int = 1,
    job: Callable[..., Any] = attention,
) -> None:
    """Each rank gives, to the bit, what its pipelines gave in one process on a GPU; ranks without any give nothing.

    In every other case each rank feeds its own shard, where there are as many ranks as pipelines.
    """
    runs = [partial(job, case, backend, DEVICE, repeats=repeats) for case in cases]
    (alone,) = world(1, BACKEND).run(in_turn, runs)
    runs = [partial(run, own_shard=i % 2 == 0 and len(run.args[0].lens) <= size) for i, run in enumerate(runs)]
    for rank, given in enumerate(world(size, BACKEND).run(in_turn, runs)):
        for case, mine, wanted in zip(cases, given, alone, strict=True):
            assert all(len(values) == len(case.lens) for values in wanted)
            for number, (values, whole) in enumerate(zip(mine, wanted, strict=True)):
                assert_own(values, whole, rank, size, f"value {number} of {case} on rank {rank}")


# Attention

LENGTHS = {
    1: [300],
    2: [129, 64],
    3: [0, 200, 65],
    4: [70, 0, 1, 130],
    5: [33, 128, 0, 2, 64],
    6: [1, 50, 0, 130, 9, 64],
}


def spread(size: int, methods: Sequence[str], splits: Sequence[str], packings: Sequence[str], **options: Any) -> Any:
    """Cases of fewer pipelines than processes, as many, and more; with empty shards."""
    return [
        Case(LENGTHS[count], [0] * count, split, method, packing, cut=[0.3, 0.4], **options)
        for method in methods
        for split in splits
        for packing in packings
        for count in (size - 1, size, size + 2)
    ]


@TWO
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_split(world: World, size: int, method: str) -> None:
    check(world, size, spread(size, [method], SPLITS, ["", "1d", "2d"], dtype=torch.float64), "torch")


@MORE
def test_every_method_and_split_of_more(world: World, size: int) -> None:
    check(world, size, spread(size, list(METHODS), SPLITS, ["1d"], dtype=torch.float64), "torch")


@TWO
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(world: World, size: int, dtype: torch.dtype) -> None:
    """With dropout, and without a mask."""
    for is_causal in (True, False):
        cases = spread(size, list(METHODS), ["sym"], ["2d"], dtype=dtype, p=0.2, is_causal=is_causal)
        check(world, size, cases, "torch")


@ALL
def test_several_groups_that_lie_across_processes(world: World, size: int) -> None:
    case = Case([65, 33, 0, 70, 40, 1], [2, 0, 2, 0, 1, 0], "sym", dtype=torch.float64)
    check(world, size, [case, Case([*case.lens], [0, 1, 1, 0, 0, 1], "stripe", "ring", dtype=torch.float64)], "torch")


@TWO
def test_rows_that_are_held_back(world: World, size: int) -> None:
    cases = spread(size, list(KV_METHODS), SPLITS, ["", "1d"], dtype=torch.bfloat16, head_dim=64)
    check(world, size, [case for case in cases if len(case.lens) == 2], "triton", repeats=2, job=holding)


@TWO
def test_on_triton(world: World, size: int) -> None:
    check(world, size, spread(size, list(METHODS), SPLITS, ["", "1d"], dtype=torch.bfloat16, head_dim=64), "triton")


@TWO
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dtypes_on_triton(world: World, size: int, dtype: torch.dtype) -> None:
    check(world, size, spread(size, list(METHODS), ["sym"], ["1d"], dtype=dtype, head_dim=64), "triton")


@MORE
def test_on_triton_of_more(world: World, size: int) -> None:
    check(world, size, spread(size, list(METHODS), ["sym"], ["1d"], dtype=torch.bfloat16, head_dim=64), "triton")


@ALL
def test_long_messages_of_runs_that_nobody_waits_for(world: World, size: int) -> None:
    """What is sent and received is megabytes, and the host is runs ahead: all memory is in use again by then."""
    options = {"dtype": torch.bfloat16, "head_dim": 64, "cut": [0.2, 0.6]}
    lens = [3000 + 1001 * r for r in range(size)]
    for method in METHODS:
        check(world, size, [Case(lens, [0] * size, "sym", method, "1d", **options)], "triton", repeats=4)
    many = Case([2000] * 2 * size, [0] * 2 * size, "sym", "direct", "1d", **options)
    check(world, size, [many], "triton", repeats=2)


# Sums, gathering, training


@ALL
def test_sums_over_pipelines(world: World, size: int) -> None:
    """Of all types, in one bucket and in many."""
    asked = [
        (dtype, op, count, bucket)
        for dtype, op in REDUCED
        for count, bucket in ((1, 1), (size - 1, 100), (size, 10**6), (2 * size + 1, 100))
    ]
    runs = [partial(reduced, *one, device=DEVICE) for one in asked]
    (alone,) = world(1, BACKEND).run(in_turn, runs)
    for rank, given in enumerate(world(size, BACKEND).run(in_turn, runs)):
        for one, mine, wanted in zip(asked, given, alone, strict=True):
            for number, (values, whole) in enumerate(zip(mine, wanted, strict=True)):
                assert_own(values, whole, rank, size, f"value {number} of {one} on rank {rank}")


@ALL
def test_gathered_shards_are_those_of_one_process_on_every_rank(world: World, size: int) -> None:
    runs = [partial(gathered, lens, DEVICE) for lens in ([5], [3, 0, 4], [1, 2, 3, 0, 5])]
    (alone,) = world(1, BACKEND).run(in_turn, runs)
    for given in world(size, BACKEND).run(in_turn, runs):
        assert_same(given, alone)


FLOAT64 = partial(float64_model, device=DEVICE)
LLAMA = partial(build, SMALL, device=DEVICE)


@pytest.mark.parametrize(
    ("size", "model", "bucket_bytes"),
    [
        pytest.param(*size.values, *rest, marks=size.marks)
        for size, *rest in (
            (ranks(2), FLOAT64, 25 * 2**20),
            (ranks(2), LLAMA, 3000),
            (ranks(3), LLAMA, 25 * 2**20),
            (ranks(4), FLOAT64, 3000),
        )
    ],
    ids=["float64", "llama, many buckets", "llama", "float64, many buckets"],
)
def test_steps_are_those_of_one_process(world: World, size: int, model: Callable[[], Model], bucket_bytes: int) -> None:
    (alone,) = world(1, BACKEND).run(train, model, steps(), deterministic=True)
    for rank in world(size, BACKEND).run(train, model, steps(), bucket_bytes=bucket_bytes, deterministic=True):
        assert_same(rank, alone)


# What goes wrong

TIMEOUT = 12.0
SLACK = 8.0
"""Seconds more that a rank gets, which may have to wait for a core and for its turn on the GPU."""

OPTIONS: dict[str, Any] = {"strategy": 1, "device": DEVICE}
"""Of the script: two pipelines."""


@TWO
def test_what_is_refused_is_refused_on_all_ranks(world: World, size: int) -> None:
    """Before anything is sent; afterwards the ranks go on."""
    refusals: list[tuple[Change, str]] = [
        (faults.another_strategy, "the strategy must be the same on all ranks"),
        (faults.other_lengths, "int_symbol_dict must be the same on all ranks"),
        (faults.another_backend, "the backend must be the same on all ranks"),
        (faults.too_many_rows, "qkv has 12 rows on pipeline 1, but the strategy gives it 6 tokens"),
        (faults.no_rows, "qkv has 0 rows on pipeline 1, but the strategy gives it 6 tokens"),
        (faults.wrong_feed_dtype, "x is float32, but a torch.float64 tensor was fed"),
    ]
    (alone,) = world(1, BACKEND).run(faults.run, **OPTIONS)
    for change, text in refusals:
        for found, is_begun in world(size, BACKEND).run(faults.watched, {1: change}, 12, **OPTIONS):
            assert not is_begun and text in found[-1]
        for rank, values in enumerate(world(size, BACKEND).run(faults.run, **OPTIONS)):
            assert_own(values, alone, rank, size)


DIED, LATE = "^rank 1 died; this rank was ", f"^rank 1 did not come within {TIMEOUT:g} s; this rank was "


@TWO
@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        pytest.param(faults.dies, DIED, id="dies before a run"),
        pytest.param(faults.sleeps, LATE, id="sleeps before a run"),
        pytest.param(faults.at_the_transfer("dies", 1), DIED, id="dies at a message"),
        # Its watch is awake, and says that it has waited in vain as well.
        pytest.param(
            faults.at_the_transfer("sleeps", 1),
            "rank 0: was receiving rows, and waited for rank 1",
            id="sleeps at a message",
        ),
        pytest.param(faults.at_the_transfer("raises", 1), "rank 1: ValueError: out of luck", id="raises at a message"),
    ],
)
def test_a_rank_that_is_lost(world: World, size: int, change: Change, pattern: str) -> None:
    """The other one gets an error that says so, in time, and lives.

    NCCL's messages come when the run has returned. What was to come from a rank that is lost is then NaN, and the next
    run is the first that can say why.
    """
    (alone,) = world(1, BACKEND).run(faults.run, tokens=54, **OPTIONS)
    with Pool(size, BACKEND, timeout=TIMEOUT) as pool:
        pool.run(faults.run_from_used_memory, tokens=48, **OPTIONS)
        job = partial(faults.run_from_used_memory, tokens=54, **OPTIONS)
        outcome = pool.outcomes(partial(job, {1: change}), limit=TIMEOUT + SLACK)[0]
        if outcome.is_value:
            (value,) = outcome.value
            assert torch.equal(value, alone[0]) or value.isnan().any(), "what never came was taken for numbers"
            (outcome,) = pool.outcomes(job, [0], limit=TIMEOUT + SLACK)
        assert_lost(outcome, pattern)
        assert pool.outcomes(faults.here, [0])[0].is_value
        (again,) = pool.outcomes(job, [0], limit=SLACK)
        assert_lost(again, "(?s)the ranks can't go on after an earlier failure: .*rank 1")


@TWO
def test_an_id_that_one_ranks_gpu_knows_is_refused_on_all(world: World, size: int) -> None:
    for wrong in range(size + 1):
        check_unseen_ids(world, wrong, size, BACKEND, DEVICE)
