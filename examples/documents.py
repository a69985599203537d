"""Real documents through one graph, under four parallel strategies that are chosen at each run.

The documents are the source files of Python's standard library, a byte a token: most are short, some are very long,
a few are empty. They are packed, embedded and projected, and attend within themselves by ``hetu.parallel_attn``.
The graph is built once, with lengths that are symbols. From pack to pack the strategy changes, and what it computes
is compared with one device. At the end a small pack goes through the Triton kernels: on a GPU if there is one, else
in Triton's interpreter.

Run it with ``make demo``, or ``python examples/documents.py --packs 4 --tokens 4096``; in several processes, with the
same numbers, by ``torchrun --nproc-per-node 3 examples/documents.py``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from corpus import VOCABULARY, cut, deal, make_packs, read_files
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hetu
from hetu.parallel import AttnPlan

WIDTH, HEAD_DIM, HEADS, KV_HEADS = 128, 64, 4, 2
TOLERANCE = 2e-5  # float32, as one device in another order of adding


# The graph: lengths of all strategies are expressions of three symbols

S = hetu.IntSymbol("s")  # tokens of the pack
A = hetu.IntSymbol("a")  # of these, tokens of the first context group, where there are three
B = hetu.IntSymbol("b")  # and of the second
C = S - A - B


@dataclass(frozen=True)
class Strategy:
    """Which pipeline holds how many tokens, which context group it belongs to, and the groups' shares of a pack."""

    name: str
    lengths: list[hetu.IntSymbol]
    groups: list[int]
    shares: tuple[int, ...] = (1,)


