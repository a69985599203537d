"""A run is done whole or not at all, whatever raises in it and whenever."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from support.devices import DEVICES
from support.states import Trained, is_same
from torch.optim import lr_scheduler

import hetu

OPTIMIZERS = {
    "SGD": functools.partial(hetu.optim.SGD, momentum=0.9),
    "Adam": functools.partial(hetu.optim.Adam, amsgrad=True, max_grad_norm=1.0),
    "AdamW": functools.partial(hetu.optim.AdamW, lr=torch.tensor(0.01)),
}


class Schedule:
    """A user's own: it keeps numbers and a list, and raises after it has changed everything."""

    raises = False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.count, self.past = optimizer, 0, [0.0]

    def step(self) -> None:
        self.count += 1
        self.past.append(self.count)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * 0.5
        if Schedule.raises:
            raise LookupError("no such step")

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "past": self.past}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.past = state["count"], state["past"]


class Rule:
    """A function of the step that counts its calls."""

    raises = False

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, epoch: int) -> float:
        self.calls.append(epoch)
        if Rule.raises:
            raise ArithmeticError("no rate")
        return 0.5


SCHEDULES: dict[str, Callable[[Any], Any] | None] = {
    "none": None,
    "torch's": functools.partial(lr_scheduler.CosineAnnealingLR, T_max=7),
    "a rule": lambda optimizer: lr_scheduler.LambdaLR(optimizer, Rule()),
    "several": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, cycle_momentum=False), lr_scheduler.StepLR(optimizer, 1)],
        [2],
    ),
    "the user's": Schedule,
}


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Any:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


class Steps:
    """Torch's own steps of an optimiser, which fail if they are asked to: a schedule keeps the one that it found."""

    fails: str | None = None

    def __init__(self, kind: str) -> None:
        self.cls = getattr(torch.optim, kind)

    def __enter__(self) -> None:
        self.step = step = self.cls.step

        def maybe_fail(optimizer: Any, *args: Any) -> None:
            if Steps.fails is None:
                return step(optimizer, *args)
            groups = optimizer.param_groups
            if Steps.fails == "half-way":
                optimizer.param_groups = groups[:1]
            step(optimizer, *args)
            optimizer.param_groups = groups
            raise RuntimeError("out of luck")

        self.cls.step = maybe_fail

    def __exit__(self, *_: object) -> None:
        self.cls.step = self.step


FAILURES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "the optimiser half-way": lambda: attribute(Steps, "fails", "half-way"),
    "the optimiser at its end": lambda: attribute(Steps, "fails", "at its end"),
    "the user's": lambda: attribute(Schedule, "raises", True),
    "a rule": lambda: attribute(Rule, "raises", True),
}


def made(kind: str, schedule: str) -> Trained:
    groups = lambda p: [{"params": [p["a"]]}, {"params": [p["b"]], "lr": 0.3}]  # noqa: E731
    return Trained(OPTIMIZERS[kind](schedule=SCHEDULES[schedule]), groups=groups)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_fails_changes_nothing_and_the_next_run_is_as_without_it(kind: str, schedule: str, steps: int) -> None:
    for name, failure in FAILURES.items():
        if name in SCHEDULES and name != schedule:
            continue
        with Steps(kind):
            spoilt, sound = made(kind, schedule), made(kind, schedule)
            for model in (spoilt, sound):
                hetu.manual_seed(0)
                for _ in range(steps):
                    model.step()
                model.step(run_level="grad")
            before = spoilt.state()
            with failure(), pytest.raises(hetu.HetuError) as caught:
                spoilt.step()
            assert caught.value.where is not None and caught.value.__cause__ is not None
            assert is_same(before, spoilt.state()), name
            ends = []
            for model in (spoilt, sound):
                hetu.manual_seed(2)
                ends.append(([model.step(), model.step()], model.state()))
            assert is_same(*ends), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_whatever_torch_computes_it_with(kind: str, options: dict[str, Any], device: str) -> None:
    lr = {"lr": 0.01}  # no tensor: torch refuses one with foreach
    model = Trained(OPTIMIZERS[kind](**lr, **options, schedule=Schedule), device=device)
    model.step()
    before = model.state()
    with attribute(Schedule, "raises", True), pytest.raises(hetu.HetuError):
        model.step()
    assert is_same(before, model.state())
    model.step()
    model.graph.load_state_dict(before)
    assert is_same(before, model.state())


