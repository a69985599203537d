"""One script that the ranks run with other values: of what stands in the graph, and of what it keeps between runs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.jobs import own

import hetu
from hetu.backends.comm import wire
from hetu.runtime.ranks import agreed_state

S = hetu.IntSymbol("s")


class Script:
    """A graph of one attention over two pipelines and a weight, and what trains it.

    Args:
        weight: What the weight starts from.
        extra: What is done with the rows before the attention.
        optimizer: What trains it.
        group: Options of the weight's group.
        demand: Gives what is required of symbols.
    """

    def __init__(
        self,
        weight: Any = torch.nn.init.normal_,
        extra: Callable[[hetu.Tensor], hetu.Tensor] | None = None,
        optimizer: Any = None,
        group: Any = None,
        demand: Callable[[], Any] | None = None,
    ) -> None:
        with hetu.graph("define_and_run", device="cpu", name="script") as self.graph:
            self.x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 24], name="x")
            w = hetu.parameter(weight, [24], name="w")
            y = self.x * w if extra is None else extra(self.x * w)
            self.out = hetu.parallel_attn(y, 8, 1, [[S // 2, S - S // 2]], [[0, 0]])[0]
            if demand is not None:
                hetu.require(demand())
            loss = hetu.sum(self.out * self.out)
            groups = None if group is None else [{"params": [w], **group}]
            self.train = (optimizer or hetu.optim.SGD(lr=0.01)).minimize(loss, groups, name="t")

    def run(self, fetch: str = "train", tokens: int = 8, **options: Any) -> list[torch.Tensor]:
        """A run of this rank's rows."""
        rows = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(tokens))
        shard = self.graph.layout(0, int_symbol_dict={S: tokens}).scatter(rows)[hetu.init_distributed().rank]
        return own(self.graph.run(getattr(self, fetch), {self.x: shard}, int_symbol_dict={S: tokens}, **options))


def _cosine(end: int) -> Any:
    return functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=end)


def _late(rank: int) -> Any:
    """A rate that differs from the third step on."""
    rule = lambda step: 1.0 if step < 2 else 1.0 + rank  # noqa: E731
    return functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=rule)


def _times(symbol: hetu.IntSymbol, data: int | None = None) -> Callable[[hetu.Tensor], hetu.Tensor]:
    if data is not None:
        symbol.set_data(data)
    return lambda y: y * symbol


def _plus(value: Any, dtype: Any = None) -> Callable[[hetu.Tensor], hetu.Tensor]:
    return lambda y: y + hetu.cast(hetu.constant(value, dtype), hetu.float32)


def _own_draw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float(np.random.default_rng(hetu.init_distributed().rank).standard_normal()))


GRAPHS: dict[str, Callable[[int], Script]] = {
    "a weight's array": lambda r: Script(np.full(24, 1.0 + r / 2**20, np.float32)),
    "a weight's tensor": lambda r: Script(torch.ones(24, dtype=torch.float64) + r),
    "a weight's number": lambda r: Script(1.0 + r),
    "a closure": lambda r: Script(lambda t: t.fill_(1.0 + r)),
    "what an initialiser draws": lambda r: Script(_own_draw),
    "an initialiser's arguments": lambda r: Script(functools.partial(torch.nn.init.normal_, std=1.0 + r)),
    "a constant's array": lambda r: Script(extra=_plus(np.arange(24, dtype=np.float32) + r * 2.0**-18)),
    "a constant's tensor": lambda r: Script(extra=_plus(torch.ones(24, dtype=torch.bfloat16) * (1 + r))),
    "a constant's list": lambda r: Script(extra=_plus([0.5 + r] * 24)),
    "a constant of ints": lambda r: Script(extra=_plus(np.full(24, r, np.int64))),
    "a constant of bools": lambda r: Script(extra=_plus(np.arange(24) > r)),
    "a constant's dtype": lambda r: Script(extra=_plus([1.0] * 24, ["float32", "float64"][r])),
    "a zero's sign": lambda r: Script(extra=lambda y: y * hetu.full([24], [0.0, -0.0][r])),
    "an operand": lambda r: Script(extra=lambda y: y * (1.0 + r * 1e-15)),
    "a default": lambda r: Script(extra=_times(hetu.IntSymbol("k"), 4 - r)),
    "an unnamed default": lambda r: Script(extra=_times(hetu.IntSymbol(4 - r))),
    "a maximum": lambda r: Script(extra=_times(hetu.IntSymbol("k", max=9 - r), 3)),
    "a minimum": lambda r: Script(extra=_times(hetu.IntSymbol("k", min=r), 3)),
    "a multiple": lambda r: Script(extra=_times(hetu.IntSymbol("k", multiple_of=1 + r), 4)),
    "a demand": lambda r: Script(demand=lambda: 100 + r >= S),
    "a rate": lambda r: Script(optimizer=hetu.optim.SGD(lr=0.01 * (1 + r))),
    "a rate's tensor": lambda r: Script(optimizer=hetu.optim.Adam(lr=torch.tensor(0.01 + r * 1e-8))),
    "a group's option": lambda r: Script(group={"weight_decay": 0.1 * r}),
    "a norm to clip at": lambda r: Script(optimizer=hetu.optim.SGD(lr=0.01, max_grad_norm=1.0 + r)),
    "another optimiser": lambda r: Script(optimizer=[hetu.optim.Adam, hetu.optim.AdamW][r](lr=0.01)),
    "a schedule's length": lambda r: Script(optimizer=hetu.optim.SGD(lr=0.01, schedule=_cosine(5 + r))),
}
"""Scripts that differ between two ranks before their first run."""


