"""One script, and what may go wrong with it on a rank: each change is a function that gets what the rank would run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from support.jobs import own
from support.poison import unpoison

import hetu
from hetu.backends.comm import transfers
from hetu.ops.attention import parallel_attn as parallel_attention
from hetu.parallel import build_plan

S = hetu.IntSymbol("s")
LENGTHS = [[S // 3, S // 2, S - S // 3 - S // 2], [S // 2, S - S // 2]]


@dataclass(frozen=True)
class Script:
    """A graph of two strategies, of three pipelines and of two, with dropout, and what trains it."""

    graph: hetu.Graph
    x: hetu.Tensor
    cu: hetu.Tensor
    out: hetu.Tensor
    lse: hetu.Tensor
    loss: hetu.Tensor
    train: hetu.Tensor


@cache
def script(dtype: str = "float32", device: str | None = "cpu") -> Script:
    """The same object for all runs of a process, as in a user's script."""
    with hetu.graph("define_and_run", num_strategy=2, device=device) as g:
        x = hetu.placeholder(dtype, [hetu.IntSymbol("rows"), 24], name="x")
        cu = hetu.placeholder(hetu.int32, [hetu.IntSymbol("documents") + 1], name="cu")
        qkv = x * hetu.parameter(1.0, [24], dtype, name="scale")
        groups = [[0] * len(lens) for lens in LENGTHS]
        out, lse, _ = hetu.parallel_attn(qkv, 8, 1, LENGTHS, groups, True, cu, p_dropout=0.1, split="sym")
        loss = hetu.sum(out * out)
        train = hetu.optim.SGD(lr=0.1).minimize(loss, name="train")
    return Script(g, x, cu, out, lse, loss, train)