STRATEGIES = (
    Strategy("one pipeline", [S], [0]),
    Strategy("two pipelines", [S // 2, S - S // 2], [0, 0]),
    Strategy("three of unequal lengths", [S // 6, S // 3, S - S // 6 - S // 3], [0, 0, 0]),
    Strategy(
        "six in three context groups",
        [A, B // 2, B - B // 2, C // 4, C // 4, C - 2 * (C // 4)],
        [0, 1, 1, 2, 2, 2],
        shares=(1, 2, 3),
    ),
)


def fixed_weights(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


rows, docs = hetu.IntSymbol("rows"), hetu.IntSymbol("docs")
with hetu.graph("define_and_run", num_strategy=len(STRATEGIES)) as g:
    tokens = hetu.placeholder(hetu.int64, [rows], name="tokens")
    cu_seqlens = hetu.placeholder(hetu.int32, [docs + 1], name="cu_seqlens")
    table = hetu.constant(fixed_weights(1, VOCABULARY, WIDTH), name="table")
    weight = hetu.constant(fixed_weights(2, (HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH) / WIDTH**0.5, name="weight")
    qkv = hetu.linear(hetu.embedding(tokens, table), weight)
    attended, lse, _ = hetu.parallel_attn(
        qkv,
        HEAD_DIM,
        HEADS // KV_HEADS,
        [strategy.lengths for strategy in STRATEGIES],
        [strategy.groups for strategy in STRATEGIES],
        packing=True,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        split="balanced",
    )


def run(index: int, pack: list[np.ndarray]) -> tuple[torch.Tensor, AttnPlan]:
    """Attends within the documents of a pack under a strategy.

    Returns:
        The result in the order of the pack, ``(tokens, HEADS * HEAD_DIM)``, and the plan that was followed.
    """
    strategy = STRATEGIES[index]
    lists = deal(pack, strategy.shares)
    cu = [np.cumsum([0, *map(len, documents)], dtype=np.int32) for documents in lists]
    symbols = {S: sum(map(len, pack))}
    if len(lists) > 1:
        symbols |= {A: int(cu[0][-1]), B: int(cu[1][-1])}

    layout = g.layout(index, int_symbol_dict=symbols, cu_seqlens=cu)
    plan = g.plan(index, int_symbol_dict=symbols, cu_seqlens=cu)
    texts = [np.concatenate([np.empty(0, np.int64), *documents]) for documents in lists]
    feeds = {
        tokens: hetu.Shards(layout.scatter(texts)),
        cu_seqlens: hetu.Shards(cu[group] for group in strategy.groups),
    }
    result = g.run(attended, feeds, int_symbol_dict=symbols, strategy=index)
    whole = layout.gather(hetu.gather_shards(result))
    return whole if len(lists) == 1 else torch.cat(whole), plan


# What is shown


@dataclass
class Tally:
    """What a strategy did, added up over its packs; arrays have one entry a pipeline."""

    pipelines: int
    packs: int = 0
    tokens: np.ndarray = field(init=False)
    pairs: np.ndarray = field(init=False)
    sent: np.ndarray = field(init=False)
    difference: float = 0.0
    plan: AttnPlan | None = None

    def __post_init__(self) -> None:
        self.tokens, self.pairs, self.sent = (np.zeros(self.pipelines, np.int64) for _ in range(3))

    def add(self, plan: AttnPlan, difference: float) -> None:
        self.packs += 1
        self.plan = plan
        self.tokens += [part.rows for part in plan.pipelines]
        self.pairs += [plan.pairs(r) for r in range(self.pipelines)]
        self.sent += [plan.bytes_sent(r) for r in range(self.pipelines)]
        self.difference = max(self.difference, difference)


def run_packs(
    packs: list[list[np.ndarray]], order: list[int], label: str, console: Console, **settings: str
) -> list[Tally]:
    """Runs the ``i``-th pack under strategy ``order[i]`` and ``settings``; compares with one device without them."""
    tallies = [Tally(len(strategy.groups)) for strategy in STRATEGIES]
    for pack, index in track(list(zip(packs, order, strict=True)), description=label, console=console):
        one_device, _ = run(0, pack)
        with hetu.config(**settings):
            result, plan = run(index, pack)
        tallies[index].add(plan, float((result - one_device).abs().max()))
    return tallies


def show(console: Console, strategy: Strategy, tally: Tally) -> None:
    """Prints one strategy: its last plan in words, then a line a pipeline."""
    table = Table("pipeline", "group", "tokens", "pairs attended", "share", "MB sent", box=None, header_style="dim")
    for column in table.columns:
        column.justify = "right"
    for r, group in enumerate(strategy.groups):
        share = tally.pairs[r] / max(tally.pairs.sum(), 1)
        cells = (r, group, f"{tally.tokens[r]:,}", f"{tally.pairs[r]:,}", f"{share:.1%}", f"{tally.sent[r] / 1e6:.2f}")
        table.add_row(*map(str, cells))
    console.print(f"\n[bold]{strategy.name}[/bold], {tally.packs} pack{'s' * (tally.packs != 1)}")
    if tally.plan is not None:
        console.print(f"[dim]the last one's plan:[/dim] {tally.plan.summary()}", highlight=False)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=int, default=8, help="how many packs are run")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens that a pack may hold")
    arguments = parser.parse_args()
    world = hetu.init_distributed()
    console, start = Console(quiet=world.rank > 0), time.perf_counter()

    files = read_files()
    documents = cut(files)
    packs = make_packs(documents, arguments.tokens, arguments.packs)
    lengths = [*map(len, files)]
    if world.rank == 0:
        print(
            f"{len(files):,} files of {min(lengths)} to {max(lengths):,} tokens, a median of {np.median(lengths):,.0f};"
        )
        print(
            f"cut into {len(documents):,} documents, of which {len(packs)} packs of up to {arguments.tokens:,} tokens\n"
        )
        print(g)
    tallies = run_packs(packs, [i % len(STRATEGIES) for i in range(len(packs))], "packs", console)
    for strategy, tally in zip(STRATEGIES, tallies, strict=True):
        show(console, strategy, tally)

    # The same graph through the Triton kernels, with short documents: the interpreter takes its time.
    short = make_packs([document for document in documents if len(document) <= 160], 256, len(STRATEGIES))
    triton = run_packs(short, list(range(len(STRATEGIES))), "Triton", console, backend="triton")

    summary = Table("in all", "tokens", "pairs", "MB moved", "off by", "Triton off by", box=None, header_style="dim")
    summary.columns[0].no_wrap = True
    for column in summary.columns[1:]:
        column.justify = "right"
    for strategy, tally, small in zip(STRATEGIES, tallies, triton, strict=True):
        numbers = (f"{tally.tokens.sum():,}", f"{tally.pairs.sum() / 1e6:.1f} M", f"{tally.sent.sum() / 1e6:.2f}")
        summary.add_row(strategy.name, *numbers, f"{tally.difference:.1e}", f"{small.difference:.1e}")
    console.print("", summary, "\n[dim]off by: the largest difference from one device[/dim]")
    cache = g.executor.stats()["executables"]
    console.print(f"{cache.misses} executables were built for {cache.hits + cache.misses} runs", highlight=False)
    processes = f" in {world.size} processes" if world.is_distributed else ""
    console.print(f"{time.perf_counter() - start:.0f} s{processes}", highlight=False)

    worst = max(tally.difference for tally in (*tallies, *triton))
    if not worst <= TOLERANCE:  # written so that NaN fails too
        raise SystemExit(f"a strategy differs from one device by {worst:.1e}, more than {TOLERANCE:.0e}")

    hetu.shutdown_distributed()


if __name__ == "__main__":
    main()
