"""What plans give graphs and PyTorch models: attention under a plan is that of each document alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.dense import dense

import hetu
from hetu.functional import ContextParallel
from hetu.parallel import Heads, build_plan

HEAD_DIM, HEADS, PIPELINES = 8, (2, 1), 5
WIDTH = (HEADS[0] + 2 * HEADS[1]) * HEAD_DIM
HARDWARE = hetu.Hardware(flops=1e9, link_bytes=1e9, latency=1e-7, memory_bytes=1e9)
LENGTHS = {
    "several groups": ([150, 61, 0, 1, 33, 1, 20, 0, 47, 18, 5], 100),
    "several micro-batches": ([83, 61, 0, 1, 33, 47, 2, 58, 29, 18, 70, 44, 9, 1], 40),
    "fewer tokens than pipelines": ([1, 0, 2], 3),
}


class _Ranks:
    """A group as far as a ContextParallel asks for it to lay its rows out."""

    rank, device = 0, torch.device("cpu")

    def __init__(self, size: int) -> None:
        self.size, self.name = size, f"{size} ranks"

    def hanging_up(self) -> AbstractContextManager[None]:
        return nullcontext()


def planned(name: str) -> hetu.BatchPlan:
    lengths, max_tokens = LENGTHS[name]
    sizes = {"num_heads": HEADS[0], "num_kv_heads": HEADS[1], "head_dim": HEAD_DIM, "dtype": "float64"}
    return hetu.plan_batch(lengths, PIPELINES, HARDWARE, max_tokens=max_tokens, token_flops=1e4, **sizes)


def documents_of(plan: hetu.BatchPlan) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(plan.lengths))
    return [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in plan.lengths]


def expected(qkv: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv.unflatten(1, (-1, HEAD_DIM)).split([HEADS[0], HEADS[1], HEADS[1]], 1)
    return dense(q, k, v, is_causal=True)[0].flatten(1)


def test_the_cases_are_what_they_are_called() -> None:
    plan = planned("several groups")
    assert len(plan.members) > 1
    assert max(map(len, plan.members.values())) > 1
    assert planned("several micro-batches").num_micro_batches > 1
    assert any(len(place.pieces) > 1 for place in planned("several micro-batches").places)


def test_a_graph_runs_every_plan_and_is_lowered_once_per_structure() -> None:
    lengths = [hetu.IntSymbol(f"n{r}") for r in range(PIPELINES)]
    groups = [hetu.IntSymbol(f"g{r}") for r in range(PIPELINES)]
    strategy = hetu.Strategy(lengths, groups)
    with hetu.graph("define_and_run", strategies=[strategy], device="cpu") as g:
        qkv = hetu.placeholder(hetu.float64, [hetu.IntSymbol("rows"), WIDTH], name="qkv")
        cu = hetu.placeholder(hetu.int32, [hetu.IntSymbol("members"), hetu.IntSymbol("ends")], name="cu_seqlens")
        out = hetu.parallel_attn(qkv, HEAD_DIM, 2, packing=True, cu_seqlens_q=cu, cu_seqlens_k=cu, split="balanced")[0]
    for name in LENGTHS:
        plan = planned(name)
        documents = documents_of(plan)
        results = g.run(
            out,
            {qkv: plan.scatter(documents), cu: plan.cu_seqlens},
            int_symbol_dict=plan.symbols(strategy),
            num_micro_batches=plan.num_micro_batches,
        )
        for mine, document in zip(plan.gather(results), documents, strict=True):
            torch.testing.assert_close(mine, expected(document), atol=1e-12, rtol=0)
    assert g.executor.stats()["executables"].misses == 1


@pytest.mark.parametrize("name", LENGTHS)
def test_plans_of_its_layouts_are_proven(name: str) -> None:
    for item in planned(name).micro_batches:
        plan = build_plan(item.layout, method="direct", heads=Heads(*HEADS, HEAD_DIM, 8))
        plan.verify()
        plan.backward().verify()


@pytest.mark.parametrize("name", LENGTHS)
def test_context_parallel_holds_the_same_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout, of as many ranks as the group has pipelines, puts each token where the plan's does."""
    plan = planned(name)
    for item in plan.micro_batches:
        for value, members in plan.members.items():
            cu = torch.from_numpy(item.cu_seqlens[value])
            lengths = [plan.lengths[d] for d in item.documents[value]]
            assert cu.shape == (len(members), len(lengths) + 1)
            assert cu.dtype == torch.int32
            ranks = _Ranks(len(members))
            monkeypatch.setattr("hetu.functional.context_parallel.world_of", lambda _, ranks=ranks: ranks)
            monkeypatch.setattr("hetu.functional.sharding.world_named", lambda _, ranks=ranks: ranks)
            layout = ContextParallel(cu).layout
            assert [layout.rows(i) for i in range(len(members))] == [item.lengths[r] for r in members]
            for i, r in enumerate(members):
                np.testing.assert_array_equal(layout.positions(i), item.layout.positions(r))
                np.testing.assert_array_equal(layout.documents(i), item.layout.documents(r))
            ends = [*layout.groups[0].offsets.tolist(), layout.groups[0].tokens]
            assert [end - start for start, end in pairwise(ends)] == lengths
