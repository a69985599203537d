"""What a rank, or all of them, may fail of in one run that trains, without any harm to the world."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from support.jobs import hidden_ids
from support.states import is_same

import hetu
from hetu import rng
from hetu.backends.comm import current_world

OPTIMIZERS = {"SGD": {"momentum": 0.9}, "Adam": {}, "AdamW": {"amsgrad": True}}
S = hetu.IntSymbol("s")
TOKENS = 12


@dataclass
class Script:
    """Two updates of one run, with an attention over all ranks and dropout; the second has a schedule."""

    graph: hetu.Graph
    feeds: dict[Any, Any]
    fetches: list[hetu.Tensor]
    out: hetu.Tensor

    def run(self, run_level: str = "update", **options: Any) -> list[torch.Tensor]:
        return self.graph.run(self.fetches, self.feeds, int_symbol_dict={S: TOKENS}, run_level=run_level, **options)


def script(kind: str = "SGD", schedule: Any = None, init: Any = torch.nn.init.normal_, stage: int = 0) -> Script:
    """Feeds the rank's own shard, or all shards where there is no other rank, or nothing where it has no pipeline."""
    world = hetu.init_distributed()
    parts = [S // 2, S - S // 2]
    make = partial(getattr(hetu.optim, kind), lr=0.1, zero_stage=stage, **OPTIMIZERS[kind])
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 24], name="x")
        a, b = (hetu.parameter(init, [24], name=name) for name in "ab")
        out = hetu.parallel_attn(x * a * b, 8, 1, [parts], [[0, 0]], p_dropout=0.1)[0]
        first = make().minimize(hetu.sum(out * out), [a], name="first")
        second = make(schedule=schedule or steady, max_grad_norm=1.0).minimize(hetu.sum(out), [b], name="second")
    shards = g.layout(0, int_symbol_dict={S: TOKENS}).scatter(torch.linspace(-1, 1, TOKENS * 24).view(TOKENS, 24))
    own = shards[world.rank : world.rank + 1] if world.is_distributed else [hetu.Shards(shards)]
    return Script(g, {x: own[0]} if own else {}, [first, hetu.optim.grad_norm(first), second], out)


def steady(optimizer: Any) -> Any:
    """A schedule that takes the loss."""
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


# What may happen in the midst of an update. Each is a context.


@contextmanager
def _in_place_of(owner: Any, name: str, number: int, error: Exception, is_done: bool) -> Iterator[None]:
    """The ``number``-th call of something raises; ``is_done``: after it was done."""
    plain, left = getattr(owner, name), [number]

    def patched(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and not is_done:
            raise error
        result = plain(*arguments, **options)
        if left[0] == 0:
            raise error
        return result

    with patch.object(owner, name, patched):
        yield


def step(kind: str, number: int = 1, is_done: bool = False, error: Exception | None = None) -> Any:
    """The step of an optimiser of torch."""
    error = RuntimeError("no step today") if error is None else error
    return _in_place_of(getattr(torch.optim, kind), "step", number, error, is_done)


def schedule(kind: str) -> Any:
    """The step of a schedule, after all updates."""
    owner = torch.optim.lr_scheduler.ReduceLROnPlateau
    return _in_place_of(owner, "step", 1, ValueError("no schedule today"), True)


def norm(kind: str, number: int = 2) -> Any:
    """The norm of the gradients of the second update."""
    return _in_place_of(torch.nn.utils, "get_total_norm", number, ArithmeticError("no norm today"), False)


def clipping(kind: str) -> Any:
    """Clipping the gradients."""
    return _in_place_of(torch.nn.utils, "clip_grads_with_norm_", 1, TypeError("no clipping today"), False)


Mishap = Callable[[str], Any]
MISHAPS: dict[str, Mishap] = {
    "the first step": step,
    "the first step, half done": partial(step, is_done=True),
    "the last step": partial(step, number=2, is_done=True),
    "the device's memory": partial(step, number=2, error=torch.OutOfMemoryError("CUDA out of memory")),
    "the schedule": schedule,
    "the norm": norm,
    "clipping": clipping,
}


@dataclass(frozen=True)
class Told:
    """What a rank was told of a run that failed, and whether that run changed anything."""

    kinds: tuple[str, ...]
    text: str
    has_changed: bool = False


def refused(run: Callable[[], Any]) -> Told:
    """How a run fails."""
    try:
        run()
    except Exception as error:
        return Told(tuple(kind.__name__ for kind in type(error).__mro__), str(error))
    raise AssertionError("it was not refused")


def train(
    kind: str, mishap: str | None = None, who: Collection[int] = (), run_level: str = "update", stage: int = 0
) -> Any:
    """Trains for two steps, the first of two runs, with a run between them that fails on some ranks.

    Returns:
        What was told of that run, and the state in the end.
    """
    hetu.manual_seed(5)
    made, told = script(kind, stage=stage), None
    made.run()
    made.run("grad")
    if mishap is not None:
        before, generator = made.graph.state_dict(), rng.get_state()
        with MISHAPS[mishap](kind) if hetu.init_distributed().rank in who else nullcontext():
            told = refused(partial(made.run, run_level))
        is_same_now = is_same(before, made.graph.state_dict()) and generator == rng.get_state()
        told = replace(told, has_changed=not is_same_now)
    made.run()
    return told, made.graph.state_dict()


def makes(what: str, who: Collection[int]) -> Told:
    """Runs a graph of which something can't be made on some ranks; then one of which all can."""

    def make(given: Any) -> Any:
        if hetu.init_distributed().rank in who:
            raise ValueError("no value today")
        return given.fill_(1.0) if isinstance(given, torch.Tensor) else steady(given)

    if what == "a schedule":
        told = refused(script(schedule=make).run)
    else:
        made = script(init=make)
        if what == "a parameter that is only read":
            made.fetches = [made.out]
        told = refused(made.run)
    script().run()
    return told


def unseen(who: Collection[int], stage: int = 0) -> bool:
    """Whether a run that fails on some ranks changes nothing, where only devices know if ids are in range."""
    with hidden_ids():
        hetu.manual_seed(3)
        size = current_world().size
        with hetu.graph("define_and_run", strategies=[hetu.Strategy([2] * size, [0] * size)], device="cpu") as g:
            ids = hetu.placeholder("int64", [2], name="ids")
            rows = hetu.embedding(ids, hetu.parameter(torch.ones(50, 20), [50, 20], name="table"))
            train = hetu.optim.SGD(lr=0.1, zero_stage=stage).minimize(hetu.sum(rows * rows), name="train")
        feeds = {ids: torch.tensor([0, 41])}
        g.run(train, feeds)
        before = g.state_dict()
        with step("SGD", is_done=True) if current_world().rank in who else nullcontext():
            refused(partial(g.run, train, feeds))
        is_kept = is_same(g.state_dict(), before)
        g.run(train, feeds)
        return is_kept and not is_same(g.state_dict(), before)


_kept: list[tuple[Script, Any]] = []


def interrupted(who: Collection[int]) -> None:
    """A run in whose last step some ranks are interrupted."""
    made = script()
    made.run()
    _kept[:] = [(made, made.graph.state_dict())]
    error: Any = KeyboardInterrupt()
    with step("SGD", 2, True, error) if hetu.init_distributed().rank in who else nullcontext():
        made.run()


def is_as_before() -> bool:
    """Whether that run changed nothing here."""
    ((made, before),) = _kept
    return is_same(made.graph.state_dict(), before)