def _weights(state: Any) -> None:
    state["parameters"]["w"] = state["parameters"]["w"] + 2.0**-20


def _averages(state: Any) -> None:
    state["optimizers"]["t"]["state"]["w"]["exp_avg"] += 1e-6


def _steps(state: Any) -> None:
    state["optimizers"]["t"]["state"]["w"]["step"] += 1


def _rate(state: Any) -> None:
    state["optimizers"]["t"]["groups"][0]["lr"] *= 2


def _schedule(state: Any) -> None:
    state["optimizers"]["t"]["schedule"]["last_epoch"] += 1


def _gradients(state: Any) -> None:
    state["gradients"]["t"]["w"] = state["gradients"]["t"]["w"] + 1e-6


def _losses(state: Any) -> None:
    state["waiting_losses"]["t"] = state["waiting_losses"]["t"] * 1.5


def _no_gradients(state: Any) -> None:
    state["gradients"].clear()
    state["waiting_losses"].clear()


STATES: dict[str, Callable[[Any], None]] = {
    "weights": _weights,
    "averages": _averages,
    "steps": _steps,
    "the rate": _rate,
    "the schedule": _schedule,
    "waiting gradients": _gradients,
    "waiting losses": _losses,
    "gradients that wait at all": _no_gradients,
}
"""What one rank does to a state before it loads it."""


def _refused(action: Callable[[], Any]) -> list[str]:
    """The kind and the text of the error; what was begun counts as a failure."""
    launches = hetu.init_distributed().launches
    with pytest.raises(hetu.HetuError) as caught:
        action()
    assert hetu.init_distributed().launches == launches, "it was begun"
    return [type(caught.value).__name__, str(caught.value)]


def graphs_that_differ(what: str) -> list[str]:
    """The error of a run of graphs that differ; afterwards equal ones run."""
    hetu.manual_seed(0)
    text = _refused(GRAPHS[what](hetu.init_distributed().rank).run)
    hetu.manual_seed(0)
    Script().run()
    return text


def schedules_that_differ_late() -> tuple[list[torch.Tensor], list[str]]:
    """The losses of the steps in which a schedule gives the same on all ranks, and the error of the next one."""
    hetu.manual_seed(0)
    optimizer = hetu.optim.SGD(lr=0.01, schedule=_late(hetu.init_distributed().rank))
    script = Script(optimizer=optimizer)
    return [script.run()[0] for _ in range(2)], _refused(script.run)


def a_norm_that_one_rank_sets() -> list[str]:
    """The error of a run after one rank alone set the norm to clip at, between two runs."""
    optimizer = hetu.optim.SGD(lr=0.01, max_grad_norm=1.0)
    script = Script(optimizer=optimizer)
    script.run()
    optimizer.max_grad_norm = 1.0 + hetu.init_distributed().rank
    return _refused(script.run)


def states_that_differ(what: str, after_a_run: bool) -> list[str]:
    """The error of a run after one rank loaded another state; once all have loaded the same it runs.

    Args:
        what: What the last rank changes.
        after_a_run: Whether the graph that loads it has run before, so that all ranks agreed on its state.
    """
    hetu.manual_seed(0)
    make = lambda: Script(optimizer=hetu.optim.Adam(lr=0.01, schedule=_cosine(9)))  # noqa: E731
    script = make()
    script.run()
    script.run(run_level="grad")
    state = script.graph.state_dict()
    if not after_a_run:
        script = make()
    if hetu.init_distributed().rank == 1:
        STATES[what](state)
        script.graph.load_state_dict(state)
    elif not after_a_run:
        script.graph.load_state_dict(state)
    texts = [_refused(script.run), _refused(script.run)]
    assert texts[0][1].splitlines()[2:] == texts[1][1].splitlines()[2:]
    for item in (state["optimizers"], state["gradients"], state["waiting_losses"]):
        item.clear()
    state["parameters"] = {"w": torch.ones(24)}
    script.graph.load_state_dict(state)
    script.run()
    return texts[0]


def a_state_that_one_rank_made_early() -> list[list[torch.Tensor]]:
    """Runs after one rank looked at its state before, or loaded its own: nothing differs, so nothing is refused."""
    hetu.manual_seed(0)
    script = Script()
    is_early = hetu.init_distributed().rank == 1
    if is_early:
        script.graph.state_dict()
    first = script.run()
    if is_early:
        script.graph.load_state_dict(script.graph.state_dict())
    return [first, script.run("out"), script.run()]


