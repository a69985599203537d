"""What the host does for a run: how long it takes, and how long it may.

Prints a table with medians and quartiles, and writes it with the machine and the versions to
``benchmarks/results/host.json``. ``--write-docs`` also writes it into ``docs/performance.md``.

    python benchmarks/host.py [--only NAME] [--write-docs]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from tables import DOCS, ROOT, Row, keep, print_table, timed

import hetu
from hetu.parallel import Heads, Layout, build_pipeline_plan

# A graph of 200 small ops


def small_ops(repeats: int = 400) -> Iterator[Row]:
    """200 ops on 32 x 32 floats, by hetu and by torch in turns, so that both meet the same machine."""
    torch.set_num_threads(1)  # ops so small gain nothing from a second thread, and it makes the times jump
    values = {name: torch.randn(32, 32) / 6 for name in ("x", "scale", "shift", "turn")}

    def chain(ops: Any, silu: Callable[[Any], Any], x: Any, scale: Any, shift: Any, turn: Any) -> Any:
        for _ in range(50):
            x = silu(ops.matmul(ops.add(ops.mul(x, scale), shift), turn))
        return x

    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 32], name="x")
        constants = [hetu.constant(values[name].numpy(), name=name) for name in ("scale", "shift", "turn")]
        y = chain(hetu, hetu.silu, x, *constants)
    assert len(g.nodes) == 204

    def by_hetu() -> torch.Tensor:
        return g.run(y, {x: values["x"]})

    @torch.no_grad()
    def by_torch() -> torch.Tensor:
        return chain(torch, torch.nn.functional.silu, *values.values())

    torch.testing.assert_close(by_hetu(), by_torch())
    pairs = [(timed(by_hetu, 1e6), timed(by_torch, 1e6)) for _ in range(repeats)][repeats // 10 :]
    yield Row.of("200 small ops, by torch", "µs", [pair[1] for pair in pairs])
    yield Row.of("200 small ops, by hetu", "µs", [pair[0] for pair in pairs])
    yield Row.of("200 small ops, hetu over torch", "times", [pair[0] / pair[1] for pair in pairs], limit=1.25)


# Planning a new set of lengths


class Lengths:
    """A graph with one packed ``parallel_attn`` over 8 pipelines, and sets of 64 document lengths to run it with."""

    PIPELINES, DOCUMENTS, HEAD_DIM = 8, 64, 8

    def __init__(self) -> None:
        s = hetu.IntSymbol("s")
        self.s, each = s, s // self.PIPELINES
        self.lengths = [each] * (self.PIPELINES - 1) + [s - each * (self.PIPELINES - 1)]
        with hetu.graph("define_and_run", device="cpu") as g:
            self.qkv = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 3 * self.HEAD_DIM], name="qkv")
            self.cu = hetu.placeholder(hetu.int32, [hetu.IntSymbol("docs") + 1], name="cu_seqlens")
            self.out, *_ = hetu.parallel_attn(
                self.qkv,
                self.HEAD_DIM,
                1,
                [self.lengths],
                [[0] * self.PIPELINES],
                packing=True,
                cu_seqlens_q=self.cu,
                cu_seqlens_k=self.cu,
                split="sym",
            )
        self.graph, self.random = g, np.random.default_rng(0)
        self.rows = torch.zeros(1 << 18, 3 * self.HEAD_DIM)

    def draw(self) -> np.ndarray:
        """New cumulative lengths: a long-tailed mix, about a thousand tokens a document."""
        lengths = np.minimum(self.random.lognormal(6, 1.2, self.DOCUMENTS).astype(np.int64), 16384)
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def request(self, cu: np.ndarray) -> dict[str, Any]:
        """What a run with these lengths is given."""
        total = int(cu[-1])
        held = [total // self.PIPELINES] * (self.PIPELINES - 1)
        held.append(total - sum(held))
        feeds = {self.qkv: hetu.Shards(self.rows[:count] for count in held), self.cu: cu}
        return {"feed_dict": feeds, "int_symbol_dict": {self.s: total}, "strategy": 0}


def planning(repeats: int = 200) -> Iterator[Row]:
    """Bind, select and plan for lengths never seen, and for lengths seen before."""
    case = Lengths()
    requests = [case.request(case.draw()) for _ in range(repeats)]

    def prepare(given: dict[str, Any]) -> None:
        case.graph.prepare(case.out, **given).build_parts(range(case.PIPELINES))

    def own_plan(given: dict[str, Any], pipeline: int) -> Any:
        held, cu = [len(shard) for shard in given["feed_dict"][case.qkv]], given["feed_dict"][case.cu]
        layout = Layout.build(held, [0] * case.PIPELINES, split="sym", cu_seqlens=cu)
        return build_pipeline_plan(layout, pipeline, heads=Heads(1, 1, case.HEAD_DIM, itemsize=4))

    own = [timed(partial(own_plan, given, i % case.PIPELINES), 1e6) for i, given in enumerate(requests)]
    new = [timed(partial(prepare, given), 1e6) for given in requests]
    seen = [timed(partial(prepare, given), 1e6) for given in requests]
    skip = repeats // 10  # warming up
    yield Row.of("64 new lengths: layout + one pipeline's own plan of 8", "µs", own[skip:], limit=500)
    yield Row.of("64 new lengths: bind + select + plan, all 8", "µs", new[skip:], limit=2000)
    yield Row.of("64 lengths seen before: bind + select + plan, all 8", "µs", seen[skip:], limit=50)


# Building and importing


def building(repeats: int = 7, nodes: int = 10_000) -> Iterator[Row]:
    """A graph of 10,000 nodes with symbolic shapes."""

    def build() -> None:
        with hetu.graph("define_and_run") as g:
            x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 64], name="x")
            weight = hetu.constant(np.ones((64, 64), np.float32), name="weight")
            while len(g.nodes) < nodes:
                x = hetu.add(hetu.silu(hetu.linear(x, weight)), x)
        assert len(g.nodes) >= nodes

    yield Row.of(f"building {nodes:,} nodes", "s", [timed(build, 1) for _ in range(repeats)], limit=2)


def importing(repeats: int = 11) -> Iterator[Row]:
    """``import hetu`` in a new process, which must not load torch."""
    code = (
        "import sys, time; start = time.perf_counter(); import hetu; hetu.IntSymbol; "
        "print(time.perf_counter() - start); assert not {'torch', 'triton'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code]
    samples = [float(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout) for _ in range(repeats)]
    yield Row.of("import hetu, without torch", "s", samples[1:], limit=0.6)


MEASURES: dict[str, Callable[[], Iterator[Row]]] = {
    "small_ops": small_ops,
    "planning": planning,
    "building": building,
    "importing": importing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MEASURES, help="take one measure, and write nothing")
    parser.add_argument("--write-docs", action="store_true", help=f"also write into {DOCS.relative_to(ROOT)}")
    arguments = parser.parse_args()
    measures = [MEASURES[arguments.only]] if arguments.only else list(MEASURES.values())
    rows = [row for measure in measures for row in measure()]
    print_table(rows)
    if arguments.only:
        return
    keep("host", rows, arguments.write_docs)


if __name__ == "__main__":
    main()
