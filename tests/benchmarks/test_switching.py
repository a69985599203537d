"""The benchmark of switching: one graph follows another strategy at every step, and nothing is compiled again."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import hetu

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)

import switching  # noqa: E402

sys.path.remove(BENCHMARKS)


def test_nothing_compiles_after_the_first_batch_of_each_structure() -> None:
    case, random = switching.Case(pipelines=3, max_tokens=64), np.random.default_rng(0)
    ways = [case.by_plan, *(lambda lengths, i=i: case.by_fixed(lengths, i) for i in range(case.fixed))]

    def run_all(lengths: list[int]) -> None:
        for way in ways:
            step = way(lengths)
            grads = case.run(step)
            for grad, rows in zip(grads if step.micro_batches > 1 else [grads], _fed(step, case), strict=True):
                assert [len(shard) for shard in grad] == [len(shard) for shard in rows]

    with hetu.testing.counting(case.graph) as first:
        run_all([9, 0, 30, 1])
    assert 1 <= first.executables <= len(ways)
    with hetu.testing.counting(case.graph) as later:
        for _ in range(3):
            run_all(random.integers(0, 40, random.integers(1, 5)).tolist())
    assert later.executables == 0 and later.plans > 0


def _fed(step: switching.Step, case: switching.Case) -> list[hetu.Shards]:
    fed = step.feeds[case.qkv]
    return fed if step.micro_batches > 1 else [fed]


def test_what_the_host_does_is_counted() -> None:
    case = switching.Case(pipelines=2, max_tokens=64)
    batches = [[5, 0, 7], [1], [40, 60], [5, 0, 7]]
    planned = switching.host(case, case.by_plan, batches)
    assert planned.steps == {"planned": 4} and planned.first >= 1 and planned.later == 0
    assert 0 < planned.hits < planned.plans and min(planned.choose, planned.run) > 0
    explained = switching.host(case, case.by_explain, batches)
    assert sum(explained.steps.values()) == 4 and explained.later == 0
    assert len(list(switching.table({"a": planned, "b": explained}))) == 4
    assert torch.isfinite(torch.tensor(switching.end_to_end(case, case.by_explain, batches)))
