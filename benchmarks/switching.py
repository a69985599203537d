"""What it costs to follow another strategy at every step: 1,000 batches of real lengths through one graph.

    python benchmarks/switching.py [--batches 1000] [--tokens 8192] [--out DIR] [--write-docs]
    torchrun --nproc-per-node 2 benchmarks/switching.py    # with the time end to end, against each fixed strategy

The graph has layers of attention, forward and backward, and a list of strategies: three fixed ones, and one whose
lengths and groups are symbols. Batches fill from 1/64 to all of what pipelines may hold, so that another strategy is
best for some. Each is run as ``g.explain`` says and as ``hetu.plan_batch`` says. What the host does is timed with
kernels that do nothing, in processor time of its thread; one process works for all pipelines.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from planning import Lengths
from tables import ROOT, environment, write_between

import hetu
from hetu.backends.attention.contract import gather, row_dot

LAYERS, HEAD_DIM = 4, 16
WIDTH = 3 * HEAD_DIM
MODEL = {"num_heads": 1, "num_kv_heads": 1, "head_dim": HEAD_DIM, "dtype": "float32"}
H100 = hetu.Hardware.h100()
SMALLER = 32 * 128 // HEAD_DIM, 2 * 8 * 128 * 2 // (2 * HEAD_DIM * 4)
"""How many times fewer FLOPs per pair and bytes per row the graph has than 32 heads of 128, 8 of keys, in bfloat16."""

HARDWARE = replace(H100, flops=H100.flops / SMALLER[0], link_bytes=H100.link_bytes / SMALLER[1])
"""An H100 that is as much slower, so that strategies are chosen as for those heads."""

TOKEN_FLOPS = 72 * (32 * 128) ** 2 / SMALLER[0]


@dataclass(frozen=True)
class Step:
    """What a batch's run is given.

    Attributes:
        strategy: The index of the strategy.
        feeds: ``feed_dict``.
        symbols: ``int_symbol_dict``.
        micro_batches: How many there are.
    """

    strategy: int
    feeds: dict[Any, Any]
    symbols: dict[Any, Any]
    micro_batches: int = 1


class Case:
    """One graph over some pipelines, and the ways to choose a strategy for a batch.

    Args:
        pipelines: How many there are.
        max_tokens: The most tokens of each in a micro-batch.
        device: Where it runs.
    """

    def __init__(self, pipelines: int, max_tokens: int, device: str = "cpu") -> None:
        self.pipelines, self.max_tokens = pipelines, max_tokens
        self.s = s = hetu.IntSymbol("s")
        lengths, groups = ([hetu.IntSymbol(f"{name}{r}") for r in range(pipelines)] for name in ("n", "g"))
        fixed = {name: _even(s, parts, pipelines) for name, parts in fixed_parts(pipelines).items()}
        strategies = [hetu.Strategy(own, [0] * pipelines, name) for name, own in fixed.items()]
        self.fixed, self.planned = len(strategies), hetu.Strategy(lengths, groups, "planned")
        with hetu.graph("define_and_run", strategies=[*strategies, self.planned], device=device) as self.graph:
            self.qkv = x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), WIDTH], name="qkv")
            ends = [hetu.IntSymbol("members"), hetu.IntSymbol("ends")]
            self.cu = cu = hetu.placeholder(hetu.int32, ends, name="cu_seqlens")
            packs = {"packing": True, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "split": "sym", "method": "auto"}
            for _ in range(LAYERS):
                out = hetu.parallel_attn(x, HEAD_DIM, 1, **packs)[0]
                x = hetu.concat([out, out, out], 1)
            self.grad = hetu.gradients(out, [self.qkv])[0]
        longest = pipelines * max_tokens
        self.rows = torch.zeros(longest, WIDTH, device=device)

    def by_explain(self, lengths: Sequence[int]) -> Step:
        """The step under the cheapest of the fixed strategies."""
        cu = np.cumsum([0, *lengths], dtype=np.int32)
        chosen = self.graph.explain(int_symbol_dict={self.s: int(cu[-1])}, cu_seqlens=cu, hardware=HARDWARE).chosen
        assert chosen is not None
        return self.by_fixed(lengths, chosen)

    def by_fixed(self, lengths: Sequence[int], strategy: int) -> Step:
        """The step under one of the fixed strategies."""
        cu, symbols = np.cumsum([0, *lengths], dtype=np.int32), {self.s: sum(lengths)}
        layout = self.graph.layout(strategy, int_symbol_dict=symbols, cu_seqlens=cu)
        pieces = np.stack([np.bincount(layout.documents(r), minlength=len(lengths)) for r in range(self.pipelines)])
        ends = np.pad(pieces.cumsum(1), ((0, 0), (1, 0))).astype(np.int32)
        return Step(strategy, self._feeds(pieces.sum(1).tolist(), {0: ends}), symbols)

    def by_plan(self, lengths: Sequence[int]) -> Step:
        """The step as ``hetu.plan_batch`` has it."""
        sizes = {"max_tokens": self.max_tokens, "token_flops": TOKEN_FLOPS, **MODEL}
        plan = hetu.plan_batch(lengths, self.pipelines, HARDWARE, **sizes)
        feeds = [self._feeds(item.lengths, dict(item.cu_seqlens)) for item in plan.micro_batches]
        joined = {key: [item[key] for item in feeds] if len(feeds) > 1 else feeds[0][key] for key in feeds[0]}
        return Step(self.fixed, joined, plan.symbols(self.planned), plan.num_micro_batches)

    def _feeds(self, held: Sequence[int], cu: dict[int, Any]) -> dict[Any, Any]:
        return {self.qkv: hetu.Shards(self.rows[:count] for count in held), self.cu: cu}

    def run(self, step: Step) -> Any:
        return self.graph.run(
            self.grad,
            step.feeds,
            int_symbol_dict=step.symbols,
            strategy=step.strategy,
            num_micro_batches=step.micro_batches,
        )


def fixed_parts(pipelines: int) -> dict[str, int]:
    """The fixed strategies' names, and over how many pipelines each spreads a batch."""
    return {f"over {parts}": parts for parts in sorted({1, max(pipelines // 2, 1), pipelines})}


def _even(s: hetu.IntSymbol, parts: int, pipelines: int) -> list[Any]:
    each = s // parts
    return [each] * (parts - 1) + [s - each * (parts - 1)] + [0] * (pipelines - parts)


class Silent:
    """Kernels that do nothing: what is left of a run is the host's."""

    row_dot, gather = staticmethod(row_dot), staticmethod(gather)

    def attend(self, *_: Any) -> None: ...

    def attend_backward(self, *_: Any) -> None: ...


@dataclass(frozen=True)
class Host:
    """What the host did for all batches, chosen in one way.

    Attributes:
        steps: How many runs each strategy had, by name.
        first: Executables that were made by the first run of each strategy.
        later: Executables that were made by all other runs.
        plans: Plans that were asked for.
        hits: Of these, how many were there already.
        choose: Milliseconds per batch to choose and to make the feeds: the median.
        run: Milliseconds per run, without kernels: the median.
        run_p95: The same, of the slowest twentieth.
    """

    steps: dict[str, int]
    first: int
    later: int
    plans: int
    hits: int
    choose: float
    run: float
    run_p95: float


def host(case: Case, choose: Callable[[Sequence[int]], Step], batches: Sequence[Sequence[int]]) -> Host:
    """Runs all batches without kernels."""
    steps, first, later, took = Counter[int](), 0, 0, []
    before = case.graph.executor.stats()["plans"]
    with patch("hetu.backends.pipelines.family", lambda _: Silent()):
        for lengths in batches:
            start = thread_time()
            step = choose(lengths)
            chosen = thread_time()
            with hetu.testing.counting(case.graph) as counted:
                case.run(step)
            took.append((chosen - start, thread_time() - chosen))
            first += 0 if steps[step.strategy] else counted.executables
            later += counted.executables if steps[step.strategy] else 0
            steps[step.strategy] += 1
    after, (choosing, running) = case.graph.executor.stats()["plans"], 1e3 * np.array(took).T
    hits, misses = after.hits - before.hits, after.misses - before.misses
    names = {str(case.graph.strategies[index].name): count for index, count in sorted(steps.items())}
    median, p95 = np.quantile(running, [0.5, 0.95]).tolist()
    return Host(names, first, later, hits + misses, hits, float(np.median(choosing)), median, p95)


def end_to_end(case: Case, choose: Callable[[Sequence[int]], Step], batches: Sequence[Sequence[int]]) -> float:
    """Seconds that all batches take with their kernels, what chooses included."""
    for lengths in batches[:3]:
        case.run(choose(lengths))
    _wait()
    start = perf_counter()
    for lengths in batches:
        case.run(choose(lengths))
    _wait()
    return perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def table(found: dict[str, Host]) -> Iterator[str]:
    """What the host did as a table of Markdown."""
    head = "chosen by", "runs", "made by first runs", "by later ones", "plans there already", "choosing", "run", "p95"
    yield f"| {' | '.join(head)} |"
    yield "| --- | --- |" + " ---: |" * 6
    for name, item in found.items():
        steps = ", ".join(f"{strategy}: {count:,}" for strategy, count in item.steps.items())
        times = " | ".join(f"{x:.2f} ms" for x in (item.choose, item.run, item.run_p95))
        yield f"| {name} | {steps} | {item.first} | {item.later} | {item.hits:,} of {item.plans:,} | {times} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=8192, help="of each pipeline in a micro-batch, at most")
    parser.add_argument("--pipelines", type=int, default=4, help="in one process; under torchrun there is one per rank")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--write-docs", action="store_true", help="also put the table into docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world, device = hetu.init_distributed(), "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(world.size if world.is_distributed else arguments.pipelines, arguments.tokens, device)
    lengths, room = Lengths(seed=0, scale=1), case.pipelines * case.max_tokens
    shares = 2 ** -np.random.default_rng(0).uniform(0, 6, arguments.batches)  # of small batches few pipelines are best
    batches = [lengths.batch(int(room * share)) for share in shares.tolist()]
    ways = {"`g.explain`": case.by_explain, "`hetu.plan_batch`": case.by_plan}
    found = {name: host(case, way, batches) for name, way in ways.items()}
    result: dict[str, Any] = environment() | {"pipelines": case.pipelines, "tokens": case.max_tokens}
    result |= {"drawn_again": lengths.drawn_again, "host": {name: asdict(item) for name, item in found.items()}}
    text = "\n".join(table(found))
    if world.is_distributed:
        fixed = {str(case.graph.strategies[i].name): partial(case.by_fixed, strategy=i) for i in range(case.fixed)}
        times = {name: end_to_end(case, way, batches) for name, way in (ways | fixed).items()}
        result["end_to_end_s"] = times
        text += "\n\nEnd to end: " + ", ".join(f"{name} {time:.2f} s" for name, time in times.items()) + "."
    if world.rank:
        return
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "switching.json").write_text(json.dumps(result, indent=2) + "\n")
    if arguments.write_docs:
        write_between("switching.json", f"{text}\n\n{result['device']}; {result['date']}; `{result['command']}`.")


if __name__ == "__main__":
    main()