def defaults_that_differ_unused() -> list[torch.Tensor]:
    """A run in which defaults differ of symbols that shapes and the run bind, and of one that it doesn't need."""
    rank = hetu.init_distributed().rank
    k = hetu.IntSymbol("k")
    script = Script()
    script.x.symbolic_shape[0].set_data(3 + rank)
    with script.graph:
        hetu.full([k], 1.0)
    k.set_data(7 + rank)
    hetu.manual_seed(0)
    b = hetu.IntSymbol("b")
    b.set_data(rank)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 24], name="x")
        out = hetu.parallel_attn(x, 8, 1, [[3, 3]], [[0, b]])[0]
    return [*script.run("out"), *own(g.run(out, {x: torch.ones(3, 24)}, int_symbol_dict={b: 1}))]


def a_default_set_between_runs() -> list[str]:
    """The error of a run after one rank alone set a symbol's default, between two that run."""
    rank, k = hetu.init_distributed().rank, hetu.IntSymbol("k")
    k.set_data(2)
    hetu.manual_seed(0)
    script = Script(extra=lambda y: y * k)
    script.run("out")
    k.set_data(2 + rank)
    text = _refused(lambda: script.run("out"))
    k.set_data(2)
    script.run("out")
    return text


def a_group_set_between_runs() -> list[str]:
    """The same with a default that says which context group a pipeline is in."""
    rank, b = hetu.init_distributed().rank, hetu.IntSymbol("b")
    b.set_data(0)
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 24], name="x")
        out = hetu.parallel_attn(x, 8, 1, [[3, 3]], [[0, b]])[0]
    feeds = {x: torch.ones(3, 24)}
    g.run(out, feeds)
    b.set_data(rank)
    text = _refused(lambda: g.run(out, feeds))
    b.set_data(0)
    g.run(out, feeds)
    return text


def speaks_another_version() -> list[list[str]]:
    """The errors of a run and of gathering, where one rank has another version of the wire's format; then both work."""
    script, rows = Script(), torch.ones(1)
    texts = []
    for action in (script.run, lambda: hetu.gather_shards(rows)):
        with pytest.MonkeyPatch.context() as patch:
            if hetu.init_distributed().rank == 1:
                patch.setattr(wire, "_HEAD", b"hetu/2 ")
            texts.append(_refused(action))
        if action == script.run:
            script.run()
    return texts


def fails_to_initialise() -> list[str]:
    """The error of a run where the initialiser fails on one rank; afterwards another script runs."""

    def init(tensor: torch.Tensor) -> torch.Tensor:
        if hetu.init_distributed().rank == 1:
            raise ValueError("no weight today")
        return tensor

    text = _refused(Script(init).run)
    Script().run()
    return text


def digests_of_training(steps: int) -> int:
    """How often the state is digested while a script trains."""
    script, plain, count = Script(), agreed_state.state_parts, [0]

    def counted(state: Any) -> list[str]:
        count[0] += 1
        return plain(state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreed_state, "state_parts", counted)
        for step in range(steps):
            script.run(tokens=8 + step, run_level=["update", "grad"][step % 2])
    return count[0]


def warnings_of_a_first_step() -> list[str]:
    """What is warned of while a script trains and its result is gathered."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        script = Script()
        script.run()
        hetu.gather_shards(script.run("out")[0])
    return [str(item.message) for item in caught]


RESULTS: dict[str, Callable[[int], Any]] = {
    "an int": lambda r: 5,
    "an array": lambda r: np.ones(2),
    "a list of tensors": lambda r: [torch.ones(2), torch.ones(2)],
    "shards of lists": lambda r: hetu.Shards([[1.0]]),
    "a sparse tensor": lambda r: torch.eye(2).to_sparse(),
    "a meta tensor": lambda r: torch.ones(2, device="meta"),
    "complex numbers": lambda r: torch.ones(2, dtype=torch.complex64),
    "a graph tensor": lambda r: Script().out,
}
"""What is no result of a run."""


def gathers(what: str) -> list[str]:
    """The error of gathering something else on the last rank; afterwards results are gathered."""
    world = hetu.init_distributed()
    value = RESULTS[what](world.rank) if world.rank == world.size - 1 else torch.ones(1)
    text = _refused(lambda: hetu.gather_shards(value))
    assert [x.tolist() for x in hetu.gather_shards(torch.full([1], world.rank))] == [[r] for r in range(world.size)]
    return text


def gathers_too_many() -> list[str]:
    """The error of gathering more values on the last rank than a strategy's pipelines have there."""
    world = hetu.init_distributed()
    values = [torch.ones(1)] * (1 + (world.rank == world.size - 1))
    text = _refused(lambda: hetu.gather_shards(hetu.Shards(values)))
    Script().run() if world.size == 2 else hetu.gather_shards(torch.ones(1))
    return text