@dataclass
class Run:
    """What a rank runs; changes are made to it."""

    rank: int
    script: Script
    fetches: Any = None
    feeds: dict[Any, Any] = field(default_factory=dict)
    symbols: dict[Any, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    backend: str = "torch"

    def bind(self, tokens: int, strategy: int) -> None:
        """Feeds the rank's own shard of so many tokens, or all shards where there is no other rank."""
        g, cu = self.script.graph, np.array([0, tokens // 4, tokens], np.int32)
        self.symbols, self.options["strategy"] = {S: tokens}, strategy
        layout = g.layout(strategy, int_symbol_dict=self.symbols, cu_seqlens=[cu])
        data = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(tokens))
        shards = layout.scatter(data.to(getattr(torch, self.script.x.dtype.name)))
        if not hetu.init_distributed().is_distributed:
            self.feeds = {self.script.x: hetu.Shards(shards), self.script.cu: cu}
        else:
            self.feeds = {self.script.x: shards[self.rank], self.script.cu: cu} if self.rank < len(shards) else {}


Change = Callable[[Run], None]


def run(
    changes: Mapping[int, Change] | None = None,
    tokens: int = 12,
    strategy: int = 0,
    fetch: str = "out",
    device: str = "cpu",
) -> Any:
    """Runs the script, with a change on some ranks."""
    made = Run(hetu.init_distributed().rank, script(device=device))
    made.fetches = getattr(made.script, fetch)
    made.bind(tokens, strategy)
    if changes and made.rank in changes:
        changes[made.rank](made)
    hetu.manual_seed(made.seed)
    with hetu.config(backend=made.backend):
        return own(made.script.graph.run(made.fetches, made.feeds, int_symbol_dict=made.symbols, **made.options))


def watched(changes: dict[int, Change], tokens: int, **options: Any) -> tuple[list[str], bool]:
    """Runs a script that is refused: the error's kinds and text, and whether anything was begun."""
    world = hetu.init_distributed()
    launches = world.launches
    try:
        run(changes, tokens, **options)
    except Exception as error:
        return [*(kind.__name__ for kind in type(error).__mro__), str(error)], world.launches > launches
    raise AssertionError("it was not refused")


def gather(changes: Mapping[int, Change]) -> Any:
    """Calls gather_shards, with a change on some ranks."""
    made = Run(hetu.init_distributed().rank, script())
    if made.rank in changes:
        changes[made.rank](made)
    return list(hetu.gather_shards(torch.ones(made.rank)))


def run_from_used_memory(*arguments: Any, **options: Any) -> Any:
    """Runs the script where fresh memory holds what was there, as it does for users, and not the tests' NaN."""
    unpoison()
    return run(*arguments, **options)


def here() -> int:
    """That the process lives."""
    return os.getpid()


# What differs


def another_strategy(made: Run) -> None:
    made.bind(12, 1 - made.options["strategy"])


def a_strategy_to_be_chosen(made: Run) -> None:
    made.options["strategy"] = "auto"


def other_lengths(made: Run) -> None:
    made.bind(11, made.options["strategy"])


def other_symbols_alone(made: Run) -> None:
    made.symbols = {S: 13}


def other_dtype(made: Run) -> None:
    made.script = script("float64", made.script.graph.device)
    made.fetches = made.script.out
    made.bind(12, made.options["strategy"])


def other_fetches(made: Run) -> None:
    made.fetches = made.script.lse


def more_fetches(made: Run) -> None:
    made.fetches = [made.script.out, made.script.lse]


def more_micro_batches(made: Run) -> None:
    made.feeds = {key: [value, value] for key, value in made.feeds.items()}
    made.options["num_micro_batches"] = 2


def another_seed(made: Run) -> None:
    made.seed = 99


def another_backend(made: Run) -> None:
    made.backend = "triton"


def another_run_level(made: Run) -> None:
    made.options["run_level"] = "grad"


def adds_a_demand_after_a_run(rank: int) -> str:
    """Runs a graph on all ranks, and once more after ``rank`` alone demanded something: the error of that."""
    n = hetu.IntSymbol("n")
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [n], name="x")
        y = x + 1.0
    g.run(y, {x: torch.ones(3)})
    if hetu.init_distributed().rank == rank:
        with g:
            hetu.require(n <= 100)
    with pytest.raises(hetu.CommunicationError) as caught:
        g.run(y, {x: torch.ones(3)})
    return str(caught.value)


# What is bad on one rank


def too_many_rows(made: Run) -> None:
    made.feeds[made.script.x] = torch.cat([made.feeds[made.script.x]] * 2)


def no_rows(made: Run) -> None:
    made.feeds[made.script.x] = torch.zeros(0, 24)


def other_columns(made: Run) -> None:
    made.feeds[made.script.x] = made.feeds[made.script.x][:, :23]


def other_documents(made: Run) -> None:
    made.feeds[made.script.cu] = np.array([0, 5, 12], np.int32)


def wrong_feed_dtype(made: Run) -> None:
    made.feeds[made.script.x] = made.feeds[made.script.x].double()


def missing_feed(made: Run) -> None:
    del made.feeds[made.script.cu]


def no_feeds(made: Run) -> None:
    made.feeds = {}


def no_placeholder(made: Run) -> None:
    made.feeds[made.script.out] = torch.zeros(1)


def too_few_shards(made: Run) -> None:
    made.feeds = {key: hetu.Shards([value] * 2) for key, value in made.feeds.items()}


def no_such_strategy(made: Run) -> None:
    made.options["strategy"] = 7


def of_another_graph(made: Run) -> None:
    made.fetches = script("float64").out


def no_such_run_level(made: Run) -> None:
    made.options["run_level"] = "often"


def raises_while_planning(made: Run) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no plan today")

    _patch_builder(fail)


def is_interrupted_while_planning(made: Run) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    _patch_builder(interrupt)


def plans_something_else(made: Run) -> None:
    _patch_builder(lambda *a, **k: build_plan(*a, **{**k, "method": "ring"}))


def _patch_builder(other: Any) -> None:
    """For the next plan alone."""
    patch = pytest.MonkeyPatch()

    def once(*args: Any, **options: Any) -> Any:
        patch.undo()
        return other(*args, **options)

    patch.setattr(parallel_attention, "build_plan", once)


# Who doesn't come, goes, or fails on the way


def dies(_: Run) -> None:
    os._exit(7)


def sleeps(_: Run) -> None:
    time.sleep(1000)


def gathers_instead(made: Run) -> None:
    hetu.gather_shards(torch.ones(1))


def is_interrupted(_: Run) -> None:
    raise KeyboardInterrupt


def _raise() -> None:
    raise ValueError("out of luck")


def _interrupt() -> None:
    raise KeyboardInterrupt


_HAPPENS = {
    "dies": partial(os._exit, 7),
    "raises": _raise,
    "sleeps": partial(time.sleep, 1000),
    "is interrupted": _interrupt,
}


def at_the_transfer(what: str, number: int, owner: str = "send") -> Change:
    """Something happens when this rank starts its ``number``-th transfer."""
    return partial(_at_the_transfer, _HAPPENS[what], number, owner)


def _at_the_transfer(happens: Callable[[], None], number: int, owner: str, _: Run) -> None:
    plain, count = getattr(transfers.DistributedComm, owner), [0]

    def patched(self: Any, *args: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            happens()
        return plain(self, *args)

    setattr(transfers.DistributedComm, owner, patched)
