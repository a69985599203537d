"""Small models that train at a stage of sharded state, in one process or on a rank of several."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from support.states import is_same

import hetu
from hetu.backends.comm import current_world, reduce
from hetu.parallel import placement
from hetu.runtime import optimizers
from hetu.runtime.before import Before
from hetu.runtime.gathering import Gathering


@dataclass(frozen=True)
class Case:
    """A model and what it is trained by.

    Attributes:
        shapes: Of its weights, each ``(rows, columns)`` with the columns of the first.
        pipelines: Of each strategy.
        kind: The optimiser.
        options: Its options.
        dtype: Of the weights.
        unit: Elements between which nothing is cut.
        bucket_bytes: What travels together.
        is_mixed: Whether products are in bfloat16, and their values computed again in the backward.
    """

    shapes: Sequence[tuple[int, int]] = ((5, 4), (1, 4), (3, 4))
    pipelines: Sequence[int] = (1, 2, 3)
    kind: str = "AdamW"
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    unit: int = 1
    bucket_bytes: int = reduce.BUCKET_BYTES
    is_mixed: bool = False


@dataclass(frozen=True)
class Step:
    """A run: its strategy, how many micro-batches, what it does with gradients."""

    strategy: int
    micro_batches: int = 1
    run_level: str = "update"


STEPS = (Step(2), Step(1, 2), Step(0, 1, "grad"), Step(1, 1, "grad"), Step(2, 2), Step(0), Step(2, 1, "grad"))
"""All strategies in turns; gradients that wait for an update, and some that wait in the end."""


@contextmanager
def cut_finely(case: Case) -> Iterator[None]:
    """Cuts what is small, too."""
    with patch.object(placement, "UNIT", case.unit), patch.object(reduce, "BUCKET_BYTES", case.bucket_bytes):
        yield


class Model:
    """Weights of several shapes, one of them used twice, one frozen, one without axes and one without elements."""

    def __init__(self, case: Case, stage: int) -> None:
        self.case = case
        columns = case.shapes[0][1]
        strategies = [hetu.Strategy([4] * count, [0] * count) for count in case.pipelines]
        hetu.manual_seed(7)
        with hetu.graph("define_and_run", strategies=strategies, device="cpu") as self.graph:
            self.x = hetu.placeholder(case.dtype, [hetu.IntSymbol("rows"), columns], name="x")
            init = torch.nn.init.normal_
            weights = [
                hetu.parameter(init, shape, case.dtype, name=f"w{i}", requires_grad=i != 1)
                for i, shape in enumerate(case.shapes)
            ]
            scale = hetu.parameter(0.5, [], case.dtype, name="scale")
            nothing = hetu.parameter(0.0, [0, 3], case.dtype, name="nothing")
            out = self.x * scale
            for weight in weights:
                out = _layer(out, weight, case.is_mixed)
            loss = hetu.sum(out * out) + hetu.sum(nothing)
            optimizer = getattr(hetu.optim, case.kind)(lr=0.05, zero_stage=stage, **case.options)
            self.train = optimizer.minimize(loss, name="train")
        self.norm = hetu.optim.grad_norm(self.train)

    def run(self, step: Step, seed: int) -> list[torch.Tensor]:
        """Loss and norm of a step; each rank feeds what it has of the shards of all pipelines."""
        generator = torch.Generator().manual_seed(seed)
        rows = [(seed * 5 + 3 * i) % 4 + 1 for i in range(step.micro_batches)]
        count, columns = self.case.pipelines[step.strategy], self.case.shapes[0][1]
        dtype = getattr(torch, self.case.dtype)
        batches = [
            hetu.Shards(
                [torch.randn(n, columns, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]
            )
            for n in rows
        ]
        feeds = {self.x: batches if len(batches) > 1 else batches[0]}
        fetches = [self.train, self.norm]
        found: list[torch.Tensor] = self.graph.run(
            fetches, feeds, strategy=step.strategy, num_micro_batches=len(batches), run_level=step.run_level
        )
        return found


def _layer(x: hetu.Tensor, weight: hetu.Tensor, is_mixed: bool) -> hetu.Tensor:
    """A weight that is read twice, and in a mixed one through views of a cast."""
    if not is_mixed:
        return hetu.tanh(hetu.matmul(hetu.linear(x, weight), weight)) + x
    with hetu.autocast(hetu.bfloat16), hetu.recompute({"tanh", "cast"}):
        inner = hetu.matmul(x, hetu.transpose(weight, 0, 1))
        return hetu.cast(hetu.tanh(hetu.matmul(inner, weight)), x.dtype) + x


@dataclass(frozen=True)
class Trained:
    """What a rank has in the end."""

    numbers: list[list[torch.Tensor]]
    state: dict[str, Any]
    bytes: dict[str, int]
    gathered: int
    copied: int


def train(
    case: Case,
    stage: int,
    steps: Sequence[Step] = STEPS,
    first: int = 0,
    begin: Path | None = None,
    end: Path | None = None,
) -> Trained:
    """Trains a model.

    Args:
        case: The model.
        stage: Its ``zero_stage``.
        steps: The runs.
        first: The number of the first of them, which says what it sees.
        begin: A file to go on from.
        end: A file that rank 0 writes.
    """
    with cut_finely(case):
        model = Model(case, stage)
        if begin is not None:
            model.graph.load_state_dict(hetu.load(begin))
        with watched_gathers() as peak, watched_copies() as copied:
            numbers = [model.run(step, first + i) for i, step in enumerate(steps)]
        state = model.graph.state_dict()
        if end is not None and current_world().rank == 0:
            hetu.save(state, end)
        return Trained(numbers, state, held_bytes(model.graph), max(peak), max(copied))


def held_bytes(graph: hetu.Graph) -> dict[str, int]:
    """Bytes that this process keeps from run to run: each memory once."""
    state = graph.executor.state
    values = [x for node in state.parameters.nodes for x in state.parameters.storages(node).values()]
    states = [
        x
        for bound in state.optimizers.values()
        for own in bound.optimizer.state.values()
        for x in own.values()
        if x.ndim or x.numel() > 1
    ]
    grads = [x for waiting in state.waiting.values() for x in waiting.grads.values()]
    return {"values": _bytes(values), "state": _bytes(states), "gradients": _bytes(grads)}


@contextmanager
def watched_gathers() -> Iterator[list[int]]:
    """Notes after each message how many bytes are held by messages, and by what was made of them and is not kept."""
    start, finish, now, seen = Gathering.start, Gathering.finish, [0], [0]

    def hold(size: int) -> None:
        now[0] += size
        seen.append(now[0])

    def watched_start(self: Gathering, number: int) -> Any:
        started = start(self, number)
        hold(_of_message(started))
        return started

    def watched_finish(self: Gathering, started: Any) -> list[torch.Tensor]:
        found = finish(self, started)
        kept = [x for node in self.store.nodes for x in self.store.storages(node).values()]
        places = {x.untyped_storage().data_ptr() for x in kept}
        for storage in (x.untyped_storage() for x in found if x.numel()):
            if storage.data_ptr() not in places:
                hold(storage.nbytes())
                weakref.finalize(storage, hold, -storage.nbytes())
        hold(-_of_message(started))  # nobody reads it any more; gloo's threads may have it a little longer
        return found

    with patch.object(Gathering, "start", watched_start), patch.object(Gathering, "finish", watched_finish):
        yield seen


def _of_message(started: Any) -> int:
    """Bytes that a message takes."""
    parts = started.message if isinstance(started.message, tuple) else [started.message]
    return sum(x.nbytes for x in parts if isinstance(x, torch.Tensor))


@contextmanager
def watched_copies() -> Iterator[list[int]]:
    """Notes how many bytes an update copies so that it can be taken back."""
    before, seen = optimizers.Before, [0]

    def noted(*objects: Any) -> Before:
        made = before(*objects)
        seen.append(sum(joined.nbytes for group, joined in made._values if group[0].ndim))
        return made

    with patch.object(optimizers, "Before", noted):
        yield seen


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Of all memory that the tensors keep alive."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


# What may go wrong


_kept: list[tuple[Model, Any]] = []


def fails_while_gathering(stage: int, who: Sequence[int], is_done: bool) -> None:
    """A run that fails on some ranks when values are on their way, or have come."""
    plain = current_world().finish_gather

    def gather(*arguments: Any) -> Any:
        found = plain(*arguments) if is_done else None
        if current_world().rank in who:
            raise ValueError("lost on the way")
        return found if is_done else plain(*arguments)

    case = Case()
    with cut_finely(case):
        model = Model(case, stage)
        model.run(STEPS[0], 0)
        _kept[:] = [(model, copy.deepcopy(_here(model)))]
        with patch.object(current_world(), "finish_gather", gather):
            model.run(STEPS[1], 1)


def is_as_before() -> bool:
    """Whether that run changed nothing of what lies here."""
    ((model, before),) = _kept
    return is_same(_here(model), before)


def _here(model: Model) -> list[Any]:
    """What this process owns, without asking others: of what others have updated it may have got a part."""
    state = model.graph.executor.state
    sources = [(node, state.parameters.homes.source(node)) for node in state.parameters.nodes]
    values = [state.parameters.own(node, source) for node, source in sources if source is not None]
    return [values, [list(own.values()) for one in state.optimizers.values() for own in one.optimizer.state.values()]]


def loads(stage: int, path: Path, who: Sequence[int], part: str) -> str:
    """What a rank is told if some load another state than the others; "" if a run goes on from it."""
    case = Case()
    with cut_finely(case):
        model, state = Model(case, stage), hetu.load(path)
        if current_world().rank in who:
            of = {
                "parameters": state["parameters"],
                "gradients": state["gradients"]["train"],
                "state": state["optimizers"]["train"]["state"]["w0"],
            }[part]
            of["w0" if "w0" in of else "exp_avg"].add_(1.0)
        model.graph.load_state_dict(state)
        try:
            model.run(STEPS[0], 0)
        except hetu.HetuError as error:
            return str(error)
        return ""


def goes_back_alone(stage: int) -> str:
    """What a rank is told if rank 1 goes back to where the others began."""
    case = Case()
    with cut_finely(case):
        model = Model(case, stage)
        begin = model.graph.state_dict()
        model.graph.load_state_dict(begin)
        model.run(STEPS[0], 0)
        if current_world().rank == 1:
            model.graph.load_state_dict(begin)
        try:
            model.run(STEPS[0], 0)
        except hetu.HetuError as error:
            return str(error)
        return ""


def asks_alone(stage: int) -> None:
    """Rank 0 asks for a state that lies on others, too."""
    case = Case()
    with cut_finely(case):
        model = Model(case, stage)
        model.run(STEPS[0], 0)
        if current_world().rank == 0:
            model.graph.state_dict()


def joins_late(stage: int) -> list[str]:
    """A process trains by itself, then with others; then it goes on from its state."""
    case, said = Case(pipelines=(2,)), list[str]()
    with cut_finely(case):
        model = Model(case, stage)
        model.run(Step(0), 0)
        state = model.graph.state_dict()
        hetu.init_distributed("gloo", timeout=30.0)
        for _ in range(2):
            try:
                model.run(Step(0), 1)
                said.append("")
            except hetu.HetuError as error:
                said.append(str(error))
            model.graph.load_state_dict(state)
        model.run(Step(0), 1)
        hetu.shutdown_distributed()
        try:
            model.run(Step(0), 2)
        except hetu.HetuError as error:
            said.append(str(error))
    return said
