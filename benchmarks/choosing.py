"""What choosing costs the host: a strategy by symbols alone, or for new packs, and a plan for a batch's lengths.

8 strategies on 8 pipelines: one group of 8, two of 4, four of 2 and eight of 1, with even and uneven lengths, causal
under ``sym`` with ``direct``. Packs have 64 documents, a long-tailed mix of about a thousand tokens each, another one
per group; their layouts are made beforehand. Batches for ``hetu.plan_batch`` have 512 documents of real lengths, on 64
pipelines of 32,768 tokens. Times are those of this process on the processor.

    python benchmarks/choosing.py [--repeats 200]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from planning import HARDWARE, Lengths
from tables import Row, print_table
from tables import processor_timed as timed

import hetu
from hetu.parallel import Heads, Layout, build_plan
from hetu.parallel.choice.setting import chosen
from hetu.planning.choosing import Chooser

PIPELINES, DOCUMENTS, WIDTH = 8, 64, 48 * 128
HEADS = Heads(num_q=32, num_kv=8, head_dim=128, itemsize=2)


def shared(total: Any, members: int, first: int) -> list[Any]:
    """A group's lengths: its first member holds ``first`` quarters of what others do."""
    quarter = total // (4 * (members - 1) + first)
    return [total - 4 * quarter * (members - 1), *[4 * quarter] * (members - 1)]


def grouped(total: Any) -> list[tuple[list[Any], list[int]]]:
    """Lengths and groups of each strategy; each group has ``total`` tokens."""
    shapes = [(8, 4), (8, 5), (8, 3), (4, 4), (4, 5), (2, 4), (2, 5), (1, 4)]
    return [
        (shared(total, size, first) * (PIPELINES // size), [r // size for r in range(PIPELINES)])
        for size, first in shapes
    ]


def by_symbols(repeats: int) -> Iterator[Row]:
    """From symbols alone: for new lengths, and a whole run's choice, binding and plan for lengths seen before."""
    s = hetu.IntSymbol("s")
    strategies = [hetu.Strategy(lengths, groups) for lengths, groups in grouped(s)]
    with hetu.graph("define_and_run", strategies=strategies, device="cpu") as g:
        qkv = hetu.placeholder(hetu.bfloat16, [hetu.IntSymbol("rows"), WIDTH])
        out = hetu.parallel_attn(qkv, HEADS.head_dim, 4, split="sym", method="direct")[0]
    totals = [20_000 + 37 * i for i in range(repeats)]
    rows = torch.empty(1, WIDTH, dtype=torch.bfloat16).expand(2 * totals[-1], -1)
    planner, new, seen = g.planner, list[float](), list[float]()
    subgraph = planner.subgraph(out)
    for total in totals:
        new.append(timed(lambda at=total: planner._chooser.by_symbols(subgraph, {s: at}, chosen()), 1e6))
        ranking = planner._chooser.by_symbols(subgraph, {s: total}, chosen())
        lengths = grouped(total)[ranking.order[0]][0]
        given = {"feed_dict": {qkv: hetu.Shards([rows[:n] for n in lengths])}, "int_symbol_dict": {s: total}}
        first = g.prepare(out, **given, strategy="auto")
        assert first.strategy == ranking.order[0]
        seen.append(timed(lambda given=given: g.prepare(out, **given, strategy="auto"), 1e6))
    yield Row.of("8 strategies, new lengths: choose", "µs", new[repeats // 10 :], limit=100)
    yield Row.of("8 strategies, seen lengths: choose, bind, plan", "µs", seen[repeats // 10 :], limit=100)


def for_packs(repeats: int) -> Iterator[Row]:
    """Of plans of which no part is built: another pack in every group."""
    rng, took = np.random.default_rng(0), list[float]()
    for _ in range(repeats):
        lengths = np.minimum(rng.lognormal(6, 1.2, (PIPELINES, DOCUMENTS)).astype(np.int64), 16384)
        lengths[:, -1] += lengths.sum(1).max() - lengths.sum(1)  # as many tokens in each group
        packs = [np.append(0, pack.cumsum()) for pack in lengths]
        plans = {number: {None: [plan]} for number, plan in enumerate(planned(packs))}
        took.append(timed(lambda plans=plans: Chooser(len(plans)).by_plans(plans, HARDWARE), 1e3))
    yield Row.of("8 strategies, new packs: price", "ms", took[repeats // 10 :], limit=2)


def planned(packs: Sequence[np.ndarray]) -> Iterator[Any]:
    """A plan for each strategy."""
    for lengths, groups in grouped(int(packs[0][-1])):
        layout = Layout.build(lengths, groups, split="sym", cu_seqlens=packs[: max(groups) + 1])
        yield build_plan(layout, method="direct", heads=HEADS)


def for_batches(repeats: int, documents: int = 512, pipelines: int = 64, max_tokens: int = 32_768) -> Iterator[Row]:
    """``hetu.plan_batch``: the least of 5 times, for each batch."""
    drawn, took = Lengths(seed=5, scale=1), list[float]()
    for _ in range(max(repeats // 8, 1)):
        lengths = [drawn.one(int(0.95 * pipelines * max_tokens)) for _ in range(documents)]
        calls = [
            timed(lambda own=lengths: hetu.plan_batch(own, pipelines, HARDWARE, max_tokens=max_tokens), 1e3)
            for _ in range(5)
        ]
        took.append(min(calls))
    yield Row.of(f"plan_batch, {documents} documents on {pipelines} pipelines", "ms", took, limit=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    print_table([*by_symbols(repeats), *for_packs(repeats), *for_batches(repeats)])


if __name__ == "__main__":
    main()