def test_of_two_updates_neither_stays() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        a, b = (hetu.parameter(1.0, [2], name=name) for name in "ab")
        loss = hetu.sum(a * b * b)
        first = hetu.optim.Adam(lr=0.1).minimize(loss, [a, b])
        second = hetu.optim.SGD(lr=0.1, momentum=0.9, schedule=Schedule).minimize(loss, [b, a])
    g.run([first, second])
    g.run([first, second], run_level="grad")
    before = g.state_dict()
    with attribute(Schedule, "raises", True), pytest.raises(hetu.HetuError):
        g.run([first, second])
    assert is_same(before, g.state_dict())


def test_a_first_run_that_fails_leaves_nothing_to_remember() -> None:
    """Neither values that were drawn with another seed, nor an optimiser."""
    drawn = functools.partial(torch.nn.init.normal_, std=1.0)

    def build() -> tuple[Any, Any, Any]:
        with hetu.graph("define_and_run", device="cpu") as g:
            w = hetu.parameter(drawn, [3], name="w")
            return g, w, hetu.optim.AdamW(schedule=Schedule).minimize(hetu.sum(w * w))

    g, w, train = build()
    hetu.manual_seed(1)
    with attribute(Schedule, "raises", True), pytest.raises(hetu.HetuError):
        g.run(train)
    hetu.manual_seed(2)
    other, v, _ = build()
    assert g.run(w).tolist() == other.run(v).tolist()
    assert g.state_dict()["optimizers"] == {}


def test_the_generator_goes_back() -> None:
    model = Trained(hetu.optim.SGD(schedule=Schedule))
    for options in ({}, {"num_micro_batches": 3}):
        before = model.state()["rng"]
        with attribute(Schedule, "raises", True), pytest.raises(hetu.HetuError):
            model.step(**options)
        assert model.state()["rng"] == before


def test_an_interrupt_at_any_moment_leaves_the_state_before_or_after() -> None:
    model = Trained(hetu.optim.Adam(lr=0.1, schedule=functools.partial(lr_scheduler.StepLR, step_size=1)))
    model.step()
    before = model.state()
    model.step()
    after = model.state()
    model.graph.load_state_dict(before)

    def interrupted(number: int) -> bool:
        """Interrupts a step at some line; tells whether it came to that."""
        lines = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal lines
            if not any(part in frame.f_code.co_filename for part in ("hetu/runtime", "torch/optim/", "eval_with_key")):
                return None
            if event == "line":
                lines += 1
                if lines == number:
                    raise KeyboardInterrupt
            return trace

        kept = sys.gettrace()
        sys.settrace(trace)
        try:
            model.step()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(kept)
            torch.set_grad_enabled(True)  # torch's optimisers turn it off and on again by lines of their own
        return False

    number, seen = 1, 0
    while interrupted(number):
        state = model.state()
        assert is_same(state, before) or is_same(state, after), number
        model.graph.load_state_dict(before)
        number, seen = number + 11, seen + 1
    assert seen > 30


def test_gradients_of_several_threads_are_all_there() -> None:
    model = Trained(hetu.optim.SGD())
    model.values()

    def work() -> None:
        for _ in range(20):
            model.step(run_level="grad")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.state()["gradients"]["train"]["b"].tolist() == [80.0, 160.0]


def test_memory_that_runs_out_stays_torchs_error() -> None:
    def fail(_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    model = Trained(hetu.optim.SGD())
    model.step()
    before = model.state()
    with attribute(torch.optim.SGD, "step", fail), pytest.raises(torch.OutOfMemoryError):
        model.step()
    assert is_same(before, model.state())
